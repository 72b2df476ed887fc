"""What the two models are compared on, for each task: the items of a batch and the terms of the loss.

The only place that knows both what a task's outputs look like and which formulas of `losses.py` fit them.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from hf_compress.distillation import losses
from hf_compress.modeling.tasks import CLASSIFICATION, IGNORED

TASKS = (
    *CLASSIFICATION,
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
        `Items`: Texts, images, tokens, or answer ends. What does not count is masked, not removed, so that nothing
        waits for the device; on a CPU, where nothing waits, masked language models keep the masked tokens' rows only.
    """
    if task in CLASSIFICATION:
        labels = batch.get("labels")
        mask = _example_mask(batch)
        return Items(outputs["logits"], labels if mask is None else labels.view(-1), mask)
    if task == "question-answering":
        labels, mask, class_mask = _answers(batch)
        logits = torch.cat([outputs["start_logits"], outputs["end_logits"]])
        return Items(logits, labels, mask, class_mask)
    labels, mask, logits = batch.get("labels"), token_mask(task, batch), outputs["logits"]
    if task == "causal-lm":
        logits, labels = logits[:, :-1], labels[:, 1:] if labels is not None else None
    logits, mask = logits.flatten(0, 1), mask.flatten()
    labels = labels.flatten() if labels is not None else None
    if task == "masked-lm" and logits.device.type == "cpu":
        rows = mask.nonzero().squeeze(-1)
        return Items(logits[rows], labels[rows] if labels is not None else None)
    return Items(logits, labels, mask)


def token_mask(task: str, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Which predictions of tokens count: those with a label, or without labels all that are no padding.

    Args:
        task (`str`): A task that predicts tokens.
        batch (`Mapping`): The inputs, with the labels where there are any.

    Returns:
        `torch.Tensor` of shape `(batch, length)`, or `(batch, length - 1)` for a causal language model: Booleans. The
        latter's first real token is not predicted from padding on its left.
    """
    attention = _attention_mask(batch)
    mask = batch["labels"] != IGNORED if "labels" in batch else attention
    return mask[:, 1:] & attention[:, :-1] if task == "causal-lm" else mask


def count_items(task: str, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Number of items of a batch that count, by the masks of `items_of`.

    Args:
        task (`str`): One of `TASKS`.
        batch (`Mapping`): The inputs, with the labels where there are any.

    Returns:
        `torch.Tensor` of shape `()`: The count.
    """
    inputs = _inputs(batch)
    if task in CLASSIFICATION:
        mask = _example_mask(batch)
        return torch.full((), inputs.shape[0], device=inputs.device) if mask is None else mask.sum()
    if task == "question-answering":
        mask = _answers(batch)[1]
        return torch.full((), 2 * inputs.shape[0], device=inputs.device) if mask is None else mask.sum()
    return token_mask(task, batch).sum()


def _inputs(batch: Mapping[str, Any]) -> torch.Tensor:
    for name in ("input_ids", "inputs_embeds", "pixel_values"):
        if name in batch:
            return batch[name]
    raise ValueError(f"The batch has the columns {sorted(batch)}, but no input_ids, inputs_embeds or pixel_values.")


def _attention_mask(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if "attention_mask" in batch:
        return batch["attention_mask"].bool()
    inputs = _inputs(batch)
    return torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device)


def _example_mask(batch: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """Which examples have a class; `None` where labels are numbers, or several per example, or missing."""
    labels = batch.get("labels")
    if labels is None or labels.is_floating_point() or labels.numel() != labels.shape[0]:
        return None
    return labels.view(-1) != IGNORED


def _answers(batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    """Labels and mask of answer starts and ends, `(2 * batch,)`, and where an answer can be, `(2 * batch, length)`.

    An answer cannot lie in the padding; counting it would make the loss depend on the longest text of the batch.
    Positions outside the text mean that the answer was cut off: Transformers' heads ignore them too.
    """
    inside = _attention_mask(batch).repeat(2, 1)
    if "start_positions" not in batch:
        return None, None, inside
    labels = torch.cat([batch["start_positions"].view(-1), batch["end_positions"].view(-1)])
    within = (labels >= 0) & (labels < inside.shape[1])
    mask = within & inside.gather(1, labels.where(within, 0)[:, None]).squeeze(1)
    return labels.where(mask, IGNORED), mask, inside


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
