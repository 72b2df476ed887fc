"""Tensors in fewer bytes: without their zeros, or with few bits per number; both ways exact.

In every layout, bits are counted from the least significant one of the first byte.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad

# NumPy finds and places numbers several times faster than PyTorch, but has no bfloat16: it sees plain integers.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# Bytes of a bitmask that are unpacked at a time: positions are numbers of 64 bits, which would fill memory and caches.
_CHUNK = 1 << 15


def pack_sparse(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Leaves out the zeros of a tensor.

    A zero is an element whose bits are all 0. What else may count as one, -0.0 and NaN, is stored bit for bit.

    Args:
        tensor (`torch.Tensor`): Of shape `(..., columns)` and any type of 1, 2, 4 or 8 bytes; a number is one column.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The other elements, row after row, in one dimension and the same type; and
        a bitmask, `uint8` of shape `(..., ceil(columns / 8))`, in which bit `i % 8` of byte `i // 8` of a row says
        whether its element `i` is stored. The bits that fill the last byte of a row are 0. Both are on the CPU.
    """
    integers = _as_integers(tensor)
    is_stored = integers != 0
    values = torch.from_numpy(integers[np.flatnonzero(is_stored)]).view(tensor.dtype)
    bitmask = np.packbits(is_stored.reshape(tensor.shape or 1), axis=-1, bitorder="little")
    return values, torch.from_numpy(bitmask)


def unpack_sparse(values: torch.Tensor, bitmask: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The dense tensor, bit for bit, that `pack_sparse` left the zeros out of.

    Args:
        values (`torch.Tensor`): The elements that are stored.
        bitmask (`torch.Tensor`): Where they belong.
        shape (`Sequence[int]`): The shape of the dense tensor; nothing else decides how much memory is taken.

    Returns:
        `torch.Tensor`: On the CPU.

    Raises:
        ValueError: if the three do not fit each other.
    """
    shape = tuple(shape)
    n_columns = shape[-1] if shape else 1
    _check_sparse(values, bitmask, shape, n_columns)
    source = _as_integers(values)
    rows = bitmask.cpu().numpy().reshape(-1, max(1, bitmask.shape[-1]))
    dense = np.empty(math.prod(shape), source.dtype)
    n_rows = max(1, _CHUNK // rows.shape[1])
    first = 0
    for start in range(0, len(rows), n_rows):
        chunk = rows[start : start + n_rows]
        positions = np.flatnonzero(np.unpackbits(chunk, axis=-1, count=n_columns, bitorder="little").view(bool))
        part = dense[start * n_columns : (start + n_rows) * n_columns]
        part[:] = 0
        part[positions] = source[first : first + len(positions)]
        first += len(positions)
    return torch.from_numpy(dense).view(values.dtype).view(shape)


def pack_bits(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs small integers, each row of its own.

    Args:
        numbers (`torch.Tensor`): Integers from 0 to `2 ** bits - 1`, of shape `(..., columns)`.
        bits (`int`): Bits per number, from 1 to 8.

    Returns:
        `torch.Tensor`: `uint8` of shape `(..., ceil(columns * bits / 8))` on the same device. In a row, number `i`
        takes the bits from `i * bits` on, its least significant bit first, and may cross from one byte to the next;
        the bits that fill the last byte are 0.

    Raises:
        ValueError: if a number or `bits` is out of range.
        TypeError: if the numbers are no integers.
    """
    _check_bits(bits)
    if numbers.is_floating_point() or numbers.is_complex():
        raise TypeError(f"Numbers of type {numbers.dtype} cannot be packed: round them to integers first.")
    if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < 1 << bits:
        raise ValueError(
            f"Numbers from {int(numbers.min())} to {int(numbers.max())} do not fit into bits={bits}, which hold 0 to "
            f"{(1 << bits) - 1}: subtract the smallest one, or take more bits."
        )
    # Eight numbers fill `bits` bytes whatever `bits` is, and these are at most the 8 bytes of one int64.
    n_columns = numbers.shape[-1]
    n_groups = -(-n_columns // 8)
    groups = pad(numbers.to(torch.uint8), (0, 8 * n_groups - n_columns)).unflatten(-1, (n_groups, 8))
    words = sum(groups[..., i].long() << bits * i for i in range(8))
    packed = torch.stack([(words >> 8 * i & 255).to(torch.uint8) for i in range(bits)], dim=-1)
    return packed.flatten(-2)[..., : _n_bytes(n_columns, bits)].contiguous()


def unpack_bits(packed: torch.Tensor, bits: int, length: int) -> torch.Tensor:
    """The integers that `pack_bits` packed.

    Args:
        packed (`torch.Tensor`): What `pack_bits` returned, of shape `(..., ceil(length * bits / 8))`.
        bits (`int`): Bits per number, from 1 to 8.
        length (`int`): Numbers per row.

    Returns:
        `torch.Tensor`: `uint8` of shape `(..., length)` on the same device.

    Raises:
        ValueError: if the three do not fit each other.
    """
    _check_bits(bits)
    n_bytes = _n_bytes(length, bits)
    if packed.dtype != torch.uint8 or packed.shape[-1] != n_bytes:
        raise ValueError(
            f"Rows of {packed.shape[-1]} elements of type {packed.dtype} do not hold {length} numbers of {bits} bits, "
            f"which are {n_bytes} bytes of type torch.uint8: the file was damaged, or length or bits is another's."
        )
    n_groups = -(-length // 8)
    groups = pad(packed, (0, bits * n_groups - n_bytes)).unflatten(-1, (n_groups, bits))
    words = sum(groups[..., i].long() << 8 * i for i in range(bits))
    numbers = torch.stack([(words >> bits * i & (1 << bits) - 1).to(torch.uint8) for i in range(8)], dim=-1)
    return numbers.flatten(-2)[..., :length].contiguous()


def _as_integers(tensor: torch.Tensor) -> Any:
    """The elements as a flat NumPy array, which shares its memory with a contiguous tensor on the CPU."""
    return tensor.detach().cpu().contiguous().view(-1).view(_INTEGERS[tensor.element_size()]).numpy()


def _n_bytes(length: int, bits: int) -> int:
    return -(-length * bits // 8)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits={bits} per number cannot be packed: give 1 to 8.")


def _check_sparse(values: torch.Tensor, bitmask: torch.Tensor, shape: tuple[int, ...], n_columns: int) -> None:
    expected = (*shape[:-1], _n_bytes(n_columns, 1))
    if values.ndim != 1 or bitmask.dtype != torch.uint8 or bitmask.shape != expected:
        raise ValueError(
            f"A sparse tensor of shape {shape} has a bitmask of shape {expected} and type torch.uint8 and values of "
            f"one dimension, not {tuple(bitmask.shape)}, {bitmask.dtype} and {tuple(values.shape)}: the file belongs "
            "to another model or was damaged, so get it again."
        )
    mask = bitmask.cpu().numpy()
    n_set = int(np.bitwise_count(mask).sum())
    if n_set != len(values) or (n_columns % 8 and (mask[..., -1] >> n_columns % 8).any()):
        raise ValueError(
            f"The bitmask of a sparse tensor of shape {shape} marks {n_set} elements, but {len(values)} values are "
            "stored, or it marks some beyond the end of a row: the file was damaged, so get it again."
        )
