"""Tensors without their zeros, exactly."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hf_compress.formats.bits import packed_width

# NumPy finds and places numbers several times faster than PyTorch, but has no bfloat16: it sees plain integers.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# Bytes of a bitmask that are unpacked at a time: positions are numbers of 64 bits, which would fill memory and caches.
_CHUNK = 1 << 15

# Bytes that an arena takes at a time. NumPy asks for large pages from 4 MiB on.
_PIECE = 1 << 25


class Arena:
    """Memory for arrays that come and go together, taken from the system in large pieces.

    Writing to fresh memory takes as long as unpacking into it where the system hands it out in pages of 4 KiB, and a
    fraction of that in the large pages that large pieces get. A piece is given back when none of its arrays is used.
    """

    def __init__(self) -> None:
        self._piece = np.empty(0, np.uint8)

    def empty(self, n: int, dtype: np.dtype) -> np.ndarray:
        """An array whose elements are not set.

        Args:
            n (`int`): How many elements.
            dtype (`np.dtype`): Their type.

        Returns:
            `np.ndarray`: Of one dimension.
        """
        n_bytes = n * dtype.itemsize
        if n_bytes > len(self._piece):
            self._piece = np.empty(max(n_bytes, _PIECE), np.uint8)
        array, self._piece = self._piece[:n_bytes], self._piece[n_bytes + -n_bytes % 64 :]
        return array.view(dtype)


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


def unpack_sparse(
    values: torch.Tensor, bitmask: torch.Tensor, shape: Sequence[int], arena: Arena | None = None
) -> torch.Tensor:
    """The dense tensor, bit for bit, that `pack_sparse` left the zeros out of.

    Args:
        values (`torch.Tensor`): The elements that are stored.
        bitmask (`torch.Tensor`): Where they belong.
        shape (`Sequence[int]`): The shape of the dense tensor; nothing else decides how much memory is taken.
        arena (`Arena`, *optional*): Where that memory is; its own without.

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
    take = arena.empty if arena else np.empty
    dense = take(math.prod(shape), source.dtype)
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


def _as_integers(tensor: torch.Tensor) -> Any:
    """The elements as a flat NumPy array, which shares its memory with a contiguous tensor on the CPU."""
    return tensor.detach().cpu().contiguous().view(-1).view(_INTEGERS[tensor.element_size()]).numpy()


def _check_sparse(values: torch.Tensor, bitmask: torch.Tensor, shape: tuple[int, ...], n_columns: int) -> None:
    expected = (*shape[:-1], packed_width(n_columns, 1))
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
