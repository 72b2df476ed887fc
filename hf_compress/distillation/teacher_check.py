"""Checks of the teachers before training: whether they fit, say numbers, and are worth learning from."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from hf_compress.distillation.arguments import DistillationArguments
from hf_compress.distillation.objective import Items, items_of
from hf_compress.distillation.teachers import Teacher, check_vocabulary
from hf_compress.distillation.tokenizers import TeacherCollator
from hf_compress.modeling.tasks import CLASSIFICATION, IGNORED

logger = logging.getLogger(__name__)


def spread_rows(dataset: Any, number: int) -> list[dict[str, Any]]:
    """Some rows of a data set, from its beginning to its end, since it may be sorted by label.

    Args:
        dataset (`Dataset` or any other, or `None`): The data.
        number (`int`): How many rows at most.

    Returns:
        `list[dict]`: None of them where the data cannot be numbered.
    """
    if not isinstance(dataset, Dataset):
        return []
    number = min(number, len(dataset))
    return [dataset[index * len(dataset) // number] for index in range(number)]


def look_at_teachers(
    teachers: Sequence[Teacher],
    rows: Sequence[Any],
    collate: Callable[[list], dict[str, torch.Tensor]],
    args: DistillationArguments,
    autocast: Callable[[], AbstractContextManager],
    is_chunked: bool = False,
) -> None:
    """Warns of a teacher that is worse than always answering the most frequent class.

    Args:
        teachers (sequence of `Teacher`): The teachers.
        rows (sequence): Rows to ask them about.
        collate (`Callable`): Makes a batch of rows, with the cached answers where they are cached.
        args (`DistillationArguments`): Where the teachers are, and how many rows they are asked about at once.
        autocast (`Callable`): Gives the context under which they run.
        is_chunked (`bool`, *optional*): Whether logits of a whole batch are too many.

    Raises:
        ValueError: if an output is NaN or infinite.
    """
    names = ["The teacher"] if len(teachers) == 1 else [f"Teacher {number}" for number in range(len(teachers))]
    found: dict[int, list[Items]] = {number: [] for number in range(len(teachers))}
    # A collator may draw random numbers, and the training's own sequence of them must not depend on this check.
    with torch.random.fork_rng(devices=[]):
        for start in range(0, len(rows), args.train_batch_size):
            batch = collate(list(rows[start : start + args.train_batch_size]))
            batch = {name: value.to(args.device) for name, value in batch.items() if isinstance(value, torch.Tensor)}
            for number, teacher in enumerate(teachers):
                answers = teacher.ask(batch, autocast(), is_chunked and teacher.cache is None)
                _check_finite(answers, names[number])
                if teacher.task in (*CLASSIFICATION, "token-classification"):
                    found[number].append(_decisions(teacher, answers, batch))
    for number, parts in found.items():
        _compare_with_majority([part for part in parts if part is not None], names[number])


def _check_finite(answers: dict[str, Any], name: str) -> None:
    for output, value in answers.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not value.isfinite().all():
            raise ValueError(
                f"{name} gives NaN or infinity ({output}) in {len(value)} rows of the data, from which "
                "nothing can be learned: check its weights, and run it in float32 or bf16 where float16 overflows."
            )


def _decisions(teacher: Teacher, answers: dict[str, Any], batch: dict[str, torch.Tensor]):
    """Decided and true classes of the labelled items; `None` where the labels are no classes."""
    if "labels" not in batch or batch["labels"].is_floating_point():
        return None
    logits = teacher.targets(answers, batch, "mean").logits
    items = items_of(teacher.task, {"logits": batch["labels"][..., None]}, batch)
    labels = items.labels
    if labels is None or labels.ndim > 1 or logits.shape[-1] < 2:
        return None
    is_known = labels != IGNORED
    return logits.argmax(-1)[is_known].cpu(), labels[is_known].cpu()


def _compare_with_majority(parts: list[tuple[torch.Tensor, torch.Tensor]], name: str) -> None:
    if not parts:
        return
    decided, labels = (torch.cat(side) for side in zip(*parts, strict=True))
    if len(labels) == 0:
        return
    accuracy = (decided == labels).float().mean().item()
    majority = (labels.bincount().max() / len(labels)).item()
    if accuracy < majority:
        logger.warning(
            "%s is right on %.1f %% of %d labels, and the most frequent class alone would be on %.1f %%: it may not "
            "be fine-tuned on this task, or count its labels in another order. Check it before you train a student.",
            name,
            100 * accuracy,
            len(labels),
            100 * majority,
        )


def rows_to_look_at(train_dataset: Any, eval_dataset: Any, has_caches: bool, number: int) -> list[dict[str, Any]]:
    """Rows on which the teachers are looked at: of the evaluation where they can be asked about it.

    Args:
        train_dataset (`Dataset` or any other, or `None`): The training data.
        eval_dataset (`Dataset` or any other, or `None`): The evaluation data.
        has_caches (`bool`): Whether answers are cached, which are those to the training data alone.
        number (`int`): How many rows at most.
    """
    is_usable = isinstance(eval_dataset, Dataset) and not has_caches
    is_usable = is_usable and "teacher_input_ids" not in columns_of(train_dataset)
    return spread_rows(eval_dataset if is_usable else train_dataset, number)


def check_teachers(teacher: Any, args: DistillationArguments) -> list[nn.Module]:
    """The teachers as a list.

    Args:
        teacher (`nn.Module` or a sequence of them): As the user passed it.
        args (`DistillationArguments`): Their weights and mixture.

    Returns:
        `list[nn.Module]`: At least one.

    Raises:
        TypeError: if one is no model.
        ValueError: if weights or mixture do not fit their number.
    """
    models = list(teacher) if isinstance(teacher, list | tuple) else [teacher]
    wrong = [one for one in models if not isinstance(one, nn.Module)]
    if wrong or not models:
        raise TypeError(
            f"teacher={teacher!r} is no model: pass a loaded model, e.g. from from_pretrained, or a list of them."
        )
    if args.teacher_weights is not None and len(args.teacher_weights) != len(models):
        raise ValueError(
            f"teacher_weights={args.teacher_weights} are for {len(args.teacher_weights)} teachers, but there are "
            f"{len(models)}: give one weight per teacher."
        )
    if args.teacher_mixture == "confidence" and len(models) < 2:
        raise ValueError("teacher_mixture='confidence' weighs teachers against each other: give two or more.")
    return models


def columns_of(dataset: Any) -> Collection[str]:
    """Names of a data set's columns.

    Args:
        dataset (`Dataset` or any other, or `None`): The data.

    Returns:
        `Collection[str]`: Of its first row, where it does not say; none of them where a row cannot be had unasked.
    """
    names = getattr(dataset, "column_names", None)
    if names:
        return names
    if isinstance(dataset, IterableDataset):
        # After a `map`; it begins anew for the training.
        first = next(iter(dataset), None)
    else:
        has_rows = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and len(dataset)
        first = dataset[0] if has_rows else None
    return first if isinstance(first, Mapping) else ()


def check_data(
    dataset: Any, teachers: Sequence[nn.Module], student: nn.Module, tokenizers: Sequence[Any], collator: Any = None
) -> None:
    """Raises if a data set has no rows, or student and teachers cannot read the same ids and have no own ones.

    Args:
        dataset (`Dataset` or any other, or `None`): The training data.
        teachers (sequence of `nn.Module`): The teachers.
        student (`nn.Module`): The student.
        tokenizers (sequence): The student's and the teachers', `None` where one is not known.
        collator (`Callable`, *optional*): Makes batches of the data; a `TeacherCollator` says that there are such ids.

    Raises:
        ValueError: with what is wrong.
    """
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError("The training data have 0 rows, from which nothing can be learned: give data with rows.")
    columns = columns_of(dataset)
    if "teacher_input_ids" in columns or (not columns and isinstance(collator, TeacherCollator)):
        if len(teachers) > 1:
            raise ValueError(
                f"The data have teacher_input_ids, which all {len(teachers)} teachers would read, whatever their "
                "tokenizers: give one teacher, or teachers with the student's tokenizer and no such column."
            )
        return
    known = [one if isinstance(one, PreTrainedTokenizerBase) else None for one in tokenizers]
    for teacher in teachers:
        check_vocabulary(teacher, student, known)
