import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from hf_compress.formats.int8 import Int8Embedding, Int8Linear, quantize_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (3, 5), (75, 37), (64, 256), (300, 33)]


def module_of(n_inputs: int, n_outputs: int, dtype: torch.dtype = torch.float32, bias: bool = True):
    torch.manual_seed(n_inputs)
    original = nn.Linear(n_inputs, n_outputs, bias=bias).to(dtype)
    return original, Int8Linear.from_float(original.weight, original.bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_are_those_of_rounded_weights_and_tokens(shape, dtype):
    original, module = module_of(*shape, dtype)
    states = torch.randn(4, 7, shape[0]).to(dtype)
    numbers, scales = quantize_rows(states)
    with torch.no_grad():
        found = module(states)
        expected = linear(numbers.float() * scales, module.dequantize(), original.bias.float())
        reference = original(states).float()
    assert found.dtype == dtype
    assert found.shape == (4, 7, shape[1])
    # A number halfway between two may be rounded either way, which is a 127th of one input.
    assert (found.float() - expected).norm() <= max(2e-3, 2 * torch.finfo(dtype).eps) * expected.norm()
    assert (found.float() - reference).norm() < 0.02 * reference.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (768, 96), (96, 768)])
def test_a_token_does_not_depend_on_the_others(shape, dtype):
    _, module = module_of(*shape, dtype)
    states = torch.randn(130, shape[0]).to(dtype)
    states[5] = 0
    states[7] *= 100
    with torch.no_grad():
        whole = module(states)
        for size in (1, 2, 31, 129):
            assert torch.equal(torch.cat([module(part) for part in states.split(size)]), whole)
        assert torch.equal(module(states[:128].view(4, 32, -1)).flatten(0, 1), whole[:128])
        assert torch.equal(module(states.T.contiguous().T), whole)
    assert torch.equal(whole[5], module.bias)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_that_is_not_finite_spoils_itself_alone(dtype, wrong):
    _, module = module_of(40, 30, dtype)
    states = torch.randn(2, 5, 40).to(dtype)
    with torch.no_grad():
        clean = module(states)
        states[1, 2, 3] = wrong
        found = module(states)
    assert not found[1, 2].isfinite().any()
    found[1, 2] = clean[1, 2]
    assert torch.equal(found, clean)


@pytest.mark.parametrize("shape", [(0, 40), (2, 0, 40)])
def test_empty_batches(shape):
    _, module = module_of(40, 30)
    assert module(torch.empty(shape)).shape == (*shape[:-1], 30)


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_those_of_the_rounded_weights(dtype, is_frozen):
    _, module = module_of(40, 30, dtype)
    module.requires_grad_(not is_frozen)
    states = torch.randn(2, 5, 40).to(dtype).requires_grad_()
    weights = torch.randn(2, 5, 30).to(dtype)
    (module(states) * weights).sum().backward()
    assert torch.equal(states.grad, weights @ module.dequantize().to(dtype))
    if is_frozen:
        assert module.bias.grad is None
    else:
        assert torch.equal(module.bias.grad, weights.flatten(0, 1).sum(0))


def test_no_gradient_where_none_is_asked_for():
    _, module = module_of(40, 30)
    module.requires_grad_(False)
    assert not module(torch.randn(2, 40)).requires_grad
    with torch.no_grad():
        assert not module(torch.randn(2, 40).requires_grad_()).requires_grad


def test_what_is_prepared_is_neither_saved_nor_copied():
    _, module = module_of(40, 30)
    keys = list(module.state_dict())
    states = torch.randn(3, 40)
    with torch.no_grad():
        expected = module(states)
        assert list(module.state_dict()) == keys == ["bias", "weight", "weight_scale"]
        assert torch.equal(copy.deepcopy(module)(states), expected)
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False)(states), expected)
        assert torch.equal(copy.copy(module)(states), expected)


def test_compiled_models_call_it_as_it_is():
    _, module = module_of(40, 30)
    compiled = torch.compile(module, backend="eager")
    for n_tokens in (2, 3):
        states = torch.randn(n_tokens, 40)
        with torch.no_grad():
            assert torch.equal(compiled(states), module(states))
        compiled(states.requires_grad_()).sum().backward()
        assert torch.equal(states.grad, torch.ones(n_tokens, 30) @ module.dequantize())


