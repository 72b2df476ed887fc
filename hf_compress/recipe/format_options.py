"""Number formats in the words of a command line: their names, their options, and the configs that these stand for."""

import difflib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, is_dataclass, make_dataclass
from typing import Any, Literal, NamedTuple

from transformers import BitsAndBytesConfig

from hf_compress.quantization.config import BinaryConfig, FixedPointConfig, FloatConfig, Int8DynamicConfig

# A field of several configs, or one of words, as any of them is parsed.
_WORDS = {"exclude": list[str], "activations": int, "embedding_bits": int, "dtype": str}
_EXCLUDE = "Modules that stay in floating point, besides the task head: names or patterns."


@dataclass
class NoOptions:
    """A format in which there is nothing to choose."""


@dataclass
class LlmInt8Options:
    """What can be chosen in LLM.int8, by the names of `transformers.BitsAndBytesConfig`."""

    llm_int8_threshold: float = field(
        default=6.0,
        metadata={
            "help": "Size from which on activations, and the columns that they are in, are computed in floating "
            "point; 0.0 rounds all, so that a text's result does not depend on the others in its batch."
        },
    )
    exclude: tuple[str, ...] = field(default=(), metadata={"help": _EXCLUDE})


@dataclass
class FourBitOptions:
    """What can be chosen in NF4 and FP4, by the names of `transformers.BitsAndBytesConfig`."""

    bnb_4bit_use_double_quant: bool = field(
        default=False, metadata={"help": "Whether the scales are rounded too, to 8 bits."}
    )
    bnb_4bit_compute_dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "What matrix products are computed in: float32, bfloat16 or float16."}
    )
    exclude: tuple[str, ...] = field(default=(), metadata={"help": _EXCLUDE})


class NumberFormat(NamedTuple):
    """A format as it is asked for.

    Attributes:
        meaning (`str`): What it is, for a page of help.
        options (`type`): A dataclass of what can be chosen.
        make (`Callable`): From some of these, as keywords, to what `quantize` takes.
    """

    meaning: str
    options: type
    make: Callable[..., Any]


def _llm_int8(exclude: tuple[str, ...] = (), **options: Any) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(exclude) or None, **options)


def _four_bit(kind: str) -> Callable[..., BitsAndBytesConfig]:
    def make(exclude: tuple[str, ...] = (), **options: Any) -> BitsAndBytesConfig:
        skipped = list(exclude) or None
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=kind, llm_int8_skip_modules=skipped, **options
        )

    return make


FORMATS: dict[str, NumberFormat] = {
    "int8": NumberFormat("8-bit weights, activations rounded per token", Int8DynamicConfig, Int8DynamicConfig),
    "bf16": NumberFormat("bfloat16", NoOptions, lambda: FloatConfig("bf16")),
    "fp16": NumberFormat("float16", NoOptions, lambda: FloatConfig("fp16")),
    "fixed-point": NumberFormat("integers of 2 to 16 bits", FixedPointConfig, FixedPointConfig),
    "llm-int8": NumberFormat("8 bits, by bitsandbytes", LlmInt8Options, _llm_int8),
    "nf4": NumberFormat("4-bit floats, by bitsandbytes", FourBitOptions, _four_bit("nf4")),
    "fp4": NumberFormat("4-bit floats, by bitsandbytes", FourBitOptions, _four_bit("fp4")),
    "binary": NumberFormat("weights of one bit, for models trained for it", BinaryConfig, BinaryConfig),
}


def format_options() -> type:
    """The choice of formats, and the options of all of them, as a dataclass that `HfArgumentParser` can read.

    Returns:
        `type`: A dataclass. What is not given is `None`, whatever its default in a config.
    """
    options: list[tuple[str, Any, Any]] = [
        (
            "format",
            str | None,
            field(default=None, metadata={"help": f"What to quantize to: {', '.join(FORMATS)}."}),
        ),
        (
            "formats",
            list[str] | None,
            field(
                default=None,
                metadata={
                    "help": "Several formats in the place of --format, such as int8 nf4: one model for each. With "
                    "--auto, those to choose from."
                },
            ),
        ),
    ]
    chosen = {one.name: one for number_format in FORMATS.values() for one in fields(number_format.options)}
    for one in chosen.values():
        kind = _WORDS.get(one.name, one.type)
        # Without a value, an option of yes or no is a yes.
        flag = {"nargs": "?", "const": True} if kind is bool else {}
        options.append((one.name, kind | None, field(default=None, metadata={**one.metadata, **flag})))
    return make_dataclass("FormatOptions", options)


