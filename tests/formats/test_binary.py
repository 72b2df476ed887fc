"""Weights of one bit: the packed module computes what slow sums over signs give."""

import copy

import pytest
import torch

from hf_compress.formats import binary
from hf_compress.formats.binary import BinaryLinear, binary_rows, input_levels, round_inputs
from hf_compress.formats.int8_kernels import INT_MM, is_exact

FIELDS = [{"activations": bits, "signed": signed} for bits in (1, 2, 4, 8) for signed in (True, False)]
EVERY = [*FIELDS, {"activations": 32}]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(fields: dict, n_inputs: int = 13, n_outputs: int = 5) -> BinaryLinear:
    inputs = {}
    if fields["activations"] != 32:
        highest = input_levels(fields["activations"], fields["signed"])[1]
        inputs = {"input_scale": torch.tensor([1.7 / highest]), "input_threshold": random(n_inputs, seed=3) / 4}
    return BinaryLinear.from_float(random(n_outputs, n_inputs, seed=1), random(n_outputs, seed=2), **inputs, **fields)


def test_signs_and_scales_of_a_small_matrix():
    signs, scales = binary_rows(torch.tensor([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]]))
    assert signs.tolist() == [[-1, -1, 1], [1, 1, 1]]
    assert scales.tolist() == [2, 0]


def test_no_scale_is_better_for_the_signs():
    rows = random(6, 50)
    signs, scales = binary_rows(rows)
    centred = rows - rows.mean(1, keepdim=True)
    error = (centred - scales[:, None] * signs).square().sum(1)
    for factor in (0.9, 0.99, 1.01, 1.1):
        assert (error < (centred - factor * scales[:, None] * signs).square().sum(1)).all()


@pytest.mark.parametrize("fields", FIELDS)
def test_inputs_are_rounded_to_the_nearest_level(fields):
    bits, is_signed = fields["activations"], fields["signed"]
    lowest, highest = input_levels(bits, is_signed)
    levels = torch.tensor([-1.0, 1.0]) if bits == 1 and is_signed else torch.arange(lowest, highest + 1.0)
    assert len(levels) == 2**bits
    values = random(500) * highest
    nearest = levels[(values[:, None] - levels).abs().argmin(1)]
    assert torch.equal(round_inputs(values, bits, is_signed), nearest)


@pytest.mark.parametrize("n_inputs", [1, 13, 64])
@pytest.mark.parametrize("fields", FIELDS)
def test_the_product_is_that_of_integers(fields, n_inputs):
    module = make(fields, n_inputs)
    weight = random(5, n_inputs, seed=1)
    signs = torch.where(weight < weight.mean(1, keepdim=True), -1, 1)
    hidden = random(2, 3, n_inputs)
    outputs = module(hidden)
    numbers = round_inputs((hidden - module.input_threshold) / module.input_scale, **bits_and_sign(fields))
    for place in ((0, 0), (1, 2)):
        for channel in range(5):
            total = sum(int(number) * int(sign) for number, sign in zip(numbers[place], signs[channel], strict=True))
            expected = total * (module.input_scale * module.weight_scale[channel]) + module.bias[channel]
            assert outputs[place][channel] == expected


@pytest.mark.skipif(not is_exact(INT_MM, "cpu"), reason="this processor clips sums of bytes")
@pytest.mark.parametrize("fields", FIELDS)
def test_the_product_is_the_same_whether_bytes_pay_or_not(fields, monkeypatch):
    module, hidden, found = make(fields, 300), random(7, 300), []
    for pays in (True, False):
        monkeypatch.setattr(binary, "bytes_pay", lambda pays=pays: pays)
        found.append(module(hidden))
    assert torch.equal(*found)


def bits_and_sign(fields: dict) -> dict:
    return {"bits": fields["activations"], "is_signed": fields["signed"]}


def test_inputs_in_floating_point_are_multiplied_as_they_are():
    module, hidden = make({"activations": 32}), random(4, 13)
    expected = hidden @ module.dequantize().T + module.bias
    assert torch.allclose(module(hidden), expected, atol=1e-6)


