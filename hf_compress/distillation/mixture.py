"""Several teachers as one: their soft targets mixed, as functions of tensors."""

import torch
from torch.nn.functional import logsigmoid

from hf_compress.distillation import losses
from hf_compress.modeling.tasks import IGNORED


def mix_logits(
    problem: str,
    logits: torch.Tensor,
    weights: torch.Tensor,
    temperature: float = 1.0,
    class_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits whose softened distribution is the weighted mean of the teachers' softened distributions.

    Distributions are averaged, not logits, because a teacher whose logits are large would else outvote the others
    (You et al., 2017, "Learning from multiple teacher networks", eq. 4).

    Args:
        problem (`str`): `"single_label_classification"`, `"multi_label_classification"`, `"regression"` or
            `"embedding"`; the outputs of the latter two are averaged themselves.
        logits (`torch.Tensor` of shape `(teachers, items, classes)`): Outputs of the teachers.
        weights (`torch.Tensor` of shape `(teachers,)` or `(teachers, items)`): Their shares, which sum to 1 over the
            teachers.
        temperature (`float`, *optional*, defaults to `1.0`): At which the mean is taken.
        class_mask (`torch.Tensor` of shape `(items, classes)`, *optional*): True where a class may be predicted.

    Returns:
        `torch.Tensor` of shape `(items, classes)`: To be softened by the same temperature.
    """
    logits = logits.float()
    shares = weights.view(len(weights), -1, 1)
    if problem in ("regression", "embedding"):
        return (shares * logits).sum(0)
    if problem == "multi_label_classification":
        # Of logarithms, because those of very sure teachers would be of 0.
        yes, no = ((logsigmoid(sign * logits / temperature) + shares.log()).logsumexp(0) for sign in (1, -1))
        return temperature * (yes - no)
    logits = logits / temperature
    if class_mask is not None:
        logits = logits.masked_fill(~class_mask, torch.finfo(logits.dtype).min)
    mixed = torch.logsumexp(logits.log_softmax(-1) + shares.log(), dim=0)
    return temperature * mixed.clamp(min=torch.finfo(mixed.dtype).min / max(1.0, temperature))


def confidence_weights(
    problem: str,
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    class_mask: torch.Tensor | None = None,
    label_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """More weight, item by item, to the teachers that are closer to the label.

    `w_k = (1 - exp(L_k) / sum_j exp(L_j)) / (K - 1)`, where L_k is the loss of teacher k (CA-MKD, Zhang et al., 2022,
    arXiv:2201.00007, eq. 3). Where an item has no label, the teacher's entropy stands for its loss.

    Args:
        problem (`str`): As for `mix_logits`; `"embedding"` has no labels.
        logits (`torch.Tensor` of shape `(teachers, items, classes)`): Outputs of two teachers or more.
        labels (`torch.Tensor` of shape `(items,)` or `(items, classes)`, *optional*): Targets of the task.
        class_mask (`torch.Tensor` of shape `(items, classes)`, *optional*): True where a class may be predicted.
        label_mask (`torch.Tensor` of shape `(items,)`, *optional*): True where an item has a label.

    Returns:
        `torch.Tensor` of shape `(teachers, items)`: Sums to 1 over the teachers.

    Raises:
        ValueError: if numbers or embeddings have no labels, so that nothing tells how sure a teacher is.
    """
    if problem in ("regression", "embedding") and (labels is None or problem == "embedding"):
        raise ValueError(
            f"teacher_mixture='confidence' cannot weigh teachers of {problem} outputs without labels: numbers carry "
            "no probability. Use 'mean' or 'weighted', or add labels."
        )
    each = torch.stack([_teacher_loss(problem, one, labels, class_mask, label_mask) for one in logits.float()])
    return (1 - each.softmax(0)) / (len(each) - 1)


def _teacher_loss(
    problem: str,
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    class_mask: torch.Tensor | None,
    label_mask: torch.Tensor | None,
) -> torch.Tensor:
    if problem == "regression":
        loss = losses.squared_error(logits, labels)
        # Nothing tells teachers of a number without a label apart.
        return loss if label_mask is None else loss.where(label_mask, 0.0)
    if problem == "multi_label_classification":
        entropy = losses.bernoulli_soft_cross_entropy(logits, logits)
        if labels is None:
            return entropy
        loss = losses.binary_cross_entropy(logits, labels)
        return loss if label_mask is None else loss.where(label_mask, entropy)
    entropy = losses.soft_cross_entropy(logits, logits, 1.0, class_mask)
    if labels is None:
        return entropy
    return losses.cross_entropy(logits, labels, class_mask=class_mask).where(labels != IGNORED, entropy)
