"""How much of its teacher's quality a compressed model kept, and how far chance could explain the difference."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from hf_compress.evaluation.bootstrap import (
    Score,
    bootstrap_scores,
    check_bootstrap,
    percentile_interval,
    retention_ratio,
)
from hf_compress.evaluation.comparison import Comparison, compare_outputs, concatenate
from hf_compress.evaluation.inference import batches, inference, task_labels, task_logits
from hf_compress.evaluation.scores import LOWER_IS_BETTER, score_of, score_rows
from hf_compress.modeling.tasks import (
    CLASSIFICATION,
    LANGUAGE_MODELS,
    matching_columns,
    names_of_labels,
    problem_type,
    shared_task,
    unwrap,
)

_F1_AVERAGES = ("f1_macro", "f1_micro", "f1_weighted")
METRICS: dict[str, tuple[str, ...]] = {
    "single_label_classification": ("accuracy", "f1", *_F1_AVERAGES, "matthews_correlation"),
    "multi_label_classification": ("accuracy", *_F1_AVERAGES),
    "regression": ("pearsonr", "spearmanr"),
    "token-classification": ("seqeval", "token_accuracy"),
    "question-answering": ("exact_match",),
    **dict.fromkeys(LANGUAGE_MODELS, ("perplexity", "token_accuracy")),
}


@dataclass(frozen=True)
class Retention:
    """What a compressed model kept of its teacher, on one test set.

    Attributes:
        metric (`str`): Name of the metric.
        higher_is_better (`bool`): Its direction.
        n_examples (`int`): Rows scored; rows whose label is -100 are not.
        teacher (`float`): The teacher's metric.
        compressed (`float`): The compressed model's.
        retention (`float`): `compressed / teacher`, or `teacher / compressed` where lower is better: 1 is all kept.
            NaN where the divisor is not positive.
        retention_interval (`tuple[float, float]`): Bootstrap interval of the retention.
        difference (`float`): `compressed - teacher`, in units of the metric.
        difference_interval (`tuple[float, float]`): Bootstrap interval of the difference.
        agreement (`float` or `None`): Share of positions (rows, words, tokens, answer ends) on which both decide the
            same; `None` where nothing is decided.
        kl (`float` or `None`): Mean `KL(teacher || compressed)` per position in nats; of a multi-label model the
            sum over its labels.
        mse (`float` or `None`): Mean squared difference of the outputs of a regression.
        confidence (`float`): Share of the bootstrap inside the intervals.
        n_bootstrap (`int`): Resamples.
        seed (`int`): Seed of the resamples.
    """

    metric: str
    higher_is_better: bool
    n_examples: int
    teacher: float
    compressed: float
    retention: float
    retention_interval: tuple[float, float]
    difference: float
    difference_interval: tuple[float, float]
    agreement: float | None
    kl: float | None
    mse: float | None
    confidence: float
    n_bootstrap: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON types; NaN, which JSON does not know, becomes `None`."""

        def plain(value: Any) -> Any:
            if isinstance(value, tuple):
                return [plain(item) for item in value]
            return None if isinstance(value, float) and not math.isfinite(value) else value

        return {name: plain(value) for name, value in asdict(self).items()}


