"""The gradient of an optimizer step is one thing, however the step is cut into batches and processes."""

import pytest

from tests.distillation import tiny
from tests.distillation.tiny import (
    ALL_TASKS,
    TASKS,
    make_trainer,
    relative_difference,
    step_gradients,
    tiny_model,
    tiny_rows,
)

TOLERANCE = 1e-5


@pytest.mark.parametrize("task", ALL_TASKS)
def test_accumulation_changes_no_gradient(task, tmp_path):
    whole = step_gradients(task, tmp_path, batch_size=8, accumulation=1)
    for batch_size, accumulation in ((1, 8), (2, 4), (4, 2)):
        parts = step_gradients(task, tmp_path, batch_size=batch_size, accumulation=accumulation)
        assert relative_difference(whole, parts) <= TOLERANCE


@pytest.mark.parametrize(("task", "side"), [*((task, "right") for task in ALL_TASKS), ("causal-lm", "left")])
def test_padding_changes_no_gradient(task, side, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "PADDING_SIDE", side)
    short = step_gradients(task, tmp_path, batch_size=8, accumulation=1)
    monkeypatch.setattr(tiny, "MINIMAL_LENGTH", 20)
    long = step_gradients(task, tmp_path, batch_size=8, accumulation=1)
    assert relative_difference(short, long) <= TOLERANCE


@pytest.mark.parametrize("task", TASKS)
def test_without_a_teacher_it_is_the_gradient_of_the_models_own_loss(task, tmp_path):
    # Rows of one length: with padding, Transformers' question answering loss counts padded positions as answers.
    rows = [row for row in tiny_rows(task) if len(row["input_ids"]) == 12]
    student = tiny_model(task, layers=1, seed=1)
    batch = tiny.PadCollator()(rows)
    student(**batch).loss.backward()
    expected = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    recorder = tiny.GradientRecorder()
    make_trainer(task, tmp_path, student=student, rows=rows, callbacks=[recorder], alpha=0.0).train()
    assert relative_difference(expected, recorder.gradients) <= TOLERANCE


@pytest.mark.parametrize("task", ALL_TASKS)
def test_equal_models_teach_each_other_nothing(task, tmp_path):
    student, teacher = tiny_model(task, seed=3), tiny_model(task, seed=3)
    recorder = tiny.GradientRecorder()
    trainer = make_trainer(task, tmp_path, teacher=teacher, student=student, callbacks=[recorder], alpha=1.0)
    trainer.train()
    assert abs(trainer.state.log_history[0]["kd_loss"]) <= 1e-6
    assert max(gradient.abs().max() for gradient in recorder.gradients.values()) <= 1e-6
