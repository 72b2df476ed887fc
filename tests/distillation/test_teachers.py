"""Several teachers, missing labels, other vocabularies, and teachers that are not worth learning from."""

import logging
import math

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast, ViTConfig, ViTForImageClassification

from hf_compress import DistillationArguments, DistillationTrainer, StageConfig, TermConfig
from hf_compress.distillation import losses
from hf_compress.distillation.mixture import confidence_weights, mix_logits
from tests.distillation import tiny
from tests.distillation.tiny import GradientRecorder, make_trainer, relative_difference, tiny_model, tiny_rows


def first_log(trainer) -> dict:
    trainer.train()
    return trainer.state.log_history[0]


def test_the_mixture_is_the_mean_of_the_softened_distributions():
    torch.manual_seed(0)
    logits = 3 * torch.randn(3, 6, 5)
    weights = torch.tensor([0.5, 0.3, 0.2])
    mixed = mix_logits("single_label_classification", logits, weights, temperature=2.0)
    expected = (weights[:, None, None] * (logits / 2).softmax(-1)).sum(0)
    torch.testing.assert_close((mixed / 2).softmax(-1), expected)
    mixed = mix_logits("multi_label_classification", logits, weights, temperature=2.0)
    torch.testing.assert_close((mixed / 2).sigmoid(), (weights[:, None, None] * (logits / 2).sigmoid()).sum(0))
    sure = torch.tensor([[[-120.0, 3.0]], [[-110.0, 2.0]]])
    mixed = mix_logits("multi_label_classification", sure, torch.tensor([0.5, 0.5]))
    # log(e^-120 / 2 + e^-110 / 2), where e^-120 is 0 in float32.
    expected = torch.logsumexp(sure[:, 0, 0].double() - math.log(2), 0)
    assert mixed[0, 0].item() == pytest.approx(expected.item())
    assert losses.bernoulli_kl_divergence(torch.zeros(1, 2), mixed).isfinite().all()
    mixed = mix_logits("regression", logits, weights)
    torch.testing.assert_close(mixed, (weights[:, None, None] * logits).sum(0))


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification", "regression"])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_equal_teachers_mix_to_one_of_them(problem, temperature):
    torch.manual_seed(0)
    one = 3 * torch.randn(6, 5)
    weights = torch.tensor([0.25, 0.75])
    mixed = mix_logits(problem, torch.stack([one, one]), weights, temperature)
    if problem == "single_label_classification":
        mixed, one = mixed.log_softmax(-1), one.log_softmax(-1)
        mixed, one = (x - x.mean(-1, keepdim=True) for x in (mixed, one))
    torch.testing.assert_close(mixed, one, rtol=1e-4, atol=1e-4)


def test_forbidden_classes_take_no_mass_in_a_mixture():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4)
    allowed = torch.tensor([True, False, True, True]).expand(3, 4)
    weights = torch.tensor([0.5, 0.5])
    mixed = mix_logits("single_label_classification", logits, weights, 2.0, allowed)
    without = mix_logits("single_label_classification", logits[..., [0, 2, 3]], weights, 2.0)
    torch.testing.assert_close(mixed[:, [0, 2, 3]], without)
    assert losses.kl_divergence(mixed, mixed, 2.0, allowed).abs().max() == 0


def test_confidence_prefers_the_teacher_that_is_right():
    right, wrong = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    logits = torch.stack([right, wrong])
    weights = confidence_weights("single_label_classification", logits, torch.tensor([0]))
    assert weights[0] > 0.9
    torch.testing.assert_close(weights.sum(0), torch.ones(1))
    loss = torch.stack([losses.cross_entropy(one, torch.tensor([0])) for one in logits])
    torch.testing.assert_close(weights, 1 - loss.exp() / loss.exp().sum(0))
    sure, unsure = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.1, 0.0]])
    without = confidence_weights("single_label_classification", torch.stack([sure, unsure]), None)
    assert without[0] > without[1]


def test_items_without_a_label_are_weighed_by_entropy():
    logits = 3 * torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([True, False, True, False])
    labels = torch.tensor([[1.0, 0.0, 1.0]] * 4) * mask[:, None]
    labelled, unlabelled, mixed = (
        confidence_weights("multi_label_classification", logits, given, None, which)
        for given, which in ((labels, None), (None, None), (labels, mask))
    )
    torch.testing.assert_close(mixed, labelled.where(mask, unlabelled))
    numbers = confidence_weights("regression", logits[..., :1], labels[:, :1], None, mask)
    torch.testing.assert_close(numbers[:, ~mask], torch.full((2, 2), 0.5))


