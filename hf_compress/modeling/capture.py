"""Reading and gating what flows through a model: context managers that hang hooks on it and always take them off.

Hooks sit on the modules that do the work, so they see every forward pass, whichever attention implementation runs and
whatever wraps the model. Tensors are handed over as they are, with their graph: wrap the forward pass in
`torch.no_grad()` where no gradient is wanted.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from hf_compress.modeling.blocks import FFN, Attention, Block, check_stack, count_layers, find_blocks
from hf_compress.modeling.projections import check_indices, in_width
from hf_compress.modeling.tasks import unwrap

# Of a training that ends by an exception, nobody is told; its gates would be copied and trained on with the model.
_HUNG: WeakKeyDictionary[nn.Module, ExitStack] = WeakKeyDictionary()


class QKV(NamedTuple):
    """What an attention compares and mixes.

    Attributes:
        q (`torch.Tensor`): Shape (batch, heads, length, head_dim).
        k (`torch.Tensor`): Shape (batch, key-value heads, length, head_dim).
        v (`torch.Tensor`): Shape (batch, key-value heads, length, head_dim).
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


@contextmanager
def gate_outputs(gates: Mapping[Attention | FFN, torch.Tensor]) -> Iterator[None]:
    """Multiply heads and neurons by gates, just before the projection that brings them back to the hidden size.

    A gate of 0 removes a unit exactly as `keep_heads_` or `keep_neurons_` would. A gate with a batch axis and
    `requires_grad` yields the gradient of every sample from one backward pass.

    Args:
        gates (`Mapping[Attention | FFN, torch.Tensor]`): Gates by the attention or network they act on. Shape
            (units,) or (batch, units), where units is the number of heads, of key-value groups, or of neurons.

    Raises:
        ValueError: if a gate has the wrong shape, or in the forward pass another batch size than the input.
    """
    for part, gate in gates.items():
        if gate.ndim not in (1, 2) or gate.shape[-1] not in part.unit_counts:
            units = " or ".join(str(count) for count in dict.fromkeys(part.unit_counts))
            raise ValueError(
                f"The gate of {part.name} has shape {tuple(gate.shape)}, but that has {units} units: "
                f"give a tensor of shape ({units},) or (batch, {units})."
            )
    with ExitStack() as hooks:
        for part, gate in gates.items():
            hooks.enter_context(part.output.register_forward_pre_hook(_gate_hook(part, gate)))
        yield


def hang_gates_(model: nn.Module, gates: Mapping[Attention | FFN, torch.Tensor]) -> ExitStack:
    """Like `gate_outputs`, for as long as a training takes.

    Args:
        model (`nn.Module`): The model, not wrapped.
        gates (`Mapping[Attention | FFN, torch.Tensor]`): Gates of its parts.

    Returns:
        `ExitStack`: Close it to take them off; `release_gates_` does that too.
    """
    hooks = _HUNG[model] = ExitStack()
    hooks.enter_context(gate_outputs(gates))
    return hooks


def release_gates_(model: nn.Module) -> None:
    """Takes off the gates of a training that was interrupted; what it switched off stays 0.

    Args:
        model (`nn.Module`): Any model.
    """
    _HUNG.pop(unwrap(model), ExitStack()).close()


@contextmanager
def visit_inputs(parts: Iterable[Attention | FFN], visit: Callable[[Any, torch.Tensor], None]) -> Iterator[None]:
    """Call a function with each input of chosen output projections, and store nothing.

    Args:
        parts (`Iterable[Attention | FFN]`): Attentions and feed-forward networks.
        visit (`Callable`): Called as `visit(part, inputs)`; `inputs` has shape (batch, length, width), where width is
            heads x head width, or the number of neurons.
    """
    with ExitStack() as hooks:
        for part in parts:
            hook = part.output.register_forward_pre_hook(lambda _, args, part=part: visit(part, args[0]))
            hooks.enter_context(hook)
        yield


@contextmanager
def capture_inputs(parts: Iterable[Attention | FFN]) -> Iterator[dict[Attention | FFN, list[torch.Tensor]]]:
    """Keep the inputs of chosen output projections.

    Args:
        parts (`Iterable[Attention | FFN]`): Attentions and feed-forward networks.

    Returns:
        `dict[Attention | FFN, list[torch.Tensor]]`: Per part one tensor for each time it ran, shape
        (batch, length, width).
    """
    parts = list(parts)
    inputs: dict[Attention | FFN, list[torch.Tensor]] = {part: [] for part in parts}
    with visit_inputs(parts, lambda part, tensor: inputs[part].append(tensor)):
        yield inputs


@contextmanager
def capture_hidden_states(
    model: nn.Module, layers: Iterable[int], stack: str | None = None
) -> Iterator[dict[int, torch.Tensor]]:
    """Keep chosen hidden states of the last forward pass.

    Numbers are those of the `hidden_states` that a model returns with `output_hidden_states=True`: 0 is what enters
    the first layer (the embeddings' output), i what layer number i, counted from 1, passes on. The last one is taken
    before the final norm of a model that has one, whereas Transformers returns it after that norm.

    Args:
        model (`nn.Module`): A Transformers model, wrapped or not.
        layers (`Iterable[int]`): Numbers from 0 to `count_layers(model, stack)`.
        stack (`str`, *optional*): Which stack, for models with more than one.

    Returns:
        `dict[int, torch.Tensor]`: By number, shape (batch, length, hidden size); filled by the forward pass.

    Raises:
        ValueError: if a number is wrong, or the stack must be named.
    """
    stack = check_stack(model, stack)
    last = count_layers(model, stack)
    wanted = check_indices(layers, last + 1, "layers", "hidden states (the embeddings' output is number 0)")
    states: dict[int, torch.Tensor] = {}
    with ExitStack() as hooks:
        for block in find_blocks(model, stack):
            before, after = _state_hooks(states, set(wanted), last, _follow(block, hooks))
            hooks.enter_context(block.module.register_forward_pre_hook(before, with_kwargs=True))
            hooks.enter_context(block.module.register_forward_hook(after))
        yield states


