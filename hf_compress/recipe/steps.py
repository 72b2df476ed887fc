"""What a recipe is made of: the data, how models are measured, and one dataclass for each kind of step."""

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from hf_compress.distillation.arguments import DistillationArguments, Divergence, StageConfig, TermConfig
from hf_compress.distillation.config import StudentConfig
from hf_compress.pruning.config import StructuredPruningConfig
from hf_compress.pruning.unstructured_config import UnstructuredPruningConfig
from hf_compress.pruning.vocabulary_config import VocabularyPruningConfig
from hf_compress.recipe.format_options import FORMATS

# Arguments of a Trainer that a run sets itself.
_OWN_ARGUMENTS = (
    "output_dir",
    "seed",
    "data_seed",
    "do_train",
    "do_eval",
    "eval_strategy",
    "push_to_hub",
    "resume_from_checkpoint",
    "save_only_model",
    "load_best_model_at_end",
)


@dataclass
class DataConfig:
    """The data of a recipe: labelled rows, of which the split `train` is learned from and another one measured on."""

    dataset: str = field(
        metadata={"help": "A name on the Hub, or a folder with train.parquet, test.parquet ... (or csv, json)."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Configuration of a Hub data set, for instance sst2 of nyu-mll/glue."}
    )
    text_columns: list[str] = field(
        default_factory=lambda: ["text"],
        metadata={"help": "Column of the texts, two for pairs, or the column of words where words are labelled."},
    )
    label_column: str = field(
        default="label",
        metadata={"help": "Column of the labels: names, ids or numbers; lists of them where words are labelled."},
    )
    eval_split: str | None = field(
        default=None,
        metadata={"help": "Split to measure on. By default validation, dev or test, the first there is."},
    )
    max_length: int = field(default=64, metadata={"help": "Tokens per row at most; longer rows are cut."})
    train_rows: int | None = field(
        default=None, metadata={"help": "Rows of train to learn from, drawn by the seed. By default all."}
    )
    metric: str | None = field(
        default=None,
        metadata={
            "help": "What quality is. By default accuracy; pearsonr for numbers; for labelled words seqeval where the "
            "labels are tags such as O and B-PER, else token_accuracy."
        },
    )

    def __post_init__(self) -> None:
        self.text_columns = [self.text_columns] if isinstance(self.text_columns, str) else list(self.text_columns)
        for name in ("max_length", "train_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: give a whole number of at least 1.")


@dataclass
class MeasureConfig:
    """How the saved model of each step is measured."""

    batch_sizes: list[int] = field(default_factory=lambda: [8, 32], metadata={"help": "Rows per batch when timed."})
    length: int | None = field(
        default=None, metadata={"help": "Tokens per row when timed. By default max_length of the data."}
    )
    eval_batch_size: int = field(default=64, metadata={"help": "Rows per batch when quality is measured."})
    n_runs: int = field(default=20, metadata={"help": "Timed runs of each model and batch size."})

    def __post_init__(self) -> None:
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ValueError(f"batch_sizes={self.batch_sizes}: give one size or more, each of at least 1.")
        for name in ("length", "eval_batch_size", "n_runs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: give a whole number of at least 1.")


@dataclass
class TrainingStep:
    """What every training has: the usual arguments of a `Trainer`, and `arguments` for all others."""

    num_train_epochs: float = field(default=3.0, metadata={"help": "Epochs."})
    max_steps: int = field(
        default=-1, metadata={"help": "Optimizer steps in the place of epochs, where it is above 0."}
    )
    learning_rate: float = field(default=2e-4, metadata={"help": "Learning rate at its peak."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Rows per batch and device."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches per optimizer step."})
    warmup_steps: float = field(
        default=0.06, metadata={"help": "Steps, or below 1 the share of them, in which the learning rate rises."}
    )
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of AdamW."})
    label_smoothing_factor: float = field(default=0.0, metadata={"help": "Smoothing of the labels."})
    bf16: bool = field(default=False, metadata={"help": "Train with bfloat16 autocast."})
    dropout: float | None = field(default=0.0, metadata={"help": "Dropout while training; null: the model's own."})
    freeze_embeddings: bool = field(default=False, metadata={"help": "Keep the token embeddings as they are."})
    arguments: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Further arguments of transformers.TrainingArguments, by name."}
    )

    def __post_init__(self) -> None:
        known = {one.name for one in fields(DistillationArguments) if one.init}
        named = {one.name for one in fields(self)} - {"arguments"}
        for name in self.arguments:
            if name in _OWN_ARGUMENTS:
                raise ValueError(f"arguments has {name}, which a recipe sets itself: leave it out.")
            if name in named:
                raise ValueError(f"arguments has {name}, which the step has too: give it there.")
            if name not in known:
                raise ValueError(f"arguments has {name}, which is no argument of a Trainer: check its name.")
        if not self.num_train_epochs > 0:
            raise ValueError(f"num_train_epochs={self.num_train_epochs}: give a number above 0.")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate}: give a number above 0.")


