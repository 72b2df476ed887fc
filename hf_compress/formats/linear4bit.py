"""The 4-bit projection of bitsandbytes, made to keep exactly the weights that it was given.

Imported only where such a module is needed: bitsandbytes takes seconds to import.
"""

import copy
from collections.abc import Callable
from typing import Any, Self

import torch
from bitsandbytes import nn as bnb_nn
from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as unpacked_for_cpu
from torch import nn


class ExactLinear4bit(bnb_nn.Linear4bit):
    """`bitsandbytes.nn.Linear4bit` that computes the same and loses nothing.

    On a CPU with AVX512-BF16, the first inference of the base class packs the weight anew in place, for a faster
    kernel, and rounds the scales of its blocks to bfloat16. What it saves, trains and moves to another device from
    then on is not what it was given: without double quantization the saved scales are also in another order, so that
    a checkpoint is useless. Its forward casts the bias in place, too. Here, the stored form is remembered while the
    weight is packed, and comes back before anything but an inference.
    """

    _stored_state: Any = None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Projects hidden states of shape (..., inputs)."""
        # The kernel of the packed form computes no gradient.
        if self.training or hidden_states.requires_grad:
            self.unpack_()
        elif hidden_states.device.type == "cpu" and self.support_avx512bf16_for_cpu and not self._is_packed:
            # The tensors of a quantization state are replaced when it is packed, and never written to.
            self._stored_state = copy.copy(self.weight.quant_state)
        bias = None if self.bias is None else self.bias.data
        outputs = super().forward(hidden_states)
        if bias is not None:
            self.bias.data = bias
        return outputs

    def unpack_(self) -> None:
        """Undoes what an inference did to the weight; the next one will do it again."""
        if self._is_packed:
            self.weight.data, _ = unpacked_for_cpu(self.weight.data, self.weight.quant_state)
            self.weight.quant_state = self.quant_state = self._stored_state
            self._stored_state = None

    @property
    def _is_packed(self) -> bool:
        # A flag of the base class, which is only there once a weight was packed.
        return getattr(self.weight.quant_state, "packing_format_for_cpu", False)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.unpack_()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        self.unpack_()
        return super()._apply(fn, recurse)


def make_exact_(model: nn.Module) -> None:
    """Turns every `bitsandbytes.nn.Linear4bit` of a model into an `ExactLinear4bit`, before its first inference.

    Args:
        model (`nn.Module`): A model, possibly on the meta device.
    """
    for module in model.modules():
        if type(module) is bnb_nn.Linear4bit:
            # The subclass adds no tensors, and the weights refer to the module.
            module.__class__ = ExactLinear4bit
