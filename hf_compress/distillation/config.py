"""What can be chosen about the student."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

LayerRule = Literal["spread", "first", "last"]
Init = Literal["teacher", "random"]


@dataclass
class StudentConfig:
    """What of the teacher the student starts from: some layers, and in them some channels, neurons and heads."""

    num_layers: int | None = field(
        default=None,
        metadata={
            "help": "Layers of the student, in each stack of an encoder-decoder. Without it, those in `layers` are "
            "kept if that is a list, else all."
        },
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
    hidden_size: int | None = field(
        default=None,
        metadata={
            "help": "Hidden size of the student. The channels with the largest weights stay, the same in all layers. "
            "Heads keep their width: where no config key sets it, as in BERT, the hidden size must be a multiple of "
            "it and decides the number of heads. Defaults to the teacher's."
        },
    )
    intermediate_size: int | None = field(
        default=None,
        metadata={
            "help": "Neurons of each of the student's feed-forward networks. In each, those with the largest weights "
            "stay. Defaults to the teacher's."
        },
    )
    num_heads: int | None = field(
        default=None,
        metadata={
            "help": "Heads of each attention of the student, with their key-value heads in proportion. In each, those "
            "with the largest weights stay. Defaults to the teacher's, or to what `hidden_size` asks for. Fewer heads "
            "alone may need hf_compress to reload, as in BERT."
        },
    )
    init: Init = field(
        default="teacher",
        metadata={
            "help": "Where the weights come from: 'teacher' copies them; 'random' draws new ones as the class does, "
            "by torch's global generator, for the same shapes, labels and head."
        },
    )

    def __post_init__(self) -> None:
        self._check_asked()
        _check_layers("num_layers", self.num_layers, "layers", self.layers)
        has_list = not isinstance(self.layers, str)
        if has_list and self.num_decoder_layers is not None and self.decoder_layers is None:
            raise ValueError(
                f"num_decoder_layers={self.num_decoder_layers} does not say which layers, and "
                f"layers={list(self.layers)} lists the encoder's: give decoder_layers, a rule or a list."
            )
        if self.decoder_layers is not None:
            _check_layers("num_decoder_layers", self.num_decoder_layers, "decoder_layers", self.decoder_layers)

    def _check_asked(self) -> None:
        if self.init not in Init.__args__:
            raise ValueError(f"init={self.init!r} is unknown: give 'teacher' or 'random'.")
        sizes = {name: getattr(self, name) for name in ("hidden_size", "intermediate_size", "num_heads")}
        for name, size in sizes.items():
            if size is not None and (not isinstance(size, int) or size < 1):
                raise ValueError(f"{name}={size!r}: a width is a whole number of at least 1.")
        others = (*sizes.values(), self.num_decoder_layers, self.decoder_layers)
        is_asked = self.init != "teacher" or any(value is not None for value in others)
        if self.num_layers is None and isinstance(self.layers, str) and (self.layers != "spread" or not is_asked):
            raise ValueError(
                f"layers={self.layers!r} needs num_layers: give the number of layers to keep, or another size of the "
                "student (hidden_size, intermediate_size, num_heads) and no rule."
            )
        if isinstance(self.decoder_layers, str) and self.num_decoder_layers is None and self.num_layers is None:
            raise ValueError(
                f"decoder_layers={self.decoder_layers!r} needs num_decoder_layers: give the number of layers to keep."
            )


def _check_layers(number_name: str, number: int | None, layers_name: str, layers: LayerRule | Sequence[int]) -> None:
    if isinstance(layers, str):
        if layers not in LayerRule.__args__:
            raise ValueError(
                f"{layers_name}={layers!r} is no rule: give 'spread', 'first', 'last' or a list of indices."
            )
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
