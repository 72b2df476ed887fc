"""What can be chosen about a distillation: its terms, its stages, and the training arguments that carry them."""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from transformers import TrainingArguments

from hf_compress.distillation.efficiency import check_dropout
from hf_compress.distillation.layer_map import LayerMap
from hf_compress.distillation.schedules import Schedule, check_schedule
from hf_compress.modeling.half import is_fast

logger = logging.getLogger(__name__)

Divergence = Literal["auto", "forward_kl", "reverse_kl", "jensen_shannon", "cross_entropy", "mse", "cosine"]
TermKind = Literal[
    "hidden_mse",
    "hidden_cosine",
    "embedding",
    "attention_kl",
    "attention_mse",
    "pkd",
    "relations",
    "distance",
    "angle",
    "contrastive",
]
Mixture = Literal["mean", "weighted", "confidence"]
Placement = Literal["replicated", "sharded"]
# What each kind compares where no layers are given; the last layer is number -1.
_LAST: tuple[tuple[int, int], ...] = ((-1, -1),)
_DEFAULT_LAYERS: dict[str, LayerMap] = {
    "hidden_mse": "uniform",
    "hidden_cosine": "uniform",
    "embedding": ((0, 0),),
    "attention_kl": "uniform",
    "attention_mse": "uniform",
    "pkd": "skip",
    "relations": _LAST,
    "distance": _LAST,
    "angle": _LAST,
    "contrastive": _LAST,
}


@dataclass
class TermConfig:
    """One thing inside the teacher that the student imitates."""

    kind: TermKind = field(
        metadata={
            "help": "hidden_mse, hidden_cosine: hidden states of tokens; embedding: what enters the first layer; "
            "attention_kl, attention_mse: attention maps (TinyBERT, eq. 7); pkd: normalised first token of each layer "
            "(PKD, eq. 7); relations: between queries, between keys, between values (MiniLMv2); distance, angle: "
            "between the texts of a batch (RKD); contrastive: the teacher's text among those of the batch (CRD)."
        }
    )
    weight: float = field(
        default=1.0,
        metadata={
            "help": "What the term counts in the loss, at the stage's start. For hidden_mse of students with fewer "
            "layers, 100 did better than 10, or as well, on five tasks (benchmarks/distillation_quality.py)."
        },
    )
    end_weight: float | None = field(
        default=None, metadata={"help": "What it counts at the stage's end; needs a schedule."}
    )
    schedule: Schedule = field(
        default="constant", metadata={"help": "How the weight gets there: constant, linear or cosine."}
    )
    layers: LayerMap | None = field(
        default=None,
        metadata={
            "help": "Which layers teach which: uniform, last, skip, or pairs of student's and teacher's numbers, "
            "counted from 1, or from -1 backwards. By default uniform; skip for pkd; the last one for relations, "
            "distance, angle and contrastive."
        },
    )
    stack: str | None = field(
        default=None, metadata={"help": "encoder or decoder, for models that have both. By default the encoder."}
    )
    teacher: int = field(default=0, metadata={"help": "Which of several teachers is imitated, counted from 0."})
    num_relation_heads: int | None = field(
        default=None,
        metadata={
            "help": "Heads into which queries, keys and values are split anew for relations; must divide both widths. "
            "By default the teacher's own number (MiniLMv2 takes more: 48 for a width of 768)."
        },
    )
    temperature: float = field(
        default=0.1, metadata={"help": "Temperature of the contrastive term's similarities, above 0."}
    )

    def __post_init__(self) -> None:
        if self.kind not in TermKind.__args__:
            raise ValueError(f"kind={self.kind!r} is no term: give one of {', '.join(TermKind.__args__)}.")
        _check_weight(f"weight of {self.kind}", self.weight)
        if self.end_weight is not None:
            _check_weight(f"end_weight of {self.kind}", self.end_weight)
        check_schedule(f"weight of {self.kind}", self.end_weight, self.schedule)
        _check_temperature(f"temperature of {self.kind}", self.temperature)
        if isinstance(self.layers, Sequence) and not isinstance(self.layers, str):
            self.layers = [tuple(pair) for pair in self.layers]
        if self.num_relation_heads is not None and self.kind != "relations":
            raise ValueError(f"num_relation_heads={self.num_relation_heads} is for relations, not {self.kind}.")

    @property
    def layer_map(self) -> LayerMap:
        """The layers to compare: those given, or the kind's own."""
        return _DEFAULT_LAYERS[self.kind] if self.layers is None else self.layers


