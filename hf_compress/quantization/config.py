"""How weights and activations are rounded: one config for each number format."""

from dataclasses import dataclass, field


@dataclass
class Int8DynamicConfig:
    """Eight-bit weights per output channel, and activations rounded anew for each token.

    Args:
        exclude (`tuple[str, ...]`, *optional*): Modules that stay in floating point, besides the task head: dotted
            names of modules, or of what they are in, or regular expressions for such names.
        embeddings (`bool`, *optional*, defaults to `False`): Whether tables of embeddings are rounded too.
    """

    exclude: tuple[str, ...] = field(
        default=(), metadata={"help": "Modules that stay in floating point, besides the task head: names or patterns."}
    )
    embeddings: bool = field(default=False, metadata={"help": "Whether tables of embeddings are rounded too."})
