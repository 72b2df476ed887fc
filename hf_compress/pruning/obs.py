"""Optimal brain surgery on groups of inputs of a projection: what removing them costs once the rest makes up for it.

Formulas on tensors alone. See Kurtic et al., "ZipLM" (2023), section 3.1, and Hassibi and Stork (1993).
"""

from typing import NamedTuple

import torch


class Removal(NamedTuple):
    """The units of a projection in the order in which they go.

    Attributes:
        order (`torch.Tensor`): Indices of units, first the one that is missed least, shape (units,).
        error (`torch.Tensor`): What is lost in all once so many are gone, shape (units + 1,), starts at 0.
    """

    order: torch.Tensor
    error: torch.Tensor


def removal_curve(
    weight: torch.Tensor, gram: torch.Tensor, unit_size: int = 1, damping: float = 1e-2, step: int = 1
) -> Removal:
    """Removes the inputs of a projection unit by unit, each time the one whose absence costs least.

    With B the inverse of the Gram matrix over the units that are left, unit J costs tr(W_J B_JJ^-1 W_J^T), the squared
    error of the outputs after the other weights were refitted; then W -= W_J B_JJ^-1 B_J: and B -= B_:J B_JJ^-1 B_J:
    (ZipLM, equations 3 and 4). The weights refitted here only serve to tell the next costs.

    Args:
        weight (`torch.Tensor`): Shape (outputs, inputs). Multiply it from the left by a root of a metric of the
            outputs to measure the error in that metric.
        gram (`torch.Tensor`): Mean of x x^T over tokens, shape (inputs, inputs); centred where a bias is refitted too.
        unit_size (`int`, *optional*, defaults to 1): Inputs of one unit, side by side.
        damping (`float`, *optional*, defaults to 0.01): Share of the mean of the diagonal that is added to it.
        step (`int`, *optional*, defaults to 1): Units removed at once: their costs are told apart beforehand.

    Returns:
        `Removal`: Order and cumulative error, in float64.
    """
    # Weights of inputs that are always 0 act on nothing.
    left = weight.double() * (gram.diagonal() > 0)
    gram = damped(gram.double(), damping)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    n_units = gram.shape[0] // unit_size
    units = torch.arange(n_units)
    order, errors = [], [0.0]
    while len(units):
        costs = _costs(left, inverse, unit_size)
        chosen = costs.argsort()[: min(step, len(units))]
        order.append(units[chosen])
        is_left = torch.ones(len(units), dtype=torch.bool)
        is_left[chosen] = False
        # Together they cost more than each alone; the exact sum is spread over them by their own costs.
        inputs = _inputs_of(chosen, unit_size)
        together = _joint_cost(left, inverse, inputs) if len(chosen) > 1 else costs[chosen[0]]
        shares = costs[chosen] / costs[chosen].sum().clamp_min(torch.finfo(torch.float64).tiny)
        errors += (errors[-1] + together * shares.cumsum(0)).tolist()
        left, inverse = _without(left, inverse, inputs, _inputs_of(is_left.nonzero()[:, 0], unit_size))
        units = units[is_left]
    return Removal(torch.cat(order), torch.tensor(errors, dtype=torch.float64))


def damped(gram: torch.Tensor, damping: float) -> torch.Tensor:
    """A Gram matrix with a share of the mean of its diagonal added to it; inputs that are always 0 get a 1.

    Args:
        gram (`torch.Tensor`): Shape (inputs, inputs).
        damping (`float`): The share.

    Returns:
        `torch.Tensor`: A positive definite matrix of the same shape.
    """
    diagonal = gram.diagonal()
    added = damping * diagonal.mean() + (diagonal <= 0)
    return gram + torch.diag(added.to(gram))


def _costs(weight: torch.Tensor, inverse: torch.Tensor, size: int) -> torch.Tensor:
    if size == 1:
        return weight.square().sum(0) / inverse.diagonal()
    n_units = weight.shape[1] // size
    blocks = torch.stack([inverse[i * size : (i + 1) * size, i * size : (i + 1) * size] for i in range(n_units)])
    columns = weight.unflatten(1, (n_units, size)).movedim(1, 0)
    solved = torch.linalg.solve(blocks, columns.transpose(1, 2))
    return (columns.transpose(1, 2) * solved).sum((1, 2))


def _joint_cost(weight: torch.Tensor, inverse: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    columns = weight[:, inputs]
    solved = torch.linalg.solve(inverse[inputs][:, inputs], columns.T)
    return (columns.T * solved).sum()


def _without(
    weight: torch.Tensor, inverse: torch.Tensor, gone: torch.Tensor, kept: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = inverse[gone]
    solved = torch.linalg.solve(rows[:, gone], rows[:, kept])
    return weight[:, kept] - weight[:, gone] @ solved, inverse[kept][:, kept] - rows[:, kept].T @ solved


def _inputs_of(units: torch.Tensor, size: int) -> torch.Tensor:
    return (units[:, None] * size + torch.arange(size)).flatten()
