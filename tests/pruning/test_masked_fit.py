"""Least squares under masks: equal to solves of each row alone, and what they are the best of."""

import pytest
import torch

from hf_compress.pruning.masked_fit import fit_masked, solve_masked
from hf_compress.pruning.repair import Moments, fit_projection

ROWS, INPUTS, TOKENS = 12, 20, 200


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def masks(share: float) -> torch.Tensor:
    """Rows that keep different numbers, two of them alike."""
    kept = torch.rand(ROWS, INPUTS, generator=torch.Generator().manual_seed(1)) < share
    kept[1] = kept[0]
    return kept


def moments_of(x: torch.Tensor, y: torch.Tensor) -> Moments:
    moments = Moments()
    for rows in (slice(0, 70), slice(70, None)):
        moments.add(x[rows], y[rows], torch.ones(len(x[rows])))
    return moments


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8, 0.95])
def test_each_row_is_solved_as_if_it_were_alone(share):
    x = draw(TOKENS, INPUTS)
    matrix, right, kept = x.T @ x, draw(ROWS, INPUTS, seed=2), masks(share)
    kept[2], kept[3] = True, False
    solved = solve_masked(matrix, right, kept)
    for row in range(ROWS):
        stays = kept[row].nonzero()[:, 0]
        alone = torch.linalg.solve(matrix[stays][:, stays], right[row, stays])
        assert torch.allclose(solved[row, stays], alone, rtol=1e-9, atol=1e-12)
        assert (solved[row, ~kept[row]] == 0).all()


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_a_fit_is_that_of_the_stacked_least_squares_problem(has_bias, ridge):
    x = draw(TOKENS, INPUTS) + 3
    y, start, kept = draw(TOKENS, ROWS, seed=2) + x[:, :ROWS], draw(ROWS, INPUTS, seed=3), masks(0.6)
    weight, bias = fit_masked(moments_of(x, y), kept, start, ridge, has_bias)
    centred = x - x.mean(0) if has_bias else x
    pull = (TOKENS * ridge * centred.square().mean()).sqrt() * torch.eye(INPUTS, dtype=torch.float64)
    for row in range(ROWS):
        stays = kept[row].nonzero()[:, 0]
        target = y[:, row] - y[:, row].mean() if has_bias else y[:, row]
        a = torch.cat([centred[:, stays], pull[stays][:, stays]])
        b = torch.cat([target, pull[stays][:, stays] @ start[row, stays]])
        expected = torch.linalg.lstsq(a, b[:, None]).solution[:, 0]
        assert torch.allclose(weight[row, stays], expected, rtol=1e-4, atol=1e-5)
    assert (weight[~kept] == 0).all()
    if has_bias:
        assert torch.allclose((x @ weight.T + bias).mean(0), y.mean(0), atol=1e-5)


def test_equal_masks_give_the_fit_of_cut_inputs():
    x, start = draw(TOKENS, INPUTS), draw(ROWS, INPUTS, seed=3)
    moments = moments_of(x, draw(TOKENS, ROWS, seed=2))
    stays = torch.tensor([0, 3, 4, 9, 17])
    kept = torch.zeros(ROWS, INPUTS, dtype=torch.bool)
    kept[:, stays] = True
    # The pull is measured by all inputs here, by those that stay there.
    weight, bias = fit_masked(moments, kept, start, 0.0)
    expected, expected_bias = fit_projection(moments, stays, start[:, stays], 0.0)
    assert torch.allclose(weight[:, stays], expected)
    assert torch.allclose(bias, expected_bias)


def test_targets_that_the_weights_give_already_leave_them_as_they_are():
    x, kept = draw(TOKENS, INPUTS), masks(0.5)
    start, bias = draw(ROWS, INPUTS, seed=3) * kept, draw(ROWS, seed=4)
    weight, fitted_bias = fit_masked(moments_of(x, x @ start.T + bias), kept, start, 0.1)
    assert torch.allclose(weight, start, atol=1e-5)
    assert torch.allclose(fitted_bias, bias, atol=1e-5)


def test_dependent_inputs_need_a_ridge_and_dead_ones_do_not():
    x = draw(TOKENS, INPUTS)
    x[:, 5] = 0
    y, start, kept = draw(TOKENS, ROWS, seed=2), draw(ROWS, INPUTS, seed=3), masks(0.8)
    weight, _ = fit_masked(moments_of(x, y), kept, start, 0.0)
    # What reads nothing stays as it is.
    assert torch.allclose(weight[:, 5], start[:, 5] * kept[:, 5])
    few = moments_of(x[:8], y[:8])
    assert fit_masked(few, kept, start, 0.1)[0].isfinite().all()
    with pytest.raises(ValueError, match="20 inputs .* are linearly dependent .* ridge=0.0"):
        fit_masked(few, kept, start, 0.0)
