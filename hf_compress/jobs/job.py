"""What a run is asked for: the job, and the arguments or the config that go with it."""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from hf_compress.distillation.arguments import DistillationArguments
from hf_compress.distillation.config import StudentConfig
from hf_compress.pruning.config import StructuredPruningConfig
from hf_compress.pruning.unstructured_config import UnstructuredPruningConfig
from hf_compress.recipe.format_options import plain

PRUNED = "pruned"

# Arguments of a Trainer that would break what a run promises: the value they must keep, and why.
_FIXED_ARGUMENTS = {
    "eval_strategy": ("no", "the models are measured when they are trained, so that nothing is chosen on those rows"),
    "push_to_hub": (False, "every training would push to the same place; push the folder of the student afterwards"),
    "resume_from_checkpoint": (None, "a stopped run continues by itself when the command is repeated"),
    "save_only_model": (False, "a stopped training could not continue exactly without the optimizer's state"),
}


@dataclass
class TextJob:
    """A text classifier and its data, which every job has."""

    model: str = field(metadata={"help": "The model to compress: a folder, or a name on the Hub."})
    dataset: str = field(
        metadata={
            "help": "Labelled texts: a name on the Hub, or a folder with train.parquet, test.parquet ... (or csv, "
            "json)."
        }
    )
    # By name only, so that what a job cannot do without may follow.
    dataset_name: str | None = field(
        default=None,
        kw_only=True,
        metadata={"help": "Configuration of a Hub data set, for instance sst2 of nyu-mll/glue."},
    )
    text_columns: list[str] = field(
        default_factory=lambda: ["text"],
        kw_only=True,
        metadata={"help": "Column of the texts, or two columns for pairs."},
    )
    label_column: str = field(
        default="label", kw_only=True, metadata={"help": "Column of the labels: names, ids or numbers."}
    )
    eval_split: str | None = field(
        default=None,
        kw_only=True,
        metadata={"help": "Split to measure on. By default validation, dev or test, the first there is."},
    )
    max_length: int = field(
        default=128, kw_only=True, metadata={"help": "Tokens per text at most; longer texts are cut."}
    )
    metric: str | None = field(
        default=None,
        kw_only=True,
        metadata={"help": "Metric of the table. By default accuracy, or pearsonr for regression."},
    )
    overwrite: bool = field(
        default=False,
        kw_only=True,
        metadata={"help": "Delete the results of an earlier run in the output folder, and start anew."},
    )


@dataclass
class DistillJob(TextJob):
    """What to distil, and on which data."""

    student_layers: int = field(metadata={"help": "Layers of the student."})
    layers: str = field(
        default="spread",
        metadata={"help": "Teacher layers that the student copies: spread, first, last, or indices such as 1,3,5."},
    )
    student_hidden_size: int | None = field(
        default=None, metadata={"help": "Hidden size of the student. By default the model's own."}
    )
    student_intermediate_size: int | None = field(
        default=None, metadata={"help": "Neurons of each feed-forward network of the student."}
    )
    student_heads: int | None = field(default=None, metadata={"help": "Heads of each attention of the student."})
    augment_copies: int = field(
        default=0,
        metadata={
            "help": "Noisy copies of every text (words dropped and replaced), which the model labels for the student. "
            "Small data sets want some; 6 did well on 5,000 questions."
        },
    )
    cache_teacher: bool = field(
        default=True,
        metadata={"help": "Ask the model once about every text and store what it says, instead of in every epoch."},
    )
    baseline: bool = field(
        default=False, metadata={"help": "Also train the same student without the teacher, to compare with."}
    )
    teacher_epochs: float = field(
        default=0.0,
        metadata={"help": "Epochs of fine-tuning the model on the data first, for a model without a trained head."},
    )
    teacher_learning_rate: float = field(default=5e-5, metadata={"help": "Learning rate of that fine-tuning."})

    def __post_init__(self) -> None:
        self.student_config()
        if self.augment_copies < 0:
            raise ValueError(f"augment_copies={self.augment_copies} is below 0: give 0 for the texts alone.")
        if self.teacher_epochs < 0:
            raise ValueError(
                f"teacher_epochs={self.teacher_epochs} is below 0: give 0 for a model that is fine-tuned."
            )

    def student_config(self) -> StudentConfig:
        """The choice of layers as `make_student` takes it.

        Returns:
            `StudentConfig`: Its `layers` are a list of numbers where indices were given.

        Raises:
            ValueError: if `layers` is neither a rule nor a list of numbers, or contradicts `student_layers`.
        """
        is_list = re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", self.layers)
        layers = [int(index) for index in self.layers.split(",")] if is_list else self.layers
        return StudentConfig(
            num_layers=self.student_layers,
            layers=layers,
            hidden_size=self.student_hidden_size,
            intermediate_size=self.student_intermediate_size,
            num_heads=self.student_heads,
        )


