"""A text classifier distilled into a student, saved, reloaded, measured and reported."""

import copy
import json
import logging
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from datasets import Dataset, DatasetDict
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, set_seed

from hf_compress.distillation.arguments import DistillationArguments
from hf_compress.distillation.augmentation import AugmentationConfig, augment
from hf_compress.distillation.cache import TeacherCache
from hf_compress.distillation.student import make_student
from hf_compress.distillation.trainer import DistillationTrainer
from hf_compress.hub.card import write_card
from hf_compress.jobs.classifiers import (
    Yardstick,
    choose_metric,
    head_options,
    load_all,
    load_classifier,
    measure_all,
    score,
)
from hf_compress.jobs.data import check_splits, label_ids, label_names, load_splits, tokenize
from hf_compress.jobs.fit import check_length, check_tokenizer
from hf_compress.jobs.inputs import inputs_digest, rows_digest
from hf_compress.jobs.job import DistillJob, autocast_dtype, check_arguments, run_settings
from hf_compress.jobs.lock import alone_in
from hf_compress.jobs.overlap import warn_of_rows_in_both
from hf_compress.jobs.stages import INPUTS, REPORT_FILE, open_run, train_once
from hf_compress.report.report import write_report

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

TEACHER, STUDENT, BASELINE = "teacher", "student", "student-alone"
# The teacher's answers, for as long as the student is trained.
CACHE = "teacher-cache"


class Material(NamedTuple):
    """What a run works with, checked.

    Attributes:
        tokenizer (`PreTrainedTokenizerBase`): Of the teacher and the student.
        train (`Dataset`): Tokenized rows to train on.
        copies (`Dataset`): The same and their noisy copies, where there are any, for the student with its teacher.
        test (`Dataset`): Tokenized rows to measure on.
        test_split (`str`): The name of the latter's split.
        labels (`list[str]` or `None`): Names of the classes, for a model that is fine-tuned here; `None`: regression.
        metric (`str`): What quality is measured by.
        n_in_both (`int`): Rows to measure on that are also trained on.
    """

    tokenizer: "PreTrainedTokenizerBase"
    train: Dataset
    copies: Dataset
    test: Dataset
    test_split: str
    labels: list[str] | None
    metric: str
    n_in_both: int


