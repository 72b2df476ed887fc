"""The roles that modules play in any architecture: the records of which `layouts.py` is made.

Every path is a dotted module name. Attributes and config keys are named only where something must be read or set.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AttentionLayout:
    """One attention of a block; paths are relative to `module`."""

    module: str
    """Path in the block of the module that holds all projections."""
    inputs: tuple[str, ...]
    """The q, k and v projections in this order; a single name where they are one projection, split in thirds."""
    output: str
    """The output projection; its input is the heads' contexts side by side."""
    head_dim: str
    """Attribute with the width of one head."""
    attributes: str = ""
    """Submodule that computes the heads, with `head_dim` and the attributes below; empty for `module` itself."""
    tail: tuple[str, ...] = ()
    """What that submodule runs last, one after the other: `output` and dropout; none where `output` is outside it."""
    post_norm: str | None = None
    """The norm in that submodule of its input plus what the tail gives, where the norm is not outside it."""
    passes_on: tuple[str, ...] = ()
    """Keyword arguments that it returns after its states, before the weights of its heads."""
    kind: str = "self"
    """`"self"` or `"cross"` (over the encoder's states)."""
    present_if: str | None = None
    """Config key that says whether blocks have this attention; `None` where all have it."""
    extra_inputs: tuple[str, ...] = ()
    """More projections onto the heads, where the config asks for them: those of relative positions."""
    head_count: tuple[str, ...] = ()
    """Attributes with the number of heads, set after a cut."""
    all_heads_width: tuple[str, ...] = ()
    """Attributes with heads x head width, set after a cut."""
    kv_group_size: str | None = None
    """Attribute with the number of heads per key-value head, where there may be more than one."""
    has_plain_scores: bool = False
    """Whether scores are q times k over the root of the head's width, with nothing rotated, normed or added later."""
    plain_scores_if: tuple[tuple[str, Any], ...] = ()
    """Config keys that must have these values for that, or be missing."""

    def computes_plain_scores(self, config: Any) -> bool:
        """Whether the scores of a model of some config are so."""
        values = (getattr(config, key, value) == value for key, value in self.plain_scores_if)
        return self.has_plain_scores and all(values)


@dataclass(frozen=True)
class FFNLayout:
    """The feed-forward network of a block; paths are relative to `module`."""

    module: str
    """Path in the block of the module that holds all projections; empty for the block itself."""
    inputs: tuple[str, ...]
    """The projections onto the neurons: one, or two where the second gates the first."""
    output: str
    """The projection back; its input is the neurons."""
    fused: int = 1
    """How many neuron-wide projections each of `inputs` holds one after the other."""
    gated_inputs: tuple[str, ...] = ()
    """What `inputs` is where the config key `gated_if` is true."""
    gated_if: str | None = None
    """Config key that switches to `gated_inputs`."""
    width: tuple[str, ...] = ()
    """Attributes of `module` with the number of neurons, set after a cut."""


@dataclass(frozen=True)
class PositionBias:
    """A table of relative position biases, shape (buckets, heads), that all blocks of a stack share."""

    owner: str
    """Path of the module that holds the table: in the block if `in_first_block`, else in the base model."""
    table: str
    """Name of the `nn.Embedding` in `owner`."""
    in_first_block: bool
    """Whether the first block owns it and hands its biases on to the next ones."""
    flag: str | None = None
    """Attribute of `owner` that is true in the one block that has the table."""
    head_count: str | None = None
    """Attribute of `owner` with the number of heads, where no attention layout names it already."""


@dataclass(frozen=True)
class Requirement:
    """A config value outside of which the facts here do not hold."""

    key: str
    """Config key; a config without it has the required value."""
    value: Any
    """The required value."""
    reason: str
    """Why another value cannot be supported; the end of a sentence."""


@dataclass(frozen=True)
class StackLayout:
    """One list of blocks."""

    blocks: str
    """Path in the base model of the `nn.ModuleList`."""
    attentions: tuple[AttentionLayout, ...]
    """Self-attention first."""
    ffn: FFNLayout
    """The feed-forward network."""
    num_layers: str = "num_hidden_layers"
    """Config key with the number of blocks."""
    num_heads: str = "num_attention_heads"
    """Config key with the number of heads."""
    ffn_width: str = "intermediate_size"
    """Config key with the number of neurons."""
    own_config: str | None = None
    """Path in the base model of a submodel with a config of its own, for stacks whose config is a copy."""
    own_num_layers: str | None = None
    """Key of that config with the number of this stack's blocks."""
    cache_num_layers: str | None = None
    """Config key, beside `num_layers`, by which `generate` sizes its cache; without it, that takes the encoder's."""
    is_shared: bool = False
    """Whether there is one block, run `num_layers` times."""
    is_pre_norm: bool = False
    """Whether outputs of parts are added to what came before the norm; otherwise to the input of the part."""
    position_bias: PositionBias | None = None
    """The table of position biases, where there is one."""
    layers_require: tuple[Requirement, ...] = ()
    """What must hold for a block to be removed."""
    first_stays: str | None = None
    """Why the first block cannot be removed, the end of a sentence; `None` where it can."""
    first_stays_if: str | None = None
    """Config key that must be true, or above zero, for `first_stays` to apply; `None` where it always does."""


@dataclass(frozen=True)
class Layout:
    """One architecture. Task heads are named relative to the model, all other paths to the base model."""

    stacks: dict[str, StackLayout]
    """Lists of blocks by name; a headless or single-stack class may lack some."""
    token_embeddings: tuple[str, ...]
    """Embeddings of tokens, tied or not; none for images."""
    position_embeddings: tuple[str, ...] = ()
    """Learned tables or parameters of positions, where the config asks for them."""
    read_whole: tuple[str, ...] = ()
    """Of these tables, those that the model reads as they are, and looks no rows up in."""
    heads: tuple[str, ...] = ()
    """All modules beside the base model in the `AutoModelFor...` classes: together, the task heads."""
    pooler: str | None = None
    """Projection between the blocks and a head, which base models have and not all classes with a head do."""
    token_rows: tuple[str, ...] = ()
    """Tensors of task heads with one row per token."""
    token_columns: tuple[str, ...] = ()
    """Tensors of task heads with one column per token."""
    hidden_size: str = "hidden_size"
    """Config key with the width of the residual stream."""
    follows_hidden: tuple[str, ...] = ()
    """Config keys that stay equal to the hidden size where they are equal to it."""
    per_layer: tuple[str, ...] = ()
    """Config keys with a list of one entry per block."""
    num_kv_heads: str | None = None
    """Config key with the number of key-value heads."""
    head_dim: str | None = None
    """Config key that sets the width of a head; without one, a config cannot express fewer heads."""
    heads_divide_hidden: bool = False
    """Whether the number of heads must divide the hidden size even though `head_dim` is set."""
    pad_token_is_fixed: bool = False
    """Whether positions are counted from the id of the padding token, which then must not move."""
    requires: tuple[Requirement, ...] = ()
    """What must hold for this layout to be right."""
