"""A Trainer whose student also learns from a teacher."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_pt_utils import nested_gather

from hf_compress.distillation import losses
from hf_compress.distillation.config import DistillationArguments
from hf_compress.distillation.objective import TASKS, count_items, hard_loss, items_of, soft_loss
from hf_compress.modeling.tasks import (
    CLASSIFICATION,
    forward_columns,
    matching_columns,
    problem_type,
    shared_task,
    unwrap,
)


class DistillationTrainer(Trainer):
    """`transformers.Trainer` with a teacher.

    The loss is `alpha * T^2 * KL(teacher_T || student_T) + (1 - alpha) * task loss` (Hinton et al., 2015), with the
    divergence that fits the task: softmax KL for single labels, tokens, answer spans and vocabularies, Bernoulli KL
    for multi-label, squared error for regression. Every term is a sum over items divided by the number of items of
    the whole optimizer step, so gradients do not depend on accumulation, processes or padding. The unweighted terms
    are logged as `kd_loss` and `task_loss`. Evaluation does not run the teacher: `eval_loss` is the task's loss.

    Args:
        model (`PreTrainedModel`): The student.
        args (`DistillationArguments`): Training arguments with `temperature` and `alpha`.
        teacher (`PreTrainedModel`): A fine-tuned model of the same task and label names. It is moved to the training
            device and put in eval mode; it never trains and is in no checkpoint.
        *trainer_args, **trainer_kwargs: Forwarded to `transformers.Trainer`. A `compute_loss_func` takes the place of
            the task's loss.

    Raises:
        TypeError: if `args` are no `DistillationArguments`, or the teacher is missing.
        ValueError: if teacher and student differ in task, labels or vocabulary, or are the same object.
    """

    # compute_loss divides by the items of the whole step, so Trainer must not divide by the accumulation steps again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: DistillationArguments | None = None,
        *trainer_args: Any,
        teacher: PreTrainedModel,
        **trainer_kwargs: Any,
    ) -> None:
        args = DistillationArguments(output_dir="tmp_trainer") if args is None else args
        if not isinstance(args, DistillationArguments):
            raise TypeError(
                f"args is a {type(args).__name__}, which has no temperature and alpha: pass "
                "hf_compress.DistillationArguments, which takes the same arguments and these two."
            )
        if not isinstance(teacher, nn.Module):
            raise TypeError(f"teacher={teacher!r} is no model: pass a loaded model, e.g. from from_pretrained.")
        super().__init__(model, args, *trainer_args, **trainer_kwargs)
        self.task = _check_pair(self.model, teacher)
        self.teacher = self._place_teacher(teacher)
        columns = matching_columns(teacher, self.model)
        self._label_order = None if columns is None else torch.tensor(columns, device=self.args.device)
        self._student_inputs = forward_columns(self.model)
        self._teacher_inputs = forward_columns(teacher) - set(self.label_names)
        self._reset_terms()

    def _place_teacher(self, teacher: PreTrainedModel) -> PreTrainedModel:
        # A quantized or dispatched teacher sits where its loader put it, and `.to` would raise.
        # accelerate's prepare_model is not used: it would list the teacher among the models to be saved, and patch
        # the forward of the user's model for mixed precision.
        placed = getattr(teacher, "hf_device_map", None) or getattr(teacher, "is_quantized", False)
        return teacher.eval() if placed else teacher.to(self.accelerator.device).eval()

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns += sorted(self._teacher_inputs - set(self._signature_columns))

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | None:
        if not batch_samples:
            return None
        num_items = sum(count_items(self.task, batch).to(device) for batch in batch_samples)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            num_items = self.accelerator.gather(num_items).sum()
        return num_items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The weighted sum of the terms in training, the task's loss in evaluation; see `Trainer.compute_loss`."""
        student_inputs = {name: value for name, value in inputs.items() if name in self._student_inputs}
        if not model.training:
            # Without a count the stock loss is this batch's mean; with one, it would be scaled by the processes.
            return super().compute_loss(model, student_inputs, return_outputs, num_items_in_batch=None)
        if num_items_in_batch is None:
            num_items_in_batch = count_items(self.task, inputs)
        unlabelled = {name: value for name, value in student_inputs.items() if name not in self.label_names}
        outputs = model(**unlabelled, return_dict=True)
        terms = self.compute_terms(outputs, inputs, num_items_in_batch)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            # Data-parallel training averages gradients over processes, but the terms were divided by all their items.
            terms = {name: term * self.args.world_size for name, term in terms.items()}
        self._note(terms)
        weights = self.term_weights()
        loss = sum(weights[name] * term for name, term in terms.items())
        return (loss, outputs) if return_outputs else loss

    def term_weights(self) -> dict[str, float]:
        """What each term of `compute_terms` counts in the loss. A subclass that adds terms adds their weights.

        Returns:
            `dict[str, float]`: Weights by the terms' names.
        """
        return {"kd_loss": self.args.alpha, "task_loss": 1 - self.args.alpha}

    def compute_terms(
        self, outputs: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor], num_items: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The terms of the training loss, before they are weighted.

        Args:
            outputs (`Mapping`): Outputs of the student.
            inputs (`Mapping`): The batch, with all columns that the student or the teacher takes, and the labels.
            num_items (`torch.Tensor` of shape `()`): Items of the whole optimizer step.

        Returns:
            `dict[str, torch.Tensor]`: `kd_loss` and `task_loss`, each this batch's share of the step's mean; a term
            of weight 0 is left out.
        """
        student = items_of(self.task, outputs, inputs)
        problem = self._problem_type(student.labels)
        terms = {}
        if self.args.alpha > 0:
            teacher = items_of(self.task, self._run_teacher(inputs), inputs)
            logits = teacher.logits
            if self._label_order is not None:
                logits = logits.index_select(-1, self._label_order)
            per_item = soft_loss(problem, student, logits, self.args.temperature)
            terms["kd_loss"] = losses.average(per_item, num_items, student.mask)
        if self.args.alpha < 1:
            terms["task_loss"] = self._task_loss(outputs, inputs, num_items, problem, student)
        return terms

    def _task_loss(self, outputs, inputs, num_items, problem, student) -> torch.Tensor:
        if self.compute_loss_func is not None:
            return self.compute_loss_func(outputs, inputs.get("labels"), num_items_in_batch=num_items)
        if student.labels is None:
            raise ValueError(
                f"alpha={self.args.alpha} gives the task's loss the weight {1 - self.args.alpha:g}, but the batch has "
                f"no labels, only {sorted(inputs)}: pass alpha=1 to learn from the teacher alone, or add the labels."
            )
        per_item = hard_loss(problem, student, self.args.label_smoothing_factor)
        return losses.average(per_item, num_items, student.mask)

    def _problem_type(self, labels: torch.Tensor | None) -> str:
        if self.task not in CLASSIFICATION:
            return "single_label_classification"
        config = unwrap(self.model).config
        kind = problem_type(config, labels)
        if labels is not None:
            # As Transformers' heads do with their first labels: pipelines read it, and this head never sees labels.
            config.problem_type = kind
        return kind

    @torch.no_grad()
    def _run_teacher(self, inputs: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        self.teacher.eval()
        teacher_inputs = {name: value for name, value in inputs.items() if name in self._teacher_inputs}
        if "use_cache" in self._teacher_inputs:
            teacher_inputs["use_cache"] = False
        with self.accelerator.autocast():
            return self.teacher(**teacher_inputs, return_dict=True)

    def prediction_step(self, model: nn.Module, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any):
        """Predicts with the student's own columns; see `Trainer.prediction_step`."""
        inputs = {name: value for name, value in inputs.items() if name in self._student_inputs}
        return super().prediction_step(model, inputs, *args, **kwargs)

    def _inner_training_loop(self, *args: Any, **kwargs: Any):
        # Also the start of another attempt when Trainer looks for a batch size that fits.
        self._reset_terms()
        return super()._inner_training_loop(*args, **kwargs)

    def _reset_terms(self) -> None:
        self._term_sums: dict[str, torch.Tensor] = {}
        self._summed_steps = 0

    def _note(self, terms: dict[str, torch.Tensor]) -> None:
        for name, term in terms.items():
            self._term_sums[name] = self._term_sums.get(name, 0) + term.detach()
        self._summed_steps += self.accelerator.sync_gradients

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs with the mean of every loss term since the last time; see `Trainer.log`."""
        if "loss" in logs and self._summed_steps:
            for name, total in self._term_sums.items():
                mean = nested_gather(total, self.args.parallel_mode).mean().item() / self._summed_steps
                logs[name] = mean
            self._reset_terms()
        super().log(logs, start_time)


def _check_pair(student: nn.Module, teacher: nn.Module) -> str:
    if unwrap(student) is unwrap(teacher):
        raise ValueError(
            "model and teacher are the same object, so the teacher would change with the student: "
            "pass copy.deepcopy(model) as the teacher."
        )
    task = shared_task(teacher, student)
    if task not in TASKS:
        raise ValueError(f"DistillationTrainer does not know the task {task} yet; it knows {', '.join(TASKS)}.")
    config, teacher_config = unwrap(student).config, unwrap(teacher).config
    if "input_ids" in forward_columns(student) and config.vocab_size != teacher_config.vocab_size:
        raise ValueError(
            f"The teacher has {teacher_config.vocab_size} tokens, the student {config.vocab_size}, so they cannot "
            "read the same input_ids. Make the student with make_student; or, if both use one tokenizer and only the "
            f"padding of the vocabulary differs, call teacher.resize_token_embeddings({config.vocab_size})."
        )
    if task in CLASSIFICATION:
        _settle_problem_type_(config, teacher_config)
    return task


def _settle_problem_type_(config: Any, teacher_config: Any) -> None:
    kinds = {config.problem_type, teacher_config.problem_type} - {None}
    if len(kinds) > 1:
        raise ValueError(
            f"The teacher's config says problem_type={teacher_config.problem_type!r}, the student's "
            f"{config.problem_type!r}: set both to what the labels are."
        )
    config.problem_type = next(iter(kinds), None)
