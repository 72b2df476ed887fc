"""SparseGPT as its formula says: optimal brain surgery with an explicit inverse for every column, row by row."""

from collections.abc import Callable

import torch


def damped_hessian(x: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    """2 X^T X / n with a share of the mean of its diagonal added."""
    hessian = 2 * x.T @ x / len(x)
    return hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=x.dtype)


def slow_sparsegpt(
    weight: torch.Tensor, x: torch.Tensor, choose: Callable[[torch.Tensor], torch.Tensor], width: int
) -> torch.Tensor:
    """Frantar and Alistarh (2023), section 3: the inverse over the columns that are left, anew for each of them."""
    left, hessian = weight.clone(), damped_hessian(x)
    n = weight.shape[1]
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(n)]
    for j in range(n):
        if j % width == 0:
            columns = range(j, min(j + width, n))
            costs = torch.stack([left[:, i] ** 2 / inverses[i][0, 0] for i in columns], dim=1)
            mask = choose(costs)
        for row in range(len(left)):
            if mask[row, j % width]:
                left[row, j:] -= left[row, j] / inverses[j][0, 0] * inverses[j][0]
                left[row, j] = 0
    return left


def keep_best(costs: torch.Tensor, share: float) -> torch.Tensor:
    """True for the cheapest share of all."""
    order = costs.flatten().argsort()
    mask = torch.zeros(costs.numel(), dtype=torch.bool)
    mask[order[: round(share * costs.numel())]] = True
    return mask.view_as(costs)
