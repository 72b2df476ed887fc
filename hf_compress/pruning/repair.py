"""Making up for what was cut: new weights for output projections by least squares. Formulas on tensors alone."""

import torch

from hf_compress.pruning.obs import damped


class Moments:
    """Weighted sums over tokens, from which a projection is fitted; gathered batch by batch.

    Values are counted from the mean of the first batch: where it is large beside the spread, squares would lose the
    spread to rounding. Products are taken in float32 and summed in float64.
    """

    def __init__(self) -> None:
        self.weight = 0.0
        self._x: torch.Tensor | None = None

    def add(self, inputs: torch.Tensor, targets: torch.Tensor | None, weights: torch.Tensor) -> None:
        """Adds the tokens of one batch.

        Args:
            inputs (`torch.Tensor`): Shape (..., inputs).
            targets (`torch.Tensor` or `None`): Shape (..., outputs).
            weights (`torch.Tensor`): Of each token, shape (...); 0 leaves a token out.
        """
        is_token = weights > 0
        if not is_token.any():
            return
        weights = weights[is_token].float()
        x = inputs[is_token].float()
        y = x.new_zeros(len(x), 0) if targets is None else targets[is_token].float()
        if self._x is None:
            self._start(x, y, weights)
        x, y = x - self._origin_x, y - self._origin_y
        weighted = x * weights[:, None]
        self.weight += weights.double().sum().item()
        # Not every accelerator has float64.
        self._x += weighted.sum(0).cpu()
        self._y += (y * weights[:, None]).sum(0).cpu()
        # A model that is being trained may run under autocast.
        with torch.autocast(x.device.type, enabled=False):
            self._xx += (x.T @ weighted).cpu()
            self._xy += (weighted.T @ y).cpu()

    def _start(self, x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor) -> None:
        self._origin_x, self._origin_y = ((weights @ values) / weights.sum() for values in (x, y))
        self._x, self._y = (torch.zeros(values.shape[1], dtype=torch.float64) for values in (x, y))
        self._xx, self._xy = (torch.zeros(x.shape[1], values.shape[1], dtype=torch.float64) for values in (x, y))

    @property
    def mean_x(self) -> torch.Tensor:
        """Mean of the inputs, shape (inputs,)."""
        return self._origin_x.cpu() + self._x / self.weight

    @property
    def mean_y(self) -> torch.Tensor:
        """Mean of the targets, shape (outputs,)."""
        return self._origin_y.cpu() + self._y / self.weight

    def xx(self, is_centred: bool = True) -> torch.Tensor:
        """Second moments of the inputs, about their mean or about 0, shape (inputs, inputs)."""
        shift = self._x / self.weight
        moments = self._xx / self.weight - torch.outer(shift, shift)
        return moments if is_centred else moments + torch.outer(self.mean_x, self.mean_x)

    def xy(self, is_centred: bool = True) -> torch.Tensor:
        """Second moments of inputs and targets, about their means or about 0, shape (inputs, outputs)."""
        moments = self._xy / self.weight - torch.outer(self._x, self._y) / self.weight**2
        return moments if is_centred else moments + torch.outer(self.mean_x, self.mean_y)


def fit_projection(
    moments: Moments, kept: torch.Tensor, weight: torch.Tensor, ridge: float, has_bias: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and bias that bring the kept inputs closest to the targets.

    argmin ||X W^T + b - Y||^2 + r ||W - W0||^2, where r is `ridge` times the mean variance of the inputs; the bias is
    free, so that it takes over the mean of what was removed. With the targets that `structured.py` gives it, Park et
    al., "Accurate Retraining-free Pruning for Pretrained Encoder-based Language Models" (2024), section 3.4.

    Args:
        moments (`Moments`): Sums over all inputs, cut ones too.
        kept (`torch.Tensor`): Indices of the inputs that stay, shape (kept,).
        weight (`torch.Tensor`): W0, shape (outputs, kept).
        ridge (`float`): Strength of the pull towards W0.
        has_bias (`bool`, *optional*, defaults to `True`): Whether there is a bias; without, the fit goes through 0.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Weight, shape (outputs, kept), and bias, shape (outputs,), in float64.

    Raises:
        ValueError: if the inputs are linearly dependent and `ridge` is 0.
    """
    if not len(kept):
        return weight.double(), moments.mean_y
    xx, xy = moments.xx(has_bias)[kept][:, kept], moments.xy(has_bias)[kept]
    regular = damped(xx, ridge)
    start = weight.double()
    factor, failed = torch.linalg.cholesky_ex(regular)
    if failed:
        raise ValueError(
            f"The {len(kept)} inputs of a projection are linearly dependent on the calibration data, and "
            f"ridge={ridge} does not tell them apart: give more texts, or ridge=0.1."
        )
    fitted = torch.cholesky_solve(xy + (regular - xx).diagonal()[:, None] * start.T, factor).T
    return fitted, moments.mean_y - fitted @ moments.mean_x[kept]


def mean_compensation(moments: Moments, kept: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The bias that keeps the mean of the outputs, with the weights as they are.

    An et al., "Fluctuation-based Adaptive Structured Pruning" (2024), equation 4.

    Args:
        moments (`Moments`): Sums over all inputs, cut ones too.
        kept (`torch.Tensor`): Indices of the inputs that stay.
        weight (`torch.Tensor`): Shape (outputs, kept).

    Returns:
        `torch.Tensor`: Bias, shape (outputs,), in float64.
    """
    return moments.mean_y - weight.double() @ moments.mean_x[kept]
