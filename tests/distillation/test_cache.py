"""A cache holds a teacher's answers exactly, finds them by content alone, and refuses what it does not know."""

import copy
import logging

import pytest
import torch
from datasets import Dataset
from transformers import ViTConfig, ViTForImageClassification

from hf_compress import TeacherCache, TermConfig
from hf_compress.distillation import cache, losses
from hf_compress.distillation.cache_keys import fingerprint
from tests.distillation import tiny
from tests.distillation.tiny import ALL_TASKS, make_trainer, tiny_model, tiny_rows

COLLATE = tiny.PadCollator()


def build(folder, task: str, teacher=None, rows=None, **settings) -> TeacherCache:
    teacher = tiny_model(task, 2, seed=2) if teacher is None else teacher
    rows = tiny_rows(task) if rows is None else rows
    return TeacherCache.build(folder, teacher, rows, data_collator=COLLATE, **settings)


def state(trainer) -> dict[str, torch.Tensor]:
    return trainer.model.state_dict()


@pytest.mark.parametrize("task", ALL_TASKS)
def test_training_from_a_cache_is_training_with_the_teacher(task, tmp_path):
    settings = {"max_steps": 4, "learning_rate": 1e-2, "per_device_train_batch_size": 8}
    held = build(tmp_path / "cache", task, batch_size=8)
    online, cached = make_trainer(task, tmp_path, **settings), make_trainer(task, tmp_path, cache=held, **settings)
    cached.teachers[0].model.forward = None  # whoever runs it fails
    online.train(), cached.train()
    for name, value in state(online).items():
        assert torch.equal(value, state(cached)[name]), name


@pytest.mark.parametrize("task", ALL_TASKS)
def test_order_batches_and_padding_give_the_same_answers(task, tmp_path, monkeypatch):
    rows = tiny_rows(task)
    held = build(tmp_path, task, batch_size=8)
    whole = held.look_up(COLLATE(rows))
    order = [5, 2, 7, 0, 3, 6, 1, 4]
    for side, length, size in (("right", 20, 3), ("left", 0, 8), ("left", 20, 1)):
        monkeypatch.setattr(tiny, "PADDING_SIDE", side)
        monkeypatch.setattr(tiny, "MINIMAL_LENGTH", length)
        for start in range(0, 8, size):
            chosen = order[start : start + size]
            found = held.look_up(COLLATE([rows[n] for n in chosen]))
            for name, value in found.items():
                for position, n in enumerate(chosen):
                    real, expected = value[position], whole[name][n]
                    if expected.ndim > 1 or (task == "question-answering"):
                        real, expected = (x[x.flatten(1).any(1) if x.ndim > 1 else x != 0] for x in (real, expected))
                    assert torch.equal(real, expected)


