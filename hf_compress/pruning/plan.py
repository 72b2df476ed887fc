"""How many units each site keeps: searches over curves of error and cost. Pure: numbers in, numbers out, no model.

A plan is a tuple of levels, one per curve. No search returns a plan that costs more than the target.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

# Costs are counted in this many steps of the target, rounded up: fine enough to use 99 % of it with 50 sites.
RESOLUTION = 10_000


@dataclass(frozen=True)
class Curve:
    """What one site may keep, from everything to the least.

    Attributes:
        kept (`np.ndarray`): Numbers of units that may stay, falling, shape (levels,).
        error (`np.ndarray`): What is lost at each level; 0 first.
        cost (`np.ndarray`): What the site costs at each level.
        kind (`str`): Sites of one kind get the same width in a uniform plan.
    """

    kept: np.ndarray
    error: np.ndarray
    cost: np.ndarray
    kind: str


Plan = tuple[int, ...]


def total_cost(curves: Sequence[Curve], plan: Plan | None = None) -> float:
    """The cost of a plan, or of everything.

    Args:
        curves (`Sequence[Curve]`): One per site.
        plan (`tuple[int, ...]`, *optional*): Their levels; by default the first, which keeps all.
    """
    levels = plan or (0,) * len(curves)
    return float(sum(curve.cost[level] for curve, level in zip(curves, levels, strict=True)))


def smallest_cost(curves: Sequence[Curve], uniform: bool = False) -> float:
    """The cost below which no plan can get.

    Args:
        curves (`Sequence[Curve]`): One per site.
        uniform (`bool`, *optional*, defaults to `False`): Whether sites of one kind must get the same width.

    Raises:
        ValueError: if they must, and sites of one kind have no width in common.
    """
    if not uniform:
        return float(sum(curve.cost.min() for curve in curves))
    least = {kind: widths[0] for kind, widths in common_widths(curves).items()}
    return float(sum(curve.cost[curve.kept == least[curve.kind]][0] for curve in curves))


def common_widths(curves: Sequence[Curve]) -> dict[str, list[int]]:
    """The widths that all sites of a kind may get.

    Args:
        curves (`Sequence[Curve]`): One per site.

    Returns:
        `dict[str, list[int]]`: By kind, rising.

    Raises:
        ValueError: if there is none.
    """
    kinds = sorted({curve.kind for curve in curves})
    common = {
        kind: sorted(set.intersection(*(set(curve.kept.tolist()) for curve in curves if curve.kind == kind)))
        for kind in kinds
    }
    if not all(common.values()):
        raise ValueError("Blocks of unlike widths cannot be cut to one width: leave uniform=False.")
    return common


def check_target(curves: Sequence[Curve], target: float, fixed: float = 0.0, uniform: bool = False) -> None:
    """Refuses a target that no plan can meet, whatever the errors.

    Args:
        curves (`Sequence[Curve]`): One per site.
        target (`float`): The cost that must not be exceeded, `fixed` aside.
        fixed (`float`, *optional*, defaults to 0.0): What a budget also counts, and nothing can cut.
        uniform (`bool`, *optional*, defaults to `False`): Whether sites of one kind must get the same width.

    Raises:
        ValueError: with the smallest share of the cost that can be met.
    """
    smallest, whole = smallest_cost(curves, uniform), total_cost(curves) + fixed
    if target < smallest:
        one_width = "one width for all layers and " if uniform else ""
        remedy = "uniform=False" if uniform else 'units that may go altogether ("layers")'
        raise budget_error(
            (target + fixed) / whole,
            (smallest + fixed) / whole,
            f"with {one_width}the fewest units that must stay",
            f"a smaller multiple_of, or {remedy}",
        )


def budget_error(budget: float, smallest: float, why: str, remedies: str) -> ValueError:
    """What is raised where a budget cannot be met.

    Args:
        budget (`float`): The share of the cost that was asked for.
        smallest (`float`): The least share that there is.
        why (`str`): What makes it the least.
        remedies (`str`): What else could be given.
    """
    # Rounded up, so that typing the figure works.
    least = np.ceil(1000 * smallest) / 1000
    return ValueError(
        f"A budget of {budget:.3f} of the cost cannot be met: {why}, {smallest:.3f} is left. Give budget={least:g} or "
        f"more, {remedies}."
    )


def dynamic_plan(curves: Sequence[Curve], target: float) -> Plan:
    """The least total error within the target, by dynamic programming over the cost.

    Frantar and Alistarh, "SPDY" (2022), section 3.2.

    Args:
        curves (`Sequence[Curve]`): One per site.
        target (`float`): The cost that must not be exceeded.

    Returns:
        `tuple[int, ...]`: A level per curve.

    Raises:
        ValueError: if the target cannot be met.
    """
    check_target(curves, target)
    if total_cost(curves) <= target:
        return (0,) * len(curves)
    best = np.zeros(RESOLUTION + 1)
    choices = []
    # Costs are counted from the least of each site, so that rounding up leaves room for every site's least.
    room = target - smallest_cost(curves)
    for curve in curves:
        steps = _steps(curve.cost - curve.cost.min(), room)
        found = np.full(RESOLUTION + 1, np.inf)
        choice = np.zeros(RESOLUTION + 1, dtype=np.int64)
        for level, step in enumerate(steps):
            if step > RESOLUTION:
                continue
            candidate = np.full(RESOLUTION + 1, np.inf)
            candidate[step:] = best[: RESOLUTION + 1 - step] + curve.error[level]
            is_better = candidate < found
            found[is_better], choice[is_better] = candidate[is_better], level
        best = found
        choices.append((choice, steps))
    left, plan = RESOLUTION, []
    for choice, steps in reversed(choices):
        plan.append(int(choice[left]))
        left -= steps[plan[-1]]
    return fill(curves, target, tuple(reversed(plan)))


def _steps(cost: np.ndarray, room: float) -> np.ndarray:
    if room <= 0:
        return np.where(cost > 0, RESOLUTION + 1, 0)
    return np.minimum(np.ceil(cost / room * RESOLUTION - 1e-9), RESOLUTION + 1).astype(np.int64)


def ranking_plan(curves: Sequence[Curve], target: float) -> Plan:
    """Removes what costs least error per cost saved, everywhere at once, until the target is met.

    Args:
        curves (`Sequence[Curve]`): One per site.
        target (`float`): The cost that must not be exceeded.

    Returns:
        `tuple[int, ...]`: A level per curve.

    Raises:
        ValueError: if the target cannot be met.
    """
    check_target(curves, target)
    levels = [0] * len(curves)
    while total_cost(curves, tuple(levels)) > target:
        slopes = [_best_step(curve, level) for curve, level in zip(curves, levels, strict=True)]
        index = min(range(len(curves)), key=lambda i: slopes[i][0])
        levels[index] = slopes[index][1]
    return fill(curves, target, tuple(levels))


def _best_step(curve: Curve, level: int) -> tuple[float, int]:
    """The next corner of the lower convex hull: error per cost saved, and its level."""
    saved = curve.cost[level] - curve.cost[level + 1 :]
    lost = curve.error[level + 1 :] - curve.error[level]
    slopes = np.where(saved > 0, lost / np.where(saved > 0, saved, 1), np.inf)
    if not len(slopes) or np.isinf(slopes).all():
        return np.inf, level
    return float(slopes.min()), level + 1 + int(slopes.argmin())


def local_plan(curves: Sequence[Curve], target: float) -> Plan:
    """The same share of units for every site, as large as the target allows.

    Args:
        curves (`Sequence[Curve]`): One per site.
        target (`float`): The cost that must not be exceeded.

    Returns:
        `tuple[int, ...]`: A level per curve.

    Raises:
        ValueError: if the target cannot be met.
    """
    check_target(curves, target)
    shares = sorted({kept / curve.kept[0] for curve in curves for kept in curve.kept}, reverse=True)
    for share in shares:
        plan = tuple(_level_at(curve, share * curve.kept[0]) for curve in curves)
        if total_cost(curves, plan) <= target:
            break
    return fill(curves, target, plan)


def _level_at(curve: Curve, kept: float) -> int:
    """The level that keeps at most so many units, or the least."""
    fitting = np.flatnonzero(curve.kept <= kept + 1e-9)
    return int(fitting[0]) if len(fitting) else len(curve.kept) - 1


def uniform_plan(curves: Sequence[Curve], target: float) -> Plan:
    """One width for all sites of a kind, with the least total error within the target.

    Args:
        curves (`Sequence[Curve]`): One per site.
        target (`float`): The cost that must not be exceeded.

    Returns:
        `tuple[int, ...]`: A level per curve; equal widths within each kind.

    Raises:
        ValueError: if the target cannot be met, or sites of one kind have no width in common.
    """
    check_target(curves, target, uniform=True)
    common = common_widths(curves)
    plans = []
    for widths in product(*common.values()):
        width = dict(zip(common, widths, strict=True))
        plan = tuple(int(np.flatnonzero(c.kept == width[c.kind])[0]) for c in curves)
        if total_cost(curves, plan) <= target:
            plans.append(plan)
    return min(plans, key=lambda plan: sum(c.error[level] for c, level in zip(curves, plan, strict=True)))


def fill(curves: Sequence[Curve], target: float, plan: Plan) -> Plan:
    """Spends what is left of the target: level by level, where it saves most error per cost.

    Args:
        curves (`Sequence[Curve]`): One per site.
        target (`float`): The cost that must not be exceeded.
        plan (`tuple[int, ...]`): A plan within the target.

    Returns:
        `tuple[int, ...]`: A plan within the target to which nothing can be added.
    """
    levels = list(plan)
    left = target - total_cost(curves, plan)
    while True:
        steps = []
        for index, (curve, level) in enumerate(zip(curves, levels, strict=True)):
            for higher in range(level - 1, -1, -1):
                price = curve.cost[higher] - curve.cost[level]
                if 0 <= price <= left:
                    gain = (curve.error[level] - curve.error[higher]) / max(price, 1e-12)
                    steps.append((gain, index, higher, price))
        if not steps:
            return tuple(levels)
        _, index, higher, price = max(steps)
        levels[index] = higher
        left -= price
