"""What a training on several processes needs, so that it is the training of one process."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.data import DataLoader
from transformers.trainer_utils import has_length

from hf_compress.distillation.curriculum import Stage
from hf_compress.distillation.output_terms import KD, TASK
from hf_compress.modeling.blocks import find_blocks


def check_batches(loader: DataLoader, accelerator: Accelerator, accumulation: int, every_batch: bool) -> None:
    """Raises if the processes would wait for each other forever, because one has fewer batches than another.

    accelerate fills the last batches with rows from the start of the epoch, unless `even_batches` is off.

    Args:
        loader (`DataLoader`): This process's batches of an epoch.
        accelerator (`Accelerator`): Tells the processes.
        accumulation (`int`): Batches of an optimizer step.
        every_batch (`bool`): Whether the processes meet in every forward pass, and not only in every step.

    Raises:
        ValueError: in all processes.
    """
    if accelerator.num_processes == 1 or accelerator.even_batches or not has_length(loader):
        return
    counts = accelerator.gather(torch.tensor([len(loader)], device=accelerator.device)).tolist()
    meetings = {count if every_batch else math.ceil(count / accumulation) for count in counts}
    if len(meetings) > 1:
        raise ValueError(
            f"The processes have {counts} batches an epoch and {accumulation} make a step, so one would wait for "
            "another that is done: leave even_batches on in accelerator_config (the last batches are then filled with "
            "rows from the start of the epoch), or set dataloader_drop_last=True."
        )


def name_blocks_(fsdp_plugin: Any, model: nn.Module) -> None:
    """Tells FSDP to shard a model block by block, where its settings do not say which layers.

    Transformers' own list also names the embeddings of some models, which FSDP2 then shards a second time and fails.

    Args:
        fsdp_plugin (`FullyShardedDataParallelPlugin`): accelerate's settings, changed in place.
        model (`nn.Module`): The student.
    """
    if fsdp_plugin.transformer_cls_names_to_wrap is None:
        names = {type(block.module).__name__ for block in find_blocks(model)}
        fsdp_plugin.transformer_cls_names_to_wrap = sorted(names)


def unreached(loss: torch.Tensor, parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """The parameters that a loss does not depend on.

    Args:
        loss (`torch.Tensor` of shape `()`): With its graph.
        parameters (sequence of `nn.Parameter`): To choose from.

    Returns:
        `list[nn.Parameter]`: In their order.
    """
    seen, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo.extend(following for following, _ in node.next_functions)
    return [parameter for parameter in parameters if get_gradient_edge(parameter).node not in seen]


class ProcessesMixin:
    """What a `Trainer` does so that several processes train as one would.

    Copies of a model wait for the gradients of all parameters of their outputs, and FSDP gathers a block's weights
    when the gradient of its output arrives. A loss that leaves outputs out has to name them with the factor 0. The
    zeros that a copy's parameters get so are taken away again: an optimizer skips what has no gradient, but would
    decay what has one of 0, and count the step.
    """

    stages: list[Stage]
    projections: nn.ModuleDict

    def _prepare_processes(self) -> None:
        """To be called by the constructor, once there are stages and projections."""
        self._check_processes()
        self._unreached: dict[tuple[int, tuple[str, ...]], list[nn.Parameter]] = {}
        self._idle: list[nn.Parameter] = []
        if self.is_fsdp_enabled:
            name_blocks_(self.accelerator.state.fsdp_plugin, self.model)

    def _check_processes(self) -> None:
        terms = [term for stage in self.stages for term in stage.terms]
        if self.args.n_gpu > 1 and terms:
            raise ValueError(
                f"One process on {self.args.n_gpu} devices copies the student in every step, so its hidden states "
                "cannot be read: start with `accelerate launch`, one process per device, or leave the terms out."
            )
        if self._is_reentrant and any(term.signal_kind == "qkv" for term in terms):
            raise ValueError(
                "activation_checkpointing_kwargs={'use_reentrant': True} runs each layer without a graph at first, so "
                "its queries, keys and values would get no gradient: leave it out, or use terms on hidden states."
            )
        if self.is_deepspeed_enabled and self.args.logits_chunk:
            raise ValueError(
                f"logits_chunk={self.args.logits_chunk} applies the output layer once per chunk, and DeepSpeed would "
                "gather its weights each time in all processes, which have different numbers of chunks: set "
                "logits_chunk=0, or train with FSDP or data-parallel."
            )
        if not self.is_fsdp_enabled and not self.is_deepspeed_enabled:
            return
        if self.projections:
            raise ValueError(
                f"The terms need projections of widths ({', '.join(self.projections)}), which are no part of the "
                "student and cannot be sharded with it: use terms that need none (relations, attention_kl, distance, "
                "angle), a student of the teacher's width, or plain data-parallel training."
            )
        if self.args.log_gradient_shares:
            raise ValueError(
                "log_gradient_shares=True needs the student's whole weights in each process, but FSDP and DeepSpeed "
                "spread them: switch it off, or measure the shares in a short data-parallel training."
            )

    @property
    def _is_reentrant(self) -> bool:
        kwargs = self.args.activation_checkpointing_kwargs or {}
        return bool(self.args.activation_checkpointing and kwargs.get("use_reentrant"))

    def _reach_all(self, loss: torch.Tensor, outputs: Mapping[str, Any], names: tuple[str, ...]) -> torch.Tensor:
        """A loss whose graph holds all outputs, where what wraps the model would else wait for them."""
        is_replicated = self.args.world_size > 1 and not self.is_fsdp_enabled and not self.is_deepspeed_enabled
        finds_unused = not is_replicated or self.accelerator.ddp_handler.find_unused_parameters
        is_wrapped = self.args.world_size > 1 or self.is_fsdp_enabled
        if not is_wrapped or ({KD, TASK} & set(names) and finds_unused):
            return loss
        if is_replicated:
            place = (self._place()[0], names)
            if place not in self._unreached:
                parameters = [p for p in self.model.parameters() if p.requires_grad]
                # Re-entrant checkpointing hides what a layer depends on.
                self._unreached[place] = [] if self._is_reentrant else unreached(loss, parameters)
            self._idle = self._unreached[place]
        tensors = [value for value in outputs.values() if isinstance(value, torch.Tensor) and value.requires_grad]
        return loss + sum(0.0 * value.flatten()[0] for value in tensors)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # The last thing before the optimizer, whether or not gradients are clipped.
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        for parameter in self._idle:
            # A layer that is dropped at random may have been part of another process's loss.
            if parameter.grad is not None and not parameter.grad.any():
                parameter.grad = None
        self._idle = []
        return grad_norm
