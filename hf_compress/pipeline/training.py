"""The steps of a recipe that train: the fine-tuned teacher, and models that learn from it."""

import logging
import shutil
import time
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoTokenizer, Trainer, TrainerCallback, set_seed

from hf_compress.distillation.arguments import DistillationArguments
from hf_compress.distillation.cache import TeacherCache
from hf_compress.distillation.curriculum import plan_stages
from hf_compress.distillation.efficiency import plain_attention_pays, training_shortcuts
from hf_compress.distillation.inner_terms import hidden_width
from hf_compress.distillation.signals import split_name
from hf_compress.distillation.trainer import DistillationTrainer
from hf_compress.jobs.job import autocast_dtype
from hf_compress.jobs.stages import folder_bytes, read_json, train_once
from hf_compress.pipeline.state import Place, write_json
from hf_compress.pruning.callback import PruningCallback
from hf_compress.pruning.masks import true_share
from hf_compress.pruning.unstructured_config import UnstructuredPruningConfig
from hf_compress.pruning.vocabulary import prune_vocabulary
from hf_compress.pruning.weight_layers import choose_layers
from hf_compress.recipe.steps import DistilStep, TrainingStep

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_compress.jobs.task_data import TaskData

logger = logging.getLogger(__name__)

# What a small data set wants, where it differs from Trainer's defaults.
_DEFAULTS: dict[str, Any] = {
    "per_device_eval_batch_size": 64,
    "plain_attention": "auto",
    "train_sampling_strategy": "group_by_length",
    "logging_steps": 0.02,
    "save_steps": 0.1,
    "save_total_limit": 1,
    "report_to": "none",
    # Trainer hides its bar by default where transformers logs errors only.
    "disable_tqdm": False,
}
# Hidden states of the teacher are stored up to so many bytes, and half of what the disk has left.
_LARGEST_CACHE = 8e9


def finetune(place: Place, data: "TaskData", seed: int, options: dict[str, Any]) -> None:
    """Fine-tunes the model of a recipe on the labels.

    Args:
        place (`Place`): The step.
        data (`TaskData`): The rows.
        seed (`int`): Of new weights and the order of the rows.
        options (`dict`): Further arguments of `from_pretrained`.
    """
    with ExitStack() as shortcuts:

        def make_trainer(work: Path) -> Trainer:
            set_seed(seed)
            args = training_arguments(place.step, work, seed)
            tokenizer = AutoTokenizer.from_pretrained(place.model)
            model = load(place.model, data, **data.head_options(place.model), **options)
            is_plain = args.plain_attention == "auto" and plain_attention_pays(model, autocast_dtype(args))
            shortcut = {"dropout": args.dropout, "freeze_embeddings": args.freeze_embeddings}
            shortcuts.enter_context(
                training_shortcuts(model, **shortcut, plain_attention=is_plain or args.plain_attention == "on")
            )
            rows = data.encode(data.train, tokenizer, model)
            logger.info("Fine-tuning the teacher on %d rows.", len(rows))
            return Trainer(
                model,
                args,
                train_dataset=rows,
                processing_class=tokenizer,
                data_collator=data.collator(tokenizer),
                callbacks=[EntryCallback(place)],
            )

        train_once(place.folder, make_trainer)


def distil(place: Place, data: "TaskData", seed: int, options: dict[str, Any]) -> None:
    """Trains the model of the step before with the teacher's answers; zeros that were made before stay.

    Args:
        place (`Place`): The step.
        data (`TaskData`): The rows.
        seed (`int`): Of the noise and the order of the rows.
        options (`dict`): Further arguments of `from_pretrained`.
    """
    step = place.step
    assert isinstance(step, DistilStep)

    def make_trainer(work: Path) -> Trainer:
        set_seed(seed)
        args = training_arguments(step, work, seed)
        tokenizer = AutoTokenizer.from_pretrained(place.model)
        model, teacher = load(place.model, data, **options), load_teacher(place, data, **options)
        rows = data.with_noise(step.augment_copies, step.augment_to, seed, tokenizer, model)
        collator = data.collator(tokenizer)
        logger.info("Training with the teacher on %d rows.", len(rows))
        callbacks: list[TrainerCallback] = [EntryCallback(place)]
        if place.zeros() is not None:
            callbacks.append(hold_zeros(model, place.zeros()))
        return DistillationTrainer(
            model,
            args,
            teacher=teacher,
            teacher_cache=_cache(place, args, model, teacher, rows, collator),
            train_dataset=rows,
            processing_class=tokenizer,
            data_collator=collator,
            callbacks=callbacks,
        )

    train_once(place.folder, make_trainer)
    if PartialState().is_main_process:
        shutil.rmtree(place.cache, ignore_errors=True)


