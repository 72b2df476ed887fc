"""Which terms the loss has at which step, and what each of them counts: stages and schedules."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from hf_compress.distillation.arguments import DistillationArguments, StageConfig
from hf_compress.distillation.inner_terms import InnerTerm, plan_terms
from hf_compress.distillation.output_terms import KD, TASK
from hf_compress.distillation.schedules import scheduled

# Two texts have a distance, three an angle.
_LEAST_TEXTS = {"distance": 2, "angle": 3, "contrastive": 2}


@dataclass(frozen=True)
class Stage:
    """A part of the training.

    Attributes:
        config (`StageConfig`): How long it lasts, and what it changes.
        args (`DistillationArguments`): What it does not change.
        terms (`list[InnerTerm]`): What is imitated inside the teachers.
    """

    config: StageConfig
    args: DistillationArguments
    terms: list[InnerTerm]

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher is ever asked."""
        counted = (self.weights(progress) for progress in (0.0, 0.5, 1.0))
        return any(weight > 0 for weights in counted for name, weight in weights.items() if name != TASK)

    @property
    def divergence(self) -> str:
        """How outputs are compared."""
        return self.args.divergence if self.config.divergence is None else self.config.divergence

    def temperature(self, progress: float) -> float:
        """The temperature of the soft targets.

        Args:
            progress (`float`): Share of the stage that is done.

        Returns:
            `float`: Above 0.
        """
        if self.config.temperature is not None:
            return self.config.temperature
        return scheduled(self.args.temperature, self.args.end_temperature, self.args.temperature_schedule, progress)

    def weights(self, progress: float) -> dict[str, float]:
        """What each term counts.

        Args:
            progress (`float`): Share of the stage that is done.

        Returns:
            `dict[str, float]`: Weights by the terms' names, `kd_loss` and `task_loss` first.
        """
        alpha = self.config.alpha
        if alpha is None:
            alpha = scheduled(self.args.alpha, self.args.end_alpha, self.args.alpha_schedule, progress)
        task_weight = 1 - alpha if self.config.task_weight is None else self.config.task_weight
        inner = {
            term.name: scheduled(term.config.weight, term.config.end_weight, term.config.schedule, progress)
            for term in self.terms
        }
        return {KD: alpha, TASK: task_weight, **inner}


def check_batch_size(terms: Sequence[InnerTerm], batch_size: int) -> None:
    """Raises if terms that compare the texts of a batch have too few to compare, where they would always be 0.

    Args:
        terms (sequence of `InnerTerm`): Of a stage.
        batch_size (`int`): Texts per forward, which accumulation does not raise.

    Raises:
        ValueError: with the size that it takes.
    """
    for term in terms:
        least = _LEAST_TEXTS.get(term.config.kind, 1)
        if batch_size < least:
            raise ValueError(
                f"The term {term.name} compares the texts of a batch with each other, and batches of {batch_size} "
                f"have too few: set per_device_train_batch_size to {least} or more; accumulation does not help."
            )


def plan_stages(args: DistillationArguments, student: nn.Module, teachers: Sequence[nn.Module]) -> list[Stage]:
    """The stages of a training, checked against the models.

    Args:
        args (`DistillationArguments`): Terms and stages.
        student (`nn.Module`): The student.
        teachers (sequence of `nn.Module`): The teachers.

    Returns:
        `list[Stage]`: At least one.

    Raises:
        ValueError: if a stage has no term that counts, only the last may leave its length open and another does, or
            a term does not fit the models.
    """
    configs = args.stages or [StageConfig()]
    stages = []
    for number, config in enumerate(configs, start=1):
        terms = args.terms if config.terms is None else config.terms
        stage = Stage(config, args, plan_terms(terms, student, teachers))
        counted = {name for progress in (0.0, 0.5, 1.0) for name, w in stage.weights(progress).items() if w > 0}
        if not counted:
            raise ValueError(
                f"Stage {number} of {len(configs)} has no term that counts: its weights are {stage.weights(0.0)}. "
                "Raise alpha or task_weight, or add terms."
            )
        if config.steps is None and config.epochs is None and number < len(configs):
            raise ValueError(
                f"Stage {number} of {len(configs)} gives neither steps nor epochs, and only the last may: say how "
                "long it lasts."
            )
        stages.append(stage)
    return stages


def stage_lengths(stages: Sequence[Stage], max_steps: int, steps_per_epoch: int) -> list[int]:
    """How many optimizer steps each stage lasts.

    Args:
        stages (sequence of `Stage`): As `plan_stages` returned them.
        max_steps (`int`): Optimizer steps of the training.
        steps_per_epoch (`int`): Optimizer steps of one epoch.

    Returns:
        `list[int]`: Their sum is `max_steps`.

    Raises:
        ValueError: if the stages do not fill the training, or overrun it.
    """
    given: list[int | None] = []
    epochs = 0.0
    for stage in stages:
        if stage.config.epochs is None:
            given.append(stage.config.steps)
            continue
        # Of where each ends, because rounded lengths do not add up.
        before, epochs = math.ceil(epochs * steps_per_epoch), epochs + stage.config.epochs
        given.append(math.ceil(epochs * steps_per_epoch) - before)
    rest = max_steps - sum(length for length in given if length is not None)
    lengths = [rest if length is None else length for length in given]
    if sum(lengths) != max_steps or min(lengths) < 1:
        raise ValueError(
            f"The stages last {lengths} steps, but the training has {max_steps} ({steps_per_epoch} an epoch): "
            "give lengths that add up, or leave the last stage's out to let it take the rest."
        )
    return lengths


def locate(lengths: Sequence[int], step: int) -> tuple[int, float]:
    """The stage of a step, and how much of the stage is done.

    Args:
        lengths (sequence of `int`): As `stage_lengths` returned them.
        step (`int`): Optimizer step, from 0.

    Returns:
        `tuple[int, float]`: Index of the stage, and a share that is 0 at its first step and 1 at its last.
    """
    start = 0
    for index, length in enumerate(lengths):
        if step < start + length or index == len(lengths) - 1:
            share = (step - start) / (length - 1) if length > 1 else 0.0
            return index, min(share, 1.0)
        start += length
    raise AssertionError("a training has at least one stage")
