"""Where a training stands in its stages, and the hooks that the current one needs."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.trainer_utils import has_length

from hf_compress.distillation.curriculum import Stage, check_batch_size, locate, stage_lengths
from hf_compress.distillation.inner_terms import InnerTerm
from hf_compress.distillation.layer_map import describe
from hf_compress.distillation.objective import check_divergence, fits
from hf_compress.distillation.signals import Probe
from hf_compress.distillation.teachers import Teacher
from hf_compress.modeling.tasks import CLASSIFICATION, problem_type, unwrap

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)


class StageMixin:
    """What a `Trainer` does with `self.stages`, whose terms read signals of the student and of `self.teachers`."""

    stages: list[Stage]
    teachers: list[Teacher]
    _lengths: list[int] | None = None
    _watched: int | None = None
    _probe: Probe | None = None

    def stage(self) -> Stage:
        """The stage of the training that the next step belongs to."""
        return self.stages[self._place()[0]]

    def _place(self) -> tuple[int, float]:
        if self._lengths is None:
            return 0, 0.0
        return locate(self._lengths, self.state.global_step)

    def _enter_stage(self) -> None:
        """Hangs the hooks of the current stage, where another one's hang."""
        if self._probe is not None:
            # What an evaluation left is of other texts.
            self._probe.take()
        index = self._place()[0]
        if self._watched == index:
            return
        self._leave_stages()
        terms = self.stages[index].terms
        for number, teacher in enumerate(self.teachers):
            own = [term for term in terms if term.config.teacher == number]
            teacher.watch({name for term in own for name in term.teacher_signals()})
        names = {name for term in terms for name in term.student_signals()}
        if self.args.torch_compile and names:
            # What an earlier stage or training compiled without hooks would not notice them.
            torch.compiler.reset()
        self._probe = Probe(self.model, names) if names else None
        self._watched = index

    def _leave_stages(self) -> None:
        for teacher in self.teachers:
            teacher.close()
        if self._probe is not None:
            self._probe.close()
        self._probe, self._watched = None, None

    def set_initial_training_values(self, args: TrainingArguments, dataloader: DataLoader):
        """Also settles which steps each stage lasts; see `Trainer.set_initial_training_values`."""
        values = super().set_initial_training_values(args, dataloader)
        epochs = [stage.config.epochs for stage in self.stages]
        if not has_length(dataloader) and any(epochs):
            raise ValueError(
                f"The stages last {epochs} epochs, and how many steps an epoch of a stream has is not known: give "
                "steps."
            )
        self._lengths = stage_lengths(self.stages, max_steps=values[-1], steps_per_epoch=values[1])
        for number, (stage, length) in enumerate(zip(self.stages, self._lengths, strict=True), start=1):
            for term in stage.terms:
                logger.info(
                    "Stage %d (%d steps): %s, layers of the %s (student<-teacher) %s.",
                    number,
                    length,
                    term.name,
                    term.stack,
                    describe(term.pairs),
                )
        return values

    def _check_ahead(self) -> None:
        """Raises for what would else come to light in a later stage."""
        if self.model_init is not None:
            raise ValueError("model_init builds another student for every trial: pass the student itself as model.")
        if self._is_chunked and (self.compute_loss_func is not None or self.args.n_gpu > 1):
            raise ValueError(
                f"logits_chunk={self.args.logits_chunk} leaves no logits of a whole batch for compute_loss_func, and "
                "no output layer for copies of the student on other devices: set logits_chunk=0."
            )
        kind = problem_type(unwrap(self.model).config) if self.task in CLASSIFICATION else None
        if self.args.label_smoothing_factor and kind in ("regression", "multi_label_classification"):
            raise ValueError(
                f"label_smoothing_factor={self.args.label_smoothing_factor} spreads one label over all classes, which "
                f"does not fit this model ({kind}): set it to 0."
            )
        config = unwrap(self.model).config
        may_be_multi_label = kind is not None and config.problem_type is None and config.num_labels > 1
        check_layers_stay(config, [term for stage in self.stages for term in stage.terms])
        for stage in self.stages:
            check_batch_size(stage.terms, self.args.train_batch_size)
            for number, teacher in enumerate(self.teachers):
                own = (term for term in stage.terms if term.config.teacher == number)
                teacher.check_signals({name for term in own for name in term.teacher_signals()})
            if not (may_be_multi_label and fits("multi_label_classification", stage.divergence)):
                check_divergence(self._problem_type(None), stage.divergence)


def check_layers_stay(config: "PreTrainedConfig", terms: Sequence[InnerTerm]) -> None:
    """Raises if layers that terms read are left out at random while the student trains.

    Args:
        config (`PreTrainedConfig`): The student's.
        terms (sequence of `InnerTerm`): Terms inside the models.

    Raises:
        ValueError: with the key to set.
    """
    for key, value in config.to_dict().items():
        if terms and key.endswith("layerdrop") and value:
            raise ValueError(
                f"{key}={value} leaves out layers of the student at random, and {terms[0].name} reads their hidden "
                f"states: load the student with {key}=0."
            )
