"""Fixed-point numbers: x = s (q - z), with integers q of a few bits, and s a power of two or any number.

With s = 2^-n, n is the number of fraction bits: of a number in b bits, one is for the sign and n stand behind the
binary point, which is written Qm.n with m = b - 1 - n. Zero is always a number of the format, exactly.
"""

from typing import Literal

import torch
from torch.nn.functional import pad

from hf_compress.formats.bits import pack_bits, unpack_bits
from hf_compress.formats.int8_kernels import bytes_pay

SMALLEST_BITS, LARGEST_BITS = 2, 16

ScaleKind = Literal["float32", "bfloat16", "power_of_two"]

# Powers of two in float32 that are neither subnormal nor infinite, as fraction bits.
_FRACTION_BITS = (-127, 126)


def integer_range(bits: int, symmetric: bool) -> tuple[int, int]:
    """The smallest and the largest integer of a format.

    Args:
        bits (`int`): Bits per number.
        symmetric (`bool`): Whether the range is the same on both sides of zero, and z = 0.

    Returns:
        `tuple[int, int]`: -(2^(b-1) - 1) and 2^(b-1) - 1 if symmetric, else -2^(b-1) and 2^(b-1) - 1.
    """
    half = 1 << (bits - 1)
    return (1 - half if symmetric else -half), half - 1


