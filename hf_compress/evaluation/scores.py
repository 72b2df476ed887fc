"""Metrics as functions of row counts, so that one matrix product scores thousands of bootstrap resamples.

Nearly every metric is a function of sums over rows: correct answers, true positives, products of deviations. With the
statistics of each row in `S` `(n, k)` and counts `W` `(resamples, n)`, the sums of all resamples are `W @ S`.
Spearman's correlation is the exception; its ranks follow from cumulated counts without sorting again.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hf_compress.evaluation import squad as answers
from hf_compress.evaluation.bootstrap import Score, bootstrap_scores, score_of_function


def score_of(metric: str | Callable, references: Sequence, predictions: Sequence) -> Score:
    """A metric of one model's predictions as a function of row counts.

    Args:
        metric (`str` or `Callable`): A key of `SCORES`, or `metric(references, predictions)` -> `float`.
        references (`Sequence`): `n` references.
        predictions (`Sequence`): `n` predictions.

    Returns:
        `Score`: Counts `(resamples, n)` -> values `(resamples,)`.

    Raises:
        ValueError: if the metric is unknown, or the lengths differ or are 0.
    """
    if len(references) != len(predictions) or len(references) == 0:
        raise ValueError(
            f"{len(references)} references and {len(predictions)} predictions cannot be compared row by row. "
            "Give one prediction for each reference, and at least one."
        )
    if callable(metric):
        return score_of_function(metric, references, predictions)
    if metric not in SCORES:
        raise ValueError(
            f"metric={metric!r} is not known. Choose one of {', '.join(sorted(SCORES))}, or pass a function "
            "`metric(references, predictions) -> float`, for which higher is better."
        )
    return SCORES[metric](references, predictions)


def score_rows(score: Score, n_rows: int) -> float:
    """The metric on the rows themselves, each counted once.

    Args:
        score (`Score`): Function of counts.
        n_rows (`int`): Rows of the test set.

    Returns:
        `float`: The metric.
    """
    return float(score(np.ones((1, n_rows)))[0])


def paired_bootstrap(
    metric: str | Callable,
    references: Sequence,
    predictions_a: Sequence,
    predictions_b: Sequence,
    *,
    n_bootstrap: int = 10_000,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """A metric of two models on the same resampled rows (Koehn 2004).

    Args:
        metric (`str` or `Callable`): A key of `SCORES`, or `metric(references, predictions)` -> `float`, which is
            called twice per resample.
        references (`Sequence`): `n` references.
        predictions_a (`Sequence`): `n` predictions of the one model.
        predictions_b (`Sequence`): `n` predictions of the other.
        n_bootstrap (`int`, *optional*, defaults to `10000`): Resamples.
        seed (`int`, *optional*, defaults to `0`): Seed of the draws.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: The metric of each model on each resample, `(n_bootstrap,)` both.
    """
    scores = [score_of(metric, references, predictions) for predictions in (predictions_a, predictions_b)]
    a, b = bootstrap_scores(scores, len(references), n_resamples=n_bootstrap, seed=seed)
    return a, b


def _score_of_sums(statistics: np.ndarray, finish: Callable[[np.ndarray], np.ndarray]) -> Score:
    statistics = np.asarray(statistics, dtype=np.float64)
    return lambda counts: finish(counts @ statistics)


def _ratio(sums: np.ndarray) -> np.ndarray:
    """Sums `(..., 2)` of numerators and denominators -> quotients, 0 where nothing was counted."""
    return np.divide(sums[..., 0], sums[..., 1], out=np.zeros(sums.shape[:-1]), where=sums[..., 1] != 0)


def accuracy(references: Sequence, predictions: Sequence) -> Score:
    """Share of correct decisions.

    Args:
        references (`Sequence`): Labels `(n,)`; or indicators `(n, classes)`, correct only where all are.
        predictions (`Sequence`): The same, predicted.

    Returns:
        `Score`: The share.
    """
    hits = np.asarray(references) == np.asarray(predictions)
    hits = hits.all(axis=-1) if hits.ndim > 1 else hits
    return _score_of_sums(np.stack([hits, np.ones(len(hits))], axis=1), _ratio)


def token_accuracy(references: Sequence, predictions: Sequence) -> Score:
    """Share of correct decisions where each row holds several, as many as it has tokens.

    Args:
        references (`Sequence`): `n` arrays of token labels.
        predictions (`Sequence`): The same, predicted.

    Returns:
        `Score`: The share of all tokens.
    """
    pairs = zip(map(np.asarray, references), map(np.asarray, predictions), strict=True)
    return _score_of_sums(np.array([[np.sum(r == p), r.size] for r, p in pairs]), _ratio)


def exact_match(references: Sequence, predictions: Sequence) -> Score:
    """Share of rows that are right in every position, for instance at both ends of an answer.

    Args:
        references (`Sequence`): `n` arrays of labels.
        predictions (`Sequence`): `n` arrays of predicted labels.

    Returns:
        `Score`: The share.
    """
    hits = [np.array_equal(*pair) for pair in zip(references, predictions, strict=True)]
    return _score_of_sums(np.stack([hits, np.ones(len(hits))], axis=1), _ratio)


def matthews_correlation(references: np.ndarray, predictions: np.ndarray) -> Score:
    """Matthews correlation for any number of classes (Gorodkin 2004, `R_K`), 0 where it is undefined.

    Args:
        references (`np.ndarray`): Labels `(n,)`.
        predictions (`np.ndarray`): Predicted labels `(n,)`.

    Returns:
        `Score`: The correlation, -1 to 1.
    """

    def finish(sums: np.ndarray) -> np.ndarray:
        hits, predicted, expected = np.split(sums, 3, axis=-1)
        n = expected.sum(-1)
        covariance = hits.sum(-1) * n - (predicted * expected).sum(-1)
        variances = (n**2 - (predicted**2).sum(-1)) * (n**2 - (expected**2).sum(-1))
        return _ratio(np.stack([covariance, np.sqrt(variances)], axis=-1))

    return _score_of_sums(_class_statistics(_vector(references), _vector(predictions)), finish)


def f1(references: np.ndarray, predictions: np.ndarray, average: str = "binary") -> Score:
    """F1 of labels `(n,)` or of indicators `(n, classes)`.

    Args:
        references (`np.ndarray`): Labels or indicators.
        predictions (`np.ndarray`): The same, predicted.
        average (`str`, *optional*, defaults to `"binary"`): `"binary"` is the F1 of label 1; `"micro"` of all
            decisions; `"macro"` the mean over classes that occur; `"weighted"` their mean by frequency.

    Returns:
        `Score`: F1, 0 to 1.

    Raises:
        ValueError: if `"binary"` meets labels other than 0 and 1.
    """
    references, predictions = np.asarray(references), np.asarray(predictions)
    is_multi_label = references.ndim > 1
    if average == "binary" and (is_multi_label or max(references.max(), predictions.max()) > 1):
        raise ValueError(
            "metric='f1' is the F1 of label 1 against label 0, but the labels have more classes. "
            "Choose 'f1_macro', 'f1_micro' or 'f1_weighted'."
        )

    def finish(sums: np.ndarray) -> np.ndarray:
        hits, predicted, expected = np.split(sums, 3, axis=-1)
        if average == "micro":
            return _ratio(np.stack([2 * hits.sum(-1), (predicted + expected).sum(-1)], axis=-1))
        per_class = _ratio(np.stack([2 * hits, predicted + expected], axis=-1))
        if average == "binary":
            return per_class[..., 1]
        # scikit-learn averages over the labels that occur, but over every column of an indicator matrix.
        occurs = np.ones_like(hits) if is_multi_label else (predicted + expected > 0)
        weights = expected if average == "weighted" else occurs
        return _ratio(np.stack([(per_class * weights).sum(-1), weights.sum(-1)], axis=-1))

    return _score_of_sums(_class_statistics(references, predictions), finish)


def pearsonr(references: np.ndarray, predictions: np.ndarray) -> Score:
    """Pearson's correlation, NaN where a resample does not vary.

    Args:
        references (`np.ndarray`): Values `(n,)`.
        predictions (`np.ndarray`): Predicted values `(n,)`.

    Returns:
        `Score`: The correlation, -1 to 1.
    """
    x, y = _vector(references).astype(np.float64), _vector(predictions).astype(np.float64)
    x, y = x - x.mean(), y - y.mean()  # sums of squares far from 0 would lose all digits
    return _score_of_sums(np.stack([x, y, x * x, y * y, x * y, np.ones_like(x)], axis=1), _correlation)


def spearmanr(references: np.ndarray, predictions: np.ndarray) -> Score:
    """Spearman's correlation: Pearson's of the average ranks within each resample.

    Args:
        references (`np.ndarray`): Values `(n,)`.
        predictions (`np.ndarray`): Predicted values `(n,)`.

    Returns:
        `Score`: The correlation, -1 to 1; NaN where a resample does not vary.
    """
    x, y = _vector(references), _vector(predictions)

    def score(counts: np.ndarray) -> np.ndarray:
        n, x_ranks, y_ranks = counts.sum(1), _centred_ranks(x, counts), _centred_ranks(y, counts)
        products = [(x_ranks, x_ranks), (y_ranks, y_ranks), (x_ranks, y_ranks)]
        second = [np.einsum("bn,bn,bn->b", counts, a, b) for a, b in products]
        return _correlation(np.stack([0 * n, 0 * n, *second, n], axis=-1))

    return score


def seqeval(references: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]]) -> Score:
    """F1 of entities, all types together, as seqeval's `overall_f1` (conlleval's rules).

    Args:
        references (`Sequence[Sequence[str]]`): Tags of each word of each sentence, such as `"B-PER"`.
        predictions (`Sequence[Sequence[str]]`): The same, predicted.

    Returns:
        `Score`: F1, 0 to 1; sentences are resampled, never words.
    """
    from seqeval.metrics.sequence_labeling import get_entities

    def count(expected: Sequence[str], predicted: Sequence[str]) -> tuple[int, int]:
        found, true = set(get_entities(list(predicted))), set(get_entities(list(expected)))
        return 2 * len(found & true), len(found) + len(true)

    return _score_of_sums([count(*pair) for pair in zip(references, predictions, strict=True)], _ratio)


def perplexity(references: np.ndarray, predictions: np.ndarray) -> Score:
    """Exponential of the mean negative log-likelihood per token.

    Args:
        references (`np.ndarray`): Tokens of each row `(n,)`.
        predictions (`np.ndarray`): Their negative log-likelihoods in nats, summed over each row `(n,)`.

    Returns:
        `Score`: Perplexity, from 1 upwards; lower is better.
    """
    return _score_of_sums(np.stack([predictions, references], axis=1), lambda sums: np.exp(_ratio(sums)))


def squad(references: Sequence[dict], predictions: Sequence[dict], measure: Callable) -> Score:
    """SQuAD's exact match or F1, in percent.

    Args:
        references (`Sequence[dict]`): `{"id": ..., "answers": {"text": [...]}}` per question.
        predictions (`Sequence[dict]`): `{"id": ..., "prediction_text": ...}` per question, in the same order.
        measure (`Callable`): `evaluation.squad.exact_match` or `token_f1`.

    Returns:
        `Score`: 0 to 100.

    Raises:
        ValueError: if the questions' ids are not in the same order.
    """
    for reference, prediction in zip(references, predictions, strict=True):
        if reference["id"] != prediction["id"]:
            raise ValueError(
                f"The prediction for question {prediction['id']!r} stands at the reference {reference['id']!r}. "
                "Sort the predictions in the order of the references."
            )
    pairs = zip(references, predictions, strict=True)
    values = [100 * measure(p["prediction_text"], r["answers"]["text"]) for r, p in pairs]
    return _score_of_sums(np.stack([values, np.ones(len(values))], axis=1), _ratio)


SCORES: dict[str, Callable[[Any, Any], Score]] = {
    "accuracy": accuracy,
    "exact_match": exact_match,
    "f1": f1,
    "f1_macro": lambda references, predictions: f1(references, predictions, "macro"),
    "f1_micro": lambda references, predictions: f1(references, predictions, "micro"),
    "f1_weighted": lambda references, predictions: f1(references, predictions, "weighted"),
    "matthews_correlation": matthews_correlation,
    "pearsonr": pearsonr,
    "perplexity": perplexity,
    "seqeval": seqeval,
    "spearmanr": spearmanr,
    "squad_exact_match": lambda references, predictions: squad(references, predictions, answers.exact_match),
    "squad_f1": lambda references, predictions: squad(references, predictions, answers.token_f1),
    "token_accuracy": token_accuracy,
}
LOWER_IS_BETTER = frozenset({"perplexity"})


def _vector(values: Sequence) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != 1:
        raise ValueError(
            f"This metric compares one number per row, but the rows have shape {values.shape[1:]}. "
            "Choose a metric of indicators ('accuracy', 'f1_macro', 'f1_micro', 'f1_weighted') or pass a function."
        )
    return values


def _class_statistics(references: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Hits, predictions and references of each class, `(n, 3 * classes)`, of labels or of indicators."""
    if references.ndim == 1:
        if min(references.min(), predictions.min()) < 0:
            raise ValueError("Labels below 0 name no class. Number the classes from 0 on.")
        references, predictions = references.astype(int), predictions.astype(int)
        n_classes = int(max(references.max(), predictions.max(), 1)) + 1
        references, predictions = np.eye(n_classes)[references], np.eye(n_classes)[predictions]
    return np.concatenate([references * predictions, predictions, references], axis=1)


def _correlation(sums: np.ndarray) -> np.ndarray:
    x, y, xx, yy, xy, n = np.moveaxis(sums, -1, 0)
    variances = (n * xx - x**2) * (n * yy - y**2)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.clip((n * xy - x * y) / np.sqrt(np.where(variances > 0, variances, np.nan)), -1, 1)


def _centred_ranks(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Average ranks minus their mean within each resample: `(n,)`, `(resamples, n)` -> `(resamples, n)`."""
    _, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    in_group = np.add.reduceat(counts[:, order], starts, axis=1)
    ranks = np.cumsum(in_group, axis=1) - (in_group - 1) / 2
    return ranks[:, group] - (counts.sum(1, keepdims=True) + 1) / 2
