"""What two processes find out about themselves, for `two_processes.py`: each function gives numbers or messages."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType, gather_object
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import Trainer

from hf_compress import TermConfig
from hf_compress.jobs.stages import train_once
from tests.distillation.tiny import PadCollator, make_trainer, tiny_model, tiny_rows


def fsdp_settings() -> dict[str, Any]:
    """Training arguments, which change what they are given."""
    return {"fsdp": True, "fsdp_config": {"version": 2}}


@contextmanager
def sharding_on_a_cpu() -> Iterator[None]:
    """accelerate ignores FSDP on a CPU, where PyTorch has it: let it believe that there are several accelerators."""
    create = Trainer.create_accelerator_and_postprocess

    def create_with_accelerators(trainer: Trainer) -> None:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        create(trainer)

    with patch.object(Trainer, "create_accelerator_and_postprocess", create_with_accelerators):
        yield


def whole(value: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor, of which a process may hold a shard."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """All that is trained, by name."""
    parameters = (*trainer.model.named_parameters(), *trainer.projections.named_parameters())
    return {name: whole(value) for name, value in parameters}


def _wide_teacher():
    return tiny_model("single-label", 2, seed=2, hidden_size=24, num_attention_heads=4)


def _largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max((value - second[name]).abs().max().item() for name, value in first.items())


def _trained(folder: Path, resume: Path | None = None, is_sharded: bool = False) -> Trainer:
    """Four steps with dropout in random order, saved after two."""
    student = tiny_model("single-label", 1, seed=1, hidden_dropout_prob=0.1)
    settings = fsdp_settings() if is_sharded else {}
    teacher = tiny_model("single-label", 2, seed=2) if is_sharded else _wide_teacher()
    with sharding_on_a_cpu() if is_sharded else nullcontext():
        trainer = make_trainer(
            "single-label", folder, teacher, student, terms=[TermConfig("hidden_mse")], max_steps=4,
            learning_rate=1e-2, per_device_train_batch_size=2, train_sampling_strategy="random", max_grad_norm=0.1,
            save_strategy="steps", save_steps=2, **settings,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def resuming(folder: Path) -> float:
    unbroken = _trained(folder / "unbroken")
    dist.barrier()
    resumed = _trained(folder / "resumed", folder / "unbroken" / "checkpoint-2")
    return _largest_difference(weights_of(unbroken), weights_of(resumed))


def resuming_shards(folder: Path) -> dict[str, Any]:
    unbroken = _trained(folder / "shards", is_sharded=True)
    dist.barrier()
    resumed = _trained(folder / "resumed-shards", folder / "shards" / "checkpoint-2", is_sharded=True)
    saved = load_file(folder / "shards" / "checkpoint-4" / "model.safetensors")
    weights = weights_of(unbroken)
    plain = type(tiny_model("single-label", 1)).from_pretrained(folder / "shards" / "checkpoint-4")
    return {
        "difference": _largest_difference(weights, weights_of(resumed)),
        "saved": _largest_difference(weights, {name: saved[name] for name in weights}),
        "keys": sorted(set(saved) ^ set(plain.state_dict())),
    }


def saved_shards(folder: Path) -> float:
    """How far the model that a stage of a run saves is from the one that was trained in shares."""
    trainers = []

    def make(work: Path) -> Trainer:
        teacher, student = tiny_model("single-label", 2, seed=2), tiny_model("single-label", 1, seed=1)
        trainers.append(make_trainer("single-label", work, teacher, student, max_steps=1, **fsdp_settings()))
        return trainers[0]

    with sharding_on_a_cpu():
        train_once(folder / "stage", make)
    saved = load_file(folder / "stage" / "model.safetensors")
    return _largest_difference(weights_of(trainers[0]), saved)


def projections_of_other_seeds(folder: Path) -> float:
    rank = dist.get_rank()
    trainer = make_trainer(
        "single-label", folder / "seeds", _wide_teacher(), terms=[TermConfig("hidden_mse")], seed=rank,
        per_device_train_batch_size=4,
    )  # fmt: skip
    trainer.train()
    ours = {name: value.detach() for name, value in trainer.projections.named_parameters()}
    return _largest_difference(*gather_object([ours]))


def sharded_teacher(folder: Path) -> dict[str, Any]:
    batch = PadCollator()(tiny_rows("masked-lm"))
    answers, keys = [], []
    for placement in ("replicated", "sharded"):
        teacher = tiny_model("masked-lm", 2, seed=2)
        n_weights = sum(value.numel() for value in teacher.parameters())
        trainer = make_trainer("masked-lm", folder / placement, teacher, teacher_placement=placement)
        trainer.train()
        answers.append(trainer.teachers[0].ask(batch, nullcontext())["logits"])
        trainer.save_model(str(folder / placement))
        dist.barrier()
        keys.append(sorted(load_file(folder / placement / "model.safetensors")))
    here = sum(value.to_local().numel() for value in teacher.parameters())
    student = type(teacher).from_pretrained(folder / "sharded")
    return {
        "are_equal": torch.equal(*answers),
        "share": here / n_weights,
        "keys": sorted(set(keys[0]) ^ set(keys[1])),
        "difference": _largest_difference(weights_of(trainer), dict(student.named_parameters())),
    }


def refusals(folder: Path) -> dict[str, str]:
    placed = tiny_model("single-label", 2, seed=2)
    placed.hf_device_map = {"": "cpu"}
    short = {"accelerator_config": {"even_batches": False}, "rows": tiny_rows("single-label")[:5]}
    asked = {
        "short batches": {**short, "per_device_train_batch_size": 1},
        "short batches, sharded": {
            "accelerator_config": {"even_batches": False},
            "rows": tiny_rows("single-label")[:6],
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "teacher_placement": "sharded",
        },
        "placed teacher": {"teacher": placed, "teacher_placement": "sharded"},
        "projections": {"teacher": _wide_teacher(), "terms": [TermConfig("hidden_mse")], **fsdp_settings()},
        "shares": {"log_gradient_shares": True, **fsdp_settings()},
    }
    messages = {}
    for name, settings in asked.items():
        try:
            with sharding_on_a_cpu() if "fsdp" in settings else nullcontext():
                make_trainer("single-label", folder, **settings).train()
            messages[name] = ""
        except ValueError as error:
            messages[name] = str(error)
    return messages


FACTS: dict[str, Callable[[Path], Any]] = {
    function.__name__: function
    for function in (resuming, resuming_shards, saved_shards, projections_of_other_seeds, sharded_teacher, refusals)
}
