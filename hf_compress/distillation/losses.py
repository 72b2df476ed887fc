"""Formulas of distillation: functions of tensors that return one value per item.

An item is what is predicted once: a text, a token, the start or the end of an answer. The caller masks, sums and
divides by the number of items of the whole optimizer step, which makes the gradient independent of how the step is cut
into micro-batches, processes and padding.
"""

import torch
import torch.nn.functional as F

from hf_compress.modeling.tasks import IGNORED


def kl_divergence(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    temperature: float = 1.0,
    class_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """`T^2 * KL(teacher_T || student_T)` of each item (Hinton et al., 2015, arXiv:1503.02531, sections 2 and 2.1).

    The gradient of the divergence shrinks with 1/T^2; the factor T^2 keeps it comparable to the task's loss.

    Args:
        student_logits (`torch.Tensor` of shape `(..., classes)`): Logits of the student.
        teacher_logits (`torch.Tensor` of shape `(..., classes)`): Logits of the teacher, in the student's label order.
        temperature (`float`, *optional*, defaults to `1.0`): T > 0, divides both logits.
        class_mask (`torch.Tensor` of shape `(..., classes)`, *optional*): True where a class may be predicted.

    Returns:
        `torch.Tensor` of shape `(...)`: The divergence in nats times T^2, 0 where the logits agree up to a constant.
    """
    student_log_probs = _log_probs(student_logits, temperature, class_mask)
    teacher_log_probs = _log_probs(teacher_logits, temperature, class_mask)
    divergence = teacher_log_probs.exp() * (teacher_log_probs - student_log_probs)
    return divergence.sum(-1) * temperature**2


def bernoulli_kl_divergence(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """`T^2 * KL` between independent yes/no predictions, for multi-label models.

    A softmax over labels that do not exclude each other would teach their competition instead of their presence.

    Args:
        student_logits (`torch.Tensor` of shape `(..., labels)`): Logits of the student.
        teacher_logits (`torch.Tensor` of shape `(..., labels)`): Logits of the teacher, in the student's label order.
        temperature (`float`, *optional*, defaults to `1.0`): T > 0, divides both logits.

    Returns:
        `torch.Tensor` of shape `(...)`: The mean over labels of the divergence in nats, times T^2.
    """
    student = student_logits.float() / temperature
    teacher = teacher_logits.float() / temperature
    present = teacher.sigmoid() * (F.logsigmoid(teacher) - F.logsigmoid(student))
    absent = (-teacher).sigmoid() * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
    return (present + absent).mean(-1) * temperature**2


def squared_error(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over outputs of the squared difference, for regression: of the student to the teacher, or to the labels.

    Args:
        prediction (`torch.Tensor` of shape `(items, outputs)`): Outputs of the student.
        target (`torch.Tensor` of shape `(items, outputs)` or `(items,)`): Outputs of the teacher, or labels.

    Returns:
        `torch.Tensor` of shape `(items,)`: In the squared unit of the labels.
    """
    return (prediction.float() - target.float().view_as(prediction)).square().mean(-1)


def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    label_smoothing: float = 0.0,
    class_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy of each item with its label.

    Args:
        logits (`torch.Tensor` of shape `(items, classes)`): Logits of the student.
        labels (`torch.Tensor` of shape `(items,)`): Class indices; `-100` is ignored.
        label_smoothing (`float`, *optional*, defaults to `0.0`): Share of the target spread evenly over all classes.
        class_mask (`torch.Tensor` of shape `(items, classes)`, *optional*): True where a class may be predicted.

    Returns:
        `torch.Tensor` of shape `(items,)`: In nats; 0 for ignored labels.
    """
    log_probs = _log_probs(logits, 1.0, class_mask)
    loss = F.nll_loss(log_probs, labels, ignore_index=IGNORED, reduction="none")
    if label_smoothing == 0:
        return loss
    allowed = torch.ones_like(log_probs, dtype=torch.bool) if class_mask is None else class_mask
    uniform = -log_probs.where(allowed, 0.0).sum(-1) / allowed.sum(-1)
    return ((1 - label_smoothing) * loss + label_smoothing * uniform).where(labels != IGNORED, 0.0)


def binary_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean over labels of the cross-entropy with yes/no targets, for multi-label models.

    Args:
        logits (`torch.Tensor` of shape `(items, labels)`): Logits of the student.
        labels (`torch.Tensor` of shape `(items, labels)`): Targets in [0, 1].

    Returns:
        `torch.Tensor` of shape `(items,)`: In nats.
    """
    return F.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="none").mean(-1)


def average(values: torch.Tensor, num_items: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Sum of the counted items' values over the number of items of the whole optimizer step.

    Args:
        values (`torch.Tensor` of shape `(items,)`): One value per item of this micro-batch.
        num_items (`torch.Tensor` of shape `()`): Items of all micro-batches and processes of the step.
        mask (`torch.Tensor` of shape `(items,)`, *optional*): True where an item counts.

    Returns:
        `torch.Tensor` of shape `()`: This micro-batch's share of the step's mean; 0 where nothing counts.
    """
    if mask is not None:
        values = values.where(mask, 0.0)
    return values.sum() / num_items.clamp(min=1)


def _log_probs(logits: torch.Tensor, temperature: float, class_mask: torch.Tensor | None) -> torch.Tensor:
    logits = logits.float() / temperature
    if class_mask is not None:
        # The lowest finite number, not -inf: 0 * (-inf - -inf) in the divergence would be NaN.
        logits = logits.masked_fill(~class_mask, torch.finfo(logits.dtype).min)
    return F.log_softmax(logits, dim=-1)
