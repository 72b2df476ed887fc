import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_compress import DistillationArguments, DistillationTrainer
from hf_compress.distillation import losses
from hf_compress.distillation.teachers import Teacher
from hf_compress.distillation.term_log import TermLog
from tests.distillation import tiny
from tests.distillation.tiny import NO_DROPOUT, TASKS, make_trainer, tiny_model, tiny_rows


def train_log(trainer) -> dict:
    trainer.train()
    return trainer.state.log_history[0]


def test_the_loss_is_hintons(tmp_path):
    student, teacher = tiny_model("single-label", 1, seed=1), tiny_model("single-label", 2, seed=2).eval()
    batch = tiny.PadCollator()(tiny_rows("single-label"))
    with torch.no_grad():
        s, t = student(**batch), teacher(**batch)
    kd = 9 * torch.nn.functional.kl_div(
        (s.logits / 3).log_softmax(-1), (t.logits / 3).softmax(-1), reduction="batchmean"
    )
    log = train_log(make_trainer("single-label", tmp_path, teacher, student, temperature=3.0, alpha=0.25))
    assert log["kd_loss"] == pytest.approx(kd.item(), rel=1e-5)
    assert log["task_loss"] == pytest.approx(s.loss.item(), rel=1e-5)
    assert log["loss"] == pytest.approx(0.25 * kd.item() + 0.75 * s.loss.item(), rel=1e-4)


@pytest.mark.parametrize("task", TASKS)
def test_terms_are_logged_as_means_over_steps(task, tmp_path):
    settings = {"max_steps": 4, "learning_rate": 1e-3, "per_device_train_batch_size": 2, "alpha": 0.7}
    every = make_trainer(task, tmp_path, logging_steps=1, gradient_accumulation_steps=2, **settings)
    once = make_trainer(task, tmp_path, logging_steps=4, gradient_accumulation_steps=2, **settings)
    every.train(), once.train()
    steps = every.state.log_history[:4]
    for name in ("kd_loss", "task_loss"):
        assert once.state.log_history[0][name] == pytest.approx(np.mean([log[name] for log in steps]), rel=1e-5)
    for log in steps:
        assert log["loss"] == pytest.approx(0.7 * log["kd_loss"] + 0.3 * log["task_loss"], rel=1e-4, abs=1e-5)


def test_steps_without_logging_never_wait_for_the_device(tmp_path, monkeypatch):
    trainer = make_trainer("token-classification", tmp_path, max_steps=3, logging_steps=10)
    inside, waits = [], []
    for name in ("item", "tolist", "__bool__", "nonzero", "cpu", "__float__", "__int__"):
        original = getattr(torch.Tensor, name)

        def watched(self, *args, _original=original, _name=name, **kwargs):
            if inside:
                waits.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, watched)
    terms = DistillationTrainer.compute_terms

    def compute_terms(self, *args, **kwargs):
        inside.append(True)
        try:
            return terms(self, *args, **kwargs)
        finally:
            inside.pop()

    monkeypatch.setattr(DistillationTrainer, "compute_terms", compute_terms)
    note = TermLog.add

    def watched_note(self, *args):
        inside.append(True)
        note(self, *args)
        inside.pop()

    monkeypatch.setattr(TermLog, "add", watched_note)
    # The teacher's and the student's own code is not ours to watch.
    ask = Teacher.ask

    def unwatched(self, *args):
        inside.clear()
        outputs = ask(self, *args)
        inside.append(True)
        return outputs

    monkeypatch.setattr(Teacher, "ask", unwatched)
    trainer.train()
    assert waits == []


