"""Formulas of distillation: functions of tensors that return one value per item.

An item is what is predicted once: a text, a token, the start or the end of an answer. The caller masks, sums and
divides by the number of items of the whole optimizer step, which makes the gradient independent of how the step is cut
into micro-batches, processes and padding.
"""

import math
from collections.abc import Mapping

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
    student = _log_probs(student_logits, temperature, class_mask)
    teacher = _log_probs(teacher_logits, temperature, class_mask)
    return _kl(teacher, student) * temperature**2


def reverse_kl_divergence(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    temperature: float = 1.0,
    class_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """`T^2 * KL(student_T || teacher_T)` of each item (MiniLLM, Gu et al., 2024, arXiv:2306.08543, section 2.1).

    A student too small to follow all of the teacher's classes keeps the likely ones, instead of covering every one.

    Args:
        student_logits (`torch.Tensor` of shape `(..., classes)`): Logits of the student.
        teacher_logits (`torch.Tensor` of shape `(..., classes)`): Logits of the teacher, in the student's label order.
        temperature (`float`, *optional*, defaults to `1.0`): T > 0, divides both logits.
        class_mask (`torch.Tensor` of shape `(..., classes)`, *optional*): True where a class may be predicted.

    Returns:
        `torch.Tensor` of shape `(...)`: The divergence in nats times T^2.
    """
    student = _log_probs(student_logits, temperature, class_mask)
    teacher = _log_probs(teacher_logits, temperature, class_mask)
    return _kl(student, teacher) * temperature**2


def jensen_shannon(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    temperature: float = 1.0,
    class_mask: torch.Tensor | None = None,
    beta: float = 0.5,
) -> torch.Tensor:
    """Generalised Jensen-Shannon divergence of each item, times T^2 (GKD, Agarwal et al., 2024, arXiv:2306.13649).

    `beta * KL(teacher || M) + (1 - beta) * KL(student || M)` with `M = beta * teacher + (1 - beta) * student`. Divided
    by beta it tends to `KL(teacher || student)` for beta -> 0, divided by 1 - beta to the reverse for beta -> 1.

    Args:
        student_logits (`torch.Tensor` of shape `(..., classes)`): Logits of the student.
        teacher_logits (`torch.Tensor` of shape `(..., classes)`): Logits of the teacher, in the student's label order.
        temperature (`float`, *optional*, defaults to `1.0`): T > 0, divides both logits.
        class_mask (`torch.Tensor` of shape `(..., classes)`, *optional*): True where a class may be predicted.
        beta (`float`, *optional*, defaults to `0.5`): The teacher's share of M, 0 < beta < 1.

    Returns:
        `torch.Tensor` of shape `(...)`: In nats times T^2, at most `log(2) * T^2` for beta = 0.5.
    """
    student = _log_probs(student_logits, temperature, class_mask)
    teacher = _log_probs(teacher_logits, temperature, class_mask)
    return _jensen_shannon(student, teacher, beta) * temperature**2


def soft_cross_entropy(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    temperature: float = 1.0,
    class_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy with the teacher's soft targets, times T^2 (Hinton et al., 2015, arXiv:1503.02531, section 2).

    Its gradient is that of `kl_divergence`; its value is larger by the entropy of the teacher.

    Args:
        student_logits (`torch.Tensor` of shape `(..., classes)`): Logits of the student.
        teacher_logits (`torch.Tensor` of shape `(..., classes)`): Logits of the teacher, in the student's label order.
        temperature (`float`, *optional*, defaults to `1.0`): T > 0, divides both logits.
        class_mask (`torch.Tensor` of shape `(..., classes)`, *optional*): True where a class may be predicted.

    Returns:
        `torch.Tensor` of shape `(...)`: In nats times T^2.
    """
    student = _log_probs(student_logits, temperature, class_mask)
    if class_mask is not None:
        student = student.masked_fill(~class_mask, 0.0)
    teacher = _log_probs(teacher_logits, temperature, class_mask)
    return -(teacher.exp() * student).sum(-1) * temperature**2


def logit_squared_error(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, class_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean over classes of the squared difference of the logits (Ba and Caruana, 2014, arXiv:1312.6184, eq. 1).

    The paper's factor 1/2 is left out, as in `squared_error`.

    Args:
        student_logits (`torch.Tensor` of shape `(..., classes)`): Logits of the student.
        teacher_logits (`torch.Tensor` of shape `(..., classes)`): Logits of the teacher, in the student's label order.
        class_mask (`torch.Tensor` of shape `(..., classes)`, *optional*): True where a class may be predicted; the
            mean is over these.

    Returns:
        `torch.Tensor` of shape `(...)`: In the squared unit of the logits; 0 where no class may be predicted.
    """
    difference = student_logits.float() - teacher_logits.float()
    if class_mask is None:
        return difference.square().mean(-1)
    difference = difference.masked_fill(~class_mask, 0.0)
    return difference.square().sum(-1) / class_mask.sum(-1).clamp(min=1)


def top_k_divergence(
    student_logits: torch.Tensor, indices: torch.Tensor, log_probs: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """`T^2 * KL(teacher_T || student_T)` where only the teacher's likeliest classes are known.

    The divergence is that of k + 1 outcomes: the k known classes, and all others as one. It never exceeds
    `kl_divergence` and equals it where k is the number of classes. Renormalising the k classes instead would leave the
    student free to waste any mass on the others.

    Args:
        student_logits (`torch.Tensor` of shape `(..., classes)`): Logits of the student.
        indices (`torch.Tensor` of shape `(..., k)`): The known classes of each item, all different.
        log_probs (`torch.Tensor` of shape `(..., k)`): Their log-probabilities under the teacher at this temperature.
        temperature (`float`, *optional*, defaults to `1.0`): T > 0, divides the student's logits.

    Returns:
        `torch.Tensor` of shape `(...)`: The divergence in nats times T^2.
    """
    lowest = torch.finfo(torch.float32).min
    student, indices = _log_probs(student_logits, temperature, None), indices.long()
    # What a short number format rounded to -inf has no mass: 0 * inf would be NaN.
    teacher = log_probs.float().clamp(min=lowest)
    divergence = _kl(teacher, student.gather(-1, indices))
    if indices.shape[-1] < student.shape[-1]:
        # Not as 1 - sum of the known: where that is close to 1, the difference is all rounding error.
        student_rest = student.scatter(-1, indices, lowest).logsumexp(-1)
        teacher_rest = (1 - teacher.exp().sum(-1)).clamp(min=0)
        tiny = torch.finfo(torch.float32).tiny
        divergence = divergence + teacher_rest * (teacher_rest.clamp(min=tiny).log() - student_rest)
    return divergence * temperature**2


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
    student = _label_log_probs(student_logits, temperature)
    teacher = _label_log_probs(teacher_logits, temperature)
    return _kl(teacher, student).mean(-1) * temperature**2


def bernoulli_reverse_kl_divergence(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """`reverse_kl_divergence` between independent yes/no predictions, for multi-label models.

    Args:
        student_logits (`torch.Tensor` of shape `(..., labels)`): Logits of the student.
        teacher_logits (`torch.Tensor` of shape `(..., labels)`): Logits of the teacher, in the student's label order.
        temperature (`float`, *optional*, defaults to `1.0`): T > 0, divides both logits.

    Returns:
        `torch.Tensor` of shape `(...)`: The mean over labels of the divergence in nats, times T^2.
    """
    student = _label_log_probs(student_logits, temperature)
    teacher = _label_log_probs(teacher_logits, temperature)
    return _kl(student, teacher).mean(-1) * temperature**2


def bernoulli_jensen_shannon(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0, beta: float = 0.5
) -> torch.Tensor:
    """`jensen_shannon` between independent yes/no predictions, for multi-label models.

    Args:
        student_logits (`torch.Tensor` of shape `(..., labels)`): Logits of the student.
        teacher_logits (`torch.Tensor` of shape `(..., labels)`): Logits of the teacher, in the student's label order.
        temperature (`float`, *optional*, defaults to `1.0`): T > 0, divides both logits.
        beta (`float`, *optional*, defaults to `0.5`): The teacher's share of the mixture, 0 < beta < 1.

    Returns:
        `torch.Tensor` of shape `(...)`: The mean over labels of the divergence in nats, times T^2.
    """
    student = _label_log_probs(student_logits, temperature)
    teacher = _label_log_probs(teacher_logits, temperature)
    return _jensen_shannon(student, teacher, beta).mean(-1) * temperature**2


def bernoulli_soft_cross_entropy(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """`soft_cross_entropy` between independent yes/no predictions, for multi-label models.

    Args:
        student_logits (`torch.Tensor` of shape `(..., labels)`): Logits of the student.
        teacher_logits (`torch.Tensor` of shape `(..., labels)`): Logits of the teacher, in the student's label order.
        temperature (`float`, *optional*, defaults to `1.0`): T > 0, divides both logits.

    Returns:
        `torch.Tensor` of shape `(...)`: The mean over labels in nats, times T^2.
    """
    student = _label_log_probs(student_logits, temperature)
    teacher = _label_log_probs(teacher_logits, temperature)
    return -(teacher.exp() * student).sum(-1).mean(-1) * temperature**2


def cosine_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """`1 - cos` of the angle between two vectors, for embeddings.

    Args:
        student (`torch.Tensor` of shape `(..., width)`): Vectors of the student.
        teacher (`torch.Tensor` of shape `(..., width)`): Vectors of the teacher.

    Returns:
        `torch.Tensor` of shape `(...)`: From 0 to 2, whatever the lengths of the vectors; 0 where both are zero.
    """
    # Half the squared chord is the same number, and exact for nearly equal vectors, where 1 - cos is rounding error.
    chord = F.normalize(student.float(), dim=-1, eps=1e-8) - F.normalize(teacher.float(), dim=-1, eps=1e-8)
    return chord.square().sum(-1) / 2


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


def average(values: torch.Tensor, num_items: torch.Tensor | int, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Sum of the counted items' values over the number of items of the whole optimizer step.

    Args:
        values (`torch.Tensor` of shape `(items,)`): One value per item of this micro-batch.
        num_items (`torch.Tensor` of shape `()`, or `int`): Items of all micro-batches and processes of the step.
        mask (`torch.Tensor` of shape `(items,)`, *optional*): True where an item counts.

    Returns:
        `torch.Tensor` of shape `()`: This micro-batch's share of the step's mean; 0 where nothing counts.
    """
    if mask is not None:
        values = values.where(mask, 0.0)
    return values.sum() / (num_items.clamp(min=1) if isinstance(num_items, torch.Tensor) else max(num_items, 1))


def weighted_sum(terms: Mapping[str, torch.Tensor], weights: Mapping[str, float]) -> torch.Tensor:
    """The loss, of its terms.

    Args:
        terms (`Mapping`): Tensors of shape `()` by name, one at least.
        weights (`Mapping`): What each counts.

    Returns:
        `torch.Tensor` of shape `()`: Their weighted sum.
    """
    (first, term), *others = terms.items()
    total = weights[first] * term
    for name, term in others:
        # One operation instead of two.
        total = torch.add(total, term, alpha=weights[name])
    return total


def _log_probs(logits: torch.Tensor, temperature: float, class_mask: torch.Tensor | None) -> torch.Tensor:
    logits = logits.float()
    if temperature != 1:
        logits = logits / temperature
    if class_mask is not None:
        # The lowest finite number, not -inf: 0 * (-inf - -inf) in the divergence would be NaN.
        logits = logits.masked_fill(~class_mask, torch.finfo(logits.dtype).min)
    return F.log_softmax(logits, dim=-1)


def _label_log_probs(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probabilities of yes and no, `(..., labels, 2)`: a label as a model of two classes with logits z and 0."""
    logits = logits.float() / temperature
    # A softmax of (z, 0) is the same, but rounds the log-probability of a nearly certain answer to 0.
    return torch.stack([F.logsigmoid(logits), F.logsigmoid(-logits)], dim=-1)


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _jensen_shannon(student: torch.Tensor, teacher: torch.Tensor, beta: float) -> torch.Tensor:
    ratio = student - teacher
    log_beta, log_rest = ratio.new_tensor(math.log(beta)), ratio.new_tensor(math.log1p(-beta))
    # log(M / teacher) and log(M / student): M itself would lose the digits in which nearly equal models differ.
    of_teacher = teacher.exp() * torch.logaddexp(log_beta, log_rest + ratio)
    of_student = student.exp() * torch.logaddexp(log_beta - ratio, log_rest)
    return -(beta * of_teacher + (1 - beta) * of_student).sum(-1)
