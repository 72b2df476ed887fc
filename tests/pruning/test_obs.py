import pytest
import torch

from hf_compress.pruning.obs import removal_curve
from hf_compress.pruning.repair import Moments, fit_projection, mean_compensation


def data(n_tokens=400, n_inputs=12, n_outputs=5):
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(n_inputs, n_inputs, generator=generator, dtype=torch.float64)
    x = torch.randn(n_tokens, n_inputs, generator=generator, dtype=torch.float64) @ mixing + 2
    weight = torch.randn(n_outputs, n_inputs, generator=generator, dtype=torch.float64)
    return x, weight


def refit_error(x, weight, kept) -> float:
    """The least mean squared error of the outputs that the kept inputs allow, without a bias."""
    targets = x @ weight.T
    solution = torch.linalg.lstsq(x[:, kept], targets).solution
    return (x[:, kept] @ solution - targets).square().sum().item() / len(x)


@pytest.mark.parametrize("unit_size", [1, 3])
@pytest.mark.parametrize("step", [1, 2])
def test_the_error_is_that_of_the_best_refit(unit_size, step):
    x, weight = data()
    removal = removal_curve(weight, x.T @ x / len(x), unit_size, damping=0.0, step=step)
    n_units = 12 // unit_size
    assert sorted(removal.order.tolist()) == list(range(n_units))
    for n_removed in range(0, n_units, step):
        units = removal.order[n_removed:]
        kept = (units[:, None] * unit_size + torch.arange(unit_size)).flatten()
        assert removal.error[n_removed].item() == pytest.approx(refit_error(x, weight, kept), rel=1e-6, abs=1e-9)


def test_the_first_unit_to_go_is_the_one_missed_least():
    x, weight = data()
    removal = removal_curve(weight, x.T @ x / len(x), damping=0.0)
    errors = [refit_error(x, weight, [j for j in range(12) if j != gone]) for gone in range(12)]
    assert removal.order[0].item() == errors.index(min(errors))


def test_inputs_that_are_always_zero_go_first_and_cost_nothing():
    x, weight = data()
    x[:, 4] = 0
    removal = removal_curve(weight, x.T @ x / len(x))
    assert removal.order[0] == 4
    assert removal.error[1] == 0


def gathered(x, y, weights, n_batches=3) -> Moments:
    moments = Moments()
    for part in torch.arange(len(x)).chunk(n_batches):
        moments.add(x[part], y[part], weights[part])
    return moments


@pytest.mark.parametrize("has_bias", [True, False])
def test_the_fit_is_weighted_least_squares(has_bias):
    x, weight = data()
    y = x @ weight.T + torch.randn(400, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    weights = torch.rand(400, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    weights[::7] = 0
    kept = torch.tensor([0, 2, 3, 7, 11])
    inputs = torch.cat([x[:, kept], torch.ones(400, int(has_bias), dtype=torch.float64)], dim=1)
    root = weights.sqrt()[:, None]
    expected = torch.linalg.lstsq(inputs * root, y * root).solution.T
    fitted, bias = fit_projection(gathered(x, y, weights), kept, weight[:, kept], 0.0, has_bias)
    assert torch.allclose(fitted, expected[:, :5], atol=1e-4)
    if has_bias:
        assert torch.allclose(bias, expected[:, 5], atol=1e-3)


def test_a_fit_of_everything_to_its_own_outputs_changes_nothing():
    x, weight = data()
    fitted, bias = fit_projection(gathered(x, x @ weight.T, torch.ones(400)), torch.arange(12), weight, 1e-2)
    assert torch.allclose(fitted, weight, atol=1e-5)
    assert bias.abs().max() < 1e-4


def test_a_strong_ridge_keeps_the_old_weights():
    x, weight = data()
    kept = torch.arange(6)
    fitted, bias = fit_projection(gathered(x, x @ weight.T, torch.ones(400)), kept, weight[:, kept], 1e9)
    assert torch.allclose(fitted, weight[:, kept], atol=1e-5)
    expected = mean_compensation(gathered(x, x @ weight.T, torch.ones(400)), kept, weight[:, kept])
    assert torch.allclose(bias, expected, atol=1e-4)


def test_a_mean_far_from_zero_does_not_drown_the_spread():
    x, weight = data()
    far = x + 1e4
    moments = gathered(far.float(), (x @ weight.T).float(), torch.ones(400))
    centred = x - x.mean(0)
    assert torch.allclose(moments.xx(), centred.T @ centred / 400, rtol=1e-2, atol=1e-1)


def test_nothing_kept_leaves_the_mean_of_the_targets():
    x, weight = data()
    y = x @ weight.T
    kept = torch.tensor([], dtype=torch.long)
    fitted, bias = fit_projection(gathered(x, y, torch.ones(400)), kept, weight[:, kept], 1e-2)
    assert fitted.shape == (5, 0)
    assert torch.allclose(bias, y.mean(0), atol=1e-4)


def test_a_singular_system_is_refused_without_ridge_and_solved_with_it():
    x, weight = data(n_tokens=6)
    moments = gathered(x, x @ weight.T, torch.ones(6), n_batches=1)
    kept = torch.arange(12)
    with pytest.raises(ValueError, match=r"linearly dependent.*give more texts, or ridge=0\.1"):
        fit_projection(moments, kept, weight, 0.0)
    fitted, _ = fit_projection(moments, kept, weight, 1e-2)
    assert torch.isfinite(fitted).all()