@dataclass
class FinetuneStep(TrainingStep):
    """Fine-tunes the model on the labels first, for one without a trained head; it becomes the teacher."""

    key: ClassVar[str] = "finetune"

    num_train_epochs: float = field(default=3.0, metadata={"help": "Epochs."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate at its peak."})


@dataclass
class StudentStep(StudentConfig):
    """A student that starts from some of the teacher's layers, channels, heads and neurons."""

    key: ClassVar[str] = "student"


@dataclass
class DistilStep(TrainingStep):
    """Trains the model as it is at this point, with the teacher's answers."""

    key: ClassVar[str] = "distil"

    alpha: float = field(default=0.9, metadata={"help": "Weight of the teacher's outputs, in [0, 1]."})
    temperature: float = field(default=2.0, metadata={"help": "Temperature of the soft targets."})
    divergence: Divergence = field(default="auto", metadata={"help": "How outputs are compared."})
    terms: list[TermConfig] = field(
        default_factory=list, metadata={"help": "What is imitated inside the teacher: kind, weight, layers ..."}
    )
    stages: list[StageConfig] = field(
        default_factory=list, metadata={"help": "Parts of the training with terms of their own, in order."}
    )
    augment_copies: int = field(
        default=0, metadata={"help": "Noisy copies of every row, which the teacher labels. Small data sets want some."}
    )
    augment_to: int = field(
        default=0,
        metadata={
            "help": "Rows to learn from, in the place of augment_copies: where there are fewer, noisy copies fill up, "
            "so that one recipe suits small and large data sets."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.augment_copies < 0:
            raise ValueError(f"augment_copies={self.augment_copies} is below 0: give 0 for the rows alone.")
        if self.augment_to < 0 or (self.augment_to and self.augment_copies):
            raise ValueError(
                f"augment_to={self.augment_to} and augment_copies={self.augment_copies}: give one of them, from 0."
            )
        # Checks what these mean, and makes objects of mappings.
        self.terms = [one if isinstance(one, TermConfig) else TermConfig(**one) for one in self.terms]
        self.stages = [one if isinstance(one, StageConfig) else StageConfig(**one) for one in self.stages]


@dataclass
class RecoverStep(DistilStep):
    """Trains a model that was pruned, with the unpruned one as its teacher, inside and outside."""

    key: ClassVar[str] = "recover"

    terms: list[TermConfig] = field(
        default_factory=lambda: [TermConfig("hidden_mse", weight=10.0)],
        metadata={"help": "What is imitated inside the teacher: kind, weight, layers ..."},
    )


@dataclass
class PruneStep(StructuredPruningConfig):
    """Cuts heads, neurons or layers to a budget, with unlabelled texts of the split train."""

    key: ClassVar[str] = "prune"

    n_texts: int = field(default=512, metadata={"help": "Texts to calibrate with, drawn by the seed."})
    seed: int | None = field(default=None, metadata={"help": "Of what is drawn. By default the recipe's."})

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_texts(self.n_texts)

    def config(self, seed: int) -> StructuredPruningConfig:
        """What `prune` takes.

        Args:
            seed (`int`): The recipe's, where the step has none of its own.
        """
        given = {one.name: getattr(self, one.name) for one in fields(StructuredPruningConfig)}
        return StructuredPruningConfig(**given | {"seed": seed if self.seed is None else self.seed})


@dataclass
class SparsifyStep(UnstructuredPruningConfig):
    """Makes single weights 0, with unlabelled texts of the split train where the score needs some."""

    key: ClassVar[str] = "sparsify"

    n_texts: int = field(default=512, metadata={"help": "Texts to calibrate with, drawn by the seed."})
    seed: int | None = field(default=None, metadata={"help": "Of what is drawn. By default the recipe's."})

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_texts(self.n_texts)

    def config(self, seed: int) -> UnstructuredPruningConfig:
        """What `prune` takes.

        Args:
            seed (`int`): The recipe's, where the step has none of its own.
        """
        given = {one.name: getattr(self, one.name) for one in fields(UnstructuredPruningConfig)}
        return UnstructuredPruningConfig(**given | {"seed": seed if self.seed is None else self.seed})


@dataclass
class VocabularyStep(VocabularyPruningConfig):
    """Cuts the vocabulary to the word pieces that the texts of the split train use."""

    key: ClassVar[str] = "vocabulary"


@dataclass
class QuantizeStep:
    """Rounds the weights to a number format."""

    key: ClassVar[str] = "quantize"

    format: str = field(metadata={"help": f"What to quantize to: {', '.join(FORMATS)}."})
    options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Options of the format, by the names that its config has."}
    )
    n_texts: int = field(default=512, metadata={"help": "Texts for formats that measure ranges, drawn by the seed."})
    max_drop: float | None = field(
        default=None,
        metadata={
            "help": "Loss of the metric that is allowed on rows of validation or dev that are not measured on, else "
            "on rows of train, 0.01 for a point of accuracy: what costs most stays in floating point until it holds. "
            "By default, nothing is checked."
        },
    )

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format={self.format!r} is no format: give one of {', '.join(FORMATS)}.")
        known = [one.name for one in fields(FORMATS[self.format].options)]
        for name in self.options:
            if name not in known:
                raise ValueError(f"options has {name!r}, but {self.format} has {', '.join(known) or 'no options'}.")
        _check_texts(self.n_texts)
        if self.max_drop is not None and self.max_drop < 0:
            raise ValueError(f"max_drop={self.max_drop} is no loss that could be allowed: give 0 or more.")
        self.config()

    def config(self) -> Any:
        """What `quantize` takes.

        Raises:
            ValueError: if an option is out of range.
        """
        options = {name: tuple(v) if isinstance(v, list) else v for name, v in self.options.items()}
        return FORMATS[self.format].make(**options)


@dataclass
class EvaluateStep:
    """Stops the run where the model at this point kept too little; earlier models stay."""

    key: ClassVar[str] = "evaluate"

    min_retention: float | None = field(
        default=None, metadata={"help": "Share of the teacher's metric that must be kept, such as 0.98."}
    )
    max_mb: float | None = field(default=None, metadata={"help": "Megabytes (10^6 bytes) that it may have on disk."})

    def __post_init__(self) -> None:
        for name in ("min_retention", "max_mb"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value}: give a number above 0.")


@dataclass
class PushStep:
    """Uploads the finished model and its card to the Hub."""

    key: ClassVar[str] = "push"

    repo_id: str = field(metadata={"help": "Where to: a name, or an organisation's and a name, such as me/my-model."})
    private: bool | None = field(default=None, metadata={"help": "Whether a new repository is private."})
    revision: str | None = field(default=None, metadata={"help": "Branch to upload to. By default main."})


Step = (
    FinetuneStep
    | StudentStep
    | DistilStep
    | RecoverStep
    | PruneStep
    | SparsifyStep
    | VocabularyStep
    | QuantizeStep
    | EvaluateStep
    | PushStep
)
STEPS: dict[str, type] = {kind.key: kind for kind in Step.__args__}


def _check_texts(n_texts: int) -> None:
    if n_texts < 1:
        raise ValueError(f"n_texts={n_texts} counts texts: give at least 1.")