def test_embeddings_of_several_widths_are_not_mixed(tmp_path):
    teachers = [tiny_model("embeddings", 2, seed=2), tiny_model("embeddings", 2, seed=3, hidden_size=32)]
    for order in (teachers, teachers[::-1]):
        with pytest.raises(ValueError, match="(16, 32|32, 16) channels, which cannot be mixed"):
            make_trainer("embeddings", tmp_path, order)


@pytest.mark.parametrize("task", tiny.ALL_TASKS)
def test_two_equal_teachers_are_as_one(task, tmp_path):
    one = first_log(make_trainer(task, tmp_path))
    twins = [tiny_model(task, 2, seed=2) for _ in range(2)]
    two = first_log(make_trainer(task, tmp_path, twins))
    assert two["kd_loss"] == pytest.approx(one["kd_loss"], rel=1e-4)


@pytest.mark.parametrize("mixture", ["mean", "weighted", "confidence"])
def test_mixtures_do_not_depend_on_accumulation(mixture, tmp_path):
    def gradients(batch_size, accumulation):
        recorder = GradientRecorder()
        teachers = [tiny_model("single-label", 2, seed=seed) for seed in (2, 3)]
        make_trainer(
            "single-label", tmp_path, teachers, callbacks=[recorder], teacher_mixture=mixture,
            teacher_weights=[2.0, 1.0] if mixture == "weighted" else None, per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
        ).train()  # fmt: skip
        return recorder.gradients

    assert relative_difference(gradients(8, 1), gradients(2, 4)) <= 1e-5


def test_a_weight_of_almost_all_is_that_teacher_alone(tmp_path):
    teachers = [tiny_model("single-label", 2, seed=seed) for seed in (2, 3)]
    alone = first_log(make_trainer("single-label", tmp_path, tiny_model("single-label", 2, seed=2)))
    heavy = first_log(make_trainer(
        "single-label", tmp_path, teachers, teacher_mixture="weighted", teacher_weights=[1e6, 1e-6]
    ))  # fmt: skip
    assert heavy["kd_loss"] == pytest.approx(alone["kd_loss"], rel=1e-4)


def test_mixtures_that_do_not_fit_raise(tmp_path):
    teachers = [tiny_model("single-label", 2, seed=seed) for seed in (2, 3)]
    with pytest.raises(ValueError, match=r"teacher_weights=\[1.0\] are for 1 teachers, but there are 2"):
        make_trainer("single-label", tmp_path, teachers, teacher_mixture="weighted", teacher_weights=[1.0])
    with pytest.raises(ValueError, match="does not go with teacher_mixture='mean'"):
        make_trainer("single-label", tmp_path, teachers, teacher_weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="give two or more"):
        make_trainer("single-label", tmp_path, teacher_mixture="confidence")
    with pytest.raises(TypeError, match="is no model"):
        make_trainer("single-label", tmp_path, [])


@pytest.mark.parametrize(("task", "missing"), [("single-label", -100), ("multi-label", [float("nan")] * 3),
                                               ("regression", float("nan"))])  # fmt: skip
def test_rows_without_a_label_learn_from_the_teacher_alone(task, missing, tmp_path):
    rows = tiny_rows(task)
    half = [row if n < 4 else {**row, "labels": missing} for n, row in enumerate(rows)]
    log = first_log(make_trainer(task, tmp_path, rows=half))
    assert log["kd_loss"] == pytest.approx(first_log(make_trainer(task, tmp_path))["kd_loss"], rel=1e-5)
    labelled = first_log(make_trainer(task, tmp_path, rows=rows[:4]))
    assert log["task_loss"] == pytest.approx(labelled["task_loss"], rel=1e-5)

    def gradients(batch_size, accumulation):
        recorder = GradientRecorder()
        make_trainer(
            task, tmp_path, rows=half, callbacks=[recorder], per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
        ).train()  # fmt: skip
        assert all(gradient.isfinite().all() for gradient in recorder.gradients.values())
        return recorder.gradients

    assert relative_difference(gradients(8, 1), gradients(2, 4)) <= 1e-5