def read_format_options(options: Any, is_auto: bool = False) -> dict[str, Any]:
    """The configs that words of a command line ask for.

    Args:
        options (`Any`): An instance of `format_options()`.
        is_auto (`bool`, *optional*, defaults to `False`): Whether one of the formats is chosen later, by its time.

    Returns:
        `dict[str, Any]`: What `quantize` takes, by the name of the format; empty for a choice from all.

    Raises:
        ValueError: if there is no format, an unknown one, one of them twice, an option that none of them has, or a
            value out of range.
    """
    given = {name: value for name, value in vars(options).items() if value is not None}
    one, several = given.pop("format", None), given.pop("formats", [])
    names = several if one is None else [one]
    _check_names(one, several, is_auto)
    if is_auto and given:
        raise ValueError(
            f"--auto times formats as they are by default, so {_listed(given)} cannot be given with it: let it "
            "choose, and run again with --format and the options of that format."
        )
    known = {name: {one.name for one in fields(FORMATS[name].options)} for name in names}
    for option in given:
        if not any(option in of_format for of_format in known.values()):
            _refuse_option(option, names)
    return {
        name: FORMATS[name].make(**{o: _frozen(value) for o, value in given.items() if o in known[name]})
        for name in names
    }


def needs_texts(config: Any) -> bool:
    """Whether ranges are measured on texts.

    Args:
        config (`Any`): What `quantize` takes.
    """
    if isinstance(config, Int8DynamicConfig):
        return config.smooth is not None
    if isinstance(config, FixedPointConfig):
        return config.activations is not None
    return isinstance(config, BinaryConfig) and config.activations != 32


def format_settings(config: Any) -> dict[str, Any]:
    """The fields of a config as plain JSON types; of bitsandbytes, those that differ from its defaults.

    Args:
        config (`Any`): What `quantize` takes.

    Returns:
        `dict[str, Any]`: By name.

    Raises:
        TypeError: if the config is of no known kind.
    """
    if isinstance(config, BitsAndBytesConfig):
        return {name: value for name, value in config.to_diff_dict().items() if not name.startswith("_")}
    if not is_dataclass(config):
        raise TypeError(
            f"A {type(config).__name__} does not say how to quantize: give Int8DynamicConfig, FixedPointConfig, "
            "FloatConfig, BinaryConfig or transformers.BitsAndBytesConfig."
        )
    return plain(config)


def _check_names(one: str | None, several: list[str], is_auto: bool) -> None:
    if one is not None and (several or is_auto):
        other = "--auto" if is_auto else "--formats"
        raise ValueError(f"--format {one} and {other} are two ways to say what to quantize to: leave one of them out.")
    names = several if one is None else [one]
    if not names and not is_auto:
        raise ValueError(
            f"There is no format to quantize to: give --format with one of {', '.join(FORMATS)}, several of them with "
            "--formats, or --auto to take the one that is fast on this machine."
        )
    unknown = next((name for name in names if name not in FORMATS), None)
    if unknown is not None:
        near = "".join(f" (did you mean {name}?)" for name in difflib.get_close_matches(unknown, FORMATS, n=1))
        raise ValueError(f"{unknown!r} is no format{near}: choose from {', '.join(FORMATS)}.")
    if len(set(names)) < len(names):
        raise ValueError(f"--formats {' '.join(names)} names a format twice: give each once.")


def _refuse_option(option: str, names: list[str]) -> None:
    owners = [
        name for name, number_format in FORMATS.items() if option in (o.name for o in fields(number_format.options))
    ]
    own = dict.fromkeys(one.name for name in names for one in fields(FORMATS[name].options))
    there = f"which has {_listed(own)}" if own else "which has no options"
    near = difflib.get_close_matches(option, own, n=1)
    meant = f" (did you mean {_listed(near)}?)" if near else ""
    raise ValueError(
        f"{_listed([option])} is an option of {', '.join(owners)} and not of {', '.join(names)}, {there}{meant}: "
        f"leave it out, or give --format {owners[0]}."
    )


def _listed(names: Any) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def plain(config: Any) -> dict[str, Any]:
    """The fields of a dataclass as they are read from a JSON file, in which tuples are lists.

    Args:
        config (`Any`): A dataclass of numbers, texts, and lists, tuples or dicts of them.

    Returns:
        `dict`: Plain JSON types.
    """
    return json.loads(json.dumps(asdict(config)))
