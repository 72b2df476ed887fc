"""Eight-bit integers: weights per output channel, activations per token while the model runs, tables per row."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self

import torch
from torch import nn

from hf_compress.formats.int8_kernels import kernel_for
from hf_compress.formats.int8_operations import LARGEST, Projection
from hf_compress.formats.packed import PackedEmbedding, PackedLinear, version


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


class _Prepared(NamedTuple):
    """What was made of weights and scales, and their versions by then."""

    weight: torch.Tensor
    scales: torch.Tensor
    versions: tuple[tuple[int, int], tuple[int, int]]
    projection: Projection


class Int8Linear(PackedLinear):
    """y = (q_x q_w^T) s_x s_w + b, with q_x rounded anew for each token, whatever else is in the batch.

    A token that holds NaN or infinity gives outputs that are not finite, and touches no other. Gradients pass to x as
    if it had not been rounded, and to b; the weights have none, so that adapters can be trained on top.

    What products on this machine read is made from the weights in the first pass and kept beside them: on a CPU, that
    is a copy of the integers in another order, so that the model takes about two bytes per weight. It is neither saved
    nor copied, and made again when the weights change.
    """

    format = "int8"

    def __init__(self, in_features: int, out_features: int, bias: bool, device=None, dtype=None, **fields: Any):
        super().__init__(in_features, out_features, bias, device, dtype, **fields)
        self.register_buffer("weight", torch.empty(1, out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("weight_scale", torch.empty(out_features, dtype=torch.float32, device=device))
        if fields.get("smooth"):
            self.register_buffer("input_scale", torch.empty(in_features, dtype=torch.float32, device=device))
        self._prepared: _Prepared | None = None

    @staticmethod
    def check_fields(fields: Mapping[str, Any]) -> None:
        """`smooth` where inputs have factors of their own, see `from_smoothed`; it is true or not there."""
        if fields and fields != {"smooth": True}:
            raise ValueError(
                f"int8 has no fields {dict(fields)}, only smooth=True: restore the config.json that the checkpoint "
                "was saved with."
            )

    @classmethod
    def from_float(cls, weight: torch.Tensor, bias: torch.Tensor | None, **fields: Any) -> Self:
        """Rounds each output channel, see `PackedLinear.from_float`; with `smooth`, all factors are 1."""
        module = cls(weight.shape[1], weight.shape[0], bias is not None, weight.device, weight.dtype, **fields)
        numbers, scales = quantize_rows(weight.detach())
        module.weight, module.weight_scale = numbers[None].contiguous(), scales[:, 0].contiguous()
        if fields.get("smooth"):
            module.input_scale = torch.ones(weight.shape[1], device=weight.device)
        if bias is not None:
            module.bias = nn.Parameter(bias.detach().clone())
        return module

    @classmethod
    def from_smoothed(cls, weight: torch.Tensor, bias: torch.Tensor | None, factors: torch.Tensor) -> Self:
        """Rounds weights whose inputs are divided by factors before they are rounded: Y = (X / s) (s W).

        Xiao et al., "SmoothQuant" (2023), equation 3.

        Args:
            weight (`torch.Tensor`): W, of shape (outputs, inputs), finite.
            bias (`torch.Tensor`, *optional*): Of shape (outputs,).
            factors (`torch.Tensor`): s, of shape (inputs,), positive.

        Returns:
            `Int8Linear`: With the field `smooth`.
        """
        # In float32: products of some weights are out of the range of float16.
        module = cls.from_float(weight.float() * factors, bias, smooth=True)
        module.input_scale = factors.float().reciprocal()
        return module

    def dequantize(self) -> torch.Tensor:
        """The rounded weights, of shape (outputs, inputs)."""
        weight = self.weight[0].float() * self.weight_scale[:, None]
        return weight * self.input_scale if "smooth" in self.fields else weight

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Projects hidden states of shape (..., inputs)."""
        if torch.compiler.is_compiling():
            return self._project_uncompiled(hidden_states)
        return self._project_through(hidden_states)

    def _project_through(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            return _StraightThrough.apply(hidden_states, self.bias, self)
        return self._project(hidden_states)

    # A compiled model calls it as it is: torch.compile sees neither versions of tensors nor what our C code does.
    _project_uncompiled = torch.compiler.disable(_project_through)

    def _project(self, hidden_states: torch.Tensor) -> torch.Tensor:
        dtype, shape = hidden_states.dtype, (*hidden_states.shape[:-1], self.out_features)
        if 0 in shape:
            return hidden_states.new_empty(shape)
        states = hidden_states.float() * self.input_scale if "smooth" in self.fields else hidden_states
        outputs = self._projection()(states, self.bias)
        # In a small model, calls that would return the same tensor are some of the time.
        return (outputs if outputs.dtype is dtype else outputs.to(dtype)).view(shape)

    def _projection(self) -> Projection:
        buffers, known = self._buffers, self._prepared
        weight, scales = buffers["weight"], buffers["weight_scale"]
        if (
            known is None
            or known.weight is not weight
            or known.scales is not scales
            or known.versions != (version(weight), version(scales))
        ):
            with torch.no_grad(), torch.inference_mode(False):
                projection = kernel_for(weight.device.type).prepare(weight[0], scales)
            known = self._prepared = _Prepared(weight, scales, (version(weight), version(scales)), projection)
        return known.projection

    def forget_packed_(self) -> None:
        """Gives back the memory of what products read, until the next one."""
        self._prepared = None

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        self._prepared = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._prepared = None
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict[str, Any]:
        # What oneDNN reads can be neither copied nor stored.
        return self.__dict__ | {"_prepared": None}


class _StraightThrough(torch.autograd.Function):
    """An int8 projection that has the gradients of one in floating point with the same weights."""

    @staticmethod
    def forward(ctx, hidden_states, bias, module):
        ctx.module = module
        return module._project(hidden_states)

    @staticmethod
    def backward(ctx, gradient):
        needs_inputs, needs_bias, _ = ctx.needs_input_grad
        inputs = gradient @ ctx.module.dequantize().to(gradient.dtype) if needs_inputs else None
        bias = gradient.flatten(0, -2).sum(0) if needs_bias else None
        return inputs, bias, None


class Int8Embedding(PackedEmbedding):
    """A table with a scale per row: of its rows, those that are looked up are converted."""

    format = "int8_embedding"

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx=None, device=None, dtype=None, **fields):
        super().__init__(num_embeddings, embedding_dim, padding_idx, device, dtype, **fields)
        self.register_buffer("weight", torch.empty(1, num_embeddings, embedding_dim, dtype=torch.int8, device=device))
        self.register_buffer("weight_scale", torch.empty(num_embeddings, dtype=torch.float32, device=device))

    @staticmethod
    def check_fields(fields: Mapping[str, Any]) -> None:
        """There are none."""
        if fields:
            raise ValueError(f"int8_embedding has no fields {', '.join(fields)}: leave them out.")

    @classmethod
    def from_float(cls, weight: torch.Tensor, padding_idx: int | None, **fields: Any) -> Self:
        """Rounds each row, see `PackedEmbedding.from_float`."""
        module = cls(*weight.shape, padding_idx, weight.device, weight.dtype, **fields)
        numbers, scales = quantize_rows(weight.detach())
        module.weight, module.weight_scale = numbers[None].contiguous(), scales[:, 0].contiguous()
        return module

    def dequantize(self) -> torch.Tensor:
        """The rounded table, of shape (tokens, channels)."""
        return self.weight[0].float() * self.weight_scale[:, None]

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Looks up rows: of ids of any shape, (..., channels)."""
        rows = self.weight[0][input_ids].float() * self.weight_scale[input_ids][..., None]
        return rows.to(self._like.dtype)
