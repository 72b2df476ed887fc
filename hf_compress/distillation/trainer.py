"""A Trainer whose student also learns from one teacher or several."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from hf_compress.distillation import losses
from hf_compress.distillation.arguments import DistillationArguments
from hf_compress.distillation.cache import TeacherCache
from hf_compress.distillation.cached_batches import CachedCollator, cache_prefix, check_caches
from hf_compress.distillation.card import CardMixin
from hf_compress.distillation.chunked import bypassed_head, check_head
from hf_compress.distillation.curriculum import plan_stages
from hf_compress.distillation.efficiency import check_embeddings, plain_attention_pays, training_shortcuts
from hf_compress.distillation.inner_terms import Masks, check_tokens, compute_term, embedding_width, make_projections
from hf_compress.distillation.objective import (
    Items,
    attention_mask,
    decoder_mask,
    embedding_of,
    items_of,
    step_counts,
    with_decoder_inputs,
)
from hf_compress.distillation.output_terms import KD, TASK, OutputSetting, chunked_values, output_values
from hf_compress.distillation.padding import quick_collator
from hf_compress.distillation.placement import check_whole, place_teacher
from hf_compress.distillation.processes import ProcessesMixin, check_batches
from hf_compress.distillation.signals import Signals
from hf_compress.distillation.staged import StageMixin
from hf_compress.distillation.teacher_check import check_data, check_teachers, look_at_teachers, rows_to_look_at
from hf_compress.distillation.teachers import Teacher, check_pair, own_columns
from hf_compress.distillation.term_log import TermLog, gradient_shares
from hf_compress.distillation.trained_projections import ProjectionMixin
from hf_compress.modeling.capture import release_gates_
from hf_compress.modeling.tasks import CLASSIFICATION, LANGUAGE_MODELS, forward_columns, problem_type, unwrap


class DistillationTrainer(StageMixin, ProcessesMixin, ProjectionMixin, CardMixin, Trainer):
    """`transformers.Trainer` with teachers.

    The loss is `alpha * T^2 * KL(teacher_T || student_T) + (1 - alpha) * task loss` (Hinton et al., 2015), with the
    divergence that fits the task, and the terms inside the models that `args.terms` or `args.stages` ask for. Every
    term is a sum over items divided by the number of items of the whole optimizer step, so gradients do not depend on
    accumulation, processes or padding (but for the terms that compare the texts of a micro-batch with each other). The
    unweighted terms are logged by name, `kd_loss` and `task_loss` first. Evaluation does not run the teacher:
    `eval_loss` is the task's loss.

    Args:
        model (`PreTrainedModel`): The student.
        args (`DistillationArguments`): Training arguments and what distillation adds to them.
        teacher (`PreTrainedModel` or a sequence of them): Fine-tuned models of the same task and label names. They are
            moved to the training device, or cut in place if they are to be sharded, and put in eval mode; they never
            train and are in no checkpoint.
        teacher_cache (`TeacherCache` or a sequence of them, *optional*): The teachers' answers, one cache per teacher.
            The teachers are then never run, and stay where they are.
        teacher_processing_class (`PreTrainedTokenizerBase`, *optional*): The teachers' tokenizer. Needed where only
            the padding of the vocabularies differs: the tokens that both know are then compared.
        *trainer_args, **trainer_kwargs: Forwarded to `transformers.Trainer`. A `compute_loss_func` takes the place of
            the task's loss.

    Raises:
        TypeError: if `args` are no `DistillationArguments`, or a teacher is no model.
        ValueError: if teacher and student differ in task, labels or vocabulary, or are the same object; if no term
            counts, or a term does not fit the models; if a cache is not of its teacher.
    """

    # compute_loss divides by the items of the whole step, so Trainer must not divide by the accumulation steps again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: DistillationArguments | None = None,
        *trainer_args: Any,
        teacher: PreTrainedModel | Sequence[PreTrainedModel],
        teacher_cache: TeacherCache | Sequence[TeacherCache] | None = None,
        teacher_processing_class: PreTrainedTokenizerBase | None = None,
        **trainer_kwargs: Any,
    ) -> None:
        args = DistillationArguments(output_dir="tmp_trainer") if args is None else args
        if not isinstance(args, DistillationArguments):
            raise TypeError(
                f"args is a {type(args).__name__}, which has no temperature and alpha: pass "
                "hf_compress.DistillationArguments, which takes the same arguments and these."
            )
        models = check_teachers(teacher, args)
        super().__init__(model, args, *trainer_args, **trainer_kwargs)
        release_gates_(self.model)
        if self.is_deepspeed_enabled:
            check_whole(self.model, "The student")
        self.task = [check_pair(self.model, one) for one in models][0]
        caches = check_caches(teacher_cache, models, self.model, args)
        tokenizers = (self.processing_class, teacher_processing_class)
        check_data(self.train_dataset, models, self.model, tokenizers, self.data_collator)
        self.teachers = [
            Teacher(self._place_teacher(one, cache), self.model, self.label_names, cache, cache_prefix(number))
            for number, (one, cache) in enumerate(zip(models, caches, strict=True))
        ]
        if self.args.freeze_embeddings:
            check_embeddings(self.model)
        self._student_inputs = forward_columns(self.model)
        self.stages = plan_stages(self.args, self.model, models)
        self.projections = self._make_projections(models)
        self._prepare_processes()
        self._check_ahead()
        self._counts: dict[str, torch.Tensor | int] = {}
        self._head_is_checked = False
        self._log = TermLog()

    def _place_teacher(self, teacher: PreTrainedModel, cache: TeacherCache | None) -> PreTrainedModel:
        if cache is not None:
            return teacher  # it does not run
        return place_teacher(teacher, self.args.teacher_placement, self.accelerator, self.args.logits_chunk > 0)

    def _make_projections(self, models: list[PreTrainedModel]) -> nn.ModuleDict:
        terms = [term for stage in self.stages for term in stage.terms]
        projections = make_projections(terms, self.model, models)
        if self.task == "feature-extraction":
            ours, theirs = embedding_width([self.model]), embedding_width(models)
            if ours != theirs:
                projections["output"] = nn.Linear(ours, theirs)
        return projections.to(self.args.device)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        known = self._signature_columns
        self._signature_columns = known + [name for name in own_columns(self.teachers) if name not in known]

    def get_train_dataloader(self) -> DataLoader:
        """Batches with the cached answers of the teachers; see `Trainer.get_train_dataloader`."""
        caches = [teacher.cache for teacher in self.teachers if teacher.cache is not None]
        plain = self.data_collator
        quick = quick_collator(plain)
        self.data_collator = CachedCollator(quick, caches) if caches else quick
        try:
            loader = super().get_train_dataloader()
        finally:
            self.data_collator = plain
        every_batch = self.is_fsdp_enabled or self.args.teacher_placement == "sharded"
        check_batches(loader, self.accelerator, self.args.gradient_accumulation_steps, every_batch)
        return loader

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        if not batch_samples:
            return None
        each = [self._count(batch) for batch in batch_samples]
        totals = {name: sum(counts[name] for counts in each) for name in each[0]}
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            numbers = torch.stack([torch.as_tensor(total, device=device) for total in totals.values()])
            totals = dict(zip(totals, self.accelerator.gather(numbers[None]).sum(0).unbind(), strict=True))
        self._counts = totals
        return totals["items"]

    def _count(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor | int]:
        is_extended = type(self).compute_terms is not DistillationTrainer.compute_terms  # by terms per token, perhaps
        return step_counts(self.task, batch, is_extended or any(stage.terms for stage in self.stages))

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
            # Without a count the stock loss is this batch's mean; with one, it would be scaled by the processes. A
            # loss of the user's may need it.
            is_counted = self.compute_loss_func is not None and num_items_in_batch is not None
            n_items = self._counts["labelled"] if is_counted else None
            return super().compute_loss(model, student_inputs, return_outputs, num_items_in_batch=n_items)
        counts = self._count(inputs) if num_items_in_batch is None else self._counts
        inputs = with_decoder_inputs(self.task, self.model, inputs)
        self._enter_stage()
        outputs = self._run_student(model, inputs)
        terms = self.compute_terms(outputs, inputs, counts)
        weights = self.term_weights()
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            # Data-parallel training averages gradients over processes, but the terms were divided by all their items.
            terms = {name: term * self.args.world_size for name, term in terms.items()}
        counted = "labelled" if set(terms) == {TASK} else "items"
        self._log.add(terms, counts[counted], self.accelerator.sync_gradients)
        # At the end of a schedule nothing may count: a step of gradients that are 0.
        loss = losses.weighted_sum(terms, weights) if terms else 0.0 * next(iter(outputs.values())).sum()
        if self.args.log_gradient_shares and terms and self._logs_after_this():
            parameters = [p for p in self.model.parameters() if p.requires_grad]
            self._log.shares = gradient_shares({name: weights[name] * terms[name] for name in terms}, parameters)
        loss = self._reach_all(loss, outputs, tuple(terms))
        return (loss, outputs) if return_outputs else loss

    def _run_student(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        names = self._student_inputs - set(self.label_names)
        unlabelled = {name: value for name, value in inputs.items() if name in names}
        if self._is_chunked and not self._head_is_checked:
            with self.accelerator.autocast():
                for one in (self.model, *(teacher.model for teacher in self.teachers if teacher.cache is None)):
                    first = {name: value[:1] for name, value in unlabelled.items() if name in forward_columns(one)}
                    check_head(one, first)
            self._head_is_checked = True
        with bypassed_head(self.model if self._is_chunked else None):
            return model(**unlabelled, return_dict=True)

    @property
    def _is_chunked(self) -> bool:
        return self.args.logits_chunk > 0 and self.task in LANGUAGE_MODELS

    def term_weights(self) -> dict[str, float]:
        """What each term of `compute_terms` counts in the loss. A subclass that adds terms adds their weights.

        Returns:
            `dict[str, float]`: Weights by the terms' names.
        """
        index, progress = self._place()
        return self.stages[index].weights(progress)

    def compute_terms(
        self,
        outputs: Mapping[str, torch.Tensor],
        inputs: Mapping[str, torch.Tensor],
        counts: Mapping[str, torch.Tensor | int],
    ) -> dict[str, torch.Tensor]:
        """The terms of the training loss, before they are weighted.

        Args:
            outputs (`Mapping`): Outputs of the student.
            inputs (`Mapping`): The batch, with all columns that the student or a teacher takes, and the labels.
            counts (`Mapping`): Items of the whole optimizer step, by what is counted: see `step_counts`.

        Returns:
            `dict[str, torch.Tensor]`: `kd_loss`, `task_loss` and the terms inside the models, each this batch's share
            of the step's mean; a term of weight 0 is left out.
        """
        weights = DistillationTrainer.term_weights(self)
        inner = [term for term in self.stage().terms if weights[term.name] > 0]
        asked = {term.config.teacher for term in inner}
        answers = [
            self._ask(number, inputs) if weights[KD] > 0 or number in asked else {}
            for number in range(len(self.teachers))
        ]
        terms = self._output_terms(outputs, inputs, counts, answers, weights)
        own = self._probe.take() if self._probe is not None else {}
        for term in inner:
            check_tokens(term, inputs)
            masks = self._masks(term, inputs)
            found = compute_term(term, own, answers[term.config.teacher], self.projections, masks)
            terms[term.name] = losses.average(_flat(found.values), counts[found.unit], _flat(found.mask))
        return terms

    def _ask(self, number: int, inputs: Mapping[str, torch.Tensor]) -> Signals:
        answers = self.teachers[number].ask(inputs, self.accelerator.autocast(), self._is_chunked)
        if self.teachers[number].cache is None:  # a cache was looked through when it was built
            self._log.check_finite(answers)
        return answers

    def _output_terms(self, outputs, inputs, counts, answers, weights) -> dict[str, torch.Tensor]:
        has_own_loss = self.compute_loss_func is not None
        if not weights[KD] > 0 and not weights[TASK] > 0:
            return {}
        student = items_of(self.task, outputs, inputs, self.args.pooling)
        setting = self._setting(student, weights, has_own_loss)
        if setting.has_labels and student.labels is None:
            raise ValueError(
                f"The task's loss has the weight {weights[TASK]:g} (1 - alpha), but the batch has no labels, only "
                f"{sorted(inputs)}: pass alpha=1 to learn from the teacher alone, or add the labels."
            )
        targets = []
        if setting.imitates:
            targets = [
                teacher.targets(answer, inputs, self.args.pooling, self._is_chunked and teacher.cache is None)
                for teacher, answer in zip(self.teachers, answers, strict=True)
            ]
        shared = [teacher.n_shared for teacher in self.teachers if teacher.n_shared is not None]
        n_shared = min(shared, default=None)
        if self._is_chunked:
            head = unwrap(self.model).get_output_embeddings()
            chunk = self.args.logits_chunk
            with self.accelerator.autocast():
                values = chunked_values(student, head, targets, self.teachers, setting, chunk, n_shared)
        else:
            if "output" in self.projections:
                student = student._replace(logits=self.projections["output"](student.logits.float()))
            values = output_values(student, targets, setting, n_shared)
        terms = {}
        if KD in values:
            terms[KD] = losses.average(values[KD], counts["items"], student.mask)
        if TASK in values:
            terms[TASK] = losses.average(values[TASK], counts["labelled"], student.label_mask)
        if has_own_loss and weights[TASK] > 0:
            terms[TASK] = self.compute_loss_func(outputs, inputs.get("labels"), num_items_in_batch=counts["labelled"])
        return terms

    def _setting(self, student: Items, weights: Mapping[str, float], has_own_loss: bool) -> OutputSetting:
        index, progress = self._place()
        stage = self.stages[index]
        mix = self.args.teacher_weights
        return OutputSetting(
            problem=self._problem_type(student.labels),
            temperature=stage.temperature(progress),
            divergence=stage.divergence,
            beta=self.args.jensen_shannon_beta,
            label_smoothing=self.args.label_smoothing_factor,
            mixture=self.args.teacher_mixture,
            weights=None if mix is None else tuple(mix),
            imitates=weights[KD] > 0,
            has_labels=weights[TASK] > 0 and not has_own_loss,
        )

    def _masks(self, term, inputs: Mapping[str, torch.Tensor]) -> Masks:
        if "pixel_values" in inputs:
            return Masks(None, None)
        if self.task == "seq2seq-lm" and term.stack == "decoder":
            mask = decoder_mask(inputs)
            return Masks(mask, mask, "decoder_tokens")
        return Masks(attention_mask(inputs), self.teachers[term.config.teacher].mask(inputs))

    def _problem_type(self, labels: torch.Tensor | None) -> str:
        if self.task == "feature-extraction":
            return "embedding"
        if self.task not in CLASSIFICATION:
            return "single_label_classification"
        config = unwrap(self.model).config
        kind = problem_type(config, labels)
        if labels is not None and config.problem_type != kind:
            # As Transformers' heads do with their first labels: pipelines read it, and this head never sees labels.
            config.problem_type = kind
        return kind

    def prediction_step(self, model: nn.Module, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any):
        """Predicts with the student's own columns; embeddings where it has no head. See `Trainer.prediction_step`."""
        if self.task != "feature-extraction":
            inputs = {name: value for name, value in inputs.items() if name in self._student_inputs}
            return super().prediction_step(model, inputs, *args, **kwargs)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            known = {name: value for name, value in inputs.items() if name in self._student_inputs}
            hidden = model(**known, return_dict=True)["last_hidden_state"]
        embedding = embedding_of(hidden, inputs, self.args.pooling)
        return None, embedding.float(), inputs.get("labels")

    def _inner_training_loop(self, *args: Any, **kwargs: Any):
        # Also the start of another attempt when Trainer looks for a batch size that fits.
        self._log.reset()
        self._look_at_teachers()
        try:
            with self._shortcuts():
                result = super()._inner_training_loop(*args, **kwargs)
            # What came after the last log was not looked at yet.
            self._log.raise_if_not_finite()
            return result
        finally:
            self._leave_stages()
            self._lengths = None

    def _shortcuts(self) -> AbstractContextManager:
        dtype = torch.bfloat16 if self.args.bf16 else None
        pays = self.args.plain_attention == "auto" and plain_attention_pays(self.model, dtype)
        return training_shortcuts(
            self.model,
            dropout=self.args.dropout,
            freeze_embeddings=self.args.freeze_embeddings,
            plain_attention=pays or self.args.plain_attention == "on",
        )

    def _look_at_teachers(self) -> None:
        caches = [teacher.cache for teacher in self.teachers if teacher.cache is not None]
        number = self.args.teacher_check_rows if any(stage.needs_teacher for stage in self.stages) else 0
        rows = rows_to_look_at(self.train_dataset, self.eval_dataset, bool(caches), number)
        if rows:
            collate = self._get_collator_with_removed_columns(self.data_collator, description="teacher check")
            collate = CachedCollator(collate, caches) if caches else collate
            look_at_teachers(
                self.teachers,
                rows,
                lambda part: with_decoder_inputs(self.task, self.model, collate(part)),
                self.args,
                self.accelerator.autocast,
                self._is_chunked,
            )

    def _logs_after_this(self) -> bool:
        steps = self.state.logging_steps or 0
        return steps > 0 and self.accelerator.sync_gradients and (self.state.global_step + 1) % steps == 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs with the mean of every loss term since the last time; see `Trainer.log`."""
        if "loss" in logs:
            logs.update(self._log.read(self.args.parallel_mode))
        super().log(logs, start_time)


def _flat(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.flatten()