def test_the_teacher_stays_as_it_was(tmp_path):
    teacher = tiny_model("single-label", hidden_dropout_prob=0.5)
    weights = copy.deepcopy(teacher.state_dict())
    trainer = make_trainer("single-label", tmp_path, teacher, max_steps=3, save_strategy="steps", save_steps=3)
    teacher.train()
    batch = tiny.PadCollator()(tiny_rows("single-label"))
    first, second = (trainer.teachers[0].ask(batch, nullcontext())["logits"] for _ in range(2))
    assert torch.equal(first, second)
    assert not first.requires_grad
    trainer.train()
    assert not any(module.training for module in teacher.modules())
    assert all(torch.equal(value, weights[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimized.isdisjoint(id(p) for p in teacher.parameters())
    assert all(model is not teacher for model in trainer.accelerator._models)
    saved = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert saved.keys() == trainer.model.state_dict().keys()


def test_evaluation_does_not_run_the_teacher(tmp_path, monkeypatch):
    trainer = make_trainer("single-label", tmp_path)
    monkeypatch.setattr(trainer.teachers[0].model, "forward", lambda **_: pytest.fail("the teacher ran"))
    assert "eval_loss" in trainer.evaluate()


# Transformers' label smoothing knows neither yes/no labels nor numbers nor answer positions.
@pytest.mark.parametrize(
    ("task", "smoothing"), [*((task, 0.0) for task in TASKS), ("single-label", 0.1), ("token-classification", 0.1)]
)
def test_evaluation_is_that_of_trainer(task, smoothing, tmp_path):
    def keep(prediction):
        arrays = prediction.predictions if isinstance(prediction.predictions, tuple) else (prediction.predictions,)
        return {f"sum_{i}": float(np.abs(array).sum()) for i, array in enumerate(arrays)}

    settings = {"label_smoothing_factor": smoothing, "per_device_eval_batch_size": 3}
    ours = make_trainer(task, tmp_path, **settings)
    stock = Trainer(
        ours.model,
        TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True, **settings),
        eval_dataset=ours.eval_dataset,
        data_collator=tiny.PadCollator(),
        compute_metrics=keep,
    )
    ours.compute_metrics = keep
    found, expected = ours.evaluate(), stock.evaluate()
    for name in expected:
        if name == "eval_loss" or name.startswith("eval_sum"):
            assert found[name] == pytest.approx(expected[name], rel=1e-6)


def permuted(model, order: list[int]):
    """The same classifier with its labels in another order."""
    copied = copy.deepcopy(model)
    names = dict(model.config.id2label)
    copied.config.id2label = {new: names[old] for new, old in enumerate(order)}
    copied.config.label2id = {names[old]: new for new, old in enumerate(order)}
    copied.classifier.weight.data = model.classifier.weight.data[order]
    copied.classifier.bias.data = model.classifier.bias.data[order]
    return copied


@pytest.mark.parametrize("task", ["single-label", "multi-label", "token-classification"])
def test_labels_are_matched_by_name(task, tmp_path):
    student = tiny_model(task, num_labels=5, id2label=dict(enumerate("abcde")))
    teacher = permuted(student, [2, 0, 1, 4, 3])
    rows = [{**row, "labels": row["labels"] + [1.0, 0.0]} if task == "multi-label" else row for row in tiny_rows(task)]
    log = train_log(make_trainer(task, tmp_path, teacher, student, rows, alpha=1.0))
    assert abs(log["kd_loss"]) <= 1e-6


def test_other_labels_raise(tmp_path):
    teacher = tiny_model("single-label", id2label={0: "a", 1: "b", 2: "d"})
    student = tiny_model("single-label", id2label={0: "a", 1: "b", 2: "c"})
    with pytest.raises(ValueError, match="teacher has .*'d'.*student .*'c'"):
        make_trainer("single-label", tmp_path, teacher, student)


def test_the_teacher_gets_the_columns_it_needs(tmp_path):
    set_seed(0)
    config = DistilBertConfig(
        dim=16, n_heads=2, hidden_dim=24, n_layers=1, vocab_size=tiny.VOCABULARY, max_position_embeddings=32,
        num_labels=3, dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0,
    )  # fmt: skip
    student, teacher = DistilBertForSequenceClassification(config), tiny_model("single-label").eval()
    rows = [{**row, "token_type_ids": [1] * len(row["input_ids"])} for row in tiny_rows("single-label")]
    batch = tiny.PadCollator()(rows)
    with torch.no_grad():
        logits = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        expected = losses.kl_divergence(logits, teacher(**batch).logits, 2.0).mean()
    trainer = make_trainer("single-label", tmp_path, teacher, student, rows, alpha=1.0)
    assert train_log(trainer)["kd_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert np.isfinite(trainer.evaluate()["eval_loss"])
    without_labels = trainer.eval_dataset.remove_columns("labels")
    assert trainer.predict(without_labels).predictions.shape == (8, 3)


@pytest.mark.parametrize("task", TASKS)
def test_learns_from_the_teacher_alone(task, tmp_path):
    rows = [{k: v for k, v in row.items() if k in ("input_ids", "attention_mask")} for row in tiny_rows(task)]
    if task == "seq2seq":
        # Something to decode it needs, though it may be what the teacher wrote.
        rows = [{**row, "decoder_input_ids": own["labels"]} for row, own in zip(rows, tiny_rows(task), strict=True)]
    log = train_log(make_trainer(task, tmp_path, rows=rows, alpha=1.0))
    assert log["kd_loss"] > 0
    assert "task_loss" not in log
    with pytest.raises(ValueError, match="no labels, only .*'input_ids'.*alpha=1"):
        make_trainer(task, tmp_path, rows=rows, alpha=0.5).train()


def test_label_smoothing_is_in_the_hard_term_only(tmp_path):
    sharp = train_log(make_trainer("single-label", tmp_path))
    smooth = train_log(make_trainer("single-label", tmp_path, label_smoothing_factor=0.2))
    assert smooth["kd_loss"] == sharp["kd_loss"]
    assert smooth["task_loss"] != sharp["task_loss"]


def test_compute_loss_func_takes_the_place_of_the_task_loss(tmp_path):
    trainer = make_trainer("single-label", tmp_path, alpha=0.5)
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch: outputs["logits"].sum() * 0 + 3.0
    log = train_log(trainer)
    assert log["task_loss"] == 3.0
    assert log["loss"] == pytest.approx(1.5 + 0.5 * log["kd_loss"], rel=1e-4)


def test_a_resumed_training_ends_where_an_unbroken_one_does(tmp_path):
    def trained(folder, resume=None, **settings):
        student = tiny_model("single-label", 1, seed=1, **dict.fromkeys(NO_DROPOUT, 0.1))
        trainer = make_trainer(
            "single-label", folder, student=student, max_steps=6, learning_rate=1e-2, per_device_train_batch_size=2,
            train_sampling_strategy="random", save_strategy="steps", save_steps=3, **settings,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    unbroken = trained(tmp_path)
    resumed = trained(tmp_path / "other", resume=str(tmp_path / "checkpoint-3"))
    for name, value in unbroken.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name])
    assert resumed.state.log_history[-2]["kd_loss"] == unbroken.state.log_history[-2]["kd_loss"]


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    trainer = make_trainer(
        "single-label", tmp_path, max_steps=4, learning_rate=0.5, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, load_best_model_at_end=True,
    )  # fmt: skip
    trainer.train()
    losses_seen = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses_seen), rel=1e-6)
    assert min(losses_seen) < max(losses_seen)