def tokenizer_of(n_tokens: int) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    words = {f"w{n}": n for n in range(n_tokens)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "w0")), pad_token="w0")


@pytest.mark.parametrize("task", ["masked-lm", "causal-lm", "single-label"])
def test_padding_of_the_vocabulary_is_cut_off(task, tmp_path):
    def trainer(teacher_tokenizer=None) -> DistillationTrainer:
        args = DistillationArguments(str(tmp_path), report_to="none", use_cpu=True, max_steps=1, logging_steps=1,
                                     save_strategy="no", disable_tqdm=True, alpha=1.0)  # fmt: skip
        return DistillationTrainer(
            tiny_model(task, 1, seed=1), args, teacher=padded, train_dataset=Dataset.from_list(tiny_rows(task)),
            data_collator=tiny.PadCollator(), processing_class=tokenizer_of(45),
            teacher_processing_class=teacher_tokenizer,
        )  # fmt: skip

    padded, plain = (tiny_model(task, 2, seed=2, vocab_size=size) for size in (56, 50))
    with torch.no_grad():
        for name, value in plain.state_dict().items():
            value.copy_(padded.state_dict()[name][tuple(slice(size) for size in value.shape)])
    log = first_log(trainer(tokenizer_of(45)))
    expected = first_log(make_trainer(task, tmp_path, plain, tiny_model(task, 1, seed=1), alpha=1.0))
    assert log["kd_loss"] == pytest.approx(expected["kd_loss"], rel=1e-5)
    with pytest.raises(ValueError, match="has 56 tokens, the student 50, so they may not read the same input_ids"):
        trainer()
    with pytest.raises(ValueError, match="their tokenizers differ"):
        trainer(tokenizer_of(44))


def test_a_teacher_worse_than_the_majority_is_warned_of(tmp_path, caplog):
    rows = [{**row, "labels": 2 if n else 1} for n, row in enumerate(tiny_rows("single-label"))]
    teacher = tiny_model("single-label", 2, seed=2)
    with torch.no_grad():
        teacher.classifier.bias += torch.tensor([100.0, 0.0, 0.0])
    with caplog.at_level(logging.WARNING, "hf_compress"):
        trainer = make_trainer("single-label", tmp_path, teacher, rows=rows, teacher_check_rows=8)
        trainer.train()
    assert "right on 0.0 % of 8 labels, and the most frequent class alone would be on 87.5 %" in caplog.text
    caplog.clear()
    with torch.no_grad():
        teacher.classifier.bias += torch.tensor([-100.0, 0.0, 100.0])
    with caplog.at_level(logging.WARNING, "hf_compress"):
        make_trainer("single-label", tmp_path, teacher, rows=rows, teacher_check_rows=8).train()
    assert "most frequent class" not in caplog.text


def test_the_check_of_the_teacher_changes_no_training(tmp_path):
    logs = [
        first_log(make_trainer("single-label", tmp_path, teacher_check_rows=rows, train_sampling_strategy="random",
                               per_device_train_batch_size=2))
        for rows in (0, 8)
    ]  # fmt: skip
    assert logs[0]["loss"] == logs[1]["loss"]


@pytest.mark.parametrize("rows", [0, 8])
def test_a_teacher_that_gives_nan_raises(rows, tmp_path):
    teacher = tiny_model("single-label", 2, seed=2)
    with torch.no_grad():
        teacher.classifier.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        make_trainer("single-label", tmp_path, teacher, teacher_check_rows=rows).train()


def test_steps_with_nothing_to_learn_are_warned_of(tmp_path, caplog):
    rows = [{**row, "labels": [-100] * len(row["labels"])} for row in tiny_rows("masked-lm")]
    with caplog.at_level(logging.WARNING, "hf_compress"):
        log = first_log(make_trainer("masked-lm", tmp_path, rows=rows, max_steps=2, logging_steps=2))
    assert log["loss"] == 0
    assert "2 of the last 2 optimizer steps had nothing to learn from" in caplog.text
    with pytest.raises(ValueError, match="0 rows"):
        make_trainer("single-label", tmp_path, rows=[])


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon", "cross_entropy", "mse"])
@pytest.mark.parametrize("task", ["single-label", "multi-label", "question-answering", "causal-lm"])
def test_every_divergence_is_exact(divergence, task, tmp_path):
    def gradients(batch_size, accumulation, **models):
        recorder = GradientRecorder()
        make_trainer(
            task, tmp_path, callbacks=[recorder], divergence=divergence, alpha=1.0,
            per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation, **models,
        ).train()  # fmt: skip
        return recorder.gradients

    assert relative_difference(gradients(8, 1), gradients(2, 4)) <= 1e-5
    twins = {"student": tiny_model(task, seed=3), "teacher": tiny_model(task, seed=3)}
    assert max(value.abs().max() for value in gradients(8, 1, **twins).values()) <= 1e-5


