"""How single weights are pruned, in the words of a command line."""

from collections.abc import Sequence
from dataclasses import field, fields, make_dataclass
from typing import Any

from hf_compress.pruning.unstructured_config import UnstructuredPruningConfig

# Fields of the config that take values of several types, which no parser of options can tell apart.
_WORDS = {"pattern": str | None, "allocation": list[str], "exclude": list[str]}


def weight_options() -> type:
    """The fields of `UnstructuredPruningConfig` as a dataclass that `HfArgumentParser` can read.

    Returns:
        `type`: A dataclass. `pattern` is a text, `allocation` and `exclude` are lists of words.
    """
    options = []
    for one in fields(UnstructuredPruningConfig):
        kind = _WORDS.get(one.name, one.type)
        default = {"default_factory": list} if kind == list[str] else {"default": one.default}
        options.append((one.name, kind, field(**default, metadata=one.metadata)))
    return make_dataclass("WeightOptions", options)


def read_weight_options(options: Any) -> UnstructuredPruningConfig:
    """The config that words of a command line ask for.

    Args:
        options (`Any`): An instance of `weight_options()`.

    Returns:
        `UnstructuredPruningConfig`: Checked.

    Raises:
        ValueError: if the words cannot be read, or a value is out of range.
    """
    return UnstructuredPruningConfig(**{**vars(options), "allocation": read_allocation(options.allocation)})


def read_allocation(words: Sequence[str]) -> str | dict[str, float]:
    """Sparsities of the layers: a rule, or one `NAME=SHARE` for each pattern of names.

    Args:
        words (`Sequence[str]`): Such as `["owl"]` or `[".*layer.0=0.3", ".*output=0.6"]`; none for `"uniform"`.

    Returns:
        `str` or `dict[str, float]`: As `UnstructuredPruningConfig.allocation`.

    Raises:
        ValueError: if one of several words is no `NAME=SHARE`.
    """
    if not any("=" in word for word in words):
        return " ".join(words) or "uniform"
    try:
        return {name: float(share) for name, _, share in (word.rpartition("=") for word in words)}
    except ValueError as error:
        raise ValueError(
            f"allocation={' '.join(words)!r} is not made of NAME=SHARE: give one for each pattern of names, as in "
            "'.*layer.0=0.3' '.*output=0.6', or 'owl' alone."
        ) from error