def fit_scales(
    lower: torch.Tensor, upper: torch.Tensor, bits: int, symmetric: bool, kind: ScaleKind
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points with which the integers just cover ranges of numbers.

    s = max(|lower|, |upper|) / (2^(b-1) - 1) if symmetric, else s = (upper - lower) / (2^b - 1), of a range that is
    widened to hold 0, and z the nearest integer to -2^(b-1) - lower / s.

    Args:
        lower (`torch.Tensor`): The smallest numbers, of any shape.
        upper (`torch.Tensor`): The largest numbers, of the same shape.
        bits (`int`): Bits per number, 2 to 16.
        symmetric (`bool`): Whether z = 0.
        kind (`str`): What scales are rounded up to: numbers in `"float32"` or `"bfloat16"`, or powers of two.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Scales in float32, above zero, 1 where the range is 0 alone, and zero
        points in int32, both of the shape of the ranges.
    """
    lower, upper = lower.float().clamp(max=0), upper.float().clamp(min=0)
    lowest, highest = integer_range(bits, symmetric)
    if symmetric:
        widest = torch.maximum(-lower, upper) / highest
    else:
        # Each is divided first: their difference may be beyond float32.
        widest = upper / (highest - lowest) - lower / (highest - lowest)
    scales = torch.where(widest == 0, 1.0, widest.clamp(min=torch.finfo(torch.float32).tiny))
    if kind == "bfloat16":
        scales = _up_to_bfloat16(scales)
    elif kind == "power_of_two":
        scales = power_of_two(fraction_bits(scales))
    if symmetric:
        return scales, torch.zeros_like(scales, dtype=torch.int32)
    return scales, (lowest - lower / scales).round().clamp(lowest, highest).to(torch.int32)


def fraction_bits(scales: torch.Tensor) -> torch.Tensor:
    """The most fraction bits with which steps are no finer than given scales: the largest n with 2^-n >= s.

    Args:
        scales (`torch.Tensor`): Steps, above zero.

    Returns:
        `torch.Tensor`: `torch.int8` of the same shape; negative where a step is of several units.
    """
    mantissa, exponent = torch.frexp(scales.float())
    return (-(exponent - (mantissa == 0.5).int())).clamp(*_FRACTION_BITS).to(torch.int8)


def power_of_two(n_fraction_bits: torch.Tensor) -> torch.Tensor:
    """2^-n, exactly.

    Args:
        n_fraction_bits (`torch.Tensor`): Integers, -127 to 126.

    Returns:
        `torch.Tensor`: In float32, of the same shape.
    """
    return ((127 - n_fraction_bits.int()) << 23).view(torch.float32)


def quantize(
    values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int, symmetric: bool
) -> torch.Tensor:
    """The nearest integers of a format: q = round(x / s) + z, within its range.

    Args:
        values (`torch.Tensor`): Numbers, of any shape and dtype.
        scales (`torch.Tensor`): From `fit_scales`; must broadcast to the shape of the values.
        zeros (`torch.Tensor`): Likewise.
        bits (`int`): Bits per number.
        symmetric (`bool`): As for `fit_scales`.

    Returns:
        `torch.Tensor`: In float32, of the shape of the values.
    """
    return (values.float() / scales).round_().add_(zeros).clamp_(*integer_range(bits, symmetric))


def dequantize(integers: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
    """The numbers that integers stand for: x = s (q - z).

    Args:
        integers (`torch.Tensor`): Of any shape and dtype.
        scales (`torch.Tensor`): Must broadcast to that shape.
        zeros (`torch.Tensor`, *optional*): Likewise; `None` stands for 0.

    Returns:
        `torch.Tensor`: In float32, of the same shape.
    """
    # A copy, for `float` would return the argument itself where it is in float32.
    return (integers if zeros is None else integers.to(torch.float32, copy=True).sub_(zeros)) * scales


def to_groups(rows: torch.Tensor, size: int) -> torch.Tensor:
    """Rows cut into groups; the last one is filled with zeros.

    Args:
        rows (`torch.Tensor`): Of shape (..., columns).
        size (`int`): Columns per group.

    Returns:
        `torch.Tensor`: Of shape (..., groups, size), a view where no zeros are needed.
    """
    missing = -rows.shape[-1] % size
    # Filling a row with nothing would copy it.
    return (pad(rows, (0, missing)) if missing else rows).unflatten(-1, (-1, size))


def pack_integers(integers: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers as two's complement in `bits` bits each, see `pack_bits`: plain bytes for 8, pairs of bytes for 16.

    Args:
        integers (`torch.Tensor`): Within the range of the format, of shape (..., columns) and any dtype.
        bits (`int`): Bits per number.

    Returns:
        `torch.Tensor`: `torch.int8` of shape (..., ceil(columns * bits / 8)).
    """
    return pack_bits(integers.to(torch.int32) & ((1 << bits) - 1), bits).view(torch.int8)


def unpack_integers(packed: torch.Tensor, bits: int, length: int) -> torch.Tensor:
    """The integers that `pack_integers` packed.

    Args:
        packed (`torch.Tensor`): Of shape (..., ceil(length * bits / 8)).
        bits (`int`): Bits per number.
        length (`int`): Numbers per row.

    Returns:
        `torch.Tensor`: `torch.int8` up to 8 bits, `torch.int16` for 16, else `torch.int32`, of shape (..., length).
    """
    if bits in (8, 16):
        return packed.view(torch.int8 if bits == 8 else torch.int16)
    codes = unpack_bits(packed.view(torch.uint8), bits, length)
    # A shift to the left brings the sign to where the one to the right copies it from.
    signed, unused = (torch.int8, 8 - bits) if bits < 8 else (torch.int32, 32 - bits)
    return (codes << unused).view(signed) >> unused


def multiply_integers(
    inputs: torch.Tensor, input_zero: torch.Tensor, weights: torch.Tensor, weight_zeros: torch.Tensor, bits: int
) -> torch.Tensor:
    """Sums of products of integers, without any rounding: sum_k (q_x - z_x) (q_w - z_w).

    Args:
        inputs (`torch.Tensor`): Integers q_x in float32, of shape (tokens, inputs).
        input_zero (`torch.Tensor`): z_x, one number.
        weights (`torch.Tensor`): Integers q_w, of shape (outputs, inputs).
        weight_zeros (`torch.Tensor`): z_w, of shape (outputs,) or (1,).
        bits (`int`): The more bits of the two.

    Returns:
        `torch.Tensor`: Integers in float64, of shape (tokens, outputs).
    """
    n_inputs = inputs.shape[-1]
    # On other devices, kernels for bytes take some sizes only; on the CPU, PyTorch's is wrong for one input. The
    # accumulator is of 32 bits.
    fits = bits <= 8 and inputs.device.type == "cpu" and n_inputs > 1 and n_inputs << 14 < 1 << 31
    if not fits or not bytes_pay():
        # Below 2^53, integers in float64 are exact, in whatever order they are summed.
        return (inputs - input_zero).double() @ (weights.double() - weight_zeros[:, None]).T
    numbers = inputs.to(torch.int8)
    products = torch._int_mm(numbers, weights.contiguous().T).double()
    # Sums of bytes are in 64 bits, and have room for what zero points are multiplied by.
    if weight_zeros.any():
        products -= (numbers.sum(-1, keepdim=True) - n_inputs * input_zero.long()) * weight_zeros
    if input_zero.any():
        products -= weights.sum(-1) * input_zero
    return products


def _up_to_bfloat16(values: torch.Tensor) -> torch.Tensor:
    """Positive numbers in float32 rounded up to ones that bfloat16 holds."""
    rounded = ((values.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)
    return rounded.clamp(max=torch.finfo(torch.bfloat16).max)
