import pytest
import torch

from hf_compress.formats.fixed_point import dequantize, fit_scales, quantize
from hf_compress.quantization.observers import Histogram
from hf_compress.quantization.ranges import mse_range, percentile_range
from tests.quantization.without_float64 import WithoutFloat64


def test_percentiles_leave_out_the_same_share_on_both_sides():
    values, ones = torch.arange(1.0, 1001)[None], torch.ones(1000)
    for percentile, lower, upper in ((100, 1, 1000), (99.9, 2, 999), (99, 11, 990), (75, 251, 750)):
        found = percentile_range(values, ones, percentile)
        assert [float(limit) for limit in found] == [lower, upper]
    # Numbers that occur often count as often.
    values, counts = torch.tensor([[-5.0, 0.0, 1.0, 9.0]]), torch.tensor([1, 500, 498, 1])
    assert [float(limit) for limit in percentile_range(values, counts, 99.8)] == [0, 1]
    assert [float(limit) for limit in percentile_range(values, counts, 99.95)] == [-5, 9]
    assert [float(limit) for limit in percentile_range(values[:, :1], counts[:1], 99)] == [-5, -5]
    on_device = (tensor.as_subclass(WithoutFloat64) for tensor in (values, counts))
    assert [float(limit) for limit in percentile_range(*on_device, 99.8)] == [0, 1]


@pytest.mark.parametrize("kind", ["float32", "power_of_two"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_no_part_of_the_range_has_a_smaller_error(symmetric, kind):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 400, generator=generator)
    values[1, 0], values[2, 0] = 12, 400

    def fit(lower, upper):
        return fit_scales(lower, upper, 4, symmetric, kind)

    def error(lower, upper):
        scales, zeros = (tensor[:, None] for tensor in fit(lower, upper))
        rounded = dequantize(quantize(values, scales, zeros, 4, symmetric), scales, zeros)
        return (rounded - values).square().sum(1)

    counts = torch.ones(400)
    found = mse_range(values, counts, 4, symmetric, fit)
    lower, upper = values.aminmax(dim=1)
    for part in torch.arange(1, 51) / 50:
        assert (error(*found) <= error(lower * part, upper * part) * (1 + 1e-5)).all()
    # A single outlier is not worth its range, unless it is so far out that it would be most of the error.
    assert not symmetric or found[1][1] < 0.7 * upper[1]
    assert found[1][2] > 0.9 * upper[2]
    # Numbers given once with their counts are the same as numbers given as often.
    doubled = mse_range(values.repeat(1, 2), torch.ones(800), 4, symmetric, fit)
    assert all(map(torch.equal, doubled, mse_range(values, 2 * counts, 4, symmetric, fit)))


def test_a_histogram_keeps_extremes_exactly_and_numbers_to_a_step():
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(7, 11, generator=generator) * 10.0**scale for scale in (-20, 0, 20)]
    histogram = Histogram()
    assert histogram.is_empty()
    for part in (torch.empty(0, 4), *parts):
        histogram.add(part)
    everything = torch.cat([part.flatten() for part in parts]).sort().values
    assert (histogram.lower, histogram.upper) == (everything.min(), everything.max())
    values, counts = histogram.values()
    assert (values.diff() > 0).all()
    assert (values[0], values[-1]) == (everything.min(), everything.max())
    assert counts.sum() == everything.numel()
    assert torch.allclose(values.repeat_interleave(counts), everything, rtol=2**-8, atol=0)
    assert histogram.is_finite
    for wrong in (torch.nan, torch.inf):
        histogram = Histogram()
        histogram.add(torch.tensor([1.0, wrong]))
        histogram.add(torch.tensor([2.0]))
        assert not histogram.is_finite