def distill(
    job: DistillJob,
    args: DistillationArguments,
    splits: DatasetDict | None = None,
    model_options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Makes a student of a text classifier, trains it with its teacher, saves, reloads and measures it.

    A run that was stopped continues when called again with the same arguments.

    Args:
        job (`DistillJob`): What to distil, on which data.
        args (`DistillationArguments`): How to train; `output_dir` gets `teacher/` (where it was fine-tuned here),
            `student/`, `student-alone/` (with `job.baseline`), `report.json` and `report.md`.
        splits (`DatasetDict`, *optional*): The data, where they are no file and have no name on the Hub.
        model_options (`dict`, *optional*): Further arguments of `from_pretrained` for the models that are trained.

    Returns:
        `dict`: The report, as in `report.json`.

    Raises:
        ValueError: if the data do not fit the model, or the output folder holds something else; before any training.
    """
    output = Path(args.output_dir)
    # Trained weights are float32 whatever the checkpoint's dtype: small updates would be rounded away in bfloat16.
    options = {"dtype": torch.float32, **(model_options or {})}
    check_arguments(job, args)
    with args.main_process_first(desc="preparing the data"):
        rows = None if splits is None else rows_digest(splits, [*job.text_columns, job.label_column])
        splits = load_splits(job.dataset, job.dataset_name) if splits is None else splits
        material = prepare(job, splits, options)
        settings = run_settings(job, args) | {INPUTS: inputs_digest(job.model, job.dataset, output, rows)}
    with alone_in(output, args.process_index == 0):
        with args.main_process_first(local=False, desc="opening the output folder"):
            overwrite = job.overwrite and args.process_index == 0
            open_run(output, settings, overwrite, (TEACHER, STUDENT, BASELINE, CACHE))
        if job.teacher_epochs > 0:
            train_once(output / TEACHER, lambda work: _teacher_trainer(job, args, material, options, work))
        teacher = str(output / TEACHER) if job.teacher_epochs > 0 else job.model
        train_once(output / STUDENT, lambda work: _student_trainer(job, args, material, options, teacher, work))
        if args.process_index == 0 and _is_cached(job, args):
            shutil.rmtree(output / CACHE, ignore_errors=True)
        if job.baseline:
            # As many steps as the student with its teacher, on the rows that have labels.
            epochs = args.num_train_epochs * (1 + job.augment_copies if _is_taught(args) else 1)
            alone = _changed(args, alpha=0.0, end_alpha=None, alpha_schedule="constant", num_train_epochs=epochs)
            alone = _changed(alone, terms=[], stages=[])
            train_once(output / BASELINE, lambda work: _student_trainer(job, alone, material, options, teacher, work))
        with args.main_process_first(local=False, desc="measuring"):
            if args.process_index == 0:
                report = measure(job, args, material, teacher)
                write_card(report, output / STUDENT)
                write_report(report, output)
    return json.loads((output / REPORT_FILE).read_text())


def prepare(job: DistillJob, splits: DatasetDict, options: dict[str, Any]) -> Material:
    """Checks data, tokenizer and model against each other, and tokenizes.

    Args:
        job (`DistillJob`): What to distil.
        splits (`DatasetDict`): The data.
        options (`dict`): Further arguments of `from_pretrained`.

    Returns:
        `Material`: Ready for training.

    Raises:
        ValueError: if a split, a column, a label, the tokenizer, the task head or the metric does not fit.
    """
    test_split = check_splits(splits, job.eval_split, job.text_columns, job.label_column)
    labels = label_names(splits["train"], job.label_column) if job.teacher_epochs > 0 else None
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    teacher = load_teacher(job, labels, options)
    check_tokenizer(tokenizer, teacher)
    make_student(teacher, job.student_config())
    metric = choose_metric(job.metric, teacher)
    ids = {name: label_ids(splits[name], name, job.label_column, teacher.config) for name in ("train", test_split)}
    train, test = (
        tokenize(splits[name], tokenizer, job.text_columns, ids[name], job.max_length)
        for name in ("train", test_split)
    )
    check_length(teacher, max(train, test, key=lambda rows: max(rows["length"])))
    copies = _with_copies(job, splits["train"], tokenizer, ids["train"]) if job.augment_copies else train
    n_in_both = warn_of_rows_in_both(splits["train"], splits[test_split], job.text_columns)
    return Material(tokenizer, train, copies, test, test_split, labels, metric, n_in_both)


def _with_copies(job: DistillJob, texts: Dataset, tokenizer, ids: list) -> Dataset:
    labelled = texts.select_columns(list(job.text_columns)).add_column("label", ids)
    noisy = augment(labelled, AugmentationConfig(copies=job.augment_copies), job.text_columns, "label")
    return tokenize(noisy, tokenizer, job.text_columns, noisy["label"], job.max_length)


def load_teacher(job: DistillJob, labels: list[str] | None, options: dict[str, Any]) -> "PreTrainedModel":
    """The model to compress, with a task head.

    Args:
        job (`DistillJob`): Names the model, and whether it is to be fine-tuned first.
        labels (`list[str]` or `None`): Classes of the data, for a model that is to be fine-tuned; `None`: regression.
        options (`dict`): Further arguments of `from_pretrained`.

    Returns:
        `PreTrainedModel`: For sequence classification.

    Raises:
        ValueError: if the head was never trained and is not going to be.
    """
    if job.teacher_epochs > 0:
        options = options | head_options(job.model, labels)
    return load_classifier(job.model, has_new_head=job.teacher_epochs > 0, **options)


def _changed(args: DistillationArguments, **values: Any) -> DistillationArguments:
    # A copy of the object, not dataclasses.replace: __post_init__ would set up the device and processes once more.
    changed = copy.copy(args)
    for name, value in values.items():
        setattr(changed, name, value)
    return changed


def _teacher_trainer(job: DistillJob, args: DistillationArguments, material: Material, options, work: Path) -> Trainer:
    logger.info("Fine-tuning the teacher on %d rows.", len(material.train))
    set_seed(args.seed)
    schedule = {
        "num_train_epochs": job.teacher_epochs,
        "max_steps": -1,  # this, if set, is the student's
        "learning_rate": job.teacher_learning_rate,
    }
    args = _changed(args, output_dir=str(work), **schedule)
    teacher = load_teacher(job, material.labels, options)
    return Trainer(teacher, args, train_dataset=material.train, processing_class=material.tokenizer)


def _student_trainer(
    job: DistillJob, args: DistillationArguments, material: Material, options, teacher_path: str, work: Path
) -> DistillationTrainer:
    how = "with its teacher" if _is_taught(args) else "without its teacher"
    rows = material.copies if _is_taught(args) else material.train
    logger.info("Training the student %s on %d rows.", how, len(rows))
    set_seed(args.seed)
    teacher = AutoModelForSequenceClassification.from_pretrained(teacher_path, **options)
    student = make_student(teacher, job.student_config())
    return DistillationTrainer(
        student,
        _changed(args, output_dir=str(work)),
        teacher=teacher,
        teacher_cache=_cache(job, args, teacher, rows, material.tokenizer),
        train_dataset=rows,
        processing_class=material.tokenizer,
    )


def _cache(job: DistillJob, args: DistillationArguments, teacher, rows: Dataset, tokenizer) -> TeacherCache | None:
    if not _is_cached(job, args):
        return None
    return TeacherCache.build(
        Path(args.output_dir) / CACHE,
        teacher.to(args.device),
        rows,
        processing_class=tokenizer,
        autocast_dtype=autocast_dtype(args),
    )


def _is_taught(args: DistillationArguments) -> bool:
    alphas = (args.alpha, args.end_alpha, *(stage.alpha for stage in args.stages))
    return any(alpha for alpha in alphas) or _looks_inside(args)


def _looks_inside(args: DistillationArguments) -> bool:
    return bool(args.terms or any(stage.terms for stage in args.stages))


def _is_cached(job: DistillJob, args: DistillationArguments) -> bool:
    # What is imitated inside the teacher takes hundreds of times the room of its answers.
    return job.cache_teacher and _is_taught(args) and not _looks_inside(args)


def measure(job: DistillJob, args: DistillationArguments, material: Material, teacher_path: str) -> dict[str, Any]:
    """Reloads the saved models and measures them side by side.

    Args:
        job (`DistillJob`): Names the data and the metric.
        args (`DistillationArguments`): Names the folder.
        material (`Material`): The rows to measure on.
        teacher_path (`str`): Where the teacher is.

    Returns:
        `dict`: The report.
    """
    logger.info("Measuring the saved models on %d rows of the split %s.", len(material.test), material.test_split)
    output = Path(args.output_dir)
    paths = {TEACHER: teacher_path, STUDENT: str(output / STUDENT)}
    if job.baseline:
        paths[BASELINE] = str(output / BASELINE)
    models = load_all(paths, args.device)
    batch_size = args.per_device_eval_batch_size
    yardstick = Yardstick(material.test, material.tokenizer, material.metric, batch_size, args.seed)
    return {
        "job": {name: value for name, value in asdict(job).items() if name != "overwrite"},
        "training": {name: args.to_dict()[name] for name in _REPORTED_ARGUMENTS},
        "rows_trained_on": len(material.train),
        "rows_in_both": material.n_in_both,
        **measure_all(models, paths, yardstick),
        "gain": score(models[BASELINE], models[STUDENT], yardstick) if job.baseline else None,
    }


_REPORTED_ARGUMENTS = (
    "alpha",
    "temperature",
    "divergence",
    "terms",
    "stages",
    "learning_rate",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
    "bf16",
    "fp16",
)
