"""How weights and activations are rounded: one config for each number format."""

from dataclasses import dataclass, field, replace
from typing import Literal


@dataclass
class Int8DynamicConfig:
    """Eight-bit weights per output channel, and activations rounded anew for each token.

    Args:
        exclude (`tuple[str, ...]`, *optional*): Modules that stay in floating point, besides the task head: dotted
            names of modules, or of what they are in, or regular expressions for such names.
        embeddings (`bool`, *optional*, defaults to `False`): Whether tables of embeddings are rounded too.
        embedding_bits (`Literal[4, 8]`, *optional*, defaults to 8): Bits of their numbers: 8 with a scale per row, or
            4 in groups of 32 neighbours with one each. Tables are looked up and not multiplied, so fewer bits cost no
            time.
        smooth (`float`, *optional*): How far large input channels are made smaller, and their weights larger, 0 to 1:
            alpha in SmoothQuant (Xiao et al., 2023), which takes 0.5. It needs data, and one more pass over the
            inputs of each projection; by default, nothing is moved.
        dtype (`Literal["bf16", "fp16"]`, *optional*): What all that is not rounded is cast to: attention, norms and
            the task head run in it too. By default, they stay as they are.

    Raises:
        ValueError: if `smooth` is not between 0 and 1, or the bits or the dtype are none of these.
    """

    exclude: tuple[str, ...] = field(
        default=(), metadata={"help": "Modules that stay in floating point, besides the task head: names or patterns."}
    )
    embeddings: bool = field(default=False, metadata={"help": "Whether tables of embeddings are rounded too."})
    smooth: float | None = field(
        default=None,
        metadata={
            "help": "How far large input channels are made smaller, and their weights larger, 0 to 1 (SmoothQuant: "
            "0.5), measured on data; None: not at all."
        },
    )
    embedding_bits: Literal[4, 8] = field(
        default=8,
        metadata={"help": "Bits of a rounded table's numbers: 8 with a scale per row, or 4 in groups of 32."},
    )
    dtype: Literal["bf16", "fp16"] | None = field(
        default=None, metadata={"help": "What all that is not rounded is cast to, bf16 or fp16; None: as it is."}
    )

    def __post_init__(self) -> None:
        if self.dtype is not None:
            FloatConfig(self.dtype)  # which knows the types
        if self.embedding_bits not in (4, 8):
            raise ValueError(f"embedding_bits={self.embedding_bits} are not known: give 8, or 4.")
        if self.embedding_bits != 8:
            _check_tables_are_rounded(self)
        if self.smooth is not None and not 0 <= self.smooth <= 1:
            raise ValueError(f"smooth={self.smooth} is no share of the way: give 0 to 1, such as 0.5, or None.")


@dataclass
class BinaryConfig:
    """Weights of one bit, -1 or +1 times a scale per output channel, for models that were trained for it.

    Args:
        weights (`Literal[1]`, *optional*, defaults to 1): Bits of a weight.
        activations (`Literal[1, 2, 4, 8, 32]`, *optional*, defaults to 1): Bits of an input; 32 leaves inputs in
            floating point. One bit stands for -1 and +1, or for 0 and 1 where that loses less.
        exclude (`tuple[str, ...]`, *optional*): Modules that stay in floating point, besides the task head and the
            embeddings: dotted names of modules, or of what they are in, or regular expressions for such names.

    Raises:
        ValueError: if the bits are none of these.
    """

    weights: Literal[1] = field(default=1, metadata={"help": "Bits of a weight: 1."})
    activations: Literal[1, 2, 4, 8, 32] = field(
        default=1, metadata={"help": "Bits of an input: 1, 2, 4 or 8, or 32 for floating point."}
    )
    exclude: tuple[str, ...] = field(
        default=(),
        metadata={"help": "Modules that stay in floating point, besides task head and embeddings: names or patterns."},
    )

    def __post_init__(self) -> None:
        if self.weights != 1:
            raise ValueError(
                f"weights={self.weights} bits are not binary: give weights=1, or take FixedPointConfig for more."
            )
        if self.activations not in (1, 2, 4, 8, 32):
            raise ValueError(f"activations={self.activations} bits are not known: give 1, 2, 4, 8 or 32.")


@dataclass
class FloatConfig:
    """Floating-point numbers of 16 bits.

    Args:
        dtype (`Literal["bf16", "fp16"]`, *optional*, defaults to `"bf16"`): bfloat16, with the range of float32, or
            float16, with three more bits of precision.

    Raises:
        ValueError: if the dtype is none of these.
    """

    dtype: Literal["bf16", "fp16"] = field(
        default="bf16", metadata={"help": "bf16, with the range of float32, or fp16, with more precision."}
    )

    def __post_init__(self) -> None:
        if self.dtype not in ("bf16", "fp16"):
            raise ValueError(f"dtype={self.dtype!r} is no 16-bit type that models are cast to: give 'bf16' or 'fp16'.")


