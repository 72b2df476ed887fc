import math
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch.nn.functional import embedding, linear

from hf_compress.formats import fixed_point
from hf_compress.formats.fixed_point import (
    dequantize,
    fit_scales,
    fraction_bits,
    integer_range,
    multiply_integers,
    pack_integers,
    power_of_two,
    quantize,
    to_groups,
    unpack_integers,
)
from hf_compress.formats.fixed_point_modules import FixedPointEmbedding, FixedPointLinear, minmax_scales
from hf_compress.formats.int8_kernels import INT_MM, is_exact

clips = pytest.mark.skipif(not is_exact(INT_MM, "cpu"), reason="this processor clips sums of bytes")
ROOT = Path(__file__).parent.parent.parent

KINDS = ["float32", "bfloat16", "power_of_two"]


def numbers(*shape, seed=0) -> torch.Tensor:
    """Of unlike magnitudes in unlike rows, and not centred."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) + 0.3
    return values * torch.logspace(-6, 4, shape[0])[:, None]


def there_and_back(values, scales, zeros, bits, symmetric) -> torch.Tensor:
    return dequantize(quantize(values, scales, zeros, bits, symmetric), scales, zeros)


def fields(bits=8, granularity="per_channel", symmetric=True, power_of_two=False, group_size=32, **more) -> dict:
    found = {"bits": bits, "granularity": granularity, "symmetric": symmetric, "power_of_two": power_of_two, **more}
    return found | {"group_size": group_size} if granularity == "group" else found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 17))
def test_no_number_is_further_off_than_half_a_step(bits, symmetric, kind):
    values = numbers(40, 33)
    scales, zeros = fit_scales(*values.aminmax(dim=1), bits, symmetric, kind)
    integers = quantize(values, scales[:, None], zeros[:, None], bits, symmetric)
    lowest, highest = integer_range(bits, symmetric)
    assert lowest <= integers.min() <= integers.max() <= highest
    rounded = dequantize(integers, scales[:, None], zeros[:, None])
    error = (rounded.double() - values.double()).abs() / scales[:, None].double()
    # What is beyond half a step is float32's own rounding of numbers that take up to 16 of its 24 bits.
    assert error.max() <= 0.5 + 2**-6
    # Zero is a number of the format.
    assert not there_and_back(torch.zeros(40, 1), scales[:, None], zeros[:, None], bits, symmetric).any()
    assert symmetric is not bool(zeros.any())


def test_powers_of_two_are_exact_and_the_least_that_suffice():
    values = numbers(200, 7)
    real, _ = fit_scales(*values.aminmax(dim=1), 8, True, "float32")
    scales, _ = fit_scales(*values.aminmax(dim=1), 8, True, "power_of_two")
    assert (torch.frexp(scales).mantissa == 0.5).all()
    assert ((scales >= real) & (scales / 2 < real)).all()
    bits = fraction_bits(scales)
    assert bits.dtype == torch.int8
    assert [Fraction(scale) for scale in scales.tolist()] == [Fraction(2) ** -n for n in bits.tolist()]
    every = torch.arange(-127, 127, dtype=torch.int8)
    assert torch.equal(fraction_bits(power_of_two(every)), every)
    # Just above a power of two, a step has to double.
    one = torch.tensor([1.0, math.nextafter(1.0, 2.0), 0.5, 127.0])
    assert fraction_bits(one + 2**-23 * torch.tensor([0, 1, 0, 0])).tolist() == [0, -1, 1, -7]


def test_scales_of_16_bits_are_exact_and_never_too_small():
    values = numbers(500, 3)
    real, _ = fit_scales(*values.aminmax(dim=1), 4, True, "float32")
    short, _ = fit_scales(*values.aminmax(dim=1), 4, True, "bfloat16")
    assert torch.equal(short, short.to(torch.bfloat16).float())
    assert ((short >= real) & (short <= real * (1 + 2**-7))).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_of_zeros_and_extremes(symmetric, kind):
    values = torch.tensor([[0.0, 0.0], [1e-45, -1e-45], [3e38, -3e38], [3e38, 1e38], [-1, -2]])
    scales, zeros = fit_scales(*values.aminmax(dim=1), 8, symmetric, kind)
    assert scales[0] == 1
    assert (scales > 0).all()
    assert scales.isfinite().all()
    rounded = there_and_back(values, scales[:, None], zeros[:, None], 8, symmetric)
    assert rounded.isfinite().all()
    assert not rounded[0].any()


@pytest.mark.parametrize("zeros", [None, torch.tensor([3], dtype=torch.int16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_integers_are_not_changed_by_what_reads_them(dtype, zeros):
    integers = torch.tensor([5, -2], dtype=dtype)
    z = 0 if zeros is None else 3
    assert dequantize(integers, torch.tensor([0.5]), zeros).tolist() == [(5 - z) / 2, (-2 - z) / 2]
    assert integers.tolist() == [5, -2]


@pytest.mark.parametrize("bits", range(2, 17))
def test_integers_are_packed_as_twos_complement(bits):
    half = 1 << (bits - 1)
    generator = torch.Generator().manual_seed(bits)
    for length in (1, 7, 8, 33):
        integers = torch.randint(-half, half, (5, length), generator=generator)
        integers[0, 0], integers[1, 0] = -half, half - 1
        packed = pack_integers(integers, bits)
        assert packed.dtype == torch.int8
        assert packed.shape == (5, math.ceil(length * bits / 8))
        assert torch.equal(unpack_integers(packed, bits, length).long(), integers)
    if bits in (8, 16):
        assert torch.equal(packed.view(getattr(torch, f"int{bits}")).long(), integers)


def test_groups_and_what_fills_the_last_one():
    rows = torch.arange(1, 15).view(2, 7)
    assert to_groups(rows, 3).tolist()[0] == [[1, 2, 3], [4, 5, 6], [7, 0, 0]]
    assert to_groups(rows, 7).data_ptr() == rows.data_ptr()


@pytest.mark.parametrize("pays", [pytest.param(True, marks=clips), False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [(2, 4), (8, 8), (4, 8), (9, 8), (12, 16), (16, 16)])
def test_products_are_those_of_integers(bits, symmetric, pays, monkeypatch):
    monkeypatch.setattr(fixed_point, "bytes_pay", lambda: pays)
    generator = torch.Generator().manual_seed(sum(bits))
    ranges = [integer_range(width, symmetric) for width in bits]
    (x_low, x_high), (w_low, w_high) = ranges
    for n_tokens, n_inputs, n_outputs in ((1, 1, 1), (3, 17, 5), (9, 1030, 4)):
        inputs = torch.randint(x_low, x_high + 1, (n_tokens, n_inputs), generator=generator)
        weights = torch.randint(w_low, w_high + 1, (n_outputs, n_inputs), generator=generator)
        inputs[0], weights[0] = x_low, w_low  # the largest sums
        x_zero = torch.tensor([0 if symmetric else x_high // 3])
        w_zeros = torch.zeros(n_outputs) if symmetric else torch.randint(w_low, w_high, (n_outputs,))
        w_zeros = w_zeros.short()
        kind = torch.int8 if bits[1] <= 8 else torch.int16 if bits[1] == 16 else torch.int32
        found = multiply_integers(inputs.float(), x_zero.short(), weights.to(kind), w_zeros, max(bits))
        assert found.tolist() == ((inputs - x_zero) @ (weights - w_zeros.long()[:, None]).T).tolist()


def test_processors_that_clip_sums_of_bytes_multiply_otherwise():
    """Without VNNI, pairs of products are added in 16 bits."""
    script = (
        "import torch; from hf_compress.formats.fixed_point import multiply_integers as multiply\n"
        "x, w = torch.full((9, 768), 127), torch.full((4, 768), 127)\n"
        "zeros = torch.zeros(4, dtype=torch.int16)\n"
        "print(multiply(x.float(), zeros[:1], w.to(torch.int8), zeros, 8).unique().tolist())"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == str([127.0 * 127 * 768]), done.stderr


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor", "group"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("power", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 8, 11, 16])
def test_a_module_stands_for_its_weights(bits, power, symmetric, granularity):
    # Widths that no group size divides, and one that is narrower than a group.
    for n_columns in (45, 5):
        weight = numbers(12, n_columns)
        settings = fields(bits, granularity, symmetric, power, group_size=16)
        module = FixedPointLinear.from_float(weight, None, **settings)
        assert module.weight.dtype == torch.int8
        assert module.weight.shape == (1, 12, math.ceil(n_columns * bits / 8))
        scales = module.weight_scales()
        spread = scales.repeat_interleave(16, 1)[:, :n_columns] if granularity == "group" else scales
        error = (module.dequantize().double() - weight.double()).abs() / spread
        assert error.max() <= 0.5 + 2**-6
        assert torch.equal(FixedPointLinear.from_float(weight, None, **settings).weight, module.weight)
        # Rounding what is rounded changes nothing, for the extremes of every range are numbers of the format.
        if symmetric:
            again = FixedPointLinear.from_scales(
                module.dequantize(), None, (scales, torch.zeros_like(scales, dtype=torch.int32)), **settings
            )
            assert torch.equal(again.weight, module.weight)
        table = FixedPointEmbedding.from_float(weight, 3, **settings)
        assert torch.equal(table.dequantize(), module.dequantize())
        ids = torch.tensor([[0, 11, 3], [5, 5, 0]])
        assert torch.equal(table(ids), embedding(ids, table.dequantize()))
        inputs = torch.randn(2, 3, n_columns)
        assert torch.equal(module(inputs), linear(inputs, module.dequantize()))
        assert table.to(torch.float16)(ids).dtype == torch.float16
        assert torch.equal(table.dequantize(), module.dequantize())


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor", "group"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("power", [True, False])
@pytest.mark.parametrize(("bits", "activation_bits"), [(8, 8), (4, 8), (8, 4), (16, 16), (12, 16)])
def test_outputs_are_those_of_integer_arithmetic(bits, activation_bits, power, symmetric, granularity):
    generator = torch.Generator().manual_seed(3)
    weight, bias = numbers(6, 21) / 1000, torch.randn(6, generator=generator)
    tokens = torch.randn(2, 4, 21, generator=generator) * 2 - 0.5
    settings = fields(bits, granularity, symmetric, power, group_size=8, activation_bits=activation_bits)
    # A range that some inputs are out of.
    kind = "power_of_two" if power else "float32"
    input_scales = fit_scales(torch.tensor([-3.0]), torch.tensor([2.0]), activation_bits, symmetric, kind)
    module = FixedPointLinear.from_scales(weight, bias, minmax_scales(weight, settings), input_scales, **settings)
    numbers_in = quantize(tokens, *input_scales, activation_bits, symmetric)
    assert torch.equal(module(tokens), slow_linear(module, numbers_in, input_scales, bias))
    # Whatever else is in the batch.
    assert torch.equal(module(tokens[1:, 2:3]), module(tokens)[1:, 2:3])
    assert module(tokens.to(torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_token_that_is_not_finite_spoils_itself_alone(symmetric, bits, dtype, wrong):
    generator = torch.Generator().manual_seed(4)
    weight, bias = torch.randn(6, 21, generator=generator), torch.randn(6, generator=generator)
    settings = fields(bits, symmetric=symmetric, activation_bits=bits)
    input_scales = fit_scales(torch.tensor([-3.0]), torch.tensor([2.0]), bits, symmetric, "float32")
    module = FixedPointLinear.from_scales(weight, bias, minmax_scales(weight, settings), input_scales, **settings)
    tokens = torch.randn(2, 5, 21, generator=generator).to(dtype)
    with torch.inference_mode():
        clean = module(tokens)
        tokens[1, 2, 3] = wrong
        found = module(tokens)
        assert not found[1, 2].isfinite().any()
        found[1, 2] = clean[1, 2]
        assert torch.equal(found, clean)


def slow_linear(module, numbers_in, input_scales, bias) -> torch.Tensor:
    """Sums of Python's integers, number by number."""
    bits, columns = module.fields["bits"], module.in_features
    integers = unpack_integers(module.weight[0], bits, columns).tolist()
    scales = module.weight_scales().expand(module.out_features, -1).tolist()
    zeros = module.weight_zeros()
    zeros = [[0] * len(scales[0])] * len(scales) if zeros is None else zeros.expand(module.out_features, -1).tolist()
    size = module.fields.get("group_size", columns)
    step, x_zero = float(input_scales[0]), int(input_scales[1])
    rows = []
    for token in numbers_in.flatten(0, -2).int().tolist():
        for o in range(module.out_features):
            total = 0.0
            for g in range(len(scales[o])):
                part = range(g * size, min(columns, (g + 1) * size))
                total += sum((token[k] - x_zero) * (integers[o][k] - zeros[o][g]) for k in part) * scales[o][g]
            rows.append(total * step)
    outputs = torch.tensor(rows, dtype=torch.float64).float().view(*numbers_in.shape[:-1], module.out_features)
    return outputs + bias


def test_fields_that_describe_no_format_are_refused():
    sound = fields()
    wrong = [
        sound | {"bits": 1},
        sound | {"bits": 17},
        sound | {"bits": 8.0},
        sound | {"granularity": "group"},
        sound | {"group_size": 32},
        sound | {"granularity": "rows"},
        sound | {"symmetric": 1},
        sound | {"activation_bits": 0},
        sound | {"colour": "red"},
        {name: value for name, value in sound.items() if name != "power_of_two"},
    ]
    for case in wrong:
        with pytest.raises(ValueError, match="describe no fixed-point format"):
            FixedPointLinear(4, 4, True, **case)
    with pytest.raises(ValueError, match="describe no fixed-point format"):
        FixedPointEmbedding(4, 4, **sound, activation_bits=8)
    with pytest.raises(ValueError, match="activation_bits=8, but input_scales=None"):
        FixedPointLinear.from_float(torch.randn(4, 4), None, **sound, activation_bits=8)