@dataclass
class CalibratedJob(TextJob):
    """A classifier that is compressed with unlabelled texts, without training."""

    output_dir: str = field(metadata={"help": "Folder for the pruned model, the figure and the report."})
    n_texts: int = field(
        default=512,
        kw_only=True,
        metadata={
            "help": "Texts of the split train to calibrate with, drawn by --seed. Their labels are not looked at, "
            "unless by --use-labels."
        },
    )
    eval_batch_size: int = field(
        default=64, kw_only=True, metadata={"help": "Texts per batch when quality is measured."}
    )
    use_cpu: bool = field(
        default=False, kw_only=True, metadata={"help": "Leave an accelerator alone, where there is one."}
    )

    def __post_init__(self) -> None:
        for name in ("n_texts", "eval_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} counts texts: give at least 1.")


@dataclass
class PruneJob(CalibratedJob):
    """What to cut heads and neurons from, and on which data."""

    budgets: list[float] | None = field(
        default=None,
        metadata={
            "help": "Several budgets in the place of --budget, such as 0.5 0.33 0.25: one model for each, from one "
            "calibration."
        },
    )

    def configs(self, config: StructuredPruningConfig) -> dict[str, StructuredPruningConfig]:
        """What to prune to, by the name of the folder that the model is saved in.

        Args:
            config (`StructuredPruningConfig`): How to prune; its budget counts where `budgets` names none.

        Returns:
            `dict[str, StructuredPruningConfig]`: From the first budget to the last.

        Raises:
            ValueError: if a budget is no share, or named twice.
        """
        return _by_share(config, "budget", self.budgets)


@dataclass
class SparsifyJob(CalibratedJob):
    """Where to make single weights 0, and on which data."""

    sparsities: list[float] | None = field(
        default=None,
        metadata={"help": "Several sparsities in the place of --sparsity, such as 0.5 0.7: one model for each."},
    )

    def configs(self, config: UnstructuredPruningConfig) -> dict[str, UnstructuredPruningConfig]:
        """What to prune to, by the name of the folder that the model is saved in.

        Args:
            config (`UnstructuredPruningConfig`): How to prune; its sparsity counts where `sparsities` names none.

        Returns:
            `dict[str, UnstructuredPruningConfig]`: From the first sparsity to the last.

        Raises:
            ValueError: if a sparsity is no share, contradicts the pattern, or is named twice.
        """
        return _by_share(config, "sparsity", self.sparsities)