def test_divergences_that_do_not_fit_raise(tmp_path):
    with pytest.raises(ValueError, match="divergence='cosine' does not fit this model"):
        make_trainer("single-label", tmp_path, divergence="cosine").train()
    with pytest.raises(ValueError, match="divergence='forward_kl' does not fit this model .regression"):
        make_trainer("regression", tmp_path, divergence="forward_kl").train()
    with pytest.raises(ValueError, match="divergence='kl' is unknown"):
        make_trainer("single-label", tmp_path, divergence="kl")


def test_embeddings_of_other_widths_are_projected(tmp_path):
    teacher = tiny_model("embeddings", 2, seed=2, hidden_size=24, num_attention_heads=4)
    for divergence in ("cosine", "mse"):
        settings = {"max_steps": 30, "learning_rate": 1e-2, "logging_steps": 10}
        trainer = make_trainer("embeddings", tmp_path, teacher, divergence=divergence, **settings)
        trainer.train()
        logs = [log["kd_loss"] for log in trainer.state.log_history if "kd_loss" in log]
        assert logs[-1] < logs[0]
        assert list(trainer.projections) == ["output"]
    prediction = trainer.predict(trainer.eval_dataset)
    assert prediction.predictions.shape == (8, 16)


def test_subclasses_and_images_are_known(tmp_path):
    class OwnBert(type(tiny_model("single-label"))):
        pass

    student = OwnBert(tiny_model("single-label").config)
    assert first_log(make_trainer("single-label", tmp_path, student=student))["loss"] > 0
    config = ViTConfig(
        hidden_size=16, num_attention_heads=2, intermediate_size=24, num_hidden_layers=1, image_size=8, patch_size=4,
        num_labels=3,
    )  # fmt: skip
    rows = [{"pixel_values": torch.randn(3, 8, 8).tolist(), "labels": n % 3} for n in range(8)]
    models = [ViTForImageClassification(config) for _ in range(2)]
    assert first_log(make_trainer("image", tmp_path, *models, rows=rows))["kd_loss"] > 0


@pytest.mark.parametrize("task", tiny.ALL_TASKS)
def test_teachers_of_every_task_are_looked_at(task, tmp_path):
    first = first_log(make_trainer(task, tmp_path, teacher_check_rows=8))
    assert first["kd_loss"] == first_log(make_trainer(task, tmp_path))["kd_loss"]


def test_squared_errors_of_several_teachers_are_of_their_mean_logits(tmp_path):
    twins = [tiny_model("single-label", 2, seed=2) for _ in range(2)]
    one = first_log(make_trainer("single-label", tmp_path, divergence="mse"))
    assert first_log(make_trainer("single-label", tmp_path, twins, divergence="mse"))["kd_loss"] == pytest.approx(
        one["kd_loss"], rel=1e-5
    )


def test_what_a_later_stage_cannot_do_is_known_at_once(tmp_path):
    stages = [StageConfig(steps=1), StageConfig(divergence="cosine")]
    with pytest.raises(ValueError, match="divergence='cosine' does not fit"):
        make_trainer("token-classification", tmp_path, stages=stages, max_steps=2)


def test_a_step_in_which_nothing_counts_changes_nothing(tmp_path):
    fading = TermConfig("hidden_mse", weight=1.0, end_weight=0.0, schedule="linear")
    trainer = make_trainer(
        "single-label", tmp_path, stages=[StageConfig(alpha=0.0, task_weight=0.0, terms=[fading])], max_steps=3,
        log_gradient_shares=True,
    )  # fmt: skip
    trainer.train()
    assert [log["loss"] > 0 for log in trainer.state.log_history[:3]] == [True, True, False]
