"""Small integers in as many bits as they need; bits are counted from the least significant one of the first byte."""

import math

import torch
from torch.nn.functional import pad

LARGEST = 16


def pack_bits(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs small integers, each row of its own.

    Args:
        numbers (`torch.Tensor`): Integers from 0 to `2 ** bits - 1`, of shape `(..., columns)`.
        bits (`int`): Bits per number, from 1 to 16.

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
    n_columns = numbers.shape[-1]
    n_numbers, n_bytes = _period(bits)
    groups = _grouped(numbers.to(_working_dtype(bits)), n_numbers)
    octets = [
        # The shift drops what lies below the byte, the conversion what lies above.
        sum(_shifted(groups[..., i], bits * i - 8 * j) for i in _overlapping(j, 8, bits, n_numbers)).to(torch.uint8)
        for j in range(n_bytes)
    ]
    return torch.stack(octets, dim=-1).flatten(-2)[..., : packed_width(n_columns, bits)].contiguous()


def unpack_bits(packed: torch.Tensor, bits: int, length: int) -> torch.Tensor:
    """The integers that `pack_bits` packed.

    Args:
        packed (`torch.Tensor`): What `pack_bits` returned, of shape `(..., ceil(length * bits / 8))`.
        bits (`int`): Bits per number, from 1 to 16.
        length (`int`): Numbers per row.

    Returns:
        `torch.Tensor`: Of shape `(..., length)` on the same device: `uint8` up to 8 bits, else `int32`.

    Raises:
        ValueError: if the three do not fit each other.
    """
    _check_bits(bits)
    if packed.dtype != torch.uint8 or packed.shape[-1] != packed_width(length, bits):
        raise ValueError(
            f"Rows of {packed.shape[-1]} elements of type {packed.dtype} do not hold {length} numbers of {bits} bits, "
            f"which are {packed_width(length, bits)} bytes of type torch.uint8: the file was damaged, or length or "
            "bits is another's."
        )
    n_numbers, n_bytes = _period(bits)
    groups = _grouped(packed.to(_working_dtype(bits)), n_bytes)
    numbers = [
        sum(_shifted(groups[..., j], 8 * j - bits * i) for j in _overlapping(i, bits, 8, n_bytes)) & (1 << bits) - 1
        for i in range(n_numbers)
    ]
    return torch.stack(numbers, dim=-1).flatten(-2)[..., :length].contiguous()


def packed_width(length: int, bits: int) -> int:
    """Bytes in a packed row.

    Args:
        length (`int`): Numbers per row.
        bits (`int`): Bits per number.

    Returns:
        `int`: ceil(length * bits / 8).
    """
    return -(-length * bits // 8)


def _period(bits: int) -> tuple[int, int]:
    """The fewest numbers that fill whole bytes, and the bytes that they fill."""
    divisor = math.gcd(bits, 8)
    return 8 // divisor, bits // divisor


def _grouped(rows: torch.Tensor, size: int) -> torch.Tensor:
    missing = -rows.shape[-1] % size
    # The number of groups is given, because it cannot be told from rows of length 0.
    n_groups = -(-rows.shape[-1] // size)
    return (pad(rows, (0, missing)) if missing else rows).unflatten(-1, (n_groups, size))


def _overlapping(index: int, width: int, other_width: int, n_others: int) -> range:
    """Of fields that are `other_width` bits wide, those that share bits with a field of `width` bits."""
    return range(index * width // other_width, min(n_others, -(-(index + 1) * width // other_width)))


def _shifted(numbers: torch.Tensor, places: int) -> torch.Tensor:
    return numbers << places if places >= 0 else numbers >> -places


def _working_dtype(bits: int) -> torch.dtype:
    # Bits that a shift pushes out of eight are not wanted, and small numbers are shifted fast.
    return torch.uint8 if bits <= 8 else torch.int32


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= LARGEST:
        raise ValueError(f"bits={bits} per number cannot be packed: give 1 to {LARGEST}.")
