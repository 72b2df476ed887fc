"""Eight-bit integers: weights per output channel, activations per token while the model runs."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import nn

from hf_compress.formats.packed import PackedLinear

LARGEST = 127


def quantize_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds each row to the nearest multiple of its own scale: q = round(x / s), s = max |x| / 127.

    Args:
        rows (`torch.Tensor`): Of shape (..., columns).

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The integers, -127 to 127, as `torch.int8` of the same shape, and the
        scales, in float32 of shape (..., 1); that of a row of zeros is 1.
    """
    scales = rows.abs().amax(-1, keepdim=True).float() / LARGEST
    scales = torch.where(scales == 0, 1.0, scales)
    return (rows.float() / scales).round_().to(torch.int8), scales


class Int8Linear(PackedLinear):
    """y = (q_x q_w^T) s_x s_w + b, with q_x rounded anew for each token, whatever else is in the batch."""

    format = "int8"

    def __init__(self, in_features: int, out_features: int, bias: bool, device=None, dtype=None, **fields: Any):
        super().__init__(in_features, out_features, bias, device, dtype, **fields)
        self.register_buffer("weight", torch.empty(1, out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("weight_scale", torch.empty(out_features, dtype=torch.float32, device=device))

    @staticmethod
    def check_fields(fields: Mapping[str, Any]) -> None:
        """There are none."""
        if fields:
            raise ValueError(f"int8 has no fields {', '.join(fields)}: leave them out.")

    @classmethod
    def from_float(cls, weight: torch.Tensor, bias: torch.Tensor | None, **fields: Any) -> Self:
        """Rounds each output channel, see `PackedLinear.from_float`."""
        module = cls(weight.shape[1], weight.shape[0], bias is not None, weight.device, weight.dtype, **fields)
        numbers, scales = quantize_rows(weight.detach())
        module.weight, module.weight_scale = numbers[None].contiguous(), scales[:, 0].contiguous()
        if bias is not None:
            module.bias = nn.Parameter(bias.detach().clone())
        return module

    def dequantize(self) -> torch.Tensor:
        """The rounded weights, of shape (outputs, inputs)."""
        return self.weight[0].float() * self.weight_scale[:, None]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Projects hidden states of shape (..., inputs)."""
        numbers, scales = quantize_rows(hidden_states)
        products = torch._int_mm(numbers.flatten(0, -2), self.weight[0].t())
        outputs = products.float() * scales.flatten(0, -2) * self.weight_scale
        if self.bias is not None:
            outputs += self.bias
        return outputs.to(hidden_states.dtype).unflatten(0, hidden_states.shape[:-1])
