"""How a cache is built and kept: interrupted, on a full disk, by several processes, and in forged files."""

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

from hf_compress import TeacherCache
from hf_compress.distillation import answers, cache, cache_files
from tests.distillation import tiny
from tests.distillation.test_cache import COLLATE, build
from tests.distillation.tiny import tiny_model, tiny_rows


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
    assert not any(written)


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


@pytest.mark.parametrize("mode", ["apart", "together", "in-turn"])
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
    two, alone = (cache_files.read_settings(tmp_path / name) for name in ("two", "one"))
    assert (two.fingerprint, two.rows) == (alone.fingerprint, alone.rows)
    built = [json.loads(path.read_text()) for path in tmp_path.glob("built-by-*.json")]
    assert len(built) == 2
    if mode == "together":
        assert sorted(built[0] + built[1]) == list(range(0, 320, 8))
        assert set(built[0]).isdisjoint(built[1])
    if mode == "in-turn":
        assert sorted(built, key=len) == [[], [*range(0, 320, 16), *range(8, 320, 16)]]


def test_workers_map_the_files_anew(tmp_path):
    held = build(tmp_path, "single-label")
    copied = pickle.loads(pickle.dumps(held))
    batch = COLLATE(tiny_rows("single-label"))
    assert torch.equal(held.look_up(batch)["cached_logits"], copied.look_up(batch)["cached_logits"])
    assert len(pickle.dumps(held)) < 1000
    array = held._blocks[0]["logits"]
    while array.base is not None and not isinstance(array, np.memmap):
        array = array.base
    assert isinstance(array, np.memmap)


def test_files_that_no_cache_wrote_shape_no_memory(tmp_path):
    from safetensors.numpy import save

    build(tmp_path, "token-classification")
    block, meta = tmp_path / "block-000000.safetensors", tmp_path / "meta.json"
    held = {name: np.array(value) for name, value in cache_files.map_block(block, block.stat().st_size).items()}
    header_size = int.from_bytes(block.read_bytes()[:8], "little")
    forged = [
        save({**held, "keys": held["keys"][:, :8]}),
        save({**held, "logits.offsets": held["logits.offsets"][::-1].copy()}),
        save({**held, "logits.offsets": held["logits.offsets"][:-1]}),
        save({name: value for name, value in held.items() if name != "keys"}),
        block.read_bytes().replace(b'"shape":[8,16]', b'"shape":[9,16]'),
        block.read_bytes().replace(b'"dtype":"F32"', b'"dtype":"C64"'),
        (2**60).to_bytes(8, "little") + block.read_bytes()[8:],
        block.read_bytes()[:8] + b"[" + b" " * (header_size - 2) + b"]" + block.read_bytes()[8 + header_size :],
    ]
    for content in forged:
        assert content != block.read_bytes()
        other = tmp_path / "other"
        other.mkdir(exist_ok=True)
        (other / "settings.json").write_bytes((tmp_path / "settings.json").read_bytes())
        (other / "meta.json").write_text(json.dumps(json.loads(meta.read_text()) | {"block_bytes": [len(content)]}))
        (other / block.name).write_bytes(content)
        with pytest.raises(ValueError, match="is none that a cache wrote"):
            TeacherCache(other)


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