def test_bf16_autocast_is_close_to_fp32(tmp_path):
    full, half = (train_log(make_trainer("single-label", tmp_path, bf16=bf16)) for bf16 in (False, True))
    for name in ("kd_loss", "task_loss"):
        assert half[name] == pytest.approx(full[name], rel=0.05)
        assert half[name] != full[name]


def test_arguments_are_parsed_like_training_arguments(tmp_path):
    parser = HfArgumentParser(DistillationArguments)
    (args,) = parser.parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--alpha", "0.3", "--temperature", "4", "--learning_rate", "1e-3"]
    )
    assert (args.alpha, args.temperature, args.learning_rate) == (0.3, 4.0, 1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 1.5}, r"alpha=1.5 must lie in \[0, 1\]"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"temperature": -1.0}, "temperature=-1.0 must be above 0"),
        ({"temperature": float("inf")}, "temperature=inf must be above 0 and finite"),
    ],
)
def test_impossible_arguments_raise(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        DistillationArguments(output_dir=str(tmp_path), **settings)


def test_impossible_pairs_raise(tmp_path):
    student = tiny_model("single-label")
    with pytest.raises(ValueError, match="same object"):
        make_trainer("single-label", tmp_path, student, student)
    with pytest.raises(ValueError, match="for token-classification, the other .* for sequence-classification"):
        make_trainer("single-label", tmp_path, tiny_model("token-classification"), student)
    with pytest.raises(ValueError, match=r"has 60 tokens, the student 50, so they may not read"):
        make_trainer("masked-lm", tmp_path, tiny_model("masked-lm", vocab_size=60))
    with pytest.raises(ValueError, match="has 60 tokens, the student 50"):
        make_trainer("single-label", tmp_path, tiny_model("single-label", vocab_size=60))
    with pytest.raises(ValueError, match="'multi_label_classification', the student's 'single_label_classification'"):
        make_trainer(
            "single-label",
            tmp_path,
            tiny_model("multi-label"),
            tiny_model("single-label", problem_type="single_label_classification"),
        )
    with pytest.raises(TypeError, match="is a TrainingArguments, which has no temperature"):
        DistillationTrainer(student, TrainingArguments(str(tmp_path)), teacher=tiny_model("single-label"))
    with pytest.raises(TypeError, match="teacher='bert' is no model"):
        DistillationTrainer(student, DistillationArguments(str(tmp_path)), teacher="bert")


def test_the_order_of_columns_does_not_matter(tmp_path):
    rows = [dict(reversed(row.items())) for row in tiny_rows("question-answering")]
    assert next(iter(rows[0])) == "end_positions"
    first = train_log(make_trainer("question-answering", tmp_path))
    assert train_log(make_trainer("question-answering", tmp_path, rows=rows))["loss"] == first["loss"]


def test_a_multi_label_teacher_is_never_taken_for_a_single_label_one(tmp_path):
    rows = [{k: v for k, v in row.items() if k != "labels"} for row in tiny_rows("multi-label")]
    logs = []
    for kind in (None, "multi_label_classification"):
        student = tiny_model("multi-label", 1, seed=1, problem_type=kind)
        logs.append(train_log(make_trainer("multi-label", tmp_path, student=student, rows=rows, alpha=1.0)))
        assert student.config.problem_type == "multi_label_classification"
    assert logs[0]["kd_loss"] == logs[1]["kd_loss"]


def test_the_student_learns_its_problem_type_from_the_labels(tmp_path):
    kinds = {"single-label": "single_label_classification", "regression": "regression"}
    for task, kind in kinds.items():
        trainer = make_trainer(task, tmp_path)
        assert trainer.model.config.problem_type is None
        trainer.train()
        assert trainer.model.config.problem_type == kind
    plain = {"problem_type": None}
    student, teacher = tiny_model("multi-label", 1, seed=1, **plain), tiny_model("multi-label", 2, seed=2, **plain)
    make_trainer("multi-label", tmp_path, teacher, student).train()
    assert student.config.problem_type == "multi_label_classification"


def test_examples_without_a_label_do_not_count(tmp_path):
    rows = tiny_rows("single-label")
    unlabelled = [{**row, "labels": losses.IGNORED if n > 2 else row["labels"]} for n, row in enumerate(rows)]
    few = train_log(make_trainer("single-label", tmp_path, rows=rows[:3], alpha=0.0))
    found = train_log(make_trainer("single-label", tmp_path, rows=unlabelled, alpha=0.0))
    # Other numbers of rows may be added up in another order.
    assert found["loss"] == pytest.approx(few["loss"], rel=1e-6)
    nested = [{**row, "labels": [row["labels"]]} for row in rows]
    plain = train_log(make_trainer("single-label", tmp_path, rows=rows))
    assert train_log(make_trainer("single-label", tmp_path, rows=nested))["loss"] == plain["loss"]


def test_answers_in_the_padding_do_not_count(tmp_path):
    rows = tiny_rows("question-answering")
    changed = [{**row, "end_positions": 11 if n == 0 else row["end_positions"]} for n, row in enumerate(rows)]
    log = train_log(make_trainer("question-answering", tmp_path, rows=changed))
    assert np.isfinite(log["loss"])
    assert log["task_loss"] < 20


def test_a_regression_has_no_named_labels(tmp_path):
    student = tiny_model("regression", id2label={0: "score"}, label2id={"score": 0})
    assert train_log(make_trainer("regression", tmp_path, tiny_model("regression", seed=5), student))["kd_loss"] > 0


def test_a_further_term_needs_only_its_weight(tmp_path):
    class WithNorm(DistillationTrainer):
        def term_weights(self):
            return {**super().term_weights(), "norm": 0.5}

        def compute_terms(self, outputs, inputs, counts):
            terms = super().compute_terms(outputs, inputs, counts)
            return {**terms, "norm": outputs["logits"].square().sum() / counts["items"]}

    plain = make_trainer("single-label", tmp_path)
    trainer = WithNorm(
        plain.model, plain.args, teacher=plain.teachers[0].model, train_dataset=plain.train_dataset,
        data_collator=plain.data_collator,
    )  # fmt: skip
    log = train_log(trainer)
    assert log["loss"] == pytest.approx(0.9 * log["kd_loss"] + 0.1 * log["task_loss"] + 0.5 * log["norm"], rel=1e-4)


def test_a_second_training_logs_its_own_terms_only(tmp_path):
    trainer = make_trainer("single-label", tmp_path, max_steps=3, logging_steps=2)
    trainer.train()
    assert trainer._log.n_steps == 1
    student = copy.deepcopy(trainer.model)
    again = train_log(make_trainer("single-label", tmp_path, max_steps=3, logging_steps=2, student=student))
    trainer.train()
    logged = [log for log in trainer.state.log_history if "kd_loss" in log]
    assert logged[0]["kd_loss"] == pytest.approx(again["kd_loss"], rel=1e-5)


def test_a_loss_of_the_users_is_evaluated_as_it_is_by_trainer(tmp_path):
    def loss(outputs, labels, num_items_in_batch=None):
        return nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch

    trainer = make_trainer("single-label", tmp_path / "out")
    usual = trainer.evaluate()["eval_loss"]
    trainer.compute_loss_func = loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(usual, rel=1e-5)