@dataclass
class FixedPointConfig:
    """Integers of 2 to 16 bits times a step; with `power_of_two`, numbers with so many bits after the binary point.

    Args:
        bits (`int`, *optional*, defaults to 8): Bits of a weight, 2 to 16.
        symmetric (`bool`, *optional*, defaults to `True`): Whether ranges are the same on both sides of zero;
            otherwise they have zero points.
        granularity (`Literal["per_channel", "per_tensor", "group"]`, *optional*, defaults to `"per_channel"`): Which
            weights share a step: those of one output, all, or `group_size` neighbours of one output.
        group_size (`int`, *optional*, defaults to 32): Weights per group; the last one of a row may be shorter.
        power_of_two (`bool`, *optional*, defaults to `False`): Whether steps are powers of two.
        activations (`int`, *optional*): Bits of the inputs of projections, 4 to 16, with ranges measured once on
            data; without it, they stay in floating point.
        ranges (`Literal["minmax", "percentile", "mse"]`, *optional*, defaults to `"minmax"`): What steps cover.
        percentile (`float`, *optional*, defaults to 99.9): Share in percent that `"percentile"` covers on each side.
        embeddings (`bool`, *optional*, defaults to `True`): Whether tables of embeddings are rounded too.
        embedding_bits (`int`, *optional*): Bits of the tables' numbers, 2 to 16; by default as many as of all others.
        exclude (`tuple[str, ...]`, *optional*): Modules that stay in floating point, besides the task head.

    Raises:
        ValueError: if a number is out of range, or a name is unknown.
    """

    bits: int = field(default=8, metadata={"help": "Bits of a weight, 2 to 16."})
    symmetric: bool = field(
        default=True, metadata={"help": "Whether ranges are the same on both sides of zero; else with zero points."}
    )
    granularity: Literal["per_channel", "per_tensor", "group"] = field(
        default="per_channel",
        metadata={"help": "Which weights share a step: those of one output, all, or neighbours of one output."},
    )
    group_size: int = field(
        default=32, metadata={"help": "Weights per group, from 2, for granularity 'group'; the last may be shorter."}
    )
    power_of_two: bool = field(default=False, metadata={"help": "Whether steps are powers of two: fraction bits."})
    activations: int | None = field(
        default=None,
        metadata={"help": "Bits of the inputs of projections, 4 to 16, with ranges from data; None: floating point."},
    )
    ranges: Literal["minmax", "percentile", "mse"] = field(
        default="minmax",
        metadata={
            "help": "What steps cover, of weights and inputs: all, 'percentile' (groups of weights: all), or what "
            "gives the least squared error."
        },
    )
    percentile: float = field(
        default=99.9, metadata={"help": "Share in percent that ranges='percentile' covers on each side, above 50."}
    )
    embeddings: bool = field(default=True, metadata={"help": "Whether tables of embeddings are rounded too."})
    exclude: tuple[str, ...] = field(
        default=(), metadata={"help": "Modules that stay in floating point, besides the task head: names or patterns."}
    )
    embedding_bits: int | None = field(
        default=None, metadata={"help": "Bits of the tables' numbers, 2 to 16; None: as many as of all others."}
    )

    def __post_init__(self) -> None:
        if self.embedding_bits is not None:
            # The same limits as those of the others.
            self.of_tables()
            _check_tables_are_rounded(self)
        if type(self.bits) is not int or not 2 <= self.bits <= 16:
            raise ValueError(f"bits={self.bits} are no fixed-point format: give 2 to 16, or BinaryConfig for one bit.")
        if self.activations is not None and (type(self.activations) is not int or not 4 <= self.activations <= 16):
            raise ValueError(f"activations={self.activations} bits cannot be had: give 4 to 16, or None for floats.")
        if self.granularity not in ("per_channel", "per_tensor", "group"):
            raise ValueError(
                f"granularity={self.granularity!r} is unknown: give 'per_channel', 'per_tensor' or 'group'."
            )
        if type(self.group_size) is not int or self.group_size < 2:
            raise ValueError(f"group_size={self.group_size} is no size of groups: give a whole number from 2, 32 say.")
        if self.ranges not in ("minmax", "percentile", "mse"):
            raise ValueError(f"ranges={self.ranges!r} are unknown: give 'minmax', 'percentile' or 'mse'.")
        if not 50 < self.percentile <= 100:
            raise ValueError(f"percentile={self.percentile} must be above 50 and at most 100: give 99.9, say.")

    def of_tables(self) -> "FixedPointConfig":
        """The format of the tables of embeddings."""
        bits = self.bits if self.embedding_bits is None else self.embedding_bits
        return replace(self, bits=bits, embedding_bits=None)


def _check_tables_are_rounded(config: Int8DynamicConfig | FixedPointConfig) -> None:
    if not config.embeddings:
        raise ValueError(
            f"embedding_bits={config.embedding_bits} says how tables of embeddings are rounded, and embeddings=False "
            "leaves them as they are: give embeddings=True, or leave embedding_bits out."
        )
