"""Modules with fixed-point weights, on their own or together with fixed-point activations."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import nn
from torch.nn.functional import linear

from hf_compress.formats.bits import packed_width
from hf_compress.formats.fixed_point import (
    LARGEST_BITS,
    SMALLEST_BITS,
    ScaleKind,
    dequantize,
    fit_scales,
    fraction_bits,
    multiply_integers,
    pack_integers,
    power_of_two,
    quantize,
    to_groups,
    unpack_integers,
)
from hf_compress.formats.packed import PackedEmbedding, PackedLinear
from hf_compress.formats.products import spoil_

GRANULARITIES = ("per_channel", "per_tensor", "group")

Scales = tuple[torch.Tensor, torch.Tensor]
"""Scales and zero points, from `fit_scales`."""


def scale_kind(fields: Mapping[str, Any]) -> ScaleKind:
    """How precise the scales of weights are: those of groups are many, and take two bytes each.

    Args:
        fields (`Mapping[str, Any]`): As in config.json.

    Returns:
        `str`: See `fit_scales`.
    """
    if fields["power_of_two"]:
        return "power_of_two"
    return "bfloat16" if fields["granularity"] == "group" else "float32"


def group_size(fields: Mapping[str, Any], n_columns: int) -> int:
    """How many weights of a row share a scale, where its rows do not share one.

    Args:
        fields (`Mapping[str, Any]`): As in config.json.
        n_columns (`int`): Weights per row.

    Returns:
        `int`: At most `n_columns`, which it is unless the granularity is `"group"`.
    """
    return min(fields.get("group_size", n_columns), n_columns)


def weight_groups(weight: torch.Tensor, fields: Mapping[str, Any]) -> torch.Tensor:
    """The weights that share a scale, side by side.

    Args:
        weight (`torch.Tensor`): Of shape (rows, columns).
        fields (`Mapping[str, Any]`): As in config.json.

    Returns:
        `torch.Tensor`: Of shape (rows, groups, group size), (rows, 1, columns) or, per tensor, (1, 1, all); the last
        group of a row is filled with zeros.
    """
    if fields["granularity"] == "per_tensor":
        return weight.reshape(1, 1, -1)
    return to_groups(weight, group_size(fields, weight.shape[1]))


def minmax_scales(weight: torch.Tensor, fields: Mapping[str, Any]) -> Scales:
    """Scales with which no weight is clipped.

    Args:
        weight (`torch.Tensor`): Of shape (rows, columns).
        fields (`Mapping[str, Any]`): As in config.json.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Scales and zero points, of shape (rows, groups), (rows, 1) or (1, 1).
    """
    lower, upper = weight_groups(weight.detach(), fields).aminmax(dim=-1)
    return fit_scales(lower, upper, fields["bits"], fields["symmetric"], scale_kind(fields))


class _FixedPointWeight:
    """What projections and tables share: integers, scales and zero points of a matrix of rows and columns."""

    def _register_weight(self, n_rows: int, n_columns: int, device: torch.device | str | None) -> None:
        fields = self.fields
        n_groups = -(-n_columns // group_size(fields, n_columns))
        shape = (1, 1) if fields["granularity"] == "per_tensor" else (n_rows, n_groups)
        n_bytes = packed_width(n_columns, fields["bits"])
        self.register_buffer("weight", torch.empty(1, n_rows, n_bytes, dtype=torch.int8, device=device))
        name, dtype = _SCALE_BUFFERS[scale_kind(fields)]
        self.register_buffer(f"weight_{name}", torch.empty(shape, dtype=dtype, device=device))
        if not fields["symmetric"]:
            self.register_buffer("weight_zero", torch.empty(shape, dtype=torch.int16, device=device))

    def _write_weight_(self, weight: torch.Tensor, scales: Scales) -> None:
        fields, (steps, zeros) = self.fields, scales
        groups = to_groups(weight.detach(), group_size(fields, weight.shape[1]))
        integers = quantize(groups, steps[..., None], zeros[..., None], fields["bits"], fields["symmetric"])
        self.weight = pack_integers(integers.flatten(1)[:, : weight.shape[1]], fields["bits"])[None]
        kind = scale_kind(fields)
        setattr(self, f"weight_{_SCALE_BUFFERS[kind][0]}", _store_scales(steps, kind))
        if not fields["symmetric"]:
            self.weight_zero = zeros.to(torch.int16)

    def weight_scales(self) -> torch.Tensor:
        """The step of each channel or group, in float32 of shape (rows, groups), (rows, 1) or, per tensor, (1, 1)."""
        kind = scale_kind(self.fields)
        return _load_scales(getattr(self, f"weight_{_SCALE_BUFFERS[kind][0]}"), kind)

    def weight_zeros(self) -> torch.Tensor | None:
        """The zero points, of the same shape; `None` where the format is symmetric."""
        return None if self.fields["symmetric"] else self.weight_zero

    def _dequantize(self, packed: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, length: int):
        groups = to_groups(unpack_integers(packed, self.fields["bits"], length), group_size(self.fields, length))
        numbers = dequantize(groups, scales[..., None], None if zeros is None else zeros[..., None])
        return numbers.flatten(-2)[..., :length]


class FixedPointLinear(_FixedPointWeight, PackedLinear):
    """y = x W^T + b with W in fixed point; with activations in fixed point, too, a product of integers.

    Without activations, W is converted to the dtype of x in every pass and not kept: the model stays small, and the
    product itself is that of a model in floating point. With them, x is rounded by a step that was measured once, and

        y = s_x sum_g s_g sum_(k in g) (q_x - z_x) (q_w - z_w) + b,

    with one group g per scale and output: the inner sum is exact, the outer one is in float64, and y is rounded to
    float32 once. That needs a device with float64, which not every accelerator has: MPS does not. A token that holds
    NaN or infinity gives outputs that are not finite, and touches no other.
    """

    format = "fixed_point"

    def __init__(self, in_features: int, out_features: int, bias: bool, device=None, dtype=None, **fields: Any):
        super().__init__(in_features, out_features, bias, device, dtype, **fields)
        self._register_weight(out_features, in_features, device)
        if "activation_bits" in fields:
            name, kind = _SCALE_BUFFERS[_input_kind(fields)]
            self.register_buffer(f"input_{name}", torch.empty(1, dtype=kind, device=device))
            if not fields["symmetric"]:
                self.register_buffer("input_zero", torch.empty(1, dtype=torch.int16, device=device))

    @staticmethod
    def check_fields(fields: Mapping[str, Any]) -> None:
        """Those of the weights, and `activation_bits` where activations are in fixed point."""
        _check_fields(fields, optional=("activation_bits",))

    @classmethod
    def from_float(cls, weight: torch.Tensor, bias: torch.Tensor | None, **fields: Any) -> Self:
        """Rounds the weights so that none is clipped; for activations, see `from_scales`."""
        cls.check_fields(fields)
        return cls.from_scales(weight, bias, minmax_scales(weight, fields), **fields)

    @classmethod
    def from_scales(
        cls,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        weight_scales: Scales,
        input_scales: Scales | None = None,
        **fields: Any,
    ) -> Self:
        """Rounds the weights with given scales.

        Args:
            weight (`torch.Tensor`): Of shape (outputs, inputs), finite.
            bias (`torch.Tensor`, *optional*): Of shape (outputs,).
            weight_scales (`tuple[torch.Tensor, torch.Tensor]`): From `fit_scales`, of the kind `scale_kind(fields)`;
                of the shape that `minmax_scales` gives.
            input_scales (`tuple[torch.Tensor, torch.Tensor]`, *optional*): Those of the activations, of shape (1,).
            **fields: As in config.json.

        Returns:
            `FixedPointLinear`: On the same device; the arguments are not changed.

        Raises:
            ValueError: if the fields are unknown or out of range, or scales of activations are missing or too many.
        """
        module = cls(weight.shape[1], weight.shape[0], bias is not None, weight.device, weight.dtype, **fields)
        if (input_scales is None) != ("activation_bits" not in fields):
            raise ValueError(
                f"activation_bits={fields.get('activation_bits')}, but input_scales={input_scales}: activations in "
                "fixed point have both, others neither."
            )
        module._write_weight_(weight, weight_scales)
        if input_scales is not None:
            kind = _input_kind(fields)
            setattr(module, f"input_{_SCALE_BUFFERS[kind][0]}", _store_scales(input_scales[0], kind))
            if not fields["symmetric"]:
                module.input_zero = input_scales[1].to(torch.int16)
        if bias is not None:
            module.bias = nn.Parameter(bias.detach().clone())
        return module

    def dequantize(self) -> torch.Tensor:
        """The rounded weights, of shape (outputs, inputs)."""
        return self._dequantize(self.weight[0], self.weight_scales(), self.weight_zeros(), self.in_features)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Projects hidden states of shape (..., inputs)."""
        if "activation_bits" not in self.fields:
            return linear(hidden_states, self.dequantize().to(hidden_states.dtype), self.bias)
        tokens = hidden_states.flatten(0, -2)
        outputs = spoil_(self._multiply(tokens).float(), tokens)
        if self.bias is not None:
            outputs += self.bias
        return outputs.to(hidden_states.dtype).unflatten(0, hidden_states.shape[:-1])

    def input_scales(self) -> Scales:
        """Step and zero point of the activations, each of shape (1,)."""
        kind = _input_kind(self.fields)
        scale = _load_scales(getattr(self, f"input_{_SCALE_BUFFERS[kind][0]}"), kind)
        return scale, torch.zeros_like(scale, dtype=torch.int16) if self.fields["symmetric"] else self.input_zero

    def _multiply(self, tokens: torch.Tensor) -> torch.Tensor:
        fields = self.fields
        scale, zero = self.input_scales()
        numbers = quantize(tokens, scale, zero, fields["activation_bits"], fields["symmetric"])
        weights = unpack_integers(self.weight[0], fields["bits"], self.in_features)
        steps, zeros = self.weight_scales(), self.weight_zeros()
        zeros = torch.zeros_like(steps, dtype=torch.int16) if zeros is None else zeros
        bits = max(fields["bits"], fields["activation_bits"])
        total = tokens.new_zeros(len(tokens), self.out_features, dtype=torch.float64)
        size = group_size(fields, self.in_features)
        for group, start in enumerate(range(0, self.in_features, size)):
            part = slice(start, start + size)
            products = multiply_integers(numbers[:, part], zero, weights[:, part], zeros[:, group], bits)
            total += products.mul_(steps[:, group].double())
        return total.mul_(scale.double())


