"""A live model seen through its layout: blocks, attentions and feed-forward networks with their true widths.

Widths are read from the weights, never from the config, so a model that was cut unevenly reads right.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_compress.modeling.layouts import LAYOUTS
from hf_compress.modeling.projections import in_width, out_width
from hf_compress.modeling.roles import AttentionLayout, FFNLayout, Layout, StackLayout
from hf_compress.modeling.tasks import unwrap


@dataclass(frozen=True, eq=False)
class Attention:
    """One attention of a live model.

    Attributes:
        name (`str`): Dotted name of `module` in the model.
        module (`nn.Module`): The module that holds the projections.
        layout (`AttentionLayout`): Where they are.
        is_stack_wide (`bool`): Whether all blocks of the stack that have heads must have the same ones.
        owns_bias (`bool`): Whether it holds the table of the position biases of all blocks of the stack.
    """

    name: str
    module: nn.Module
    layout: AttentionLayout
    is_stack_wide: bool
    owns_bias: bool

    @property
    def kind(self) -> str:
        """`"self"` or `"cross"`."""
        return self.layout.kind

    @property
    def inputs(self) -> tuple[nn.Module, ...]:
        """The q, k and v projections, or the one that fuses them in thirds; none where all heads were removed."""
        paths = self.layout.inputs if self.num_heads else ()
        return tuple(self.module.get_submodule(path) for path in paths)

    @property
    def extra_inputs(self) -> tuple[nn.Module, ...]:
        """Further projections onto the heads, those of relative positions."""
        found = (find_module(self.module, path) for path in self.layout.extra_inputs)
        return tuple(module for module in found if module is not None)

    @property
    def output(self) -> nn.Module:
        """The output projection; its input holds the heads side by side."""
        return self.module.get_submodule(self.layout.output)

    @property
    def output_name(self) -> str:
        """Dotted name of the output projection in the model."""
        return f"{self.name}.{self.layout.output}"

    @property
    def attributes(self) -> nn.Module:
        """The module whose attributes repeat the sizes."""
        return self.module.get_submodule(self.layout.attributes)

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return getattr(self.attributes, self.layout.head_dim)

    @property
    def num_heads(self) -> int:
        """Number of heads; 0 where the attention was removed."""
        return in_width(self.output) // self.head_dim

    @property
    def num_groups(self) -> int:
        """Number of key-value heads: of units that can be cut, since the heads of one group share their k and v."""
        if self.is_fused or not self.num_heads:
            return self.num_heads
        return out_width(self.inputs[1]) // self.head_dim

    @property
    def group_size(self) -> int:
        """Heads per key-value head; 1 unless the model uses grouped-query attention."""
        return self.num_heads // self.num_groups if self.num_groups else 1

    @property
    def is_fused(self) -> bool:
        """Whether one projection gives q, k and v."""
        return len(self.layout.inputs) == 1

    @property
    def unit_counts(self) -> tuple[int, ...]:
        """The lengths that a gate may have: one entry per group, or one per head."""
        return (self.num_groups, self.num_heads)


@dataclass(frozen=True, eq=False)
class FFN:
    """One feed-forward network of a live model.

    Attributes:
        name (`str`): Dotted name of `module` in the model.
        module (`nn.Module`): The module that holds the projections; the block itself where it has no own module.
        layout (`FFNLayout`): Where they are.
        input_paths (`tuple[str, ...]`): Those projections onto the neurons that this model has.
    """

    name: str
    module: nn.Module
    layout: FFNLayout
    input_paths: tuple[str, ...]

    @property
    def inputs(self) -> tuple[nn.Module, ...]:
        """The projections onto the neurons: one, or two where the network is gated and not fused."""
        return tuple(self.module.get_submodule(path) for path in self.input_paths)

    @property
    def output(self) -> nn.Module:
        """The projection back to the hidden size; its input holds the neurons."""
        return self.module.get_submodule(self.layout.output)

    @property
    def output_name(self) -> str:
        """Dotted name of the output projection in the model."""
        return f"{self.name}.{self.layout.output}"

    @property
    def width(self) -> int:
        """Number of neurons; 0 where the network was removed."""
        return in_width(self.output)

    @property
    def unit_counts(self) -> tuple[int, ...]:
        """The lengths that a gate may have: one entry per neuron."""
        return (self.width,)


@dataclass(frozen=True, eq=False)
class Block:
    """One transformer block of a live model.

    Attributes:
        index (`int`): Position in its stack, from 0.
        stack (`str`): `"encoder"` or `"decoder"`.
        name (`str`): Dotted name of `module` in the model.
        module (`nn.Module`): The block.
        attentions (`tuple[Attention, ...]`): Self-attention first, then cross-attention where there is one.
        ffn (`FFN`): The feed-forward network.
        repeats (`int`): How often a forward pass runs it; more than 1 where all layers share their weights.
        is_pre_norm (`bool`): Whether what a part gives is added to its input before the norm, and not after it.
    """

    index: int
    stack: str
    name: str
    module: nn.Module
    attentions: tuple[Attention, ...]
    ffn: FFN
    repeats: int = 1
    is_pre_norm: bool = False

    @property
    def attention(self) -> Attention:
        """The self-attention."""
        return self.attentions[0]


def find_blocks(model: nn.Module, stack: str | None = None) -> list[Block]:
    """The blocks of a model, stack after stack.

    Args:
        model (`nn.Module`): A Transformers model of any head class, wrapped or not.
        stack (`str`, *optional*): Only this stack.

    Returns:
        `list[Block]`: One entry per block that has weights of its own: a single one where all layers share theirs.

    Raises:
        ValueError: if the architecture is unknown, not supported with its config, or has no such stack.
    """
    model = unwrap(model)
    base_name = _base_name(model)
    names = list(find_stacks(model)) if stack is None else [check_stack(model, stack)]
    return [block for name in names for block in _stack_blocks(model, name, base_name)]


def find_stacks(model: nn.Module) -> dict[str, StackLayout]:
    """The stacks that a model really has: an encoder-decoder may come as its encoder alone.

    Args:
        model (`nn.Module`): A Transformers model, wrapped or not.

    Returns:
        `dict[str, StackLayout]`: Layouts by stack name, `"encoder"` before `"decoder"`.

    Raises:
        ValueError: if the architecture is unknown, or the class has none of its stacks.
    """
    model = unwrap(model)
    layout = find_layout(model.config)
    base = model.base_model
    found = {name: stack for name, stack in layout.stacks.items() if find_module(base, stack.blocks) is not None}
    if not found:
        paths = ", ".join(stack.blocks for stack in layout.stacks.values())
        raise ValueError(
            f"{type(model).__name__} has no blocks at {paths} of its base model, where model_type "
            f"{model.config.model_type!r} keeps them. Load it with a stock AutoModelFor... class."
        )
    return found


def find_layout(config: Any) -> Layout:
    """The layout of an architecture.

    Args:
        config (`PreTrainedConfig`): Config of a model.

    Returns:
        `Layout`: Where things are in such models.

    Raises:
        ValueError: if the `model_type` is unknown, or the config asks for a variant that is not supported.
    """
    if config.model_type not in LAYOUTS:
        raise ValueError(
            f"No layout for model_type {config.model_type!r}: known are {', '.join(sorted(LAYOUTS))}. "
            'To add one, follow the section "Adding an architecture" of CONTRIBUTING.md.'
        )
    layout = LAYOUTS[config.model_type]
    for requirement in layout.requires:
        value = getattr(config, requirement.key, requirement.value)
        if value != requirement.value:
            raise ValueError(
                f"{config.model_type} with {requirement.key}={value!r} cannot be compressed: {requirement.reason}. "
                f"Use a checkpoint with {requirement.key}={requirement.value!r}."
            )
    return layout


def count_layers(model: nn.Module, stack: str | None = None) -> int:
    """How many blocks a forward pass runs through; layers that share their weights count each.

    Args:
        model (`nn.Module`): A Transformers model, wrapped or not.
        stack (`str`, *optional*): Which stack, for models with more than one.

    Returns:
        `int`: The number of layers.

    Raises:
        ValueError: if the model has no such stack, or several and none is named.
    """
    return sum(block.repeats for block in find_blocks(model, check_stack(model, stack)))


def check_stack(model: nn.Module, stack: str | None) -> str:
    """The name of a stack, filled in where there is only one.

    Args:
        model (`nn.Module`): A Transformers model, wrapped or not.
        stack (`str`, *optional*): The name asked for.

    Returns:
        `str`: The name of an existing stack.

    Raises:
        ValueError: if the model has no such stack, or several and none is named.
    """
    known = list(find_stacks(model))
    if stack is None and len(known) == 1:
        return known[0]
    if stack not in known:
        options = " or ".join(f"stack={name!r}" for name in known)
        raise ValueError(f"stack={stack!r} does not name a stack of this {type(model).__name__}: give {options}.")
    return stack


def embedding_names(model: nn.Module) -> list[str]:
    """Dotted names of the token and position embeddings, tokens first; a table that is a parameter counts too."""
    model = unwrap(model)
    layout = find_layout(model.config)
    base = model.base_model
    paths = layout.token_embeddings + layout.position_embeddings
    present = [path for path in paths if find_module(base, path) is not None or path in dict(base.named_parameters())]
    return [join(_base_name(model), path) for path in present]


def lookup_tables(model: nn.Module) -> dict[str, nn.Embedding]:
    """The token and position embeddings that rows are looked up in by a plain `nn.Embedding`, by dotted name.

    Those of a class of its own, which scales rows or shifts positions, are not among them.
    """
    layout = find_layout(unwrap(model).config)
    whole = {join(_base_name(unwrap(model)), path) for path in layout.read_whole}
    found = {name: find_module(unwrap(model), name) for name in embedding_names(model) if name not in whole}
    return {name: module for name, module in found.items() if _stands_for(module) is nn.Embedding}


def _stands_for(module: nn.Module) -> type:
    """The class whose forward a module has, but for rounding: one that is trained for a number format says so."""
    return getattr(type(module), "stands_for", type(module))


def token_embeddings(model: nn.Module) -> list[nn.Embedding]:
    """The token embeddings of a model, tied or not; an encoder-decoder has up to three, an image model none."""
    model = unwrap(model)
    found = [find_module(model.base_model, path) for path in find_layout(model.config).token_embeddings]
    return [module for module in found if module is not None]


def task_head_names(model: nn.Module) -> list[str]:
    """Dotted names of the modules that turn the base model's states into predictions; empty for a headless model."""
    model = unwrap(model)
    return [path for path in find_layout(model.config).heads if find_module(model, path) is not None]


