"""Two models' outputs position by position: decisions, divergence, likelihood. Formulas of tensors only."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch.nn import functional as F

from hf_compress.evaluation.inference import IGNORED
from hf_compress.modeling.tasks import LANGUAGE_MODELS


@dataclass(frozen=True)
class Comparison:
    """What is kept of the outputs of two models: a few numbers for each position that has a label.

    A position is a row of a classification, a word, a token, or one end of an answer; there are `p` in all.

    Attributes:
        rows (`np.ndarray`): The row of the dataset that each position belongs to, `(p,)`, ascending.
        labels (`np.ndarray`): `(p,)`, or `(p, outputs)` for multi-label classification.
        teacher_decisions (`np.ndarray`): What the teacher decides, of the labels' shape.
        decisions (`np.ndarray`): What the compressed model decides.
        divergence (`np.ndarray`): `(p,)`, see `divergence`.
        teacher_nll (`np.ndarray`): Negative log-likelihood of the label in nats, `(p,)`; language models only, else
            NaN.
        nll (`np.ndarray`): The same of the compressed model.
    """

    rows: np.ndarray
    labels: np.ndarray
    teacher_decisions: np.ndarray
    decisions: np.ndarray
    divergence: np.ndarray
    teacher_nll: np.ndarray
    nll: np.ndarray


def compare_outputs(
    teacher_logits: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, kind: str, first_row: int = 0
) -> Comparison:
    """Reduces the outputs of two models for one batch to a few numbers per position.

    Args:
        teacher_logits (`torch.Tensor`): `(batch, classes)` or `(batch, positions, classes)`.
        logits (`torch.Tensor`): Of the compressed model, in the same order of classes.
        labels (`torch.Tensor`): `(batch,)`, `(batch, classes)` or `(batch, positions)`; -100 does not count.
        kind (`str`): `"regression"`, a `problem_type`, or a task of `task_of`. For `"causal-lm"` the logits of one
            position predict the label of the next.
        first_row (`int`, *optional*, defaults to `0`): Number of the batch's first row in the dataset.

    Returns:
        `Comparison`: Arrays on the CPU.

    Raises:
        ValueError: if the two models' outputs differ in shape.
    """
    if teacher_logits.shape != logits.shape:
        raise ValueError(
            f"The teacher's logits have shape {tuple(teacher_logits.shape)}, the compressed model's "
            f"{tuple(logits.shape)}: they cannot be compared class by class. Models with different vocabularies or "
            "heads need inputs and outputs of their own: `predict` each and score the decisions with "
            "`retention_from_predictions`."
        )
    if kind == "causal-lm":
        teacher_logits, logits, labels = teacher_logits[:, :-1], logits[:, :-1], labels[:, 1:]
    rows = first_row + torch.arange(len(labels))
    if kind not in ("regression", "multi_label_classification"):
        counts = (labels != IGNORED).to(logits.device)
        rows = rows.reshape(-1, *[1] * (labels.ndim - 1)).expand(labels.shape)[counts.cpu()]
        teacher_logits, logits, labels = teacher_logits[counts], logits[counts], labels.to(logits.device)[counts]
    else:
        # As in a training: NaN marks a missing number, or a missing list of them.
        known = ~labels.isnan().reshape(len(labels), -1).any(1)
        rows, labels = rows[known.cpu()], labels[known]
        teacher_logits, logits = (x[known.to(x.device)] for x in (teacher_logits, logits))
    teacher_logits, logits = teacher_logits.float(), logits.float()
    has_nll = kind in LANGUAGE_MODELS
    teacher_nll, nll = (
        F.cross_entropy(x, labels, reduction="none") if has_nll else torch.full((len(x),), torch.nan)
        for x in (teacher_logits, logits)
    )
    values = (
        rows,
        labels.squeeze(-1) if kind == "regression" and labels.ndim > 1 else labels,
        decide(teacher_logits, kind),
        decide(logits, kind),
        divergence(teacher_logits, logits, kind),
        teacher_nll,
        nll,
    )
    return Comparison(*(value.cpu().numpy() for value in values))


def concatenate(parts: Sequence[Comparison]) -> Comparison:
    """Joins the comparisons of successive batches.

    Args:
        parts (`Sequence[Comparison]`): In the order of the dataset.

    Returns:
        `Comparison`: Of all rows.
    """
    return Comparison(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Comparison)))


def decide(logits: torch.Tensor, kind: str) -> torch.Tensor:
    """The decisions that logits stand for.

    Args:
        logits (`torch.Tensor`): `(..., classes)`.
        kind (`str`): As for `compare_outputs`.

    Returns:
        `torch.Tensor`: The number itself for regression, `(...,)`; 0 or 1 for each label where several may hold,
        `(..., classes)`; else the most probable class, `(...,)`.

    Raises:
        ValueError: if one is NaN, which would pass for the first class.
    """
    if logits.isnan().any():
        raise ValueError(
            "The model's outputs are not numbers (NaN): its training diverged, or a number format overflowed. Train "
            "with a smaller learning rate, or take bfloat16 or float32."
        )
    if kind == "regression":
        return logits.squeeze(-1)
    return (logits > 0).long() if kind == "multi_label_classification" else logits.argmax(-1)


def divergence(teacher_logits: torch.Tensor, logits: torch.Tensor, kind: str) -> torch.Tensor:
    """How far the compressed model's output is from the teacher's, position by position.

    Args:
        teacher_logits (`torch.Tensor`): `(positions, classes)`.
        logits (`torch.Tensor`): The same shape.
        kind (`str`): As for `compare_outputs`.

    Returns:
        `torch.Tensor`: `(positions,)`: the squared error for regression, else `KL(teacher || compressed)` in nats:
        of the distribution over classes, or summed over the labels where each is a yes-or-no of its own.
    """
    if kind == "regression":
        return (teacher_logits - logits).square().mean(-1)
    if kind == "multi_label_classification":
        teacher_logits, logits = (torch.stack([x, torch.zeros_like(x)], dim=-1) for x in (teacher_logits, logits))
    teacher_log, log = teacher_logits.log_softmax(-1), logits.log_softmax(-1)
    # A class that the teacher excludes adds nothing, even where both log-probabilities are -inf.
    terms = torch.where(teacher_log == -torch.inf, 0, teacher_log.exp() * (teacher_log - log))
    return terms.flatten(1).sum(1).clamp(min=0)
