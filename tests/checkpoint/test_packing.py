import math

import numpy as np
import pytest
import torch

from hf_compress.checkpoint.packing import Arena, pack_sparse, unpack_sparse
from hf_compress.formats.bits import pack_bits

FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn]
DTYPES = [*FLOATS, torch.int8, torch.uint8, torch.int64, torch.bool]
SHAPES = [(), (0,), (1,), (7,), (8,), (9,), (5, 3), (4, 0, 2), (16, 24), (3, 5, 7)]


def random(shape, dtype, sparsity=0.5, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    tensor = (torch.randn(shape, generator=generator) * 20).to(dtype)
    return torch.where(torch.rand(shape, generator=generator) < sparsity, torch.zeros((), dtype=dtype), tensor)


def as_integers(tensor: torch.Tensor) -> torch.Tensor:
    same_size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().reshape(-1).view(same_size)


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    same_kind = first.dtype == second.dtype and first.shape == second.shape
    return same_kind and torch.equal(as_integers(first), as_integers(second))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_are_left_out_and_come_back(dtype):
    for shape in SHAPES:
        for sparsity in (0, 0.5, 1):
            tensor = random(shape, dtype, sparsity)
            values, bitmask = pack_sparse(tensor)
            assert values.dtype == dtype
            assert values.shape == (int((as_integers(tensor) != 0).sum()),)
            assert bitmask.dtype == torch.uint8
            assert bitmask.shape == (*shape[:-1], math.ceil((shape or (1,))[-1] / 8))
            assert same_bits(unpack_sparse(values, bitmask, shape), tensor)


def test_the_layout_of_a_bitmask():
    values, bitmask = pack_sparse(torch.tensor([[0, 5, 0, 0, 7], [1, 0, 0, 2, 3]], dtype=torch.int8))
    assert values.tolist() == [5, 7, 1, 2, 3]
    assert bitmask.tolist() == [[0b10010], [0b11001]]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_is_not_all_bits_0_is_kept_bit_for_bit(dtype):
    as_integer = as_integers(torch.empty(0, dtype=dtype)).dtype
    every = torch.arange(256) if dtype.itemsize == 1 else torch.arange(-(1 << 15), 1 << 15)
    # Every bit pattern of two bytes, and the same ones as the upper bytes: NaNs with all payloads, -0.0, subnormals.
    patterns = torch.cat([every, every << 8 * (dtype.itemsize - 2)]) if dtype.itemsize > 2 else every
    tensor = patterns.to(as_integer).view(dtype)
    values, bitmask = pack_sparse(tensor)
    assert len(values) == int((patterns.to(as_integer) != 0).sum())
    assert same_bits(unpack_sparse(values, bitmask, tensor.shape), tensor)
    negative_zero = torch.tensor([-0.0, 0.0]).to(dtype)
    assert len(pack_sparse(negative_zero)[0]) == (torch.signbit(negative_zero.float())[0].item())


def test_tensors_that_are_views_parameters_or_large():
    tensor = random((40, 30), torch.float32)
    for view in (tensor.T, tensor[::3, 1::2], tensor[None].expand(2, -1, -1), torch.nn.Parameter(tensor)):
        assert same_bits(unpack_sparse(*pack_sparse(view), view.shape), view)
    # Longer than what is unpacked at a time, and no multiple of it.
    large = random((1031, 771), torch.float16)
    assert same_bits(unpack_sparse(*pack_sparse(large), large.shape), large)


def test_tensors_in_one_arena_are_apart():
    arena = Arena()
    tensors = [random((n, 61), dtype, seed=n) for n, dtype in enumerate(DTYPES)]
    # One is larger than the pieces that an arena takes.
    tensors.insert(4, random((3000, 3000), torch.float32))
    found = [unpack_sparse(*pack_sparse(tensor), tensor.shape, arena) for tensor in tensors]
    for one, tensor in zip(found, tensors, strict=True):
        assert same_bits(one, tensor)
        assert one.untyped_storage().nbytes() == tensor.nbytes
    found[1].fill_(1)
    del found[2]
    assert all(same_bits(*pair) for pair in zip(found[2:], tensors[3:], strict=True))
    assert arena.empty(0, np.dtype(np.int16)).shape == (0,)


@pytest.mark.parametrize(("dtype", "sparsity", "bound"), [(torch.float16, 0.5, 0.58), (torch.float32, 0.7, 0.35)])
def test_bytes(dtype, sparsity, bound):
    tensor = random((768, 768), dtype, sparsity)
    assert sum(part.nbytes for part in pack_sparse(tensor)) <= bound * tensor.nbytes


def test_parts_that_do_not_fit_are_refused():
    values, bitmask = pack_sparse(torch.tensor([0.0, 1, 0, 2, 3, 0, 0, 4, 5, 0]))
    cases = [
        (values[:-1], bitmask, (10,), "marks 5 elements, but 4 values"),
        (values.repeat(2), bitmask, (10,), "marks 5 elements, but 10 values"),
        (values[None], bitmask, (10,), r"not \(2,\), torch.uint8 and \(1, 5\)"),
        (values, bitmask[:1], (10,), r"shape \(10,\) has a bitmask of shape \(2,\)"),
        (values, bitmask[:, None], (10,), r"not \(2, 1\)"),
        (values, bitmask.long(), (10,), "torch.int64"),
        (values, bitmask, (10**15,), r"shape \(1000000000000000,\) has a bitmask"),
        (values, torch.tensor([0b10011000, 0b00010001], dtype=torch.uint8), (10,), "beyond the end of a row"),
        (values, bitmask, (8,), r"shape \(8,\) has a bitmask of shape \(1,\)"),
        (values, bitmask, (1, 10), r"shape \(1, 10\) has a bitmask of shape \(1, 2\)"),
        (values, bitmask, (), r"shape \(\) has a bitmask of shape \(1,\)"),
    ]
    for *parts, shape, message in cases:
        with pytest.raises(ValueError, match=message):
            unpack_sparse(*parts, shape)


def test_a_bitmask_is_packed_like_bits():
    tensor = random((5, 13), torch.float32)
    assert torch.equal(pack_bits(tensor != 0, 1), pack_sparse(tensor)[1])