class FixedPointEmbedding(_FixedPointWeight, PackedEmbedding):
    """A table in fixed point: of its rows, those that are looked up are converted."""

    format = "fixed_point_embedding"

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx=None, device=None, dtype=None, **fields):
        super().__init__(num_embeddings, embedding_dim, padding_idx, device, dtype, **fields)
        self._register_weight(num_embeddings, embedding_dim, device)

    @staticmethod
    def check_fields(fields: Mapping[str, Any]) -> None:
        """Bits, granularity, and whether ranges are symmetric and steps powers of two."""
        _check_fields(fields)

    @classmethod
    def from_float(cls, weight: torch.Tensor, padding_idx: int | None, **fields: Any) -> Self:
        """Rounds the rows so that no number is clipped."""
        cls.check_fields(fields)
        return cls.from_scales(weight, padding_idx, minmax_scales(weight, fields), **fields)

    @classmethod
    def from_scales(cls, weight: torch.Tensor, padding_idx: int | None, weight_scales: Scales, **fields: Any) -> Self:
        """Rounds the rows with given scales, see `FixedPointLinear.from_scales`."""
        module = cls(*weight.shape, padding_idx, weight.device, weight.dtype, **fields)
        module._write_weight_(weight, weight_scales)
        return module

    def dequantize(self) -> torch.Tensor:
        """The rounded table, of shape (tokens, channels)."""
        return self._dequantize(self.weight[0], self.weight_scales(), self.weight_zeros(), self.embedding_dim)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Looks up rows: of ids of any shape, (..., channels)."""
        rows, zeros = [
            values if values is None or len(values) == 1 else values[input_ids]
            for values in (self.weight_scales(), self.weight_zeros())
        ]
        return self._dequantize(self.weight[0][input_ids], rows, zeros, self.embedding_dim).to(self._like.dtype)


# By kind: the name that the buffers end in, and the type of what they hold. A type of floating point that is not
# float32 would not survive: the loader casts weights that must stay in float32 by their names.
_SCALE_BUFFERS = {
    "float32": ("scale", torch.float32),
    "bfloat16": ("scale_bfloat16", torch.int16),
    "power_of_two": ("fraction_bits", torch.int8),
}


def _store_scales(scales: torch.Tensor, kind: ScaleKind) -> torch.Tensor:
    if kind == "power_of_two":
        return fraction_bits(scales)
    return scales.to(torch.bfloat16).view(torch.int16) if kind == "bfloat16" else scales.clone()


def _load_scales(stored: torch.Tensor, kind: ScaleKind) -> torch.Tensor:
    if kind == "power_of_two":
        return power_of_two(stored)
    return stored.view(torch.bfloat16).float() if kind == "bfloat16" else stored


def _input_kind(fields: Mapping[str, Any]) -> ScaleKind:
    return "power_of_two" if fields["power_of_two"] else "float32"


def _check_fields(fields: Mapping[str, Any], optional: tuple[str, ...] = ()) -> None:
    def is_width(value: Any, least: int) -> bool:
        return type(value) is int and least <= value <= LARGEST_BITS

    size = fields.get("group_size")
    sound = (
        {"bits", "granularity", "symmetric", "power_of_two"}
        <= fields.keys()
        <= {"bits", "granularity", "symmetric", "power_of_two", "group_size", *optional}
        and is_width(fields["bits"], SMALLEST_BITS)
        and fields["granularity"] in GRANULARITIES
        and ((type(size) is int and size >= 1) if fields["granularity"] == "group" else "group_size" not in fields)
        and all(type(fields[name]) is bool for name in ("symmetric", "power_of_two"))
        and is_width(fields.get("activation_bits", SMALLEST_BITS), SMALLEST_BITS)
    )
    if not sound:
        raise ValueError(
            f"The fields {dict(fields)!r} describe no fixed-point format: it has bits from {SMALLEST_BITS} to "
            f"{LARGEST_BITS}, a granularity of {', '.join(GRANULARITIES)}, symmetric and power_of_two, for groups a "
            "group_size, and for a projection it may have activation_bits. Restore the config.json that the "
            "checkpoint was saved with."
        )
