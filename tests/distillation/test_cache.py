"""A cache holds a teacher's answers exactly, finds them by content alone, and refuses what it does not know."""

import copy
import errno
import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import ViTConfig, ViTForImageClassification

from hf_compress import TeacherCache, TermConfig
from hf_compress.distillation import answers, cache, cache_files, losses
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


def test_broken_caches_raise(tmp_path):
    teacher = tiny_model("single-label", 2, seed=2)
    build(tmp_path / "cache", "single-label", teacher)
    block = tmp_path / "cache" / "block-000000.safetensors"
    content = block.read_bytes()
    block.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=f"has {len(content) - 1:,} bytes instead of {len(content):,}"):
        TeacherCache.open(tmp_path / "cache", teacher)
    block.unlink()
    with pytest.raises(ValueError, match="has 0 bytes instead of"):
        TeacherCache.open(tmp_path / "cache", teacher)
    block.write_bytes(content)
    settings = tmp_path / "cache" / "settings.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"version": 99}))
    with pytest.raises(ValueError, match="has version 99 of the format"):
        TeacherCache.open(tmp_path / "cache", teacher)
    with pytest.raises(ValueError, match="There is no cache"):
        TeacherCache.open(tmp_path / "nothing", teacher)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds files that are not of a cache"):
        build(tmp_path / "mine", "single-label", teacher)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="0 rows"):
        build(tmp_path / "empty", "single-label", teacher, [])


def test_an_interrupted_build_continues(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "BLOCK_ROWS", 2)
    teacher, written = tiny_model("single-label", 2, seed=2), []
    ask = answers.Answers.ask

    def stop_after_two(self, rows, batch_size, first_row=0):
        if first_row >= 4:
            raise KeyboardInterrupt
        return ask(self, rows, batch_size, first_row)

    monkeypatch.setattr(answers.Answers, "ask", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, "single-label", teacher, batch_size=2)
    with pytest.raises(ValueError, match="is unfinished: call TeacherCache.build"):
        TeacherCache.open(tmp_path, teacher)

    def count(self, rows, batch_size, first_row=0):
        written.append(first_row)
        return ask(self, rows, batch_size, first_row)

    monkeypatch.setattr(answers.Answers, "ask", count)
    held = build(tmp_path, "single-label", teacher, batch_size=2)
    assert [first for first in written if first] == [4, 6]
    whole = build(tmp_path / "whole", "single-label", teacher, batch_size=2)
    batch = COLLATE(tiny_rows("single-label"))
    assert torch.equal(held.look_up(batch)["cached_logits"], whole.look_up(batch)["cached_logits"])
    written.clear()
    build(tmp_path, "single-label", teacher)
    assert written == []


def test_a_full_disk_leaves_no_half_file(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "BLOCK_ROWS", 4)
    replace = os.replace

    def full(source, target):
        if "block-000001" in str(target):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="is full: block-000001.safetensors needs .* bytes and .* are free") as caught:
        build(tmp_path, "single-label")
    assert caught.value.errno == errno.ENOSPC
    assert sorted(path.name for path in tmp_path.iterdir()) == ["block-000000.safetensors", "settings.json"]
    monkeypatch.setattr(os, "replace", replace)
    assert len(build(tmp_path, "single-label")) == 8


def test_a_cache_that_cannot_fit_is_not_begun(tmp_path, monkeypatch):
    from types import SimpleNamespace

    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(OSError, match="will take about .* bytes .* and the disk .* has 100 free"):
        build(tmp_path, "single-label")


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


def test_workers_map_the_files_anew(tmp_path):
    held = build(tmp_path, "single-label")
    copied = pickle.loads(pickle.dumps(held))
    batch = COLLATE(tiny_rows("single-label"))
    assert torch.equal(held.look_up(batch)["cached_logits"], copied.look_up(batch)["cached_logits"])
    assert len(pickle.dumps(held)) < 1000
    assert isinstance(held._blocks[0]["logits"].base, np.memmap | np.ndarray)


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


@pytest.mark.parametrize("mode", ["apart", "together"])
def test_two_processes_build_one_cache(mode, tmp_path):
    root = Path(__file__).parent.parent.parent
    command = [sys.executable, str(Path(__file__).with_name("two_builders.py")), mode, str(tmp_path / "two")]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    rows = [row for _ in range(40) for row in tiny_rows("single-label")]
    for n, row in enumerate(rows):
        row["input_ids"] = [random.Random(n).randrange(1, tiny.VOCABULARY) for _ in row["input_ids"]]
    teacher = tiny_model("single-label", 2, seed=2)
    held = TeacherCache.open(tmp_path / "two", teacher)
    one = build(tmp_path / "one", "single-label", teacher, rows)
    assert len(held) == len(one)
    batch = COLLATE(rows)
    torch.testing.assert_close(held.look_up(batch)["cached_logits"], one.look_up(batch)["cached_logits"])
    assert not list((tmp_path / "two").glob(".*"))
    assert cache_files.read_settings(tmp_path / "two") == cache_files.read_settings(tmp_path / "one")
