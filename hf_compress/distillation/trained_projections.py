"""Projections that are trained beside a student: in the optimizer and the checkpoints, but not in the model."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

PROJECTIONS_FILE = "projections.safetensors"


class ProjectionMixin:
    """What a `Trainer` does with `self.projections`, which its model does not hold."""

    projections: nn.ModuleDict

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Also optimizes the projections; see `Trainer.create_optimizer`."""
        is_given = self.optimizer is not None
        optimizer = super().create_optimizer(*args, **kwargs)
        parameters = list(self.projections.parameters())
        if self.args.world_size > 1:
            # As a data-parallel wrapper does with the model's own: processes may have drawn other random numbers.
            for parameter in parameters:
                dist.broadcast(parameter.data, src=0)
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if parameters and id(parameters[0]) not in known:
            if is_given:
                raise ValueError(
                    f"The optimizer that was passed does not know the projections {', '.join(self.projections)}, "
                    "which were made after it: pass optimizer_cls_and_kwargs=(class, arguments) instead."
                )
            optimizer.add_param_group({"params": parameters, "weight_decay": self.args.weight_decay})
            self.add_callback(_ClearGradients(self.projections))
        return optimizer

    def _clip_grad_norm(self, model: nn.Module):
        if not self.projections:
            return super()._clip_grad_norm(model)
        self._average_projection_gradients()
        return self.accelerator.clip_grad_norm_(self._all_parameters(model), self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm=None):
        if self.projections and grad_norm is None:
            self._average_projection_gradients()
            return self.accelerator.clip_grad_norm_(self._all_parameters(model), float("inf"))
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    def _all_parameters(self, model: nn.Module) -> list[nn.Parameter]:
        return [*model.parameters(), *self.projections.parameters()]

    def _average_projection_gradients(self) -> None:
        """What a data-parallel wrapper does for the model's own parameters."""
        if self.args.world_size == 1:
            return
        for parameter in self.projections.parameters():
            # A stage without the term, which all processes are in.
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.args.world_size

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.projections and self.args.should_save:
            state = {name: tensor.contiguous().cpu() for name, tensor in self.projections.state_dict().items()}
            save_file(state, Path(output_dir) / PROJECTIONS_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if not self.projections or checkpoint is None:
            return
        path = Path(checkpoint) / PROJECTIONS_FILE
        if not path.exists():
            raise ValueError(
                f"The checkpoint {checkpoint} has no {PROJECTIONS_FILE}, but the terms need projections of widths: it "
                "was saved with other terms, or with save_only_model. Continue with the same ones, or start anew."
            )
        state = load_file(path)
        expected = {name: tuple(tensor.shape) for name, tensor in self.projections.state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if found != expected:
            raise ValueError(
                f"The projections in {path} are {found}, but the terms need {expected}: the checkpoint was saved with "
                "other terms or layers. Continue with the same ones, or start anew."
            )
        self.projections.load_state_dict(state)


class _ClearGradients(TrainerCallback):
    """Clears the gradients of the projections after each step: Trainer clears those of its model alone."""

    def __init__(self, projections: nn.ModuleDict) -> None:
        self.projections = projections

    def on_train_begin(self, args, state, control, **kwargs):
        # An earlier attempt may have been stopped between a backward pass and its step.
        self.projections.zero_grad()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.projections.zero_grad()