@dataclass
class QuantizeJob(CalibratedJob):
    """What to quantize, and on which data."""

    output_dir: str = field(metadata={"help": "Folder for the quantized models, the figures and the report."})
    n_texts: int = field(
        default=512,
        kw_only=True,
        metadata={
            "help": "Texts of the split train that ranges are measured on, drawn by --seed, for formats that need "
            "some: int8 with --smooth, fixed-point with --activations, binary. Their labels are not looked at."
        },
    )
    auto: bool = field(
        default=False,
        kw_only=True,
        metadata={
            "help": "Time formats on this machine, at --cost-batch texts of the split to measure on, and quantize to "
            "one within 10 % of the fastest."
        },
    )
    max_drop: float | None = field(
        default=None,
        kw_only=True,
        metadata={
            "help": "Loss of the metric that is allowed, 0.01 for a point of accuracy: the modules that cost most "
            "stay in floating point until it holds. It is measured on up to 1000 rows of validation or dev or, where "
            "there is none besides the split to measure on, of a tenth of train that is drawn by --seed. The model "
            "may know the latter by heart, so new rows can cost more. By default, nothing is checked."
        },
    )
    cost_batch: int = field(
        default=32, kw_only=True, metadata={"help": "Texts per batch when time is measured, and for --auto."}
    )
    seed: int = field(
        default=0, kw_only=True, metadata={"help": "Of the choice of texts and rows, and of the intervals."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cost_batch < 1:
            raise ValueError(f"cost_batch={self.cost_batch} counts texts: give at least 1.")
        if self.max_drop is not None and not 0 <= self.max_drop < math.inf:
            raise ValueError(
                f"max_drop={self.max_drop} is no loss that could be allowed: give a number from 0, such as 0.01."
            )


def _by_share(config: Any, name: str, shares: Sequence[float] | None) -> dict[str, Any]:
    if not shares:
        return {PRUNED: config}
    if len(set(shares)) < len(shares):
        raise ValueError(f"{shares} names a {name} twice: give each once.")
    return {f"{PRUNED}-{share}": replace(config, **{name: share}) for share in shares}


def run_settings(job: DistillJob, args: DistillationArguments) -> dict[str, Any]:
    """What decides the result of a run: the job and the training arguments, without where it is written.

    Args:
        job (`DistillJob`): What to distil.
        args (`DistillationArguments`): How to train.

    Returns:
        `dict`: Plain JSON types.
    """
    training = {name: value for name, value in args.to_dict().items() if not name.endswith("_dir")}
    chosen = {name: value for name, value in asdict(job).items() if name != "overwrite"}
    return {**training, **chosen}


def prune_settings(job: CalibratedJob, config: StructuredPruningConfig | UnstructuredPruningConfig) -> dict[str, Any]:
    """What decides the result of a pruning: the job and the config, without where it is written.

    Args:
        job (`CalibratedJob`): What to prune.
        config (`StructuredPruningConfig` or `UnstructuredPruningConfig`): How to prune it.

    Returns:
        `dict`: Plain JSON types.
    """
    return plain(config) | job_settings(job)


def job_settings(job: CalibratedJob) -> dict[str, Any]:
    """The job without where it is written.

    Args:
        job (`CalibratedJob`): What to compress.

    Returns:
        `dict`: Plain JSON types.
    """
    return {name: value for name, value in plain(job).items() if name not in ("overwrite", "output_dir")}


def autocast_dtype(args: DistillationArguments) -> torch.dtype | None:
    """The dtype that a training computes in, where it is not that of the weights.

    Args:
        args (`DistillationArguments`): How to train.
    """
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def check_arguments(job: DistillJob, args: DistillationArguments) -> None:
    """Raises if training arguments contradict what a run does by itself, or its results could replace its inputs.

    Args:
        job (`DistillJob`): Names the model and the data.
        args (`DistillationArguments`): Names the output folder.

    Raises:
        ValueError: with the argument and the reason.
    """
    for name, (fixed, reason) in _FIXED_ARGUMENTS.items():
        value = getattr(args, name)
        if value != fixed:
            raise ValueError(f"{name}={value} cannot be used here: {reason}. Leave it out.")
    check_output(job.model, job.dataset, args.output_dir)


def check_output(model: str, dataset: str, output_dir: str | Path) -> None:
    """Raises if results could replace what they are made of.

    Args:
        model (`str`): A folder, or a name on the Hub.
        dataset (`str`): A folder, a file, or a name on the Hub.
        output_dir (`str` or `Path`): The output folder.

    Raises:
        ValueError: if one of them lies in the output folder.
    """
    output = Path(output_dir).resolve()
    for what, path in (("model", model), ("data set", dataset)):
        inner = Path(path).expanduser().resolve()
        if inner.exists() and output in (inner, *inner.parents):
            raise ValueError(
                f"The {what} {path} lies in the output folder {output_dir}, where it could be overwritten: "
                "give an output folder of its own."
            )
