import math

import pytest
import torch

from hf_compress.formats.bits import pack_bits, unpack_bits


@pytest.mark.parametrize("bits", range(1, 17))
def test_bits_of_rows_of_every_length(bits):
    generator = torch.Generator().manual_seed(bits)
    for length in range(35):
        numbers = torch.randint(1 << bits, (3, 2, length), generator=generator)
        packed = pack_bits(numbers, bits)
        assert packed.dtype == torch.uint8
        assert packed.shape == (3, 2, math.ceil(length * bits / 8))
        unpacked = unpack_bits(packed, bits, length)
        assert unpacked.dtype == (torch.uint8 if bits <= 8 else torch.int32)
        assert torch.equal(unpacked.long(), numbers)
        # A row is a number of its own, read from its least significant bit on.
        for row, row_packed in zip(numbers.flatten(0, 1).tolist(), packed.flatten(0, 1).tolist(), strict=True):
            expected = sum(number << bits * i for i, number in enumerate(row))
            assert int.from_bytes(bytes(row_packed), "little") == expected


def test_the_layout_of_bits():
    assert pack_bits(torch.tensor([1, 2, 7]), 3).tolist() == [0b11010001, 0b00000001]
    assert pack_bits(torch.tensor([[3], [2]]), 2).tolist() == [[3], [2]]


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64])
def test_bits_of_other_integers(dtype):
    numbers = torch.arange(128).to(dtype)
    assert torch.equal(unpack_bits(pack_bits(numbers, 7), 7, 128).to(dtype), numbers)


def test_bits_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="Numbers from 0 to 8 do not fit into bits=3, which hold 0 to 7"):
        pack_bits(torch.tensor([0, 8]), 3)
    with pytest.raises(ValueError, match="Numbers from -1 to 1"):
        pack_bits(torch.tensor([-1, 1]), 3)
    with pytest.raises(TypeError, match="round them"):
        pack_bits(torch.tensor([1.0]), 3)
    packed = pack_bits(torch.arange(5), 3)
    for bits in (0, 17):
        with pytest.raises(ValueError, match=f"bits={bits} per number"):
            pack_bits(torch.tensor([0]), bits)
        with pytest.raises(ValueError, match=f"bits={bits} per number"):
            unpack_bits(packed, bits, 5)
    for part, bits, length in ((packed, 3, 6), (packed, 4, 5), (packed.long(), 3, 5), (packed[:1], 3, 5)):
        with pytest.raises(ValueError, match="do not hold"):
            unpack_bits(part, bits, length)
