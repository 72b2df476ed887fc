"""Making up for single weights that went: least squares with a mask for each output. Formulas on tensors alone."""

import torch

from hf_compress.pruning.obs import damped
from hf_compress.pruning.repair import Moments


def fit_masked(
    moments: Moments, kept: torch.Tensor, weight: torch.Tensor, ridge: float, has_bias: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and bias that bring the outputs closest to the targets, where each output reads inputs of its own.

    For each row, argmin ||X_S w_S + b - y||^2 + r ||w_S - w0_S||^2 over the inputs S that it keeps, with r as in
    `fit_projection`: w_S = (G_SS + r)^-1 (c_S + r w0_S), with G and c the second moments of the inputs, and of the
    inputs and the target.

    Args:
        moments (`Moments`): Sums over all inputs.
        kept (`torch.Tensor`): The weights that stay, booleans of shape (outputs, inputs).
        weight (`torch.Tensor`): W0, shape (outputs, inputs).
        ridge (`float`): Strength of the pull towards W0, in units of the mean variance of the inputs.
        has_bias (`bool`, *optional*, defaults to `True`): Whether there is a bias; without, the fit goes through 0.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Weight, shape (outputs, inputs), exactly 0 where it is not kept, and bias,
        shape (outputs,), in float64.

    Raises:
        ValueError: if the inputs are linearly dependent and `ridge` is 0.
    """
    gram = moments.xx(has_bias)
    regular = damped(gram, ridge)
    right = moments.xy(has_bias).T + (regular - gram).diagonal() * weight.double()
    try:
        fitted = solve_masked(regular, right, kept)
    except torch.linalg.LinAlgError as error:
        raise ValueError(
            f"The {len(gram)} inputs of a projection are linearly dependent on the calibration data, and "
            f"ridge={ridge} does not tell them apart: give more texts, or ridge=0.1."
        ) from error
    return fitted, moments.mean_y - fitted @ moments.mean_x


def solve_masked(matrix: torch.Tensor, right: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Solves A_SS x_S = b_S for each row b of the right sides, with the unknowns S that the row keeps; others are 0.

    Rows of the same mask are solved together. A row that keeps few unknowns is solved by their part of A; one that
    loses few, R, by the solution x of the whole system less what they bring: x - B_:R B_RR^-1 x_R with B = A^-1, as in
    Optimal Brain Surgeon.

    Args:
        matrix (`torch.Tensor`): A, symmetric and positive definite, shape (unknowns, unknowns).
        right (`torch.Tensor`): Shape (rows, unknowns).
        kept (`torch.Tensor`): Booleans of shape (rows, unknowns).

    Returns:
        `torch.Tensor`: Shape (rows, unknowns).

    Raises:
        torch.linalg.LinAlgError: if A, or a part of it, is not positive definite.
    """
    solved = torch.zeros_like(right)
    masks, rows_of = kept.unique(dim=0, return_inverse=True)
    is_mostly_kept = masks.sum(1) > masks.shape[1] / 2
    if is_mostly_kept.any():
        factor = torch.linalg.cholesky(matrix)
        inverse, whole = torch.cholesky_inverse(factor), torch.cholesky_solve(right.T, factor).T
    for number, mask in enumerate(masks):
        rows = (rows_of == number).nonzero()[:, 0]
        if is_mostly_kept[number]:
            gone = (~mask).nonzero()[:, 0]
            columns = inverse[gone]
            solved[rows] = whole[rows] - _solve(columns[:, gone], whole[rows][:, gone]) @ columns
        else:
            stays = mask.nonzero()[:, 0]
            solved[rows[:, None], stays] = _solve(matrix[stays][:, stays], right[rows][:, stays])
    return solved.masked_fill(~kept, 0)


def _solve(matrix: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.cholesky_solve(right.T, torch.linalg.cholesky(matrix)).T
