"""Batches that carry the cached answers of the teachers."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from hf_compress.distillation.arguments import DistillationArguments
from hf_compress.distillation.cache import TeacherCache
from hf_compress.modeling.tasks import unwrap

_TOP_K = "top-k"


class CachedCollator:
    """A collator that also looks up what the teachers say of the rows.

    The answers are found by what the collated rows hold, so nothing can misalign them: neither shuffling, nor
    accumulation, nor the number of processes, nor a resumed training.

    Args:
        collator (`Callable`): Makes a batch of rows.
        caches (sequence of `TeacherCache`): One per teacher.
    """

    def __init__(self, collator: Callable[[list], dict[str, Any]], caches: Sequence[TeacherCache]) -> None:
        self.collator = collator
        self.caches = list(caches)

    def __call__(self, rows: list) -> dict[str, torch.Tensor]:
        batch = dict(self.collator(rows))
        answers: dict[str, torch.Tensor] = {}
        for number, cache in enumerate(self.caches):
            prefix = cache_prefix(number)
            for name, value in cache.look_up(batch).items():
                answers[prefix + name.removeprefix(cache_prefix(0))] = value
        return batch | answers


def cache_prefix(number: int) -> str:
    """What the cached columns of a teacher begin with.

    Args:
        number (`int`): Of the teacher, from 0.

    Returns:
        `str`: `"cached_"` for the first.
    """
    return "cached_" if number == 0 else f"cached{number}_"


def check_caches(
    given: TeacherCache | Sequence[TeacherCache] | None,
    teachers: Sequence[nn.Module],
    student: nn.Module,
    args: DistillationArguments,
) -> list[TeacherCache | None]:
    """The caches of the teachers, one each, or `None` for each.

    Args:
        given (`TeacherCache`, a sequence of them, or `None`): As the user passed them.
        teachers (sequence of `nn.Module`): The teachers.
        student (`nn.Module`): The student.
        args (`DistillationArguments`): Temperature, divergence and stages.

    Returns:
        `list[TeacherCache or None]`: In the teachers' order.

    Raises:
        ValueError: if their number differs from the teachers', one is of another teacher, or a cache of the likeliest
            classes alone does not fit the arguments.
    """
    if given is None:
        return [None] * len(teachers)
    caches = [given] if isinstance(given, TeacherCache) else list(given)
    if len(caches) != len(teachers):
        raise ValueError(
            f"{len(teachers)} teachers and {len(caches)} caches are given: give one cache per teacher, or none at all."
        )
    for cache, teacher in zip(caches, teachers, strict=True):
        cache.check_teacher(teacher)
        if cache.settings.task == "feature-extraction" and cache.settings.pooling != args.pooling:
            raise ValueError(
                f"The cache holds embeddings with pooling={cache.settings.pooling!r}, and the training uses "
                f"{args.pooling!r}: use one of them for both."
            )
        if cache.settings.task == "seq2seq-lm":
            _check_first_tokens(teacher, student)
        if cache.precision == _TOP_K:
            _check_top_k(cache, len(teachers), args)
    return caches


def _check_first_tokens(teacher: nn.Module, student: nn.Module) -> None:
    ours, theirs = (_first_tokens(unwrap(model).config) for model in (student, teacher))
    if ours != theirs:
        raise ValueError(
            f"The cached teacher decoded from the tokens {theirs}, and the student starts from {ours}: they would "
            "continue different texts. Give both configs the same ones, or train without a cache."
        )


def _first_tokens(config: Any) -> dict[str, int | None]:
    return {name: getattr(config, name, None) for name in ("decoder_start_token_id", "pad_token_id")}


def _check_top_k(cache: TeacherCache, n_teachers: int, args: DistillationArguments) -> None:
    if n_teachers > 1:
        raise ValueError(
            f"{n_teachers} teachers cannot be mixed from caches of their likeliest classes alone, which differ from "
            "teacher to teacher: build the caches with precision='fp16'."
        )
    temperatures = {args.temperature if stage.temperature is None else stage.temperature for stage in args.stages}
    temperatures = temperatures or {args.temperature}
    if args.end_temperature is not None or temperatures != {cache.temperature}:
        raise ValueError(
            f"The cache holds the likeliest classes at temperature={cache.temperature}, and what it left out cannot "
            f"be softened anew, but the training uses {sorted(temperatures)}"
            f"{'' if args.end_temperature is None else f' up to {args.end_temperature}'}: use one temperature, and "
            "build the cache with it."
        )
    divergences = {args.divergence, *(stage.divergence for stage in args.stages if stage.divergence is not None)}
    if not divergences <= {"auto", "forward_kl"}:
        raise ValueError(
            f"divergence={sorted(divergences)} needs all classes, but the cache holds the likeliest ones alone: use "
            "forward_kl, or build the cache with precision='fp16'."
        )