def test_accumulation_shuffling_and_resuming_cannot_misalign(tmp_path):
    held = build(tmp_path / "cache", "single-label", batch_size=8)
    settings = {
        "max_steps": 6, "learning_rate": 1e-2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "train_sampling_strategy": "random", "save_strategy": "steps", "save_steps": 3, "optim": "sgd",
    }  # fmt: skip
    online = make_trainer("single-label", tmp_path / "online", **settings)
    cached = make_trainer("single-label", tmp_path / "cached", cache=held, **settings)
    online.train(), cached.train()
    for name, value in state(online).items():
        torch.testing.assert_close(value, state(cached)[name], rtol=1e-4, atol=1e-5)
    resumed = make_trainer("single-label", tmp_path / "resumed", cache=held, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cached" / "checkpoint-3"))
    assert all(torch.equal(value, state(resumed)[name]) for name, value in state(cached).items())


def test_hidden_states_are_cached_where_they_are_asked_for(tmp_path):
    teacher, terms = (
        tiny_model("single-label", 2, seed=2),
        [TermConfig("hidden_mse"), TermConfig("pkd", layers="last")],
    )
    held = build(tmp_path / "cache", "single-label", teacher, batch_size=8, signals=["hidden.encoder.2"])
    settings = {"teacher": teacher, "terms": terms, "max_steps": 3, "learning_rate": 1e-2}
    online = make_trainer("single-label", tmp_path, student=tiny_model("single-label", 1, seed=1), **settings)
    cached = make_trainer(
        "single-label", tmp_path, student=tiny_model("single-label", 1, seed=1), cache=held, **settings
    )
    online.train(), cached.train()
    assert all(torch.equal(value, state(cached)[name]) for name, value in state(online).items())
    with pytest.raises(ValueError, match=r"need \['qkv.encoder.2'\] of the teacher, but its cache holds"):
        make_trainer("single-label", tmp_path, teacher, terms=[TermConfig("relations")], cache=held).train()


def test_images_are_cached(tmp_path):
    config = ViTConfig(
        hidden_size=16, num_attention_heads=2, intermediate_size=24, num_hidden_layers=1, image_size=8, patch_size=4,
        num_labels=3,
    )  # fmt: skip
    teacher = ViTForImageClassification(config).eval()
    rows = [{"pixel_values": torch.randn(3, 8, 8).tolist(), "labels": n % 3} for n in range(8)]
    held = build(tmp_path, "image", teacher, rows, signals=["hidden.encoder.1"])
    with torch.no_grad():
        expected = teacher(COLLATE(rows)["pixel_values"]).logits
    assert torch.equal(held.look_up(COLLATE(rows))["cached_logits"], expected)
    assert held.look_up(COLLATE(rows))["cached_hidden.encoder.1"].shape == (8, 5, 16)


@pytest.mark.parametrize("task", ["single-label", "token-classification", "causal-lm"])
def test_half_precision_is_half_as_large_and_close(task, tmp_path):
    whole, half = build(tmp_path / "a", task), build(tmp_path / "b", task, precision="fp16")
    batch = COLLATE(tiny_rows(task))
    first, second = whole.look_up(batch)["cached_logits"], half.look_up(batch)["cached_logits"]
    torch.testing.assert_close(first, second, rtol=2e-3, atol=1e-3)
    assert not torch.equal(first, second)
    assert torch.equal(first.half().float(), second)


@pytest.mark.parametrize("task", ["masked-lm", "causal-lm", "seq2seq"])
def test_the_likeliest_classes_are_those_of_the_teacher(task, tmp_path):
    every = build(tmp_path / "all", task, precision="top-k", top_k=tiny.VOCABULARY, temperature=2.0)
    few = build(tmp_path / "few", task, precision="top-k", top_k=5, temperature=2.0)
    dense = build(tmp_path / "dense", task)
    batch = COLLATE(tiny_rows(task))
    logits = dense.look_up(batch)["cached_logits"]
    real = logits.any(-1)
    log_probs = (logits[real] / 2).log_softmax(-1)
    found = few.look_up(batch)
    values, indices = log_probs.topk(5, dim=-1)
    assert torch.equal(found["cached_top_indices"][real], indices)
    torch.testing.assert_close(found["cached_top_log_probs"][real], values, rtol=2e-3, atol=2e-3)
    for held, tolerance in ((every, 0.02), (few, None)):
        trainer = make_trainer(task, tmp_path, cache=held, temperature=2.0)
        online = make_trainer(task, tmp_path, temperature=2.0)
        trainer.train(), online.train()
        ours, theirs = (t.state.log_history[0]["kd_loss"] for t in (trainer, online))
        assert ours <= theirs * 1.02
        if tolerance is not None:
            assert ours == pytest.approx(theirs, rel=tolerance)
    with pytest.raises(ValueError, match=r"temperature=2.0, .* but the training uses \[3.0\]"):
        make_trainer(task, tmp_path, cache=few, temperature=3.0)
    with pytest.raises(ValueError, match="needs all classes"):
        make_trainer(task, tmp_path, cache=few, temperature=2.0, divergence="reverse_kl")


def test_a_teacher_too_flat_for_its_likeliest_classes_is_warned_of(tmp_path, caplog):
    teacher = tiny_model("causal-lm", 2, seed=2)
    with caplog.at_level(logging.WARNING, "hf_compress"):
        build(tmp_path / "all", "causal-lm", teacher, precision="top-k", top_k=tiny.VOCABULARY)
    assert not caplog.records
    with caplog.at_level(logging.WARNING, "hf_compress"):
        build(tmp_path / "few", "causal-lm", teacher, precision="top-k", top_k=2, temperature=4.0)
    assert "The 2 likeliest of 50 tokens hold" in caplog.text


@pytest.mark.parametrize("vocabulary", [30_522, 151_936])
def test_the_likeliest_classes_fit_in_300_bytes_and_keep_the_gradient(vocabulary):
    k = cache.default_top_k(vocabulary)
    assert k * (4 if vocabulary <= 2**16 else 6) + cache_files_overhead() <= 300
    # Flatter than a trained language model: Zipf's law with noise, a tenth of the mass in the tail.
    generator = torch.Generator().manual_seed(0)
    ranks = torch.arange(1, vocabulary + 1).float()
    teacher = -1.5 * ranks.log() + 0.5 * torch.randn(16, vocabulary, generator=generator)
    student = (teacher + torch.randn(16, vocabulary, generator=generator)).requires_grad_()
    values, indices = teacher.log_softmax(-1).topk(k, dim=-1)
    (exact,) = torch.autograd.grad(losses.kl_divergence(student, teacher).sum(), student)
    (found,) = torch.autograd.grad(losses.top_k_divergence(student, indices, values.half().float()).sum(), student)
    assert torch.nn.functional.cosine_similarity(exact.flatten(), found.flatten(), dim=0) >= 0.999


def cache_files_overhead() -> int:
    """Bytes of a row's key and offset, if a row has but four tokens."""
    return (16 + 2 * 8) // 4


def test_other_teachers_are_refused(tmp_path):
    teacher = tiny_model("single-label", 2, seed=2)
    build(tmp_path, "single-label", teacher)
    assert len(TeacherCache.open(tmp_path, copy.deepcopy(teacher))) == 8
    other = copy.deepcopy(teacher)
    with torch.no_grad():
        weight = other.classifier.weight
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(10.0))
    assert fingerprint(other) != fingerprint(teacher)
    with pytest.raises(ValueError, match="is of another teacher"):
        TeacherCache.open(tmp_path, other)
    with pytest.raises(ValueError, match="is of another teacher"):
        make_trainer("single-label", tmp_path / "run", other, cache=TeacherCache(tmp_path))
    with pytest.raises(ValueError, match="cache with other settings .fingerprint was"):
        build(tmp_path, "single-label", other)
    with pytest.raises(ValueError, match="precision was 'fp32' and is 'fp16'"):
        build(tmp_path, "single-label", teacher, precision="fp16")


