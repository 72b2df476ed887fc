"""How much units matter, from weights and activations: formulas of tensors alone."""

import torch

_ORDERS = {"l1": 1, "l2": 2, "linf": float("inf")}


def weight_norm(weights: torch.Tensor, norm: str) -> torch.Tensor:
    """The norm of all weights of each unit: L1, L2 or their maximum.

    Han et al. (2015) for single weights, Li et al., "Pruning Filters for Efficient ConvNets" (2017) for units.

    Args:
        weights (`torch.Tensor`): Shape (units, weights).
        norm (`str`): `"l1"`, `"l2"` or `"linf"`.

    Returns:
        `torch.Tensor`: Shape (units,), float64.
    """
    # Not every accelerator has float64.
    return torch.linalg.vector_norm(weights.cpu(), _ORDERS[norm], dim=1, dtype=torch.float64)


def activation(weight: torch.Tensor, squares: torch.Tensor, unit_size: int) -> torch.Tensor:
    """||W_:j|| ||x_j|| summed over the inputs j of each unit.

    Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (2024), equation 1, for columns.

    Args:
        weight (`torch.Tensor`): Of the output projection, shape (outputs, inputs).
        squares (`torch.Tensor`): Sums of squares of the inputs over tokens, shape (inputs,).
        unit_size (`int`): Inputs of one unit.

    Returns:
        `torch.Tensor`: Shape (units,), float64.
    """
    norms = torch.linalg.vector_norm(weight, dim=0, dtype=torch.float64) * squares.double().sqrt()
    return norms.unflatten(0, (-1, unit_size)).sum(1)
