"""Trainings that are stopped and resumed end like those that are not, bit for bit; two processes prune as one."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hf_compress as hc
from hf_compress.pruning.training_weights import PRUNING_FILE
from tests.pruning.weight_training import Stop, StopAt, config, make_trainer, model_of, zeros

ROOT = Path(__file__).parent.parent.parent
SAVES = {"save_strategy": "steps", "save_steps": 2, "max_steps": 8}


def callback(**values):
    return hc.PruningCallback(config(**values), n_updates=4, n_batches=2, end=0.8)


def assert_equal(first, second) -> None:
    for (name, one), other in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize(
    ("stop", "distilled", "values"),
    [
        (3, False, {"score": "random", "scope": "global"}),
        (5, False, {"score": "wanda"}),
        (5, True, {"score": "sparsegpt", "pattern": "2:4", "sparsity": None}),
        (3, True, {"score": "movement"}),
        (7, False, {"score": "movement", "scope": "global"}),
        (5, False, {"score": "magnitude", "allocation": "owl", "outlier_factor": 2.0, "outlier_spread": 0.2}),
    ],
)
def test_a_resumed_training_ends_alike(stop, distilled, values, tmp_path):
    # With dropout, so that random numbers must be those of the whole run too.
    whole = make_trainer(tmp_path / "whole", [callback(**values)], distilled=distilled, **SAVES)
    whole.train()
    parts = {"distilled": distilled, **SAVES}
    with pytest.raises(Stop):
        make_trainer(tmp_path / "parts", [callback(**values), StopAt(stop)], **parts).train()
    second = make_trainer(tmp_path / "parts", [callback(**values)], **parts)
    second.train(resume_from_checkpoint=True)
    assert_equal(whole.model, second.model)
    assert any(mask.any() for mask in zeros(whole.model).values())


@pytest.mark.parametrize(
    ("score", "first", "then"), [("magnitude", 40, 12), ("magnitude", 8, 32), ("movement", 8, 32)]
)
def test_a_training_resumed_with_another_length_never_goes_back(score, first, then, tmp_path, caplog):
    saves = {"save_strategy": "steps", "save_steps": 1}
    with pytest.raises(Stop):
        make_trainer(tmp_path, [callback(score=score), StopAt(7)], **saves, max_steps=first).train()
    before = type(model_of()).from_pretrained(tmp_path / "checkpoint-7")
    second = make_trainer(tmp_path, [callback(score=score)], **saves, max_steps=then)
    with caplog.at_level(logging.WARNING, "hf_compress"):
        second.train(resume_from_checkpoint=True)
    for name, mask in zeros(second.model).items():
        assert mask.double().mean() == pytest.approx(0.6, abs=0.001), name
        if score == "magnitude":
            assert not (zeros(before)[name] & ~mask).any()
    assert ("had more steps when it was stopped" in caplog.text) == (then < first)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder of a training by movement that was stopped after step 4."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(Stop):
        make_trainer(folder, [callback(score="movement"), StopAt(5)], **SAVES).train()
    return folder


def test_a_checkpoint_holds_what_runs_and_what_may_come_back(stopped):
    model = type(model_of()).from_pretrained(stopped / "checkpoint-4")
    assert 0 < sum(mask.sum().item() for mask in zeros(model).values())
    assert (stopped / "checkpoint-4" / PRUNING_FILE).exists()


def test_what_was_pruned_by_other_rules_is_not_continued(stopped, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    changed = make_trainer(folder, [callback(score="movement", sparsity=0.9)], **SAVES)
    with pytest.raises(ValueError, match="saved with other settings or layers .sparsity was 0.6 and is 0.9"):
        changed.train(resume_from_checkpoint=True)
    shutil.copy(folder / "checkpoint-4" / PRUNING_FILE, folder / "checkpoint-2" / PRUNING_FILE)
    with pytest.raises(ValueError, match="are pruned, but in the model they are not 0"):
        make_trainer(folder, [callback(score="movement")], **SAVES).train(str(folder / "checkpoint-2"))
    elsewhere = make_trainer(tmp_path / "elsewhere", [callback(score="movement")], **SAVES)
    with pytest.raises(ValueError, match="continues from step 4, but there is no .*pruning.safetensors"):
        elsewhere.train(str(folder / "checkpoint-4"))


def test_two_processes_have_the_masks_of_one(tmp_path):
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "two_processes.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found.keys() == {"magnitude", "sparsegpt", "resumed movement"}
    for name, facts in found.items():
        assert facts["between_processes"] == 0.0, name
        assert facts["masks"] == 0, name
        # An inverted Hessian makes rounding larger.
        assert facts["weights"] <= (1e-4 if name == "sparsegpt" else 1e-5), name
