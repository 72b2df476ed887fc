"""What the two models are compared on, for each task: the items of a batch and the terms of the loss.

The only place that knows both what a task's outputs look like and which formulas of `losses.py` fit them.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from hf_compress.distillation import losses

TASKS = (
    "sequence-classification",
    "token-classification",
    "question-answering",
    "masked-lm",
    "causal-lm",
)


class Items(NamedTuple):
    """The predictions of one batch, one row each.

    Attributes:
        logits (`torch.Tensor` of shape `(items, classes)`): Outputs of a model.
        labels (`torch.Tensor` of shape `(items,)` or `(items, classes)`, or `None`): Targets of the task.
        mask (`torch.Tensor` of shape `(items,)`, or `None`): True where an item counts; `None` means everywhere.
        class_mask (`torch.Tensor` of shape `(items, classes)`, or `None`): True where a class may be predicted.
    """

    logits: torch.Tensor
    labels: torch.Tensor | None
    mask: torch.Tensor | None = None
    class_mask: torch.Tensor | None = None


def items_of(task: str, outputs: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]) -> Items:
    """Lays the outputs of a batch out as one row per prediction.

    Args:
        task (`str`): One of `TASKS`.
        outputs (`Mapping`): A model's outputs: `logits`, or `start_logits` and `end_logits`.
        batch (`Mapping`): The inputs, with the labels where there are any.

    Returns:
        `Items`: Texts, tokens, or answer ends. Padding and ignored labels are masked, not removed, so that no shape
        depends on the data and nothing waits for the device.
    """
    if task == "sequence-classification":
        return Items(outputs["logits"], batch.get("labels"))
    if task == "question-answering":
        return _span_items(outputs, batch)
    labels, mask = batch.get("labels"), token_mask(task, batch)
    logits = outputs["logits"]
    if task == "causal-lm":
        logits, mask = logits[:, :-1], mask[:, 1:]
        labels = labels[:, 1:] if labels is not None else None
    return Items(logits.flatten(0, 1), labels.flatten() if labels is not None else None, mask.flatten())


def _span_items(outputs: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]) -> Items:
    logits = torch.cat([outputs["start_logits"], outputs["end_logits"]])
    # An answer cannot lie in the padding; counting it would make the loss depend on the longest text of the batch.
    inside = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(logits[::2]).bool()
    class_mask = torch.cat([inside, inside])
    if "start_positions" not in batch:
        return Items(logits, None, None, class_mask)
    labels = torch.cat([batch["start_positions"].view(-1), batch["end_positions"].view(-1)])
    # Positions outside the text mean: cut off, no answer here. Transformers' heads ignore them too.
    labels = labels.where((labels >= 0) & (labels < logits.shape[-1]), losses.IGNORED)
    return Items(logits, labels, labels != losses.IGNORED, class_mask)


def token_mask(task: str, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Which tokens of a batch count: the labelled ones, or without labels all that are no padding.

    Args:
        task (`str`): A task that predicts tokens.
        batch (`Mapping`): The inputs, with the labels where there are any.

    Returns:
        `torch.Tensor` of shape `(batch, length)`: Booleans.
    """
    if "labels" in batch:
        return batch["labels"] != losses.IGNORED
    if "attention_mask" in batch:
        return batch["attention_mask"].bool()
    return torch.ones_like(batch["input_ids"], dtype=torch.bool)


def count_items(task: str, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Number of items of a batch that count, by the same rule as `items_of`.

    Args:
        task (`str`): One of `TASKS`.
        batch (`Mapping`): The inputs, with the labels where there are any.

    Returns:
        `torch.Tensor` of shape `()`: The count.
    """
    if task == "sequence-classification":
        return torch.tensor(_first(batch).shape[0])
    if task == "question-answering":
        rows, length = _first(batch).shape[:2]
        if "start_positions" not in batch:
            return torch.tensor(2 * rows)
        positions = torch.cat([batch["start_positions"].view(-1), batch["end_positions"].view(-1)])
        return ((positions >= 0) & (positions < length)).sum()
    mask = token_mask(task, batch)
    return (mask[:, 1:] if task == "causal-lm" else mask).sum()


def soft_loss(problem: str, student: Items, teacher_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """What the student pays for differing from the teacher.

    Args:
        problem (`str`): `"regression"`, `"single_label_classification"` or `"multi_label_classification"`.
        student (`Items`): The student's predictions.
        teacher_logits (`torch.Tensor` of shape `(items, classes)`): The teacher's, in the student's label order.
        temperature (`float`): Of the soft targets; unused for regression.

    Returns:
        `torch.Tensor` of shape `(items,)`: One value per item.
    """
    if problem == "regression":
        return losses.squared_error(student.logits, teacher_logits)
    if problem == "multi_label_classification":
        return losses.bernoulli_kl_divergence(student.logits, teacher_logits, temperature)
    return losses.kl_divergence(student.logits, teacher_logits, temperature, student.class_mask)


def hard_loss(problem: str, student: Items, label_smoothing: float = 0.0) -> torch.Tensor:
    """What the student pays for differing from the labels: the loss of the task.

    Args:
        problem (`str`): `"regression"`, `"single_label_classification"` or `"multi_label_classification"`.
        student (`Items`): The student's predictions, with labels.
        label_smoothing (`float`, *optional*, defaults to `0.0`): Share of the target spread over all classes.

    Returns:
        `torch.Tensor` of shape `(items,)`: One value per item.
    """
    if problem == "regression":
        return losses.squared_error(student.logits, student.labels)
    if problem == "multi_label_classification":
        return losses.binary_cross_entropy(student.logits, student.labels)
    return losses.cross_entropy(student.logits, student.labels, label_smoothing, student.class_mask)


def _first(batch: Mapping[str, Any]) -> torch.Tensor:
    return next(iter(batch.values()))