@contextmanager
def capture_qkv(
    model: nn.Module, layers: Iterable[int], stack: str | None = None, kind: str = "self"
) -> Iterator[dict[int, QKV]]:
    """Keep what the q, k and v projections of chosen layers gave in the last forward pass, split into heads.

    Taken right after the projections: rotary embeddings, norms of q and k, and a cache come later.

    Args:
        model (`nn.Module`): A Transformers model, wrapped or not.
        layers (`Iterable[int]`): Indices of layers, from 0.
        stack (`str`, *optional*): Which stack, for models with more than one.
        kind (`str`, *optional*, defaults to `"self"`): `"self"` or `"cross"` attention.

    Returns:
        `dict[int, QKV]`: By index of the layer; filled by the forward pass. A layer whose attention was removed has
        no entry.

    Raises:
        ValueError: if an index is wrong, the stack must be named, or it has no attention of this kind.
    """
    stack = check_stack(model, stack)
    wanted = check_indices(layers, count_layers(model, stack), "layers", f"layers in the {stack}")
    blocks = [block for block in find_blocks(model, stack) if set(wanted) & set(_layers_of(block))]
    attentions = {block: part for block in blocks for part in block.attentions if part.kind == kind}
    if not attentions:
        raise ValueError(f'The {stack} of {type(model).__name__} has no attention of kind={kind!r}: use kind="self".')
    captured: dict[int, QKV] = {}
    with ExitStack() as hooks:
        for block, attention in attentions.items():
            parts: dict[int, torch.Tensor] = {}
            for place, projection in enumerate(attention.inputs):
                hooks.enter_context(projection.register_forward_hook(_part_hook(parts, place, attention)))
            # An interrupted pass, such as a recomputation for gradient checkpointing, may have left some behind.
            hooks.enter_context(attention.module.register_forward_pre_hook(_clear_hook(parts)))
            hook = _qkv_hook(captured, set(wanted), parts, _follow(block, hooks))
            hooks.enter_context(attention.module.register_forward_hook(hook))
        yield captured


def _gate_hook(part: Attention | FFN, gate: torch.Tensor) -> Callable[..., tuple[Any, ...]]:
    def multiply(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        inputs = args[0]
        if gate.ndim == 2 and gate.shape[0] != inputs.shape[0]:
            raise ValueError(
                f"The gate of {part.name} has batch size {gate.shape[0]}, but its input has {inputs.shape[0]}: "
                "give one row of gates per row of the batch, or a single gate for all."
            )
        # Of a removed part, both widths are 0.
        columns = gate.to(inputs).repeat_interleave(in_width(module) // max(gate.shape[-1], 1), dim=-1)
        if gate.ndim == 2:
            columns = columns.view(inputs.shape[0], *[1] * (inputs.ndim - 2), inputs.shape[-1])
        return (inputs * columns, *args[1:])

    return multiply


def _layers_of(block: Block) -> range:
    """The layers as which a block runs in one forward pass."""
    return range(block.index, block.index + block.repeats)


def _follow(block: Block, hooks: ExitStack) -> Callable[[], int]:
    """Keep track of the layer as which a block is running, and return a function that tells it."""
    if block.repeats == 1:
        # Counting would make torch.compile compile every pass anew.
        return lambda: block.index
    runs = 0

    def count(*_: Any) -> None:
        nonlocal runs
        runs += 1

    hooks.enter_context(block.module.register_forward_pre_hook(count))
    return lambda: block.index + (runs - 1) % block.repeats


def _state_hooks(
    states: dict[int, torch.Tensor], wanted: set[int], last: int, running: Callable[[], int]
) -> tuple[Callable[..., None], Callable[..., None]]:
    # A state is read where the next layer takes it in: what comes between two layers then belongs to the first.
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if running() in wanted:
            states[running()] = args[0] if args else kwargs["hidden_states"]

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if last in wanted and running() == last - 1:
            states[last] = output[0] if isinstance(output, tuple) else output

    return before, after


def _clear_hook(parts: dict[int, torch.Tensor]) -> Callable[..., None]:
    def clear(module: nn.Module, args: tuple[Any, ...]) -> None:
        parts.clear()

    return clear


def _part_hook(parts: dict[int, torch.Tensor], place: int, attention: Attention) -> Callable[..., None]:
    def split(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        for offset, part in enumerate(output.chunk(3, dim=-1) if attention.is_fused else (output,)):
            # The first call counts: DeBERTa runs the same projections again, on its relative positions.
            parts.setdefault(place + offset, part.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2))

    return split


def _qkv_hook(
    captured: dict[int, QKV], wanted: set[int], parts: dict[int, torch.Tensor], running: Callable[[], int]
) -> Callable[..., None]:
    def collect(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # A cached cross-attention computes no k and v: what its first pass gave stays.
        if len(parts) == 3 and running() in wanted:
            captured[running()] = QKV(parts[0], parts[1], parts[2])
        parts.clear()

    return collect