def training_arguments(step: TrainingStep, work: Path, seed: int) -> DistillationArguments:
    """The arguments that a step of a recipe stands for.

    Args:
        step (`TrainingStep`): The step.
        work (`Path`): Folder for training checkpoints.
        seed (`int`): The recipe's.

    Raises:
        ValueError: if a value is none that `DistillationArguments` takes.
    """
    own = {"arguments", "augment_copies", "augment_to"}
    given = {one.name: getattr(step, one.name) for one in fields(step) if one.name not in own}
    # Trainer takes bf16 on a CPU only where it is said that a CPU is meant.
    device = {"use_cpu": torch.accelerator.current_accelerator(check_available=True) is None}
    return DistillationArguments(output_dir=str(work), seed=seed, **(_DEFAULTS | device | given | step.arguments))


def load(path: str, data: "TaskData", **options: Any) -> "PreTrainedModel":
    """A model to train, in float32: small updates would be rounded away in half precision.

    Args:
        path (`str`): A folder, or a name on the Hub.
        data (`TaskData`): Knows the class.
        **options: Further arguments of `from_pretrained`.
    """
    return data.model_class.from_pretrained(path, **{"dtype": torch.float32, **options})


def load_teacher(place: Place, data: "TaskData", **options: Any) -> "PreTrainedModel":
    """The teacher for a step, which reads the same tokens as the step's model.

    Args:
        place (`Place`): The step. If the vocabulary was cut before it, the teacher's is cut in the same way.
        data (`TaskData`): Its texts decided which tokens stay.
        **options: Further arguments of `from_pretrained`.
    """
    teacher = load(place.teacher, data, **options)
    cut = place.cut_vocabulary()
    if cut is None:
        return teacher
    return prune_vocabulary(teacher, AutoTokenizer.from_pretrained(place.teacher), data.texts, cut)[0]


def hold_zeros(model: "PreTrainedModel", config: UnstructuredPruningConfig) -> PruningCallback:
    """A callback that keeps the zeros of a pruned model, and no others.

    Args:
        model (`PreTrainedModel`): The model.
        config (`UnstructuredPruningConfig`): How it was pruned, for which layers that were.
    """
    layers = choose_layers(model, config)
    shares = {layer.name.replace(".", r"\."): true_share(layer.weight == 0) for layer in layers}
    held = UnstructuredPruningConfig(score="magnitude", scope="layer", allocation=shares, exclude=config.exclude)
    return PruningCallback(held, schedule="constant", n_updates=1)


class EntryCallback(TrainerCallback):
    """Writes down what a training was, when it ends: losses, and seconds over all the times that it was continued.

    Args:
        place (`Place`): The step.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._file = place.work / "seconds.json"
        self._before = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the clock."""
        self._start = time.perf_counter()
        # Of a training that was stopped, what came after its last checkpoint is done anew, and not counted twice.
        if state.global_step > 0 and self._file.exists():
            self._before = read_json(self._file).get("seconds", 0.0)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keeps the seconds so far beside the checkpoint."""
        if state.is_world_process_zero:
            write_json(self._file, {"seconds": self._seconds()})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes the step's entry."""
        if state.is_world_process_zero:
            self._place.write_entry({"seconds": self._seconds(), "details": {"losses": losses(state.log_history)}})

    def _seconds(self) -> float:
        return self._before + time.perf_counter() - self._start


def losses(history: list[dict[str, Any]]) -> list[dict[str, float]]:
    """The numbers that a Trainer logged.

    Args:
        history (`list[dict]`): Its `state.log_history`.

    Returns:
        `list[dict[str, float]]`: Without the summary at the end.
    """
    logged = [entry for entry in history if "loss" in entry]
    return [{name: float(value) for name, value in entry.items() if _is_number(value)} for entry in logged]


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _cache(
    place: Place, args: DistillationArguments, model: Any, teacher: Any, rows: Dataset, collator: Any
) -> TeacherCache | None:
    """The teacher's answers, and what is imitated inside it where that can be stored and has room."""
    terms = [term for stage in plan_stages(args, model, [teacher]) for term in stage.terms]
    signals = sorted({name for term in terms for name in term.teacher_signals()})
    if any(not name.startswith("hidden.") for name in signals):
        return None
    if signals:
        width = hidden_width(teacher, split_name(signals[0])[1])
        n_bytes = 2 * sum(rows["length"][:]) * width * len(signals)
        free = shutil.disk_usage(place.folder.parent).free
        # What a run that was stopped has stored of it is part of the room.
        if n_bytes > min(_LARGEST_CACHE, (free + folder_bytes(place.cache)) / 2):
            logger.info("The teacher runs in every step: its hidden states would take %.1f GB.", n_bytes / 1e9)
            return None
    return TeacherCache.build(
        place.cache,
        teacher.to(args.device),
        # Answers are found by what a row holds, so the order is free: batches of one length have no padding.
        rows.sort("length"),
        data_collator=collator,
        precision="fp16" if signals else "fp32",
        signals=signals,
        autocast_dtype=autocast_dtype(args),
    )
