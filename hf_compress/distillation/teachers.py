"""One teacher beside its student: what it is fed, what it says, and how that is brought into the student's order."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import nn

from hf_compress.distillation.cache import TeacherCache
from hf_compress.distillation.cast_weights import CastWeights
from hf_compress.distillation.chunked import bypassed_head
from hf_compress.distillation.objective import (
    OWN,
    POSITIONS,
    TASKS,
    attention_mask,
    items_of,
    teacher_inputs,
)
from hf_compress.distillation.signals import Probe, Signals
from hf_compress.distillation.tokenizers import gather_positions, is_same_vocabulary
from hf_compress.modeling.autocast import without_autocast
from hf_compress.modeling.tasks import (
    CLASSIFICATION,
    LANGUAGE_MODELS,
    forward_columns,
    matching_columns,
    shared_task,
    task_of,
    unwrap,
)


class Targets(NamedTuple):
    """What a teacher says of the items of a batch.

    Attributes:
        logits (`torch.Tensor` or `None`): Shape (items, classes), in the student's order of labels; or what enters
            the output layer, where `head` is set.
        indices (`torch.Tensor` or `None`): Shape (items, k): the likeliest classes, where only these are known.
        log_probs (`torch.Tensor` or `None`): Shape (items, k): their log-probabilities.
        head (`nn.Module` or `None`): The output layer that turns `logits` into logits, chunk by chunk.
    """

    logits: torch.Tensor | None
    indices: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    head: nn.Module | None = None


class Teacher:
    """A teacher that is asked online, or whose answers are cached.

    Args:
        model (`nn.Module`): The teacher, in its place already.
        student (`nn.Module`): The student.
        label_names (iterable of `str`): Columns that are labels.
        cache (`TeacherCache`, *optional*): Its answers. The model is then never run.
        prefix (`str`, *optional*, defaults to `"cached_"`): Of the columns that the cache adds to a batch.
    """

    def __init__(
        self,
        model: nn.Module,
        student: nn.Module,
        label_names: Iterable[str],
        cache: TeacherCache | None = None,
        prefix: str = "cached_",
    ) -> None:
        self.model = model.eval()
        # To look for them anew in each step takes as long as a layer of a small model.
        self._modules = list(model.modules())
        self._weights = CastWeights(model)
        self.task = shared_task(model, student)
        self.cache = cache
        self.prefix = prefix
        self.columns = forward_columns(model) - set(label_names)
        self.label_order = matching_columns(model, student)
        self.n_shared = shared_vocabulary(self.task, model, student)
        self._probe: Probe | None = None
        n_tokens = unwrap(model).config.vocab_size if self.n_shared is not None else 0
        if cache is not None and cache.precision == "top-k" and self.n_shared is not None and n_tokens > self.n_shared:
            raise ValueError(
                f"The cache holds the likeliest of the teacher's {n_tokens} tokens, and the student knows "
                f"{self.n_shared} of them: build the cache with precision='fp16', from which the rest can be cut off."
            )

    def watch(self, names: Iterable[str]) -> None:
        """Reads these signals in every forward pass from now on, instead of those before.

        Args:
            names (iterable of `str`): Names of signals.

        Raises:
            ValueError: if the answers are cached and one of them is not.
        """
        self.check_signals(names)
        if self.cache is not None:
            return
        self.close()
        names = sorted(names)
        self._probe = Probe(self.model, names) if names else None

    def check_signals(self, names: Iterable[str]) -> None:
        """Raises if the answers are cached and a signal is not.

        Args:
            names (iterable of `str`): Names of signals.

        Raises:
            ValueError: with those that are missing.
        """
        missing = [] if self.cache is None else sorted(set(names) - set(self.cache.signals))
        if missing:
            raise ValueError(
                f"The terms need {missing} of the teacher, but its cache holds {list(self.cache.signals)}: build a "
                "cache with these signals, or leave it out (queries, keys and values are never cached)."
            )

    def close(self) -> None:
        """Takes the hooks off the model."""
        if self._probe is not None:
            self._probe.close()
            self._probe = None

    @torch.no_grad()
    def ask(
        self, batch: Mapping[str, torch.Tensor], autocast: AbstractContextManager, is_chunked: bool = False
    ) -> Signals:
        """What the teacher says of a batch.

        Args:
            batch (`Mapping`): The batch, with the cached columns where the answers are cached.
            autocast (context manager): Under which it runs.
            is_chunked (`bool`, *optional*): Whether to stop before the output layer.

        Returns:
            `Signals`: Its outputs and the watched signals, by name.
        """
        if self.cache is not None:
            return {
                name.removeprefix(self.prefix): value for name, value in batch.items() if name.startswith(self.prefix)
            }
        if any(module.training for module in self._modules):
            self.model.eval()
        inputs = teacher_inputs(batch, self.columns)
        if "use_cache" in self.columns:
            inputs["use_cache"] = False
        # A teacher that was trained in this process would still compute in that training's precision.
        with (
            without_autocast(self._modules),
            autocast,
            self._weights.in_place(next(iter(inputs.values())).device.type),
            bypassed_head(self.model if is_chunked else None),
        ):
            signals = dict(self.model(**inputs, return_dict=True))
        if self._probe is not None:
            signals |= self._probe.take()
        return signals

    def targets(
        self, signals: Signals, batch: Mapping[str, torch.Tensor], pooling: str, is_chunked: bool = False
    ) -> Targets:
        """The teacher's answers as one row per item of the student, in the student's order of labels.

        Args:
            signals (`Signals`): As `ask` returned them.
            batch (`Mapping`): The batch.
            pooling (`str`): How embeddings are made of tokens.
            is_chunked (`bool`, *optional*): Whether `ask` stopped before the output layer.

        Returns:
            `Targets`: Logits, or the likeliest classes.
        """
        if f"{OWN}input_ids" in batch:
            self._check_own_tokens(batch)
        if "top_indices" in signals:
            indices, log_probs = (
                items_of(self.task, {"logits": signals[name]}, batch).logits
                for name in ("top_indices", "top_log_probs")
            )
            return Targets(None, indices, log_probs)
        if self.task == "feature-extraction":
            if "embedding" in signals:
                return Targets(signals["embedding"])
            return Targets(items_of(self.task, signals, {**batch, **self._own_mask(batch)}, pooling).logits)
        if self.task == "token-classification" and POSITIONS in batch:
            signals = {**signals, "logits": gather_positions(signals["logits"], batch[POSITIONS])}
        if self.task in CLASSIFICATION:
            return Targets(self.in_order(signals["logits"]))
        logits = items_of(self.task, signals, batch, pooling).logits
        if is_chunked:
            return Targets(logits, head=unwrap(self.model).get_output_embeddings())
        return Targets(self.in_order(logits))

    def _check_own_tokens(self, batch: Mapping[str, torch.Tensor]) -> None:
        if self.task == "question-answering":
            raise ValueError(
                "The batch has teacher_input_ids, but answers are positions in a text, which another tokenizer counts "
                "differently: give a teacher with the student's tokenizer."
            )
        if self.task in LANGUAGE_MODELS:
            raise ValueError(
                "The batch has teacher_input_ids, but a language model predicts tokens, which another tokenizer cuts "
                "and numbers differently: give a teacher with the student's tokenizer."
            )
        if self.task == "token-classification" and POSITIONS not in batch:
            raise ValueError(
                "The batch has teacher_input_ids, but nothing says which of these tokens stand for which of the "
                "student's: make them with add_teacher_inputs(..., words_column=...)."
            )

    def in_order(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits in the student's order of labels, without the padding of the vocabulary.

        Args:
            logits (`torch.Tensor` of shape `(..., classes)`): The teacher's.

        Returns:
            `torch.Tensor`: The same shape, or fewer classes.
        """
        if self.n_shared is not None:
            return logits[..., : self.n_shared]
        if self.label_order is None:
            return logits
        return logits.index_select(-1, torch.tensor(self.label_order, device=logits.device))

    def mask(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """Where the texts that the teacher reads are real.

        Args:
            batch (`Mapping`): The batch.

        Returns:
            `torch.Tensor` of shape `(batch, length)`, or `None` for images.
        """
        return None if "pixel_values" in batch else attention_mask({**batch, **self._own_mask(batch)})

    @staticmethod
    def _own_mask(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        names = ("attention_mask", "input_ids")
        return {name: batch[OWN + name] for name in names if OWN + name in batch}


def check_pair(student: nn.Module, teacher: nn.Module) -> str:
    """Raises if a teacher cannot teach a student.

    Args:
        student (`nn.Module`): The student.
        teacher (`nn.Module`): The teacher.

    Returns:
        `str`: Their task.

    Raises:
        ValueError: if they are one object, or differ in task or in the type of the problem.
    """
    if unwrap(student) is unwrap(teacher):
        raise ValueError(
            "model and teacher are the same object, so the teacher would change with the student: "
            "pass copy.deepcopy(model) as the teacher."
        )
    task = shared_task(teacher, student)
    if task not in TASKS:
        raise ValueError(f"DistillationTrainer does not know the task {task}; it knows {', '.join(TASKS)}.")
    if task in CLASSIFICATION:
        _settle_problem_type_(unwrap(student).config, unwrap(teacher).config)
    return task


def shared_vocabulary(task: str, teacher: nn.Module, student: nn.Module) -> int | None:
    """How many classes two language models share, whose vocabularies are one but padded to different sizes.

    Args:
        task (`str`): Their task.
        teacher (`nn.Module`): The teacher.
        student (`nn.Module`): The student.

    Returns:
        `int` or `None`: `None` where nothing has to be cut off.
    """
    if task not in LANGUAGE_MODELS:
        return None
    sizes = [unwrap(model).config.vocab_size for model in (teacher, student)]
    return None if sizes[0] == sizes[1] else min(sizes)


def check_vocabulary(teacher: nn.Module, student: nn.Module, tokenizers: Sequence[Any]) -> None:
    """Raises if two models cannot read the same `input_ids`.

    Args:
        teacher (`nn.Module`): The teacher.
        student (`nn.Module`): The student.
        tokenizers (sequence): The student's and the teacher's, `None` where one is not known.

    Raises:
        ValueError: if the sizes of the vocabularies differ and nothing tells that it is padding alone, or the
            tokenizers differ.
    """
    if "input_ids" not in forward_columns(student):
        return
    are_known = all(tokenizer is not None for tokenizer in tokenizers)
    if task_of(student) in (*LANGUAGE_MODELS, "question-answering"):
        advice = "Tokens and their places are what this task is about: give a teacher with the student's tokenizer"
    else:
        advice = "Give the teacher its own inputs with add_teacher_inputs and TeacherCollator"
    if are_known and not is_same_vocabulary(*tokenizers):
        raise ValueError(
            f"Student and teacher cannot read the same input_ids: their tokenizers differ "
            f"({len(tokenizers[0])} and {len(tokenizers[1])} tokens). {advice}."
        )
    ours, theirs = (unwrap(model).config.vocab_size for model in (student, teacher))
    if ours != theirs and not are_known:
        raise ValueError(
            f"The teacher has {theirs} tokens, the student {ours}, so they may not read the same input_ids. Make the "
            "student with make_student; pass both tokenizers, as processing_class and teacher_processing_class, if "
            f"they agree and only the padding of the vocabulary differs. {advice}."
        )


def _settle_problem_type_(config: Any, teacher_config: Any) -> None:
    kinds = {config.problem_type, teacher_config.problem_type} - {None}
    if len(kinds) > 1:
        raise ValueError(
            f"The teacher's config says problem_type={teacher_config.problem_type!r}, the student's "
            f"{config.problem_type!r}: set both to what the labels are."
        )
    config.problem_type = next(iter(kinds), None)


def own_columns(teachers: Sequence[Teacher]) -> list[str]:
    """Every column that a data set may hold for teachers.

    Args:
        teachers (sequence of `Teacher`): The teachers.

    Returns:
        `list[str]`: Plain and prefixed names.
    """
    plain = set().union(*(teacher.columns for teacher in teachers))
    return sorted(plain | {OWN + name for name in plain} | {POSITIONS})