def test_examples_that_are_not_there_raise(tmp_path):
    held = build(tmp_path, "single-label")
    rows = tiny_rows("single-label")
    rows[3]["input_ids"][1] += 1
    with pytest.raises(ValueError, match="1 of 8 examples of a batch are not in the cache"):
        held.look_up(COLLATE(rows))


def test_other_rows_are_noticed(tmp_path):
    rows = tiny_rows("single-label")
    build(tmp_path, "single-label", rows=rows)
    with pytest.raises(ValueError, match="cache with other settings .rows was"):
        build(tmp_path, "single-label", rows=rows[::-1])
    with pytest.raises(TypeError, match="generator, which can be read only once"):
        build(tmp_path / "once", "single-label", rows=(row for row in rows))


def test_what_the_decoder_reads_is_part_of_the_key(tmp_path):
    rows = [{**row, "decoder_input_ids": [0, *row["labels"][:-1]]} for row in tiny_rows("seq2seq")]
    twin = {**rows[0], "decoder_input_ids": [0, *[5] * (len(rows[0]["labels"]) - 1)]}
    held = build(tmp_path, "seq2seq", rows=[*rows, twin])
    found = held.look_up(COLLATE([rows[0], twin]))["cached_logits"]
    assert len(held) == 9
    assert not torch.equal(found[0], found[1])


def test_tokens_that_are_masked_in_the_middle_are_part_of_the_key(tmp_path):
    row = {"input_ids": [5, 6, 7], "attention_mask": [1, 0, 1], "labels": 0}
    held = build(tmp_path, "single-label", rows=[row, {"input_ids": [5, 7], "attention_mask": [1, 1], "labels": 0}])
    assert len(held) == 2


def test_nan_is_never_stored(tmp_path):
    teacher = tiny_model("single-label", 2, seed=2)
    with torch.no_grad():
        teacher.classifier.bias[0] = float("nan")
    with pytest.raises(ValueError, match="gives NaN or infinity .logits. in the rows from 0 on"):
        build(tmp_path, "single-label", teacher)
    with torch.no_grad():
        teacher.classifier.bias[0] = 1e6
    with pytest.raises(ValueError, match="reach 1e.06 .* more than float16 can hold"):
        build(tmp_path / "half", "single-label", teacher, precision="fp16")


def test_the_teacher_is_left_as_it_was(tmp_path):
    teacher = tiny_model("single-label", 2, seed=2, hidden_dropout_prob=0.5).train()
    first = build(tmp_path / "a", "single-label", teacher)
    assert all(module.training for module in teacher.modules())
    second = build(tmp_path / "b", "single-label", teacher)
    batch = COLLATE(tiny_rows("single-label"))
    assert torch.equal(first.look_up(batch)["cached_logits"], second.look_up(batch)["cached_logits"])


def test_streams_and_data_sets_are_read_alike(tmp_path):
    rows = Dataset.from_list(tiny_rows("token-classification"))
    batch = COLLATE(tiny_rows("token-classification"))
    found = [
        build(tmp_path / name, "token-classification", rows=given).look_up(batch)["cached_logits"]
        for name, given in (("a", rows), ("b", rows.to_iterable_dataset()), ("c", list(rows)))
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "int8"}, "precision='int8' is unknown"),
        ({"precision": "top-k"}, "keeps the likeliest tokens of a language model"),
        ({"top_k": 3}, "top_k=3 with precision='fp32'"),
        ({"temperature": 2.0}, "only 'top-k' depends on it"),
        ({"signals": ["qkv.encoder.1"]}, "cannot be cached: only hidden states can"),
        ({"signals": ["hidden.encoder.9"]}, "9"),
    ],
)
def test_impossible_settings_raise(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        build(tmp_path, "single-label", **settings)


def test_rows_that_differ_late_are_other_rows(tmp_path):
    rows = tiny_rows("single-label") * 40
    other = [*rows[:-40], *({**row, "input_ids": row["input_ids"][::-1]} for row in rows[-40:])]
    for _ in range(2):
        build(tmp_path / "cache", "single-label", rows=rows)
    with pytest.raises(ValueError, match="other"):
        build(tmp_path / "cache", "single-label", rows=other)