def find_module(root: nn.Module, path: str) -> nn.Module | None:
    """The submodule at a dotted path, or `None`."""
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None


def join(*names: str) -> str:
    """A dotted name of the non-empty parts."""
    return ".".join(name for name in names if name)


def _base_name(model: nn.Module) -> str:
    return "" if model.base_model is model else model.base_model_prefix


def _stack_blocks(model: nn.Module, stack: str, base_name: str) -> Iterator[Block]:
    layout = find_layout(model.config).stacks[stack]
    config = model.base_model.config
    repeats = getattr(config, layout.num_layers) if layout.is_shared else 1
    bias = layout.position_bias
    for index, module in enumerate(model.base_model.get_submodule(layout.blocks)):
        name = join(base_name, layout.blocks, str(index))
        attentions = tuple(
            Attention(
                name=join(name, part.module),
                module=module.get_submodule(part.module),
                layout=part,
                is_stack_wide=bias is not None,
                owns_bias=index == 0 and bias is not None and bias.in_first_block and bias.owner == part.module,
            )
            for part in layout.attentions
            if part.present_if is None or getattr(config, part.present_if)
        )
        is_gated = layout.ffn.gated_if is not None and getattr(config, layout.ffn.gated_if)
        ffn = FFN(
            name=join(name, layout.ffn.module),
            module=module.get_submodule(layout.ffn.module),
            layout=layout.ffn,
            input_paths=layout.ffn.gated_inputs if is_gated else layout.ffn.inputs,
        )
        yield Block(index, stack, name, module, attentions, ffn, repeats, layout.is_pre_norm)