# Tensors made in inference mode do not count their changes in place.
@pytest.mark.parametrize(
    ("way", "is_inference"),
    [(way, False) for way in ("load", "assign", "in_place", "data", "buffer", "scale")]
    + [(way, True) for way in ("load", "assign", "data", "buffer")],
)
def test_changed_weights_are_seen(way, is_inference):
    with torch.inference_mode(is_inference):
        _, module = module_of(40, 30)
        _, other = module_of(40, 30)
        other.weight, other.weight_scale = other.weight.flip(1), other.weight_scale * 2
        states = torch.randn(3, 40)
        module(states)
        if way in ("load", "assign"):
            module.load_state_dict(other.state_dict(), assign=way == "assign")
        elif way == "in_place":
            module.weight.copy_(other.weight)
            module.weight_scale.copy_(other.weight_scale)
        elif way == "data":
            module.weight.data, module.weight_scale.data = other.weight, other.weight_scale
        elif way == "buffer":
            module.weight, module.weight_scale = other.weight, other.weight_scale
        else:
            other.weight = module.weight
            module.weight_scale *= 2
            other.bias = module.bias
        module.bias = other.bias
        assert torch.equal(module(states), other(states))


def test_casts_leave_numbers_and_scales():
    _, module = module_of(40, 30)
    weight, scale = module.weight.clone(), module.weight_scale.clone()
    module(torch.randn(3, 40))
    module.to(torch.bfloat16)
    assert torch.equal(module.weight, weight)
    assert torch.equal(module.weight_scale, scale)
    assert module.bias.dtype == torch.bfloat16
    assert module(torch.randn(3, 40).bfloat16()).dtype == torch.bfloat16


def test_without_a_bias():
    original, module = module_of(40, 30, bias=False)
    states = torch.randn(3, 40)
    assert (module(states) - original(states)).norm() < 0.02 * original(states).norm()


def test_made_where_other_defaults_hold():
    states = torch.randn(3, 40)
    original, module = module_of(40, 30)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.no_grad(), torch.device("meta"):
            expected = module(states)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(copy.deepcopy(module)(states), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_smoothed_inputs(dtype):
    original, _ = module_of(40, 30, dtype)
    factors = 2.0 ** torch.arange(-20, 20).float().div(4).round()
    module = Int8Linear.from_smoothed(original.weight, original.bias, factors)
    assert module.fields == {"smooth": True}
    plain = Int8Linear.from_float(original.weight.float() * factors, original.bias)
    states = torch.randn(6, 40).to(dtype)
    with torch.no_grad():
        assert torch.equal(module(states * factors.to(dtype)), plain(states))
        torch.testing.assert_close(module.dequantize() * factors, plain.dequantize())


def test_fields_of_a_file_are_checked():
    for fields in ({"smooth": False}, {"smooth": True, "bits": 8}, {"bits": 8}):
        with pytest.raises(ValueError, match="int8 has no fields"):
            Int8Linear.check_fields(fields)
    with pytest.raises(ValueError, match="no fields bits"):
        Int8Embedding.check_fields({"bits": 8})


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_table_gives_its_rows_in_its_dtype(dtype):
    torch.manual_seed(0)
    table = nn.Embedding(20, 12, padding_idx=3).to(dtype)
    module = Int8Embedding.from_float(table.weight, table.padding_idx)
    ids = torch.randint(20, (4, 5))
    rows = module(ids)
    assert rows.dtype == dtype
    assert torch.equal(rows, module.dequantize()[ids].to(dtype))
    assert (rows - table(ids)).abs().max() <= table.weight.abs().max() / 127
    assert module.padding_idx == 3
    assert (module(torch.tensor([3])) == 0).all()
    assert module.to(torch.bfloat16)(ids).dtype == torch.bfloat16
    assert module(ids[:0]).shape == (0, 5, 12)


def test_a_row_of_zeros_stays_zero():
    numbers, scales = quantize_rows(torch.tensor([[0.0, 0.0], [1.0, -2.0]]))
    assert numbers.tolist() == [[0, 0], [64, -127]]
    assert scales[:, 0].tolist() == pytest.approx([1.0, 2 / 127])
