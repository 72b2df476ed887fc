"""Cutting a model in place: keep some heads, neurons or layers. The class of the model stays what it is.

Cut before an optimizer is made: the parameters are new objects afterwards. Call `update_config_` once all is cut.
Tokens are cut in `tokens.py`.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_compress.modeling.blocks import (
    FFN,
    Attention,
    check_stack,
    count_layers,
    find_blocks,
    find_layout,
    find_stacks,
)
from hf_compress.modeling.projections import check_indices, keep, keep_inputs_, keep_outputs_, spread
from hf_compress.modeling.roles import PositionBias, StackLayout
from hf_compress.modeling.tasks import unwrap


def keep_heads_(attention: Attention, heads: Iterable[int]) -> None:
    """Keep some heads of one attention, whole key-value groups under grouped-query attention.

    Args:
        attention (`Attention`): From `find_blocks`.
        heads (`Iterable[int]`): Indices below `attention.num_groups`: heads, or key-value groups with all their heads.

    Raises:
        ValueError: if an index is wrong, or all blocks of the stack must have the same heads.
        TypeError: if a projection is neither `nn.Linear` nor `Conv1D`, or is quantized.
    """
    if attention.is_stack_wide:
        raise ValueError(
            f"The heads of {attention.name} cannot be cut alone: all blocks of its stack share one position bias per "
            "head, so they must keep the same heads. Use keep_stack_heads_(model, heads, stack)."
        )
    _keep_heads_(attention, check_indices(heads, attention.num_groups, "heads", _head_unit(attention)))


def keep_stack_heads_(model: nn.Module, heads: Iterable[int], stack: str | None = None, kind: str = "self") -> None:
    """Keep the same heads in all blocks of a stack that have any, and in the position bias that they share.

    Args:
        model (`nn.Module`): A Transformers model, wrapped or not.
        heads (`Iterable[int]`): Indices of heads (key-value groups under grouped-query attention).
        stack (`str`, *optional*): Which stack, for models with more than one.
        kind (`str`, *optional*, defaults to `"self"`): `"self"` or `"cross"` attention.

    Raises:
        ValueError: if an index is wrong, or the stack has no attention of this kind.
    """
    model = unwrap(model)
    stack = check_stack(model, stack)
    attentions = [part for block in find_blocks(model, stack) for part in block.attentions if part.kind == kind]
    if not attentions:
        raise ValueError(f'The {stack} of {type(model).__name__} has no attention of kind={kind!r}: use kind="self".')
    # What was removed as a whole is no longer among those that must agree.
    attentions = [part for part in attentions if part.num_heads] or attentions
    kept = check_indices(heads, min(part.num_groups for part in attentions), "heads", _head_unit(attentions[0]))
    for attention in attentions:
        _keep_heads_(attention, kept)
    bias = find_stacks(model)[stack].position_bias
    if bias is not None and kind == "self":
        _keep_bias_heads_(_bias_owners(model, stack)[0], bias, kept)


def keep_neurons_(ffn: FFN, neurons: Iterable[int]) -> None:
    """Keep some neurons of one feed-forward network.

    Args:
        ffn (`FFN`): From `find_blocks`.
        neurons (`Iterable[int]`): Indices below `ffn.width`.

    Raises:
        ValueError: if an index is wrong.
        TypeError: if a projection is neither `nn.Linear` nor `Conv1D`, or is quantized.
    """
    width = ffn.width
    kept = check_indices(neurons, width, "neurons", "neurons")
    keep_inputs_(ffn.output, kept)
    for projection in ffn.inputs:
        keep_outputs_(projection, [part * width + index for part in range(ffn.layout.fused) for index in kept])
    for attribute in ffn.layout.width:
        setattr(ffn.module, attribute, len(kept))


def keep_layers_(model: nn.Module, layers: Iterable[int], stack: str | None = None) -> None:
    """Keep some layers of one stack; the others are gone as if the hidden states passed them by unchanged.

    The config follows: number of layers, lists with an entry per layer, and every `layer_idx`, so that the model saves
    and reloads as a stock checkpoint. Where all layers share their weights, only how many are kept matters.

    Args:
        model (`nn.Module`): A Transformers model, wrapped or not.
        layers (`Iterable[int]`): Indices of layers in rising order.
        stack (`str`, *optional*): Which stack, for models with more than one.

    Raises:
        ValueError: if an index is wrong, the order does not rise, or the stock config cannot express the result.
    """
    model = unwrap(model)
    stack = check_stack(model, stack)
    layout = find_stacks(model)[stack]
    size = count_layers(model, stack)
    kept = check_indices(layers, size, "layers", f"layers in the {stack}")
    if kept != sorted(kept):
        raise ValueError(f"layers={kept} are not in rising order, but layers cannot change places: sort them.")
    if len(kept) == size:
        return
    _check_layers(model.config, layout, kept)
    if not layout.is_shared:
        _keep_blocks_(model, stack, layout, kept)
    _write_layer_count_(model, layout, kept)
    _forget_missing_(model)


def _forget_missing_(model: nn.Module) -> None:
    """Takes weights that went out of the list of those that may be stored without their zeros."""
    method = vars(model.config).get("quantization_config")
    if getattr(method, "sparse", None):
        names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        method.sparse = [name for name in method.sparse if name in names] or None


def first_layer_stays(model: nn.Module, stack: str | None = None) -> bool:
    """Whether a stack cannot do without its first layer, because that has parts that no other layer has.

    Args:
        model (`nn.Module`): A Transformers model, wrapped or not.
        stack (`str`, *optional*): Which stack, for models with more than one.

    Returns:
        `bool`: True if `keep_layers_` would refuse to drop layer 0.
    """
    model = unwrap(model)
    return _first_stays(model.config, find_stacks(model)[check_stack(model, stack)]) is not None


def check_layers_can_go(model: nn.Module, stack: str | None = None) -> None:
    """Refuses models whose config keeps any layer from being removed.

    Args:
        model (`nn.Module`): A Transformers model, wrapped or not.
        stack (`str`, *optional*): Which stack, for models with more than one.

    Raises:
        ValueError: if `keep_layers_` would refuse to drop any layer.
    """
    model = unwrap(model)
    _check_requirements(model.config, find_stacks(model)[check_stack(model, stack)])


def update_config_(model: nn.Module) -> bool:
    """Write into the config what the live widths allow, after heads, neurons or layers were cut.

    The width of the feed-forward networks is written where all blocks agree, the number of heads where they agree and
    the config can set the width of a head apart from it. No config can say that a part was removed.

    Args:
        model (`nn.Module`): A Transformers model, wrapped or not.

    Returns:
        `bool`: Whether the config now describes the model in full, so that stock `from_pretrained` rebuilds it.
    """
    model = unwrap(model)
    widths: dict[str, set[int]] = defaultdict(set)
    heads: dict[str, set[tuple[int, int, int]]] = defaultdict(set)
    for stack, layout in find_stacks(model).items():
        for block in find_blocks(model, stack):
            widths[layout.ffn_width].add(block.ffn.width)
            for part in block.attentions:
                heads[layout.num_heads].add((part.num_heads, part.num_groups, part.head_dim))
    written = [_write_width_(model, key, values) for key, values in widths.items()]
    written += [_write_heads_(model, key, values) for key, values in heads.items()]
    return all(written)


def configs(model: nn.Module) -> list[Any]:
    """The config of a model and the copies of it that its submodels hold.

    Args:
        model (`nn.Module`): A Transformers model.

    Returns:
        `list[PreTrainedConfig]`: Distinct objects, the model's own first.
    """
    found = [part.config for part in model.modules() if isinstance(part, PreTrainedModel)]
    return list({id(config): config for config in found}.values())


def _head_unit(attention: Attention) -> str:
    return "heads" if attention.group_size == 1 else f"key-value groups (of {attention.group_size} heads)"


def _keep_heads_(attention: Attention, kept: list[int]) -> None:
    layout, head_dim = attention.layout, attention.head_dim
    group_size, num_groups = attention.group_size, attention.num_groups
    of_heads = spread(kept, group_size * head_dim)
    of_groups = spread(kept, head_dim)
    if attention.is_fused:
        thirds = [third * num_groups * head_dim + index for third in range(3) for index in of_groups]
        selections = [thirds]
    else:
        selections = [of_heads, of_groups, of_groups]
    keep_inputs_(attention.output, of_heads)
    for projection, selection in zip(attention.inputs, selections, strict=True):
        keep_outputs_(projection, selection)
    for projection in attention.extra_inputs:
        keep_outputs_(projection, of_heads)
    for attribute in layout.head_count:
        setattr(attention.attributes, attribute, len(kept) * group_size)
    for attribute in layout.all_heads_width:
        setattr(attention.attributes, attribute, len(of_heads))


def _bias_owners(model: nn.Module, stack: str) -> list[nn.Module]:
    bias = find_stacks(model)[stack].position_bias
    if bias.in_first_block:
        return [block.module.get_submodule(bias.owner) for block in find_blocks(model, stack)]
    return [model.base_model.get_submodule(bias.owner)]


def _keep_bias_heads_(owner: nn.Module, bias: PositionBias, kept: list[int]) -> None:
    table = getattr(owner, bias.table)
    table.weight = keep(table.weight, kept, 1)
    table.embedding_dim = len(kept)
    if bias.head_count is not None:
        setattr(owner, bias.head_count, len(kept))


def _check_requirements(config: Any, layout: StackLayout) -> None:
    for requirement in layout.layers_require:
        value = getattr(config, requirement.key, requirement.value)
        if value != requirement.value:
            raise ValueError(
                f"Layers cannot be removed with {requirement.key}={value!r}: {requirement.reason}. "
                f"Use a checkpoint with {requirement.key}={requirement.value!r}."
            )


def _check_layers(config: Any, layout: StackLayout, kept: list[int]) -> None:
    _check_requirements(config, layout)
    reason = _first_stays(config, layout)
    if reason is not None and kept[0] != 0:
        raise ValueError(
            f"layers={kept} drops the first layer, which no config of {config.model_type} can express: "
            f"{reason}. Keep layer 0."
        )


def _first_stays(config: Any, layout: StackLayout) -> str | None:
    is_special = layout.first_stays_if is None or getattr(config, layout.first_stays_if, False)
    return layout.first_stays if is_special else None


def _keep_blocks_(model: nn.Module, stack: str, layout: StackLayout, kept: list[int]) -> None:
    bias = layout.position_bias
    if bias is not None and bias.in_first_block and kept[0] != 0:
        if not find_blocks(model, stack)[kept[0]].attention.num_heads:
            raise ValueError(
                f"layers={kept} makes layer {kept[0]} the first of the {stack}, whose self-attention gives all others "
                "their position bias, but its self-attention was removed: keep a layer before it that has one."
            )
        owners = _bias_owners(model, stack)
        old, new = owners[0], owners[kept[0]]
        setattr(new, bias.table, getattr(old, bias.table))
        delattr(old, bias.table)
        setattr(old, bias.flag, False)
        setattr(new, bias.flag, True)
    blocks = model.base_model.get_submodule(layout.blocks)
    remaining = [blocks[index] for index in kept]
    del blocks[:]
    blocks.extend(remaining)
    for index, block in enumerate(remaining):
        for module in block.modules():
            if "layer_idx" in vars(module):
                module.layer_idx = index


def _write_layer_count_(model: nn.Module, layout: StackLayout, kept: list[int]) -> None:
    config = model.base_model.config
    for key in find_layout(config).per_layer:
        if getattr(config, key, None) is not None:
            setattr(config, key, [getattr(config, key)[index] for index in kept])
    setattr(config, layout.num_layers, len(kept))
    if layout.own_config is not None:
        own = model.base_model.get_submodule(layout.own_config).config
        setattr(own, layout.own_num_layers, len(kept))
    for name, stack in find_stacks(model).items():
        if stack.cache_num_layers is not None:
            setattr(config, stack.cache_num_layers, count_layers(model, name))


def _set_config_(model: nn.Module, key: str, value: Any) -> None:
    for config in configs(model):
        setattr(config, key, value)


def heads_fit_config(model: nn.Module, num_heads: int) -> bool:
    """Whether a class of this model can be built with so many heads of the width that they have.

    Args:
        model (`nn.Module`): A model of a known architecture.
        num_heads (`int`): In every attention.
    """
    config = model.base_model.config
    layout = find_layout(config)
    return num_heads > 0 and not (layout.heads_divide_hidden and getattr(config, layout.hidden_size) % num_heads)


def shrink_unread_bias_(model: nn.Module, stack: str) -> None:
    """Leaves one column of a stack's position biases where no attention is left that reads them.

    How many heads there were is not known where such a model is loaded.

    Args:
        model (`nn.Module`): Is changed.
        stack (`str`): Name of a stack.
    """
    bias = find_stacks(model)[stack].position_bias
    if bias is not None and not any(block.attention.num_heads for block in find_blocks(model, stack)):
        _keep_bias_heads_(_bias_owners(model, stack)[0], bias, [0])


def _write_width_(model: nn.Module, key: str, found: set[int]) -> bool:
    is_even = len(found) == 1 and found != {0}
    if is_even:
        _set_config_(model, key, *found)
    return is_even


def _write_heads_(model: nn.Module, key: str, found: set[tuple[int, int, int]]) -> bool:
    layout, config = find_layout(model.config), model.base_model.config
    if len(found) != 1:
        return False
    ((num_heads, num_groups, head_dim),) = found
    if num_heads == 0:
        return False
    num_kv_heads = getattr(config, layout.num_kv_heads) if layout.num_kv_heads else num_groups
    if (num_heads, num_groups) == (getattr(config, key), num_kv_heads):
        return True
    if layout.head_dim is None or not heads_fit_config(model, num_heads):
        return False
    _set_config_(model, layout.head_dim, head_dim)
    _set_config_(model, key, num_heads)
    if layout.num_kv_heads is not None:
        _set_config_(model, layout.num_kv_heads, num_groups)
    return True
