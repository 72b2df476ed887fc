"""Run as a program: every case in two processes, then in one, and how far apart the two are.

python tests/distillation/two_processes.py FOLDER CASES...

Leaves FOLDER/differences.json: by case, the relative differences of gradients, weights and logged terms.
"""

import gc
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import debug_launcher
from accelerate.state import PartialState
from torch.distributed.tensor import DTensor

from hf_compress import StageConfig, TeacherCache, TermConfig
from tests.distillation.process_facts import FACTS, fsdp_settings, sharding_on_a_cpu, weights_of, whole
from tests.distillation.tiny import (
    ALL_TASKS,
    GradientRecorder,
    PadCollator,
    make_trainer,
    relative_difference,
    tiny_model,
    tiny_rows,
)

ONLY_TERMS = {"alpha": 0.0, "task_weight": 0.0}


class Case(NamedTuple):
    """Two optimizer steps.

    Attributes:
        task (`str`): Of `ALL_TASKS`.
        settings (`Callable`): Gives models and arguments, anew for each run; it is called with the run's folder.
        rows (`tuple[int, ...]`): Which rows the two processes learn from.
        alone (`tuple[int, ...]`): And which the one process.
        is_sharded (`bool`): Whether the two processes shard the student.
    """

    task: str
    settings: Callable[[Path], dict[str, Any]] = lambda folder: {}
    rows: tuple[int, ...] = tuple(range(8))
    alone: tuple[int, ...] = tuple(range(8))
    is_sharded: bool = False


def _pair(task: str, **settings) -> dict[str, Any]:
    return {"student": tiny_model(task, 2, seed=1), "teacher": tiny_model(task, 4, seed=2), **settings}


def _wide(**settings) -> dict[str, Any]:
    teacher = tiny_model("single-label", 4, seed=2, hidden_size=24, num_attention_heads=4)
    return {"student": tiny_model("single-label", 2, seed=1), "teacher": teacher, **settings}


def _only(*kinds: str, steps: int | None = None) -> list[StageConfig]:
    return [StageConfig(terms=[TermConfig(kind) for kind in kinds], steps=steps, **ONLY_TERMS)]


def _cached(folder: Path) -> dict[str, Any]:
    teacher = tiny_model("single-label", 2, seed=2)
    rows = tiny_rows("single-label")
    return {"teacher": teacher, "cache": TeacherCache.build(folder, teacher, rows, data_collator=PadCollator())}


CASES: dict[str, Case] = {
    **{task: Case(task) for task in ALL_TASKS},
    # In its first step the head has no gradient, in its second the projections have none.
    "stages": Case(
        "single-label",
        lambda _: _wide(stages=[*_only("hidden_mse", "pkd", steps=1), StageConfig(alpha=0.9)], max_grad_norm=0.1),
    ),
    "terms alone": Case("causal-lm", lambda _: _pair("causal-lm", stages=_only("relations", "hidden_mse"))),
    "terms with outputs": Case(
        "token-classification",
        lambda _: _pair("token-classification", terms=[TermConfig("relations"), TermConfig("attention_kl")]),
    ),
    # The output layer of BERT has a bias, that of this Llama is tied to the embeddings.
    "chunks of masked-lm": Case("masked-lm", lambda _: {"logits_chunk": 7}),
    "chunks of causal-lm": Case(
        "causal-lm", lambda _: {"student": tiny_model("causal-lm", 1, 1, tie_word_embeddings=True), "logits_chunk": 7}
    ),
    # Without a search for unused parameters, and with a pooler that nothing uses.
    "checkpointing": Case(
        "embeddings", lambda _: _pair("embeddings", terms=[TermConfig("relations")], activation_checkpointing=True)
    ),
    "checkpointing, terms alone": Case(
        "single-label", lambda _: _pair("single-label", stages=_only("relations"), activation_checkpointing=True)
    ),
    "cache": Case("single-label", _cached),
    # accelerate fills the last batch with the first row, unless it is told not to.
    "last batch filled": Case("token-classification", rows=tuple(range(7)), alone=(*range(7), 0)),
    "last batch short": Case(
        "token-classification",
        lambda _: {"accelerator_config": {"even_batches": False}},
        rows=tuple(range(7)),
        alone=tuple(range(7)),
    ),
    "sharded teacher": Case(
        "single-label",
        lambda _: _pair("single-label", teacher_placement="sharded", terms=[TermConfig("relations")]),
    ),
    "sharded teacher, chunks": Case(
        "masked-lm", lambda _: {"teacher_placement": "sharded", "logits_chunk": 7, "teacher_check_rows": 8}
    ),
    "FSDP": Case(
        "single-label",
        lambda _: _pair("single-label", terms=[TermConfig("hidden_mse"), TermConfig("attention_kl")]),
        is_sharded=True,
    ),
    # The head's shards get a gradient of 0, which the one process has not.
    "FSDP, terms alone": Case(
        "single-label",
        lambda _: _pair("single-label", stages=_only("relations"), weight_decay=0.0),
        is_sharded=True,
    ),
    "FSDP, chunks, sharded teacher": Case(
        "causal-lm",
        lambda _: _pair("causal-lm", teacher_placement="sharded", logits_chunk=7, terms=[TermConfig("relations")]),
        is_sharded=True,
    ),
}


