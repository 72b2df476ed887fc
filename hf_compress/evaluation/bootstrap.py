"""The paired bootstrap: how far the difference of two models on a test set is chance.

Efron & Tibshirani, *An Introduction to the Bootstrap* (1993), chapter 13 (percentile intervals); Koehn, *Statistical
Significance Tests for Machine Translation Evaluation* (2004) (the same resampled rows for both systems).

A resample of `n` rows is a vector of counts: how often each row was drawn. Every metric here is a function of counts,
a `Score`, so that thousands of resamples are one matrix product.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

Score = Callable[[np.ndarray], np.ndarray]
"""Counts `(resamples, n)` -> the metric on each resample `(resamples,)`."""

_CELLS_PER_CHUNK = 2**22  # 32 MiB of counts at a time


def resample_counts(n_rows: int, n_resamples: int, seed: int = 0) -> Iterator[np.ndarray]:
    """How often each row occurs in resamples of `n_rows` rows drawn with replacement.

    Args:
        n_rows (`int`): Rows of the test set.
        n_resamples (`int`): Resamples in all.
        seed (`int`, *optional*, defaults to `0`): Seed of the draws.

    Yields:
        `np.ndarray`: Counts `(chunk, n_rows)` as float64; each row sums to `n_rows`.
    """
    generator = np.random.default_rng(seed)
    chunk = max(1, _CELLS_PER_CHUNK // n_rows)
    for start in range(0, n_resamples, chunk):
        size = min(chunk, n_resamples - start)
        drawn = generator.integers(n_rows, size=(size, n_rows))
        drawn += n_rows * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * n_rows).reshape(size, n_rows).astype(np.float64)


def bootstrap_scores(scores: Sequence[Score], n_rows: int, *, n_resamples: int, seed: int = 0) -> list[np.ndarray]:
    """Several scores on the same resamples.

    Args:
        scores (`Sequence[Score]`): Functions of counts over the same rows.
        n_rows (`int`): Rows of the test set.
        n_resamples (`int`): Resamples.
        seed (`int`, *optional*, defaults to `0`): Seed of the draws.

    Returns:
        `list[np.ndarray]`: One array `(n_resamples,)` per score.
    """
    chunks = [[score(counts) for score in scores] for counts in resample_counts(n_rows, n_resamples, seed)]
    return [np.concatenate(parts) for parts in zip(*chunks, strict=True)]


def score_of_function(metric_fn: Callable, references: Sequence, predictions: Sequence) -> Score:
    """A `Score` of any function of references and predictions, called once per resample.

    Args:
        metric_fn (`Callable`): `metric_fn(references, predictions)` -> `float`.
        references (`Sequence`): `n` references.
        predictions (`Sequence`): `n` predictions.

    Returns:
        `Score`: As slow as `metric_fn` times the number of resamples.
    """

    def score(counts: np.ndarray) -> np.ndarray:
        drawn = (np.repeat(np.arange(len(row)), row.astype(int)) for row in counts)
        return np.array([float(metric_fn(_take(references, rows), _take(predictions, rows))) for rows in drawn])

    return score


def check_bootstrap(n_resamples: int, confidence: float) -> None:
    """Refuses what gives no interval, before anything is computed.

    Args:
        n_resamples (`int`): Resamples.
        confidence (`float`): Share inside the interval.

    Raises:
        ValueError: if there are no resamples, or the confidence is not between 0 and 1.
    """
    if n_resamples < 1:
        raise ValueError(f"n_bootstrap={n_resamples} resamples give no interval. Give 1,000 or more.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} is no share between 0 and 1. Give 0.95 for a 95 % interval.")


def percentile_interval(values: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """The central interval that holds a share of bootstrap values (Efron & Tibshirani, section 13.3).

    Args:
        values (`np.ndarray`): Bootstrap values `(n_resamples,)`.
        confidence (`float`, *optional*, defaults to `0.95`): Share inside, between 0 and 1.

    Returns:
        `tuple[float, float]`: Both ends; NaN if any value is NaN, because the share outside is then unknown.

    Raises:
        ValueError: if the confidence is not between 0 and 1.
    """
    check_bootstrap(len(values), confidence)
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def retention_ratio(teacher: np.ndarray, compressed: np.ndarray, higher_is_better: bool = True) -> np.ndarray:
    """The share of a metric that was kept.

    Args:
        teacher (`np.ndarray`): The teacher's metric, `(...,)`.
        compressed (`np.ndarray`): The compressed model's, `(...,)`.
        higher_is_better (`bool`, *optional*, defaults to `True`): `False` for perplexity, whose ratio is inverted.

    Returns:
        `np.ndarray`: `(...,)`, 1 where nothing was lost, NaN where the divisor is not positive.
    """
    kept, whole = (compressed, teacher) if higher_is_better else (teacher, compressed)
    kept, whole = np.asarray(kept, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    return np.divide(kept, whole, out=np.full(whole.shape, np.nan), where=whole > 0)


def _take(values: Sequence, rows: np.ndarray) -> Any:
    return values[rows] if isinstance(values, np.ndarray) else [values[row] for row in rows]