@pytest.mark.parametrize("fields", EVERY)
def test_a_token_does_not_depend_on_the_others(fields):
    module, hidden = make(fields), random(6, 13)
    together = module(hidden)
    for token, alone in zip(hidden, together, strict=True):
        assert (module(token[None]) - alone).abs().max() <= (1e-6 if fields["activations"] == 32 else 0)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fields", EVERY)
def test_a_token_that_is_not_finite_spoils_itself_alone(fields, dtype, wrong):
    # Some numbers reach the ends of eight bits, with a sign or without.
    module, hidden = make(fields), 2 * random(2, 5, 13).to(dtype)
    with torch.inference_mode():
        clean = module(hidden)
        hidden[1, 2, 3] = wrong
        found = module(hidden)
        assert not found[1, 2].isfinite().any()
        found[1, 2] = clean[1, 2]
        assert torch.equal(found, clean)


def test_sums_of_float16_have_room_until_they_are_scaled():
    weight = random(4, 3072) / 100
    module = BinaryLinear.from_float(weight, None, activations=32)
    hidden = 30 * module.signs().half()
    expected = hidden.float() @ module.dequantize().T
    assert expected.max() < 1000
    assert torch.allclose(module(hidden).float(), expected, rtol=1e-3, atol=0.1)
    with torch.autocast("cpu", torch.float16):
        assert torch.allclose(module(hidden.float()), expected, rtol=1e-3, atol=0.1)


@pytest.mark.parametrize("fields", EVERY)
def test_no_tokens_give_no_outputs(fields):
    assert make(fields)(random(2, 0, 13)).shape == (2, 0, 5)


def test_a_weight_takes_one_bit():
    module = make({"activations": 32}, n_inputs=160, n_outputs=7)
    assert module.weight.nbytes == 160 * 7 // 8
    names = {"weight", "weight_scale", "bias"}
    assert module.state_dict().keys() == names
    assert make(FIELDS[0]).state_dict().keys() == names | {"input_scale", "input_threshold"}
    module(random(1, 160))
    assert module.state_dict().keys() == names


def test_rows_of_equal_weights_give_the_bias():
    module = BinaryLinear.from_float(torch.zeros(2, 9), torch.tensor([1.0, 2.0]), activations=32)
    assert module(random(3, 9)).tolist() == [[1, 2]] * 3


@pytest.mark.parametrize("fields", EVERY)
def test_a_copy_that_gets_other_weights_computes_with_them(fields):
    first, hidden = make(fields), random(4, 13)
    second = copy.deepcopy(first)
    first(hidden)
    third = copy.deepcopy(first)
    changed = {name: tensor.flip(0) if tensor.ndim == 1 else ~tensor for name, tensor in first.state_dict().items()}
    second.load_state_dict(changed)
    third.load_state_dict(changed)
    assert torch.equal(second(hidden), third(hidden))
    assert not torch.equal(second(hidden), first(hidden))


# Tensors made in inference mode do not count their changes in place.
@pytest.mark.parametrize(
    ("way", "is_inference"), [("in_place", False), *((way, on) for way in ("data", "buffer") for on in (False, True))]
)
def test_changed_signs_are_seen(way, is_inference):
    with torch.inference_mode(is_inference):
        module, hidden = make({"activations": 32}), random(4, 13)
        other = copy.deepcopy(module)
        other.weight = ~other.weight
        module(hidden)
        if way == "in_place":
            module.weight.copy_(other.weight)
        elif way == "data":
            module.weight.data = other.weight
        else:
            module.weight = other.weight
        assert torch.equal(module(hidden), other(hidden))


@pytest.mark.parametrize("fields", EVERY)
def test_a_cast_leaves_scales_alone(fields):
    module = make(fields).bfloat16()
    assert module.bias.dtype == torch.bfloat16
    assert {buffer.dtype for name, buffer in module.named_buffers() if name != "weight"} == {torch.float32}
    assert module(random(2, 13).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"activations": 3, "signed": True},
        {"activations": True, "signed": True},
        {"activations": 8},
        {"activations": 8, "signed": 1},
        {"activations": 32, "signed": True},
        {"activations": 1, "signed": True, "other": 0},
    ],
)
def test_unknown_fields_are_refused(fields):
    with pytest.raises(ValueError, match="give activations, one of"):
        BinaryLinear.check_fields(fields)