class _Recorder(GradientRecorder):
    """Whole gradients, those of the projections too."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        super().on_pre_optimizer_step(args, state, control, **kwargs)
        self.gradients |= {
            f"projections.{name}": value.grad.clone()
            for name, value in self.projections.named_parameters()
            if value.grad is not None
        }
        self.gradients = {name: whole(value) for name, value in self.gradients.items()}


def run(name: str, folder: Path, is_alone: bool) -> dict[str, Any]:
    """Gradients of the second step, weights after it, and the logs of both."""
    case = CASES[name]
    size = (8, 1) if is_alone else (2, 2)
    settings = case.settings(folder / "cache")
    if is_alone:
        settings.pop("teacher_placement", None)
    elif case.is_sharded:
        settings |= fsdp_settings()
    rows = tiny_rows(case.task)
    recorder = _Recorder()
    with sharding_on_a_cpu() if case.is_sharded and not is_alone else nullcontext():
        trainer = make_trainer(
            case.task,
            folder / "work",
            rows=[rows[number] for number in (case.alone if is_alone else case.rows)],
            callbacks=[recorder],
            per_device_train_batch_size=size[0],
            gradient_accumulation_steps=size[1],
            # Plain descent with decay: what has no gradient stays as it is, and rounding is not blown up.
            **{"max_steps": 2, "optim": "sgd", "learning_rate": 0.1, "weight_decay": 0.1, **settings},
        )
        recorder.projections = trainer.projections
        trainer.train()
    if not is_alone:
        assert trainer.args.world_size == 2
        assert any(isinstance(value, DTensor) for value in trainer.model.parameters()) == case.is_sharded
    gradients = {name.removeprefix("module."): value for name, value in recorder.gradients.items()}
    return {"gradients": gradients, "weights": weights_of(trainer), "logs": trainer.state.log_history[:2]}


def in_two(folder: Path, names: list[str]) -> None:
    """The part of both processes; the first writes down what it found."""
    # Trainer collects garbage, which copies all that the processes still share.
    gc.freeze()
    found = {name: run(name, folder, is_alone=False) for name in names if name in CASES}
    facts = {name: FACTS[name](folder) for name in names if name in FACTS}
    if PartialState().is_main_process:
        torch.save((found, facts), folder / "found.pt")


def compare(together: dict[str, Any], alone: dict[str, Any], is_sharded: bool) -> dict[str, float]:
    """The largest relative differences, by what differs."""
    if is_sharded:
        zeros = {name: torch.zeros_like(value) for name, value in together["gradients"].items()}
        alone["gradients"] = zeros | alone["gradients"]
    logs = [
        abs(mine[name] - other[name]) / max(abs(mine[name]), 1e-3)
        for mine, other in zip(alone["logs"], together["logs"], strict=True)
        for name in mine
        if name == "loss" or name.endswith(("_loss", "_mse", "_kl", "relations", "pkd"))
    ]
    return {
        "gradients": relative_difference(alone["gradients"], together["gradients"]),
        "weights": relative_difference(alone["weights"], together["weights"]),
        "logs": max(logs),
    }


if __name__ == "__main__":
    folder, names = Path(sys.argv[1]), sys.argv[2:] or [*CASES, *FACTS]
    debug_launcher(in_two, (folder, names), num_processes=2)
    together, facts = torch.load(folder / "found.pt")
    gc.freeze()
    differences = {
        name: compare(found, run(name, folder, is_alone=True), CASES[name].is_sharded)
        for name, found in together.items()
    }
    (folder / "differences.json").write_text(json.dumps({"differences": differences, "facts": facts}, indent=1))
