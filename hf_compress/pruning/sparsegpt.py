"""SparseGPT: weights go column by column, and the columns to the right make up for them. Formulas on tensors alone.

Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot" (2023), algorithm 1.
"""

import torch

from hf_compress.pruning.masks import Selection

# Of the damping, for inputs that are always 0.
DEAD_SHARE = 1e-12


def hessian_sums(inputs: torch.Tensor) -> torch.Tensor:
    """2 X X^T of the squared error of a layer's outputs, from inputs of shape (tokens, inputs) to (inputs, inputs)."""
    return 2 * inputs.T @ inputs


def inverse_factor(hessian: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    """The upper Cholesky factor U of the inverse of a damped Hessian: U^T U = (H + damping mean(diag H) I)^-1.

    Row j of U, from the diagonal on and divided by its root, is the first row of the inverse over the columns from j
    on: all inverses that the sweep needs in one matrix. With the order of the columns turned round, H = R R^T for an
    upper R, and U is its inverse, so that H is never inverted itself.

    Args:
        hessian (`torch.Tensor`): H = 2 X X^T, the mean over tokens, shape (inputs, inputs), in float32 or float64.
            Inputs that are always 0 get next to nothing on the diagonal: their weights cost nothing and go first.
        damping (`float`, *optional*, defaults to 0.01): Share of the mean of the diagonal.

    Returns:
        `torch.Tensor`: U, shape (inputs, inputs).

    Raises:
        ValueError: if the damped Hessian is not positive definite in its precision.
    """
    diagonal = hessian.diagonal()
    added = torch.where(diagonal > 0, 1.0, DEAD_SHARE).to(diagonal) * damping * diagonal.mean()
    # Where no input is ever anything but 0, all are alike.
    damped = hessian + torch.diag(added if diagonal.any() else torch.ones_like(added))
    turned, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if failed:
        raise ValueError(
            f"A Hessian of {len(hessian)} inputs with damping={damping} is not positive definite in {hessian.dtype}: "
            "give damping=0.01 or more, or precision='float64'."
        )
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    return torch.linalg.solve_triangular(turned.flip(0, 1), identity, upper=True)


def removal_costs(weight: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """What removing each weight alone costs, once the others of its row made up for it: w_ij^2 / [H^-1]_jj.

    Hassibi and Stork, "Second Order Derivatives for Network Pruning: Optimal Brain Surgeon" (1993), equation 5.

    Args:
        weight (`torch.Tensor`): Shape (outputs, inputs).
        factor (`torch.Tensor`): U of `inverse_factor`.

    Returns:
        `torch.Tensor`: Shape (outputs, inputs).
    """
    return weight.to(factor).square() / factor.square().sum(0)


def prune_compensated(
    weight: torch.Tensor, factor: torch.Tensor, selection: Selection, width: int = 128
) -> torch.Tensor:
    """Weights with some of them 0, and the others adapted so that the outputs change little.

    From left to right, the mask of the next columns is chosen by w^2 / U_jj^2, the cost of their removal if only later
    columns can make up for it. Then each column passes its error on: w_j: -= (w_j - q_j) / U_jj U_j:.

    Args:
        weight (`torch.Tensor`): Shape (outputs, inputs).
        factor (`torch.Tensor`): U of `inverse_factor`, shape (inputs, inputs).
        selection (`Selection`): Which weights may go and how many; each slice of columns loses the same share.
        width (`int`, *optional*, defaults to 128): Columns whose mask is chosen at once; of an n:m pattern, only those
            of a group are, and so many columns are updated at once.

    Returns:
        `torch.Tensor`: New weights in the precision of `factor`, shape (outputs, inputs).
    """
    left = weight.to(factor, copy=True)
    width = max(1, width // selection.unit) * selection.unit
    chosen_at_once = selection.unit if selection.group else width
    for start in range(0, left.shape[1], width):
        stop = min(start + width, left.shape[1])
        part, root = left[:, start:stop], factor[start:stop, start:stop]
        errors, mask = torch.zeros_like(part), torch.zeros_like(part, dtype=torch.bool)
        for j in range(stop - start):
            if j % chosen_at_once == 0:
                columns = slice(j, j + chosen_at_once)
                scores = (part[:, columns] / root.diagonal()[columns]).square()
                mask[:, columns] = selection.mask(scores, start + j)
            errors[:, j] = part[:, j] * mask[:, j] / root[j, j]
            part[:, j:] -= errors[:, j : j + 1] * root[j, j:]
        part[mask] = 0
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return left
