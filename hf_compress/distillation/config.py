"""What can be chosen about the student and about its training."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments

LayerRule = Literal["spread", "first", "last"]


@dataclass
class StudentConfig:
    """Which of the teacher's layers the student starts from."""

    num_layers: int | None = field(
        default=None,
        metadata={"help": "Layers of the student, in each stack of an encoder-decoder. May be left out with a list."},
    )
    layers: LayerRule | Sequence[int] = field(
        default="spread",
        metadata={
            "help": "Teacher layers to copy: 'spread' ends each of num_layers equal runs of layers (6 -> 3 copies 1, "
            "3, 5; TinyBERT, eq. 6), 'first', 'last', or a list of indices counted from 0."
        },
    )
    num_decoder_layers: int | None = field(
        default=None,
        metadata={"help": "Layers of the student's decoder, for an encoder-decoder. Defaults to num_layers."},
    )
    decoder_layers: LayerRule | Sequence[int] | None = field(
        default=None,
        metadata={"help": "Decoder layers to copy, for an encoder-decoder. Defaults to the rule in `layers`."},
    )

    def __post_init__(self) -> None:
        _check_layers("num_layers", self.num_layers, "layers", self.layers)
        has_list = not isinstance(self.layers, str)
        if has_list and self.num_decoder_layers is not None and self.decoder_layers is None:
            raise ValueError(
                f"num_decoder_layers={self.num_decoder_layers} does not say which layers, and "
                f"layers={list(self.layers)} lists the encoder's: give decoder_layers, a rule or a list."
            )
        if self.decoder_layers is not None:
            _check_layers("num_decoder_layers", self.num_decoder_layers, "decoder_layers", self.decoder_layers)


def _check_layers(number_name: str, number: int | None, layers_name: str, layers: LayerRule | Sequence[int]) -> None:
    if isinstance(layers, str):
        if layers not in LayerRule.__args__:
            raise ValueError(
                f"{layers_name}={layers!r} is no rule: give 'spread', 'first', 'last' or a list of indices."
            )
        if layers_name == "layers" and number is None:
            raise ValueError(f"{layers_name}={layers!r} needs {number_name}: give the number of layers to keep.")
    else:
        if number is not None and number != len(layers):
            raise ValueError(
                f"{number_name}={number} but {layers_name}={list(layers)} names {len(layers)} layers: "
                f"make them agree, or leave {number_name} out."
            )
        if len(set(layers)) != len(layers):
            raise ValueError(f"{layers_name}={list(layers)} names a layer twice: name each layer once.")
    if number is not None and number < 1:
        raise ValueError(f"{number_name}={number}: a student has at least 1 layer.")


@dataclass
class DistillationArguments(TrainingArguments):
    """`transformers.TrainingArguments` and what distillation adds to them."""

    temperature: float = field(
        default=2.0,
        metadata={
            "help": "Temperature T > 0 of the soft targets; the term is multiplied by T^2 so that its gradient keeps "
            "its size (Hinton et al., 2015). 2 is DistilBERT's value. Unused for regression."
        },
    )
    alpha: float = field(
        default=0.9,
        metadata={
            "help": "Weight of the teacher's term, in [0, 1]; the task's own loss gets 1 - alpha. 1 trains on the "
            "teacher alone and needs no labels, 0 ignores the teacher."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"temperature={self.temperature} must be above 0 and finite: "
                "1 leaves the teacher's outputs as they are."
            )
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha} must lie in [0, 1]: it is the teacher's share of the loss.")