def score_retention(
    teacher: nn.Module,
    model: nn.Module,
    dataset: Sequence[Mapping[str, Any]],
    metric: str | Callable = "accuracy",
    *,
    processing_class: Any = None,
    data_collator: Callable | None = None,
    batch_size: int = 64,
    label_column: str = "labels",
    n_bootstrap: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Retention:
    """Scores a compressed model and its teacher on the same rows.

    Both models see the same batches, each its own columns of them; no logits are stored, so language models fit too.
    The labels are in the compressed model's order, and the teacher's outputs are brought into it by label names.
    A vocabulary-pruned model needs other `input_ids` than its teacher: `predict` each with its own tokenizer and give
    the outputs to `retention_from_outputs`.

    Args:
        teacher (`nn.Module`): The model before compression.
        model (`nn.Module`): The compressed model, for the same task.
        dataset (`datasets.Dataset` or a sequence of dicts): Tokenised rows with labels; other columns are ignored.
            Question answering is scored by positions; for SQuAD's measures of text see `retention_from_predictions`.
        metric (`str` or `Callable`, *optional*, defaults to `"accuracy"`): One of `METRICS` for the task, or
            `metric(references, predictions)` -> `float` for which higher is better, called twice per resample.
        processing_class (*optional*): Tokenizer that pads.
        data_collator (`Callable`, *optional*): Replaces the collator of the task, for instance to mask tokens.
        batch_size (`int`, *optional*, defaults to `64`): Rows per forward.
        label_column (`str`, *optional*, defaults to `"labels"`): Column of the labels; `"label"` is understood too.
        n_bootstrap (`int`, *optional*, defaults to `10000`): Resamples.
        confidence (`float`, *optional*, defaults to `0.95`): Share of the bootstrap inside the intervals.
        seed (`int`, *optional*, defaults to `0`): Seed of the resamples.
        progress (`Callable[[int, int], None]`, *optional*): Called after each batch with the rows done and in all.

    Returns:
        `Retention`: Scores, intervals, agreement and divergence.

    Raises:
        ValueError: if the models' tasks, labels or output shapes differ, labels are missing, or the metric does not
            fit the task.
    """
    check_bootstrap(n_bootstrap, confidence)
    task = shared_task(teacher, model)
    if task == "feature-extraction":
        raise ValueError(
            f"{type(unwrap(model)).__name__} has no task head, so it predicts nothing that could be scored: load both "
            "models with the AutoModelFor... class of their task."
        )
    config = unwrap(model).config
    parts, kind, n_done = [], task, 0
    loader = batches(
        dataset,
        [model, teacher],
        processing_class=processing_class,
        data_collator=data_collator,
        batch_size=batch_size,
        label_column=label_column,
    )
    with inference(teacher, model):
        for batch in loader:
            labels = task_labels(task, batch)
            if labels is None:
                raise ValueError(
                    f"The batches have the columns {sorted(batch)} and no labels, so nothing can be scored. "
                    "Name their column with `label_column`, or mask tokens with a `data_collator`."
                )
            if not parts:
                kind = problem_type(config, labels) if task in CLASSIFICATION else task
                permutation = matching_columns(teacher, model)
                _check_metric(metric, kind)
            logits = task_logits(model, batch)
            teacher_logits = task_logits(teacher, batch).to(logits.device)
            if permutation is not None:
                teacher_logits = teacher_logits[..., permutation]
            parts.append(compare_outputs(teacher_logits, logits, labels, kind, first_row=n_done))
            n_done += len(labels)
            if progress is not None:
                progress(n_done, len(dataset))
    label_names = names_of_labels(config) if kind == "token-classification" else None
    bootstrap = {"n_bootstrap": n_bootstrap, "confidence": confidence, "seed": seed}
    return _retention_of(concatenate(parts), n_done, metric, kind, label_names, bootstrap)


def retention_from_outputs(
    teacher_logits: np.ndarray,
    logits: np.ndarray,
    labels: np.ndarray,
    *,
    metric: str | Callable = "accuracy",
    kind: str = "single_label_classification",
    label_names: Sequence[str] | None = None,
    **bootstrap: Any,
) -> Retention:
    """Scores outputs that were computed elsewhere, for instance by `predict` or by `Trainer.predict`.

    Args:
        teacher_logits (`np.ndarray`): `(n, classes)`, or `(n, positions, classes)` for words, tokens and answers.
        logits (`np.ndarray`): Of the compressed model, in the same order of classes.
        labels (`np.ndarray`): `(n,)`, `(n, classes)` for multi-label, `(n, positions)` with -100 where none counts.
        metric (`str` or `Callable`, *optional*, defaults to `"accuracy"`): As for `score_retention`.
        kind (`str`, *optional*, defaults to `"single_label_classification"`): A key of `METRICS`.
        label_names (`Sequence[str]`, *optional*): Names of the classes in their order, for `metric="seqeval"`.
        bootstrap: `n_bootstrap`, `confidence` and `seed` of `retention_from_predictions`.

    Returns:
        `Retention`: Scores, intervals, agreement and divergence.

    Raises:
        ValueError: if shapes differ, or the metric does not fit the kind.
    """
    _check_metric(metric, kind)
    tensors = (torch.from_numpy(np.asarray(array)) for array in (teacher_logits, logits, labels))
    return _retention_of(compare_outputs(*tensors, kind), len(labels), metric, kind, label_names, bootstrap)


def retention_from_predictions(
    references: Sequence,
    teacher_predictions: Sequence,
    predictions: Sequence,
    *,
    metric: str | Callable = "accuracy",
    n_bootstrap: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Retention:
    """Scores decisions that were made elsewhere, for instance SQuAD's answers as text.

    For SQuAD, turn the logits of both models into answers with your post-processing, and pass
    `metric="squad_exact_match"` or `"squad_f1"` with references `{"id": ..., "answers": {"text": [...]}}` and
    predictions `{"id": ..., "prediction_text": ...}`.

    Args:
        references (`Sequence`): `n` references in the form that the metric in `scores.SCORES` takes.
        teacher_predictions (`Sequence`): The teacher's `n` predictions.
        predictions (`Sequence`): The compressed model's `n` predictions.
        metric (`str` or `Callable`, *optional*, defaults to `"accuracy"`): A key of `scores.SCORES`, or
            `metric(references, predictions)` -> `float` for which higher is better, called twice per resample.
        n_bootstrap (`int`, *optional*, defaults to `10000`): Resamples.
        confidence (`float`, *optional*, defaults to `0.95`): Share of the bootstrap inside the intervals.
        seed (`int`, *optional*, defaults to `0`): Seed of the resamples.

    Returns:
        `Retention`: Without divergence, which needs outputs; without agreement where predictions are numbers.

    Raises:
        ValueError: if the metric is unknown or the lengths differ.
    """
    agreement = None
    rows = _rows(predictions)
    are_numbers = callable(metric) and np.asarray(rows[0]).dtype.kind == "f"
    if metric not in ("pearsonr", "spearmanr", "perplexity") and not are_numbers:
        # Several labels of a row are one decision; words, tokens and ends of answers are one each.
        one = np.all if metric in ("accuracy", *_F1_AVERAGES) else np.ravel
        same = [
            np.atleast_1d(one(a == b) if np.shape(a) == np.shape(b) else False)
            for a, b in zip(_rows(teacher_predictions), rows, strict=True)
        ]
        agreement = float(np.concatenate(same).mean())
    scores = [score_of(metric, references, decided) for decided in (teacher_predictions, predictions)]
    bootstrap = {"n_bootstrap": n_bootstrap, "confidence": confidence, "seed": seed}
    return _bootstrapped(*scores, len(references), metric, {"agreement": agreement}, **bootstrap)


def _check_metric(metric: str | Callable, kind: str) -> None:
    if kind not in METRICS:
        raise ValueError(f"kind={kind!r} is not known. Choose one of {', '.join(METRICS)}.")
    if not callable(metric) and metric not in METRICS[kind]:
        raise ValueError(
            f"metric={metric!r} does not fit outputs of the kind {kind!r}. Choose one of {', '.join(METRICS[kind])}, "
            "or pass a function `metric(references, predictions) -> float`, for which higher is better."
        )


def _retention_of(
    comparison: Comparison,
    n_rows: int,
    metric: str | Callable,
    kind: str,
    label_names: Sequence[str] | None,
    bootstrap: dict[str, Any],
) -> Retention:
    """Scores a comparison: groups its positions by row, because rows and not positions are drawn."""
    if len(comparison.rows) == 0:
        raise ValueError("No position has a label other than -100, so nothing can be scored. Check the label column.")
    has_positions = kind in ("token-classification", "question-answering", *LANGUAGE_MODELS)
    # Without the rows that have no label.
    _, rows = np.unique(comparison.rows, return_inverse=True)
    n_rows = int(rows[-1]) + 1 if has_positions else len(rows)
    counts = np.bincount(rows, minlength=n_rows)
    starts = np.cumsum(counts)[:-1]

    def by_row(values: np.ndarray) -> Sequence:
        return np.split(values, starts) if has_positions else values

    references, teacher, compressed = comparison.labels, comparison.teacher_decisions, comparison.decisions
    if metric == "perplexity":
        sums = (np.bincount(rows, nll, n_rows) for nll in (comparison.teacher_nll, comparison.nll))
        scores = [score_of(metric, counts, nll) for nll in sums]
    else:
        if metric == "seqeval":
            if label_names is None:
                raise ValueError("metric='seqeval' compares tags such as 'B-PER'. Give their names as `label_names`.")
            names = np.array(label_names, dtype=object)
            references, teacher, compressed = names[references], names[teacher], names[compressed]
        scores = [score_of(metric, by_row(references), by_row(decided)) for decided in (teacher, compressed)]
    is_regression = kind == "regression"
    same = comparison.teacher_decisions == comparison.decisions
    mean_divergence = float(comparison.divergence.mean())
    closeness = {
        "agreement": None if is_regression else float((same.all(-1) if same.ndim > 1 else same).mean()),
        "kl": None if is_regression else mean_divergence,
        "mse": mean_divergence if is_regression else None,
    }
    return _bootstrapped(*scores, n_rows, metric, closeness, **bootstrap)


def _bootstrapped(
    teacher_score: Score,
    score: Score,
    n_rows: int,
    metric: str | Callable,
    closeness: dict[str, float | None],
    n_bootstrap: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Retention:
    check_bootstrap(n_bootstrap, confidence)
    higher_is_better = metric not in LOWER_IS_BETTER
    teacher, compressed = score_rows(teacher_score, n_rows), score_rows(score, n_rows)
    draws = bootstrap_scores([teacher_score, score], n_rows, n_resamples=n_bootstrap, seed=seed)
    ratio = float(retention_ratio(teacher, compressed, higher_is_better))
    ratio_interval = percentile_interval(retention_ratio(*draws, higher_is_better), confidence)
    if math.isnan(ratio) or math.isnan(ratio_interval[0]):
        warnings.warn(
            f"Retention of {metric} is not defined{'' if math.isnan(ratio) else ' on every resample of the rows'}: "
            f"there the metric is undefined, or not above 0 for the teacher ({teacher:.4g} on all rows). Read "
            "`difference` and its interval instead, give more rows, or check the teacher's labels.",
            stacklevel=4,
        )
    return Retention(
        metric=metric if isinstance(metric, str) else getattr(metric, "__name__", type(metric).__name__),
        higher_is_better=higher_is_better,
        n_examples=n_rows,
        teacher=teacher,
        compressed=compressed,
        retention=ratio,
        retention_interval=ratio_interval,
        difference=compressed - teacher,
        difference_interval=percentile_interval(draws[1] - draws[0], confidence),
        agreement=closeness.get("agreement"),
        kl=closeness.get("kl"),
        mse=closeness.get("mse"),
        confidence=confidence,
        n_bootstrap=n_bootstrap,
        seed=seed,
    )


def _rows(predictions: Sequence) -> list:
    """Predictions that compare element by element: nested lists become arrays, of an answer its text counts."""
    return [row.get("prediction_text", row) if isinstance(row, dict) else np.asarray(row) for row in predictions]
