"""The terms on the outputs: the teachers' soft targets and the labels, whole or in chunks of a large vocabulary."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from hf_compress.distillation import losses
from hf_compress.distillation.chunked import in_chunks
from hf_compress.distillation.mixture import confidence_weights, mix_logits
from hf_compress.distillation.objective import Items, hard_loss, soft_loss
from hf_compress.distillation.teachers import Targets, Teacher

KD, TASK = "kd_loss", "task_loss"


@dataclass(frozen=True)
class OutputSetting:
    """How outputs are compared at one step.

    Attributes:
        problem (`str`): `"single_label_classification"`, `"multi_label_classification"`, `"regression"` or
            `"embedding"`.
        temperature (`float`): Of the soft targets.
        divergence (`str`): See `DistillationArguments`.
        beta (`float`): Of the Jensen-Shannon divergence.
        label_smoothing (`float`): In the hard term alone.
        mixture (`str`): How several teachers are mixed.
        weights (`tuple[float, ...]` or `None`): One per teacher, for `"weighted"`.
        imitates (`bool`): Whether the teachers' term is computed.
        has_labels (`bool`): Whether the labels' term is computed.
    """

    problem: str
    temperature: float
    divergence: str
    beta: float
    label_smoothing: float
    mixture: str
    weights: tuple[float, ...] | None
    imitates: bool
    has_labels: bool


def output_values(
    student: Items, targets: Sequence[Targets], setting: OutputSetting, n_shared: int | None = None
) -> dict[str, torch.Tensor]:
    """Values of the terms on the outputs, one per item, not masked yet.

    Args:
        student (`Items`): The student's predictions.
        targets (sequence of `Targets`): What each teacher says of them; unused unless `setting.imitates`.
        setting (`OutputSetting`): How they are compared.
        n_shared (`int`, *optional*): How many of the student's classes the teachers know too.

    Returns:
        `dict[str, torch.Tensor]`: `kd_loss` and `task_loss`, of shape (items,), as far as they are asked for.
    """
    # Once for both terms: on a GPU, each small operation costs as much as a larger one.
    student = student._replace(logits=student.logits.float())
    values = {}
    if setting.imitates:
        shared = student if n_shared is None else student._replace(logits=student.logits[..., :n_shared])
        values[KD] = _soft_values(shared, targets, setting)
    if setting.has_labels:
        values[TASK] = hard_loss(setting.problem, student, setting.label_smoothing)
    return values


def chunked_values(
    student: Items,
    head: nn.Module,
    targets: Sequence[Targets],
    teachers: Sequence[Teacher],
    setting: OutputSetting,
    chunk: int,
    n_shared: int | None = None,
) -> dict[str, torch.Tensor]:
    """`output_values` of a language model, with the logits of `chunk` items at a time.

    Args:
        student (`Items`): Its `logits` are what enters the output layer.
        head (`nn.Module`): The student's output layer.
        targets (sequence of `Targets`): As the teachers gave them, before their output layers.
        teachers (sequence of `Teacher`): They gave them.
        setting (`OutputSetting`): How they are compared.
        chunk (`int`): Items at a time.
        n_shared (`int`, *optional*): How many of the student's classes the teachers know too.

    Returns:
        `dict[str, torch.Tensor]`: As `output_values`.
    """

    def compute(where: slice) -> dict[str, torch.Tensor]:
        part = Items(*(None if field is None else field[where] for field in student))
        part = part._replace(logits=head(part.logits))
        known = [_part(target, teacher, where) for target, teacher in zip(targets, teachers, strict=True)]
        return output_values(part, known, setting, n_shared)

    return in_chunks(compute, len(student.logits), chunk)


def _part(target: Targets, teacher: Teacher, where: slice) -> Targets:
    if target.head is None:
        return Targets(*(None if field is None else field[where] for field in target[:3]))
    with torch.no_grad():
        return Targets(teacher.in_order(target.head(target.logits[where])))


def _soft_values(student: Items, targets: Sequence[Targets], setting: OutputSetting) -> torch.Tensor:
    first, n_classes = targets[0], student.logits.shape[-1]
    if first.indices is not None:
        return losses.top_k_divergence(student.logits, first.indices, first.log_probs, setting.temperature)
    compare = partial(
        soft_loss, setting.problem, temperature=setting.temperature, divergence=setting.divergence, beta=setting.beta
    )
    if len(targets) == 1:
        return compare(student, first.logits)
    # The padding of their vocabularies may differ too.
    logits = torch.stack([target.logits[..., :n_classes] for target in targets])
    if setting.mixture == "confidence":
        weights = confidence_weights(setting.problem, logits, student.labels, student.class_mask, student.label_mask)
    else:
        shares = setting.weights or (1.0,) * len(targets)
        weights = torch.tensor(shares, device=logits.device) / sum(shares)
    # Squared errors compare logits themselves, for which a mean of distributions has no scale.
    problem = "regression" if setting.divergence == "mse" else setting.problem
    mixed = mix_logits(problem, logits, weights, setting.temperature, student.class_mask)
    return compare(student, mixed)
