"""SparseGPT against optimal brain surgery written from its formula: an explicit inverse for every column."""

import pytest
import torch

from hf_compress.pruning.masks import InputMeans, Selection, square_sums, wanda_scores
from hf_compress.pruning.sparsegpt import hessian_sums, inverse_factor, prune_compensated, removal_costs
from tests.pruning.slow_obs import damped_hessian, keep_best, slow_sparsegpt

OUTPUTS, INPUTS, TOKENS = 24, 40, 600


def correlated(seed: int = 0, inputs: int = INPUTS, tokens: int = TOKENS) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, and inputs as in a transformer: correlated, of unlike scales, a few of them large."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs // 2, inputs, generator=draw, dtype=torch.float64)
    x = torch.randn(tokens, inputs // 2, generator=draw, dtype=torch.float64) @ mixing
    x = x + 0.5 * torch.randn(tokens, inputs, generator=draw, dtype=torch.float64)
    x = x * torch.exp(0.7 * torch.randn(inputs, generator=draw, dtype=torch.float64))
    return torch.randn(OUTPUTS, inputs, generator=draw, dtype=torch.float64), x


def error(weight, left, x) -> float:
    return ((x @ (left.to(x) - weight).T).norm() / (x @ weight.T).norm()).item()


def fast(weight, x, selection, width=128, precision=torch.float64):
    means = InputMeans(hessian_sums)
    for part in x.split(100):
        means.add(part, torch.ones(len(part), dtype=torch.bool))
    return prune_compensated(weight, inverse_factor(means.mean.to(precision)), selection, width)


@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("width", [8, 20, 128])
def test_it_is_optimal_brain_surgery_column_by_column(share, width, precision):
    weight, x = correlated()
    expected = slow_sparsegpt(weight, x, lambda costs: keep_best(costs, share), width)
    left = fast(weight, x, Selection(share), width, precision)
    assert ((left == 0) == (expected == 0)).double().mean() > 0.995
    assert error(weight, left, x) == pytest.approx(error(weight, expected, x), rel=0.01)
    if precision == torch.float64:
        assert torch.allclose(left, expected, atol=1e-4)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4)])
def test_groups_are_chosen_inside_the_sweep(n, m):
    weight, x = correlated()
    expected = slow_sparsegpt(weight, x, lambda costs: costs.argsort(1).argsort(1) < m - n, m)
    left = fast(weight, x, Selection(1 - n / m, group=(n, m)), width=10)
    assert ((left == 0).view(OUTPUTS, -1, m).sum(2) == m - n).all()
    assert torch.allclose(left, expected, atol=1e-4)


@pytest.mark.parametrize("selection", [Selection(0.37), Selection(0.37, True), Selection(0.37, block=(4, 2))])
@pytest.mark.parametrize("width", [7, 128])
def test_counts_are_exact(selection, width):
    weight, x = correlated()
    zeros = fast(weight, x, selection, width) == 0
    rows, columns = selection.block
    n_units = OUTPUTS * INPUTS // (rows * columns)
    if selection.is_by_row:
        assert (zeros.sum(1) == round(0.37 * INPUTS)).all()
    else:
        assert zeros.sum() == round(0.37 * n_units) * rows * columns


def test_less_is_lost_than_by_wanda_and_by_magnitude():
    for seed in range(5):
        weight, x = correlated(seed)
        means = InputMeans(square_sums)
        means.add(x, torch.ones(len(x), dtype=torch.bool))
        by_rows = Selection(0.5, is_by_row=True)
        wanda = weight.masked_fill(by_rows.mask(wanda_scores(weight, means.mean)), 0)
        magnitude = weight.masked_fill(by_rows.mask(weight.abs()), 0)
        errors = [error(weight, left, x) for left in (fast(weight, x, Selection(0.5)), wanda, magnitude)]
        assert errors == sorted(errors)
        assert errors[0] < 0.9 * errors[1]


def test_the_factor_is_that_of_the_inverse():
    _, x = correlated()
    hessian = 2 * x.T @ x / len(x)
    factor = inverse_factor(hessian, 0.01)
    assert torch.equal(factor, factor.triu())
    assert torch.allclose(factor.T @ factor, torch.linalg.inv(damped_hessian(x)), rtol=1e-8, atol=1e-10)


def test_the_cost_of_a_removal_is_what_the_others_cannot_make_up_for():
    weight, x = correlated()
    costs = removal_costs(weight, inverse_factor(2 * x.T @ x / len(x), 1e-9))
    for column in (0, 17, 39):
        others = [j for j in range(INPUTS) if j != column]
        target = x @ weight[3]
        rest = x[:, others] @ torch.linalg.lstsq(x[:, others], target).solution - target
        assert costs[3, column].item() == pytest.approx(2 * rest.square().mean().item(), rel=1e-4)


def test_inputs_that_are_always_zero_go_first_and_count():
    weight, x = correlated()
    x[:, [3, 30]] = 0
    left = fast(weight, x, Selection(0.25), width=20)
    assert (left[:, [3, 30]] == 0).all()
    assert (left == 0).sum() == round(0.25 * weight.numel())
    assert torch.isfinite(left).all()
    few = fast(weight, x, Selection(0.01), precision=torch.float32)
    assert (few == 0).sum() == (few[:, [3, 30]] == 0).sum() == round(0.01 * weight.numel())
    nothing = fast(weight, torch.zeros_like(x), Selection(0.5))
    assert (nothing == 0).sum() == weight.numel() / 2


def test_nothing_removed_changes_nothing():
    weight, x = correlated()
    assert torch.equal(fast(weight, x, Selection(0.0)), weight)


def test_a_singular_hessian_is_refused_without_damping():
    _, x = correlated(tokens=10)
    with pytest.raises(ValueError, match=r"not positive definite.*give damping=0\.01 or more"):
        inverse_factor(2 * x.T @ x / len(x), 0.0)