@dataclass
class StageConfig:
    """A part of the training with its own terms; what is left out is as in the training arguments."""

    steps: int | None = field(default=None, metadata={"help": "Optimizer steps that the stage lasts."})
    epochs: float | None = field(
        default=None, metadata={"help": "Epochs that it lasts, instead of steps. The last stage may give neither."}
    )
    alpha: float | None = field(default=None, metadata={"help": "Weight of the teacher's outputs."})
    task_weight: float | None = field(
        default=None, metadata={"help": "Weight of the task's own loss. By default 1 - alpha, where alpha is given."}
    )
    temperature: float | None = field(default=None, metadata={"help": "Temperature of the soft targets."})
    divergence: Divergence | None = field(default=None, metadata={"help": "How outputs are compared."})
    terms: list[TermConfig] | None = field(default=None, metadata={"help": "What is imitated inside the teacher."})

    def __post_init__(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"steps={self.steps} and epochs={self.epochs} are both given: a stage lasts one of them.")
        for name in ("steps", "epochs"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value}: a stage lasts more than 0, or leaves {name} out to take the rest.")
        if self.alpha is not None:
            _check_alpha("alpha", self.alpha)
        if self.task_weight is not None:
            _check_weight("task_weight", self.task_weight)
        if self.temperature is not None:
            _check_temperature("temperature", self.temperature)
        if self.divergence is not None:
            _check_divergence(self.divergence)
        if self.terms is not None:
            self.terms = _configs(TermConfig, self.terms, "terms")


