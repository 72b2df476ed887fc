"""Sparse layouts of a weight compute what the dense product does."""

import pytest
import torch
from torch.nn import functional

from hf_compress.pruning.sparse_formats import PACKERS, best_block, best_group, is_two_of_four, why_not

ON_CPU = [name for name in PACKERS if name != "semi_structured"]


def sparse_weight(rows, columns, block=(1, 1), share=0.7, dtype=torch.float32) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=draw)
    keep = torch.rand(rows // block[0], columns // block[1], generator=draw) >= share
    return (weight * keep.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)).to(dtype)


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1)).item()


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("block", [(1, 1), (4, 1), (1, 4), (16, 16), (32, 1)])
@pytest.mark.parametrize("n_tokens", [1, 7, 600])
def test_every_format_equals_the_dense_product(name, has_bias, block, n_tokens):
    weight = sparse_weight(64, 96, block)
    weight[5], weight[:, 7] = 0, 0
    inputs, bias = torch.randn(n_tokens, 96), torch.randn(64) if has_bias else None
    found = PACKERS[name](weight)(inputs, bias)
    wanted = functional.linear(inputs.double(), weight.double(), bias.double() if has_bias else None)
    assert found.shape == (n_tokens, 64)
    assert relative_error(found, wanted) < 1e-6


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("share", [0, 1])
def test_weights_of_zeros_alone_and_without_any(name, share):
    weight = sparse_weight(8, 12, share=share)
    inputs, bias = torch.randn(5, 12), torch.randn(8)
    assert relative_error(PACKERS[name](weight)(inputs, bias), functional.linear(inputs, weight, bias).double()) < 1e-6


@pytest.mark.parametrize("name", ["row_groups", "sliced"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(name, dtype):
    weight, inputs, bias = sparse_weight(64, 96, (32, 1), dtype=dtype), torch.randn(9, 96, dtype=dtype), torch.ones(64)
    found = PACKERS[name](weight)(inputs, bias.to(dtype))
    assert found.dtype == dtype
    wanted = functional.linear(inputs.double(), weight.double(), bias.double())
    assert relative_error(found, wanted) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", ON_CPU)
def test_transposed_weights_and_inputs(name):
    weight, inputs = sparse_weight(16, 32, (4, 1)).T, torch.randn(16, 10).T
    found = PACKERS[name](weight)(inputs, None)
    assert relative_error(found, inputs.double() @ weight.double().T) < 1e-6


def test_sliced_keeps_the_bias_alone_where_rows_are_0():
    weight, bias = torch.zeros(4, 6), torch.arange(4.0)
    weight[2, 3] = 1
    inputs = torch.randn(5, 6)
    found = PACKERS["sliced"](weight)(inputs, bias)
    assert torch.equal(found[:, [0, 1, 3]], bias[[0, 1, 3]].expand(5, 3))
    assert torch.equal(found[:, 2], inputs[:, 3] + 2)


@pytest.mark.parametrize(("block", "group", "size"), [((32, 1), 32, None), ((16, 16), 16, 16), ((4, 1), 8, None)])
def test_the_pattern_is_found_in_the_zeros(block, group, size):
    weight = sparse_weight(192, 96, block, share=0.9)
    assert best_group(weight) == group
    assert size is None or best_block(weight) == size


def test_groups_of_odd_widths():
    weight = sparse_weight(7, 5)
    assert best_group(weight) == 1
    assert why_not("row_groups", weight) is None
    assert "do not divide 7 x 5" in why_not("bsr", weight)


def test_two_of_four():
    weight = torch.tensor([[1.0, 0, 0, 2, 0, 3, 4, 0], [0, 0, 0, 0, 1, 2, 0, 0]])
    assert is_two_of_four(weight)
    weight[0, 1] = 1
    assert not is_two_of_four(weight)
    assert not is_two_of_four(weight[:, :6])


def test_why_a_format_cannot_hold_a_weight():
    weight = sparse_weight(64, 64)
    assert "weight is on cpu" in why_not("semi_structured", weight)
    for name in ("csr", "bsr"):
        assert why_not(name, weight) is None
        assert "torch.bfloat16" in why_not(name, weight.bfloat16())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n_tokens", [5, 64, 600])
def test_every_format_on_a_gpu(dtype, n_tokens):
    weight = sparse_weight(256, 512, (32, 32), dtype=dtype).cuda()
    weight[:, 0::4] = weight[:, 1::4] = 0
    inputs, bias = torch.randn(n_tokens, 512, dtype=dtype).cuda(), torch.randn(256, dtype=dtype).cuda()
    wanted = functional.linear(inputs.double(), weight.double(), bias.double())
    for name, pack in PACKERS.items():
        assert why_not(name, weight) is None, name
        assert relative_error(pack(weight)(inputs, bias), wanted) < 8 * torch.finfo(dtype).eps, name
