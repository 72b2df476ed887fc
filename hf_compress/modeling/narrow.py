"""Making a model narrower by weight alone: the heads, neurons and hidden channels whose weights are largest stay.

Heads and neurons are cut in place. The hidden size runs through every module, so a new model of it is built, and each
tensor is cut along the axes in which the new model's shapes differ: no architecture is named here.
"""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_compress.modeling.blocks import FFN, Attention, find_blocks, find_layout, find_stacks
from hf_compress.modeling.projections import keep, read_matrix
from hf_compress.modeling.surgery import keep_heads_, keep_neurons_, keep_stack_heads_
from hf_compress.modeling.tasks import unwrap

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def unit_importance(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Importance of units that work through several matrices in turn: the product of their norms in each.

    A unit whose weights are zero in any one of them is worth nothing. Norms are divided by the Frobenius norm of the
    matrix, so that units of unlike blocks compare.

    Args:
        parts (sequence of `torch.Tensor`): Per matrix, all weights of each unit, shape (units, anything).

    Returns:
        `torch.Tensor`: Shape (units,), in float32.
    """
    return torch.stack([_relative_squares(part).sqrt() for part in parts]).prod(0)


def channel_importance(matrices: Sequence[torch.Tensor], norms: Sequence[torch.Tensor]) -> torch.Tensor:
    """Importance of hidden channels: `sum |N_c|^2 / |N|^2` over the norms times `sqrt(sum |M_c|^2 / |M|^2)`.

    The second factor sums over all matrices that read or write the channels, each divided by its Frobenius norm so
    that none counts for more by its scale. Alone it misleads: matrices make up for norms, and read with large weights
    the channels to which the norms give little. The first factor is the mean square that the norms give a channel.

    Args:
        matrices (sequence of `torch.Tensor`): Per matrix, all weights of each channel, shape (channels, anything).
        norms (sequence of `torch.Tensor`): Per norm, its weight for each channel, and its bias where it has one, shape
            (channels, 1 or 2).

    Returns:
        `torch.Tensor`: Shape (channels,), in float32.
    """
    of_matrices = torch.stack([_relative_squares(matrix) for matrix in matrices]).sum(0)
    of_norms = torch.stack([_relative_squares(norm) for norm in norms]).sum(0)
    return of_norms * of_matrices.sqrt()


def strongest(importance: torch.Tensor, number: int) -> list[int]:
    """Indices of the largest entries.

    Args:
        importance (`torch.Tensor`): Shape (units,).
        number (`int`): How many to take.

    Returns:
        `list[int]`: In rising order; among equals, the first.
    """
    return importance.argsort(descending=True, stable=True)[:number].sort().values.tolist()


def head_importance(attention: Attention) -> torch.Tensor:
    """What each unit of an attention that can be cut weighs: the norms of its q, k, v and output weights, multiplied.

    Args:
        attention (`Attention`): From `find_blocks`.

    Returns:
        `torch.Tensor`: Shape (groups,): per head, or summed over the heads that share their k and v.
    """
    groups, size = attention.num_groups, attention.group_size
    rows = [_rows(projection) for projection in attention.inputs]
    query, key, value = rows[0].chunk(3) if attention.is_fused else rows
    shared = [part.reshape(groups, -1).repeat_interleave(size, 0) for part in (key, value)]
    own = [part.reshape(groups * size, -1) for part in (query, _columns(attention.output))]
    return unit_importance([*own, *shared]).reshape(groups, size).sum(1)


def neuron_importance(ffn: FFN) -> torch.Tensor:
    """What each neuron weighs: the norms of its weights in every projection, multiplied.

    Args:
        ffn (`FFN`): From `find_blocks`.

    Returns:
        `torch.Tensor`: Shape (neurons,).
    """
    rows = [part for projection in ffn.inputs for part in _rows(projection).chunk(ffn.layout.fused)]
    return unit_importance([*rows, _columns(ffn.output)])


def keep_strongest_heads_(model: nn.Module, number: int, stack: str) -> None:
    """Keep the most important heads in each attention of a stack; the same ones in all blocks where they must agree.

    Args:
        model (`nn.Module`): A Transformers model, wrapped or not.
        number (`int`): Heads of each attention; a multiple of the heads that share their k and v.
        stack (`str`): Which stack.
    """
    by_kind: dict[str, list[Attention]] = {}
    for block in find_blocks(model, stack):
        for part in block.attentions:
            by_kind.setdefault(part.kind, []).append(part)
    for kind, parts in by_kind.items():
        if parts[0].is_stack_wide:
            importance = torch.stack([head_importance(part) for part in parts]).sum(0)
            keep_stack_heads_(model, strongest(importance, number // parts[0].group_size), stack, kind)
            continue
        for part in parts:
            keep_heads_(part, strongest(head_importance(part), number // part.group_size))


def keep_strongest_neurons_(model: nn.Module, number: int) -> None:
    """Keep the most important neurons of each feed-forward network.

    Args:
        model (`nn.Module`): A Transformers model, wrapped or not.
        number (`int`): Neurons of each network.

    Raises:
        ValueError: if a network has fewer.
    """
    blocks = find_blocks(model)
    fewest = min(block.ffn.width for block in blocks)
    if number > fewest:
        raise ValueError(
            f"intermediate_size={number} cannot be cut from feed-forward networks of {fewest} neurons: "
            f"give 1 to {fewest}."
        )
    for block in blocks:
        keep_neurons_(block.ffn, strongest(neuron_importance(block.ffn), number))


def hidden_width(model: nn.Module) -> int:
    """The hidden size of a model, as its config says.

    Args:
        model (`nn.Module`): A Transformers model, wrapped or not.

    Returns:
        `int`: Width of the residual stream.
    """
    config = unwrap(model).config
    return getattr(config, find_layout(config).hidden_size)


def plan_heads(model: nn.Module, hidden_size: int | None = None, num_heads: int | None = None) -> dict[str, int]:
    """How many heads each stack has to be cut to, so that a stock config can express the sizes asked for.

    Where no config key sets the width of a head, a new hidden size decides the number of heads: their width stays.

    Args:
        model (`nn.Module`): A Transformers model, wrapped or not.
        hidden_size (`int`, *optional*): The new hidden size; `None` if it stays, where any number of heads will do.
        num_heads (`int`, *optional*): Heads asked for, in each attention of each stack.

    Returns:
        `dict[str, int]`: Heads by stack, of the stacks whose heads are to be cut.

    Raises:
        ValueError: if the sizes cannot be cut from this model, or no stock config can express them together.
    """
    if hidden_size is not None and hidden_size > hidden_width(model):
        raise ValueError(
            f"hidden_size={hidden_size} cannot be cut from a hidden size of {hidden_width(model)}: give a smaller one."
        )
    layout = find_layout(unwrap(model).config)
    plan = {}
    for stack in find_stacks(model):
        attentions = [part for block in find_blocks(model, stack) for part in block.attentions]
        wanted = num_heads
        if hidden_size is not None and layout.head_dim is None:
            wanted = _heads_of_hidden(hidden_size, num_heads, attentions[0].head_dim, stack)
        if wanted is not None:
            _check_heads(wanted, attentions, stack, None if num_heads else hidden_size)
            plan[stack] = wanted
        if hidden_size is not None and layout.heads_divide_hidden:
            _check_division(hidden_size, wanted or attentions[0].num_heads, attentions[0])
    return plan


def narrow_hidden(model: "PreTrainedModel", hidden_size: int) -> "PreTrainedModel":
    """A copy of a model with only its most important hidden channels, all other sizes as they are.

    One choice of channels holds for the whole model, since the residual stream runs through all of it. Norms keep the
    weights of the channels that stay.

    Args:
        model (`PreTrainedModel`): A model whose heads were cut to what `plan_heads` says; left untouched.
        hidden_size (`int`): Channels to keep.

    Returns:
        `PreTrainedModel`: A model of the same class whose config says its sizes, with the same ties, dtypes, devices
        and mode.

    Raises:
        ValueError: if a stock config cannot express the result, or a tensor cannot be cut.
    """
    config = _narrow_config(model, hidden_size)
    with torch.device("meta"):
        narrow = type(model)(config)
    axes = _hidden_axes(model, narrow, hidden_size)
    kept = strongest(channel_importance(*_channel_weights(model, axes)), hidden_size)
    copies: dict[int, torch.Tensor] = {}
    tensors = _tensors(model)
    for name, along in axes.items():
        tensor = tensors[name]
        if id(tensor) not in copies:
            copies[id(tensor)] = _keep_channels(tensor, along, kept)
        owner, _, leaf = name.rpartition(".")
        setattr(narrow.get_submodule(owner), leaf, copies[id(tensor)])
    if narrow.can_generate():
        narrow.generation_config = copy.deepcopy(model.generation_config)
    return narrow.train(model.training)


def _relative_squares(part: torch.Tensor) -> torch.Tensor:
    squares = part.float().flatten(1).pow(2).sum(1)
    # A matrix of zeros says nothing about its units: all are worth 0 in it.
    return squares / squares.sum().clamp_min(torch.finfo(squares.dtype).tiny)


def _rows(projection: nn.Module) -> torch.Tensor:
    """Weights by output, shape (out, in), or (out, in + 1) with the bias: a unit may live by its bias alone."""
    rows = read_matrix(projection).float()
    return rows if projection.bias is None else torch.cat([rows, projection.bias.detach().float()[:, None]], dim=1)


def _columns(projection: nn.Module) -> torch.Tensor:
    """Weights by input, shape (in, out)."""
    return read_matrix(projection).float().T


def _heads_of_hidden(hidden_size: int, num_heads: int | None, head_dim: int, stack: str) -> int:
    if hidden_size % head_dim:
        below = hidden_size // head_dim * head_dim
        options = " or ".join(str(size) for size in (below, below + head_dim) if size)
        raise ValueError(
            f"hidden_size={hidden_size} is not a multiple of {head_dim}, the width of a head in the {stack}, and no "
            f"config of this architecture sets that width apart: give hidden_size={options}."
        )
    heads = hidden_size // head_dim
    if num_heads not in (None, heads):
        raise ValueError(
            f"num_heads={num_heads} and hidden_size={hidden_size} contradict each other: this architecture's config "
            f"splits the hidden size among the heads, and a head of the {stack} is {head_dim} wide. Give "
            f"hidden_size={num_heads * head_dim}, or num_heads={heads}, or leave one of them out."
        )
    return heads


def _check_heads(wanted: int, attentions: list[Attention], stack: str, hidden_size: int | None) -> None:
    fewest = min(part.num_heads for part in attentions)
    if fewest == 0:
        raise ValueError(
            f"The heads of the {stack} cannot be cut to one number, because an attention of it was removed: leave "
            "num_heads and hidden_size out, or make the student from the model as it was before."
        )
    if wanted > fewest:
        asked = f"num_heads={wanted}" if hidden_size is None else f"hidden_size={hidden_size}, thus {wanted} heads,"
        advice = f"1 to {fewest} heads" if hidden_size is None else f"at most {fewest * attentions[0].head_dim}"
        raise ValueError(
            f"{asked} cannot be cut from the {stack}, where an attention has {fewest} heads: give {advice}."
        )
    size = attentions[0].group_size
    if wanted % size:
        below = wanted // size * size
        options = " or ".join(str(heads) for heads in (below, below + size) if heads)
        raise ValueError(
            f"num_heads={wanted} splits a group: each {size} heads share one key-value head and go together. "
            f"Give num_heads={options}."
        )


def _check_division(hidden_size: int, num_heads: int, attention: Attention) -> None:
    if hidden_size % num_heads == 0:
        return
    below = hidden_size // num_heads * num_heads
    sizes = " or ".join(str(size) for size in (below, below + num_heads) if size)
    units = range(attention.group_size, attention.num_heads + 1, attention.group_size)
    heads = ", ".join(str(number) for number in units if hidden_size % number == 0)
    raise ValueError(
        f"hidden_size={hidden_size} is not a multiple of its {num_heads} heads, which this architecture's config "
        f"demands: give hidden_size={sizes}{f', or num_heads out of {heads}' if heads else ''}."
    )


def _narrow_config(model: "PreTrainedModel", hidden_size: int) -> Any:
    layout = find_layout(model.config)
    config = copy.deepcopy(model.config)
    for key in layout.follows_hidden:
        if getattr(config, key, None) == hidden_width(model):
            setattr(config, key, hidden_size)
    sizes: dict[tuple[str, str], set[int]] = {}
    for stack, part in find_stacks(model).items():
        for block in find_blocks(model, stack):
            sizes.setdefault((part.ffn_width, "intermediate_size"), set()).add(block.ffn.width)
            for attention in block.attentions:
                sizes.setdefault((part.num_heads, "num_heads"), set()).add(attention.num_heads)
                if layout.num_kv_heads is not None:
                    sizes.setdefault((layout.num_kv_heads, "num_heads"), set()).add(attention.num_groups)
                if layout.head_dim is not None:
                    sizes.setdefault((layout.head_dim, "num_heads"), set()).add(attention.head_dim)
    for (key, field), found in sizes.items():
        if len(found) > 1:
            raise ValueError(
                f"hidden_size={hidden_size} asks for a stock config, but the blocks of this model differ: {key} would "
                f"be each of {sorted(found)}. Give {field} too, so that all blocks are alike."
            )
        setattr(config, key, *found)
    setattr(config, layout.hidden_size, hidden_size)
    return config


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, tied ones under each of their names."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def _hidden_axes(model: nn.Module, narrow: nn.Module, hidden_size: int) -> dict[str, tuple[int, ...]]:
    """By tensor, the axes along which the hidden channels lie: those in which the two models differ."""
    old, new = _tensors(model), _tensors(narrow)
    # A model whose last sliding layer was dropped still has its table of angles, which no checkpoint holds.
    unlike = sorted((old.keys() - new.keys()) & model.state_dict().keys() | (new.keys() - old.keys()))
    if unlike:
        raise ValueError(
            f"hidden_size={hidden_size} cannot be cut: this {type(model).__name__} and one built from its config with "
            f"that size do not have the same tensors: {', '.join(unlike[:4])} is in one alone. Give another "
            "hidden_size, or load the teacher with a stock AutoModelFor... class and merge adapters first."
        )
    change = (hidden_width(model), hidden_size)
    axes = {}
    for name, cut in new.items():
        tensor = old[name]
        pairs = list(zip(tensor.shape, cut.shape, strict=True))
        if any(pair[0] != pair[1] and pair != change for pair in pairs):
            raise ValueError(
                f"hidden_size={hidden_size} cannot be cut: {name} has the shape {tuple(tensor.shape)} and would need "
                f"{tuple(cut.shape)}, which is more than a choice of channels. Leave hidden_size out."
            )
        axes[name] = tuple(axis for axis, pair in enumerate(pairs) if pair == change)
    return axes


def _channel_weights(
    model: nn.Module, axes: dict[str, tuple[int, ...]]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What the matrices and the norms hold for each hidden channel, channels first."""
    found = {name: parameter.detach() for name, parameter in model.named_parameters() if axes[name]}
    matrices = [tensor.movedim(axis, 0) for name, tensor in found.items() if tensor.ndim > 1 for axis in axes[name]]
    norms = []
    for name, tensor in found.items():
        owner, _, leaf = name.rpartition(".")
        # Of the vectors, only norms' are weights: the others are biases of projections.
        if tensor.ndim == 1 and leaf == "weight":
            bias = found.get(f"{owner}.bias")
            norms.append(torch.stack([tensor] if bias is None else [tensor, bias], dim=1))
    return matrices, norms


def _keep_channels(tensor: torch.Tensor, axes: tuple[int, ...], kept: list[int]) -> torch.Tensor:
    for axis in axes:
        tensor = keep(tensor, kept, axis)
    return tensor if axes else copy.deepcopy(tensor)
