"""Which range of numbers a format is to cover: all of them, most of them, or those with which the error is least."""

from collections.abc import Callable

import torch

from hf_compress.formats.fixed_point import dequantize, quantize

Range = tuple[torch.Tensor, torch.Tensor]
"""The smallest and the largest number, each of shape (rows,)."""

# Parts of the full range that are tried: an activation of few bits may do best without nearly all of it.
_N_PARTS = 50


def percentile_range(values: torch.Tensor, counts: torch.Tensor, percentile: float) -> Range:
    """Leaves out the same share of numbers on both sides.

    Args:
        values (`torch.Tensor`): Sorted numbers, of shape (rows, values).
        counts (`torch.Tensor`): How often each occurs, of shape (values,).
        percentile (`float`): Of the largest number, above 50 and at most 100; 100 leaves out none.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The least number with at least that share of all at or below it, and the
        greatest with at least that share at or above it, as (lower, upper).
    """
    share = percentile / 100
    upper = _index_of_share(counts, share)
    lower = len(counts) - 1 - _index_of_share(counts.flip(0), share)
    return values[:, lower], values[:, upper]


def mse_range(
    values: torch.Tensor,
    counts: torch.Tensor,
    bits: int,
    symmetric: bool,
    fit: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
) -> Range:
    """The part of the full range with which the mean squared error of rounding and clipping is least.

    Args:
        values (`torch.Tensor`): Numbers, of shape (rows, values), in float32.
        counts (`torch.Tensor`): How often each occurs, of shape (values,).
        bits (`int`): Bits per number.
        symmetric (`bool`): Whether the format is.
        fit (`Callable`): From the limits of a range to scales and zero points, as `fit_scales`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: (lower, upper), the full range shrunk by a factor of k / 50, for each row
        the largest of the best.
    """
    lower, upper = values.aminmax(dim=1)
    best = torch.ones_like(lower)
    least = torch.full_like(lower, torch.inf)
    for k in range(_N_PARTS, 0, -1):
        part = k / _N_PARTS
        scales, zeros = (tensor[:, None] for tensor in fit(lower * part, upper * part))
        rounded = dequantize(quantize(values, scales, zeros, bits, symmetric), scales, zeros)
        error = rounded.sub_(values).square_().mul_(counts).sum(1)
        is_better = error < least
        least = torch.where(is_better, error, least)
        best[is_better] = part
    return lower * best, upper * best


def _index_of_share(counts: torch.Tensor, share: float) -> int:
    # Not every accelerator has float64.
    cumulated = counts.cpu().double().cumsum(0)
    # Less than one more, because a product such as 0.999 * 1000 may come out above the whole number that it is.
    return int(torch.searchsorted(cumulated, cumulated[-1] * share * (1 - 1e-12)).clamp(max=len(counts) - 1))