@dataclass
class DistillationArguments(TrainingArguments):
    """`transformers.TrainingArguments` and what distillation adds to them."""

    temperature: float = field(
        default=2.0,
        metadata={
            "help": "Temperature T > 0 of the soft targets; the term is multiplied by T^2 so that its gradient keeps "
            "its size (Hinton et al., 2015). 2 is DistilBERT's value. Unused for regression and embeddings."
        },
    )
    end_temperature: float | None = field(
        default=None,
        metadata={
            "help": "Temperature at the end of the training, or of each stage that gives none; needs "
            "temperature_schedule."
        },
    )
    temperature_schedule: Schedule = field(
        default="constant", metadata={"help": "How the temperature gets there: constant, linear or cosine."}
    )
    alpha: float = field(
        default=0.9,
        metadata={
            "help": "Weight of the teacher's outputs, in [0, 1]; the task's own loss gets 1 - alpha. 1 trains on the "
            "teacher alone and needs no labels, 0 ignores the teacher's outputs."
        },
    )
    end_alpha: float | None = field(
        default=None,
        metadata={"help": "alpha at the end of the training, or of each stage that gives none; needs alpha_schedule."},
    )
    alpha_schedule: Schedule = field(
        default="constant", metadata={"help": "How alpha gets there: constant, linear or cosine."}
    )
    divergence: Divergence = field(
        default="auto",
        metadata={
            "help": "How outputs are compared: forward_kl, reverse_kl, jensen_shannon, cross_entropy (forward_kl plus "
            "the teacher's entropy), mse (of logits), cosine (of embeddings). auto: forward_kl; cosine for "
            "embeddings. Regression always takes mse."
        },
    )
    jensen_shannon_beta: float = field(
        default=0.5,
        metadata={"help": "Share of the teacher in the mixture of jensen_shannon, between 0 and 1 (GKD, eq. 1)."},
    )
    terms: list[TermConfig] | str | None = field(
        default=None,
        metadata={
            "help": "What is imitated inside the teacher: TermConfigs, or the same as JSON, "
            """'[{"kind": "hidden_mse", "weight": 1.0}]'."""
        },
    )
    stages: list[StageConfig] | str | None = field(
        default=None,
        metadata={
            "help": "Parts of the training with terms of their own, in order: StageConfigs, or the same as JSON, "
            """'[{"epochs": 2, "alpha": 0, "task_weight": 0, "terms": [{"kind": "hidden_mse"}]}, {"epochs": 1}]'."""
        },
    )
    pooling: Literal["mean", "cls"] = field(
        default="mean", metadata={"help": "How a text's embedding is made of its tokens', for embedding models."}
    )
    teacher_mixture: Mixture = field(
        default="mean",
        metadata={
            "help": "How the soft targets of several teachers are mixed: mean, weighted (by teacher_weights), or "
            "confidence (per item, less weight to the teacher that is further from the label; CA-MKD, eq. 3)."
        },
    )
    teacher_weights: list[float] | None = field(
        default=None, metadata={"help": "One weight per teacher, above 0, for teacher_mixture=weighted."}
    )
    teacher_placement: Placement = field(
        default="replicated",
        metadata={
            "help": "Where the teachers live when several processes train: replicated (whole in each, fastest) or "
            "sharded (each holds its share, and the weights of a block are gathered while it runs)."
        },
    )
    teacher_check_rows: int = field(
        default=256,
        metadata={
            "help": "Rows on which a classifying teacher is compared with the majority class before training, with a "
            "warning where it is worse. 0 skips the check."
        },
    )
    logits_chunk: int = field(
        default=0,
        metadata={
            "help": "Tokens whose vocabulary logits are held at once, for language models; 0 holds all. Memory of the "
            "logits is then bounded by the chunk, for one more product of the output layer."
        },
    )
    dropout: float | None = field(
        default=None,
        metadata={
            "help": "Dropout of the student while it is trained, in [0, 1). 0 draws no random numbers, and soft "
            "targets regularize already. By default the student's own; what is saved has its own in any case."
        },
    )
    plain_attention: Literal["off", "auto", "on"] = field(
        default="off",
        metadata={
            "help": "Whether the student trains with attention as plain products. On a CPU in bf16 that is faster "
            "than the fused kernel for texts below some 500 tokens: auto does it there. Results differ by rounding."
        },
    )
    freeze_embeddings: bool = field(
        default=False,
        metadata={"help": "Keep the student's token embeddings as they are. Saves their gradient and optimizer step."},
    )
    log_gradient_shares: bool = field(
        default=False,
        metadata={"help": "Log each term's share of the gradient norm; costs one more backward per term and log."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_temperature("temperature", self.temperature)
        _check_alpha("alpha", self.alpha)
        if self.end_temperature is not None:
            _check_temperature("end_temperature", self.end_temperature)
        if self.end_alpha is not None:
            _check_alpha("end_alpha", self.end_alpha)
        check_schedule("temperature", self.end_temperature, self.temperature_schedule)
        check_schedule("alpha", self.end_alpha, self.alpha_schedule)
        _check_divergence(self.divergence)
        if not 0 < self.jensen_shannon_beta < 1:
            raise ValueError(
                f"jensen_shannon_beta={self.jensen_shannon_beta} must lie between 0 and 1: near 0 or 1 the divergence "
                "vanishes; take forward_kl or reverse_kl instead."
            )
        self.terms = _configs(TermConfig, self.terms or [], "terms")
        self.stages = _configs(StageConfig, self.stages or [], "stages")
        if (self.teacher_weights is not None) != (self.teacher_mixture == "weighted"):
            raise ValueError(
                f"teacher_weights={self.teacher_weights} does not go with teacher_mixture={self.teacher_mixture!r}: "
                "give weights with 'weighted', and only then."
            )
        if self.teacher_weights is not None and not all(0 < w < math.inf for w in self.teacher_weights):
            raise ValueError(f"teacher_weights={self.teacher_weights}: every weight must be above 0 and finite.")
        if self.teacher_placement not in Placement.__args__:
            raise ValueError(
                f"teacher_placement={self.teacher_placement!r} is unknown: give {' or '.join(Placement.__args__)}."
            )
        if self.dropout is not None:
            check_dropout(self.dropout)
        for name in ("bf16", "fp16"):
            if getattr(self, name) and not is_fast(self.device, name):
                logger.warning(
                    "%s=True, but this CPU has no instructions for it, and a step takes up to 50 times as long as in "
                    "float32: leave it out here.",
                    name,
                )
        if self.plain_attention not in ("off", "auto", "on"):
            raise ValueError(f"plain_attention={self.plain_attention!r} is unknown: give off, auto or on.")
        if self.log_gradient_shares and self.logging_strategy != "steps":
            raise ValueError(
                f"log_gradient_shares=True with logging_strategy={str(self.logging_strategy)!r}: shares are measured "
                "in the step before a log, so set logging_strategy='steps'."
            )
        for name in ("teacher_check_rows", "logits_chunk"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} is below 0: give 0 to switch it off.")

    def to_dict(self) -> dict[str, Any]:
        """The arguments as plain JSON types; see `TrainingArguments.to_dict`."""
        plain = super().to_dict()
        plain["terms"] = [asdict(term) for term in self.terms]
        plain["stages"] = [asdict(stage) for stage in self.stages]
        return plain


def _configs(kind: type, given: str | Sequence, name: str) -> list:
    """Config objects of what was given: objects, dicts, or JSON of a list of dicts."""
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}={given!r} is no JSON ({error}): write a list such as '[{{...}}]'.") from error
    if not isinstance(given, list | tuple):
        raise TypeError(f"{name} is a {type(given).__name__}: give a list of {kind.__name__}.")
    known = {item.name for item in fields(kind)}
    configs = []
    for item in given:
        if isinstance(item, dict):
            unknown = sorted(set(item) - known)
            if unknown:
                raise ValueError(f"{name} has the unknown keys {unknown}: a {kind.__name__} has {sorted(known)}.")
            if kind is TermConfig and "kind" not in item:
                raise ValueError(f"{name} has {item}, which names no kind: give one of {TermKind.__args__}.")
            item = kind(**item)
        if not isinstance(item, kind):
            raise TypeError(f"{name} holds {item!r}: give {kind.__name__} objects, or dicts of their fields.")
        configs.append(item)
    return configs


def _check_temperature(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name}={value} must be above 0 and finite: 1 leaves the teacher's outputs as they are.")


def _check_alpha(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value} must lie in [0, 1]: it is the teacher's share of the loss.")


def _check_weight(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}={value} must be 0 or above and finite: a term that is rewarded never settles.")


def _check_divergence(value: str) -> None:
    if value not in Divergence.__args__:
        raise ValueError(f"divergence={value!r} is unknown: give one of {', '.join(Divergence.__args__)}.")
