import re

import numpy as np
import pytest

from hf_compress.pruning.plan import (
    Curve,
    check_target,
    dynamic_plan,
    fill,
    local_plan,
    ranking_plan,
    total_cost,
    uniform_plan,
)

SEARCHES = [dynamic_plan, ranking_plan, local_plan, uniform_plan]


def random_curves(seed: int, n_sites: int = 6, units: int = 12) -> list[Curve]:
    """Half of the sites with few dear units, half with many cheap ones; errors rise ever faster, or at random."""
    draw = np.random.default_rng(seed)
    curves = []
    for index in range(n_sites):
        kind, n_units, price = ("heads", units, 7.3) if index % 2 else ("neurons", 8 * units, 1.1)
        kept = np.arange(n_units, 0, -1 if kind == "heads" else -8)
        steps = draw.random(len(kept) - 1) if seed % 2 else np.sort(draw.random(len(kept) - 1))
        error = np.concatenate([[0.0], steps.cumsum()]) * draw.lognormal()
        curves.append(Curve(kept, error, kept * price, kind))
    return curves


def total_error(curves, plan) -> float:
    return sum(curve.error[level] for curve, level in zip(curves, plan, strict=True))


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.2, 0.35, 0.5, 0.77, 1.0])
def test_a_plan_never_exceeds_its_target(search, seed, share):
    curves = random_curves(seed)
    target = share * total_cost(curves)
    plan = search(curves, target)
    assert total_cost(curves, plan) <= target
    if search is not uniform_plan:  # whose steps are a unit of every site at once
        assert total_cost(curves, plan) >= 0.98 * target or is_full(curves, target, plan)


def is_full(curves, target, plan) -> bool:
    """Whether no site can keep more within the target."""
    more = [(*plan[:i], level - 1, *plan[i + 1 :]) for i, level in enumerate(plan) if level]
    return all(total_cost(curves, better) > target for better in more)


@pytest.mark.parametrize("seed", range(6))
def test_dynamic_programming_finds_the_least_error(seed):
    curves = random_curves(seed, n_sites=3, units=4)
    target = 0.5 * total_cost(curves)
    plans = [(i, j, k) for i in range(len(curves[0].kept)) for j in range(4) for k in range(len(curves[2].kept))]
    best = min(total_error(curves, plan) for plan in plans if total_cost(curves, plan) <= target)
    # Costs are rounded up to a ten-thousandth of the target.
    assert total_error(curves, dynamic_plan(curves, target)) <= best + 1e-9


@pytest.mark.parametrize("seed", range(6))
def test_no_search_beats_dynamic_programming(seed):
    curves = random_curves(seed)
    target = 0.4 * total_cost(curves)
    errors = {search.__name__: total_error(curves, search(curves, target)) for search in SEARCHES}
    assert errors["dynamic_plan"] <= min(errors.values()) * 1.02


def test_everything_stays_where_the_budget_allows_it():
    curves = random_curves(0)
    for search in SEARCHES:
        assert search(curves, total_cost(curves)) == (0,) * len(curves)


@pytest.mark.parametrize(
    ("uniform", "remedy"), [(True, "uniform=False"), (False, 'that may go altogether ("layers")')]
)
def test_remedies_are_of_the_kind_of_plan(uniform, remedy):
    curves = [Curve(np.array([4, 2]), np.zeros(2), np.array([4.0, 2.0]), "heads")]
    with pytest.raises(ValueError, match=f"more, a smaller multiple_of, or .*{re.escape(remedy)}[.]$"):
        check_target(curves, 1.0, uniform=uniform)


def test_a_uniform_plan_has_one_width_for_each_kind():
    curves = random_curves(1)
    plan = uniform_plan(curves, 0.5 * total_cost(curves))
    for kind in ("heads", "neurons"):
        assert len({int(c.kept[level]) for c, level in zip(curves, plan, strict=True) if c.kind == kind}) == 1


@pytest.mark.parametrize("search", SEARCHES)
def test_an_impossible_target_names_the_smallest_share(search):
    curves = random_curves(0)
    smallest = sum(curve.cost[-1] for curve in curves) / total_cost(curves)
    with pytest.raises(ValueError, match=r"cannot be met.*Give budget=0\.\d+ or more"):
        search(curves, 0.99 * smallest * total_cost(curves))
    assert search(curves, (smallest + 0.001) * total_cost(curves))


def test_nothing_can_be_added_to_a_filled_plan():
    curves = random_curves(2)
    target = 0.5 * total_cost(curves)
    plan = fill(curves, target, tuple(len(curve.kept) - 1 for curve in curves))
    assert total_cost(curves, plan) <= target
    assert is_full(curves, target, plan)
