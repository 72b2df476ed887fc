"""Which weights go: scores of single weights, masks of the lowest, and how much each layer loses. Formulas on tensors.

A mask is True where a weight becomes 0. Counts are exact: of n weights, round(sparsity * n) go, and among equals those
that come first.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch


def true_share(flags: torch.Tensor) -> float:
    """How many of some flags are True, as a share of 1; exact, and without the float64 that not every device has.

    Args:
        flags (`torch.Tensor`): Booleans of any shape, at least one.
    """
    return flags.sum().item() / flags.numel()


class InputMeans:
    """A mean over the inputs of a layer, gathered batch by batch: products in float32, sums in float64 on the CPU.

    Args:
        total (`Callable`): What is averaged, as a sum over tokens: `square_sums` or `hessian_sums`.
    """

    def __init__(self, total: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.n_tokens = 0
        self._total = total
        self._sum: torch.Tensor | float = 0.0

    def add(self, inputs: torch.Tensor, mask: torch.Tensor) -> None:
        """Adds the tokens of one batch.

        Args:
            inputs (`torch.Tensor`): Shape (..., inputs).
            mask (`torch.Tensor`): Which tokens count, booleans of shape (...).
        """
        tokens = inputs[mask].float()
        self.n_tokens += len(tokens)
        # A model that is being trained may run under autocast.
        with torch.autocast(tokens.device.type, enabled=False):
            # Not every accelerator has float64.
            self._sum = self._sum + self._total(tokens).cpu().double()

    @property
    def mean(self) -> torch.Tensor:
        """What `total` gives, per token, in float64 on the CPU."""
        return self._sum / self.n_tokens


def square_sums(inputs: torch.Tensor) -> torch.Tensor:
    """Sums of squares over tokens, from shape (tokens, inputs) to (inputs,)."""
    return inputs.square().sum(0)


def blind_scores(
    weight: torch.Tensor,
    score: Literal["magnitude", "l1", "l2", "random"],
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Scores that are told from the weights alone; the score of a block is their sum.

    Args:
        weight (`torch.Tensor`): Shape (outputs, inputs).
        score (`str`): `"magnitude"` or `"l1"`, |w|; `"l2"`, w^2, which ranks blocks by their Euclidean norm;
            `"random"`, where only weights that are 0 already go first.
        generator (`torch.Generator`, *optional*): Draws random scores, on the CPU.

    Returns:
        `torch.Tensor`: Of the same shape, in float32; the lowest go first.
    """
    weight = weight.float()
    if score == "random":
        drawn = torch.rand(weight.shape, generator=generator).to(weight.device)
        return (1 - drawn) * (weight != 0)
    assert score in ("magnitude", "l1", "l2"), score
    return weight.square() if score == "l2" else weight.abs()


def wanda_scores(weight: torch.Tensor, square_means: torch.Tensor) -> torch.Tensor:
    """|W_ij| times the norm of input j; Sun et al., "A Simple and Effective Pruning Approach for LLMs" (2024), eq. 1.

    The norm is the root of the mean square, so that scores do not grow with the number of tokens.

    Args:
        weight (`torch.Tensor`): Shape (outputs, inputs).
        square_means (`torch.Tensor`): Shape (inputs,).

    Returns:
        `torch.Tensor`: Shape (outputs, inputs), in float32.
    """
    return weight.float().abs() * square_means.sqrt().to(weight.device, torch.float32)


@dataclass(frozen=True)
class Selection:
    """How the weights of one layer are chosen by their scores.

    Attributes:
        sparsity (`float`): Share that goes, from 0 to 1; of an n:m pattern, the pattern says it.
        is_by_row (`bool`): Whether each output loses the same share, or the layer as a whole.
        group (`tuple[int, int]`, *optional*): n and m: of each m weights along the inputs, the n best stay.
        block (`tuple[int, int]`): Rows and columns of what goes at once.
    """

    sparsity: float
    is_by_row: bool = False
    group: tuple[int, int] | None = None
    block: tuple[int, int] = (1, 1)

    @property
    def unit(self) -> int:
        """How many columns belong together."""
        return self.group[1] if self.group else self.block[1]

    @property
    def is_empty(self) -> bool:
        """Whether nothing goes."""
        return self.sparsity == 0 if self.group is None else self.group[0] == self.group[1]

    def mask(self, scores: torch.Tensor, start: int = 0) -> torch.Tensor:
        """The weights that go, of a layer or of some columns of it.

        Args:
            scores (`torch.Tensor`): Shape (outputs, columns).
            start (`int`, *optional*, defaults to 0): Number of the first of the columns. Slices whose counts are
                rounded as if the layer was cut up to there add up to the exact count of the layer.

        Returns:
            `torch.Tensor`: Booleans of the same shape.
        """
        if self.group is not None:
            n, m = self.group
            grouped = scores.reshape(-1, m)
            return lowest(grouped, m - n).reshape(scores.shape)
        rows, columns = self.block
        pooled = pool(scores, self.block)
        per_column = 1 if self.is_by_row else len(pooled)
        first, last = start // columns, start // columns + pooled.shape[1]
        count = round(self.sparsity * last * per_column) - round(self.sparsity * first * per_column)
        ranked = pooled if self.is_by_row else pooled.reshape(1, -1)
        mask = lowest(ranked, count).reshape(pooled.shape)
        return mask.repeat_interleave(rows, 0).repeat_interleave(columns, 1)

    def after(self, share: float) -> "Selection":
        """The selection of an earlier round: the same share of what is left goes in each, geometrically.

        Args:
            share (`float`): Of the rounds that are done then, up to 1.

        Returns:
            `Selection`: With a lower sparsity, or more of each group left.
        """
        if share == 1:
            return self
        if self.group is None:
            return replace(self, sparsity=1 - (1 - self.sparsity) ** share)
        n, m = self.group
        return replace(self, group=(round(m * (n / m) ** share), m))


def lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The lowest scores of each row, as many as asked for, ties included: among equals the first.

    Args:
        scores (`torch.Tensor`): Shape (rows, columns).
        count (`int`): How many of each row.

    Returns:
        `torch.Tensor`: Booleans of the same shape, `count` True in each row.
    """
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(count, dim=1, keepdim=True).values
    below, equal = scores < threshold, scores == threshold
    return below | (equal & (equal.cumsum(1) <= count - below.sum(1, keepdim=True)))


def pool(scores: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Sums of scores over blocks.

    Args:
        scores (`torch.Tensor`): Shape (outputs, inputs).
        block (`tuple[int, int]`): Rows and columns of a block, which divide the shape.

    Returns:
        `torch.Tensor`: Shape (outputs / rows, inputs / columns).
    """
    rows, columns = block
    return scores.unflatten(0, (-1, rows)).unflatten(2, (-1, columns)).sum((1, 3))


def global_shares(scores: Mapping[str, torch.Tensor], sparsity: float) -> dict[str, float]:
    """How much of each layer goes if all weights of all layers are ranked together.

    Args:
        scores (`Mapping[str, torch.Tensor]`): By layer, of any shapes; of blocks, pooled.
        sparsity (`float`): Share of all that goes.

    Returns:
        `dict[str, float]`: Shares by layer; times the sizes of the layers, they are whole numbers with the exact sum.
    """
    together = torch.cat([values.flatten() for values in scores.values()])
    mask = lowest(together[None], round(sparsity * len(together)))[0]
    parts = mask.split([values.numel() for values in scores.values()])
    return {name: part.sum().item() / part.numel() for name, part in zip(scores, parts, strict=True)}


def outlier_ratio(scores: Sequence[torch.Tensor], factor: float) -> float:
    """Share of the scores of a block that are more than `factor` times their mean.

    Yin et al., "Outlier Weighed Layerwise Sparsity (OWL)" (2024), equation 2, with the scores of Wanda.

    Args:
        scores (`Sequence[torch.Tensor]`): Of the layers of the block, of any shapes.
        factor (`float`): M.

    Returns:
        `float`: From 0 to 1.
    """
    together = torch.cat([values.flatten() for values in scores])
    return true_share(together > factor * together.mean())


def owl_shares(ratios: Sequence[float], sizes: Sequence[int], sparsity: float, spread: float) -> list[float]:
    """Sparsities of blocks that fall with their outlier ratios, linearly, around a given mean.

    From the block with the fewest outliers to the one with the most lie 2 `spread`; less where a share would leave
    [0, 1]. Yin et al., "Outlier Weighed Layerwise Sparsity (OWL)" (2024), section 4.

    Args:
        ratios (`Sequence[float]`): Outlier ratio of each block.
        sizes (`Sequence[int]`): How many weights each block has.
        sparsity (`float`): Share of all weights that goes.
        spread (`float`): lambda.

    Returns:
        `list[float]`: Their mean, weighted by the sizes, is `sparsity`.
    """
    ratio = torch.tensor(ratios, dtype=torch.float64)
    size = torch.tensor(sizes, dtype=torch.float64)
    width = ratio.max() - ratio.min()
    if width == 0:
        return [sparsity] * len(ratios)
    more = -2 * spread * (ratio - ratio.min()) / width
    more = more - (more * size).sum() / size.sum()
    room = torch.where(more > 0, 1 - sparsity, sparsity) / more.abs().clamp_min(torch.finfo(torch.float64).tiny)
    return (sparsity + more * room.min().clamp_max(1)).clamp(0, 1).tolist()
