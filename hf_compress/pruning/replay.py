"""Running a model block by block over stored batches, so that one block can change while the rest stands still."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from hf_compress.modeling.blocks import Block
from hf_compress.modeling.tasks import without_cache
from hf_compress.pruning.batches import Batch
from hf_compress.pruning.units import Part


class _Reached(Exception):  # noqa: N818 - no error: what a forward pass was started for is there
    pass


class Replay:
    """The forward passes of a model over some batches, continued from block to block.

    Blocks that are done hand on what they gave, so that a pass costs one block. The model may change in between: what
    was handed on stays, which is how two states of a model, before and after a change, are followed side by side.

    Args:
        model (`nn.Module`): A Transformers model of a known architecture.
        batches (`Sequence[dict[str, torch.Tensor]]`): Inputs of its forward.
        progress (`Callable`, *optional*): Called after each batch of each block that is finished.
    """

    def __init__(
        self, model: nn.Module, batches: Sequence[Batch], progress: Callable[[], None] = lambda: None
    ) -> None:
        self.model = model
        self.progress = progress
        self.batches = [without_cache(model, batch) for batch in batches]
        self._done: list[Block] = []
        self._given: dict[str, list[Any]] = {}

    def visit(self, block: Block, parts: Sequence[Part], visit: Callable[[int, Part, "Passage"], None]) -> None:
        """Runs up to some parts of a block, and no further.

        Args:
            block (`Block`): The first one that is not done; its parts may have changed since.
            parts (`Sequence[Attention | FFN]`): Parts of that block, in their order.
            visit (`Callable`): Called as `visit(number of the batch, part, passage)`.
        """
        for number in range(len(self.batches)):
            self._run(number, block, parts, visit)

    def finish(self, block: Block, is_passed_by: bool = False) -> None:
        """Runs a block as it is now, and keeps what it gave for the next one.

        Args:
            block (`Block`): The first one that is not done.
            is_passed_by (`bool`, *optional*, defaults to `False`): Whether the next one gets the hidden states that
                this one got, as if it were not there.
        """
        given = []
        for number in range(len(self.batches)):
            given.append(self._run(number, block, (), None, is_passed_by))
            self.progress()
        self._given[block.stack] = given
        self._done.append(block)

    @torch.no_grad()
    def _run(
        self, number: int, block: Block, parts: Sequence[Part], visit: Callable | None, is_passed_by: bool = False
    ) -> Any:
        output: list[Any] = []

        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
            output.append(with_state(result, state_of(args, kwargs)) if is_passed_by else result)
            raise _Reached

        with ExitStack() as hooks:
            # Blocks that are done give what they gave, whatever they are called with.
            given = {block.module: self._given[block.stack][number] for block in self._done if block.repeats == 1}
            forwards = {module: lambda *_, output=output, **__: output for module, output in given.items()}
            hooks.enter_context(replaced_forwards(forwards))
            if parts:
                watch_block(block, parts, lambda part, passage: visit(number, part, passage), hooks)
            elif block.repeats == 1:
                hooks.enter_context(block.module.register_forward_hook(stop, with_kwargs=True))
            try:
                self.model(**self.batches[number])
            except _Reached:
                pass
        return output[0] if output else None


class Passage(NamedTuple):
    """What passed through a part in one forward.

    Attributes:
        inputs (`torch.Tensor`): Of the output projection, shape (batch, length, units x width of a unit).
        outputs (`torch.Tensor`): Of the output projection, shape (batch, length, hidden size).
        residual (`torch.Tensor`): What the outputs are added to, shape (batch, length, hidden size).
    """

    inputs: torch.Tensor
    outputs: torch.Tensor
    residual: torch.Tensor


def watch_block(
    block: Block,
    parts: Sequence[Part],
    visit: Callable[[Part, Passage], None],
    hooks: ExitStack,
) -> None:
    """Hangs hooks on a block that tell what passes through its parts, and end the forward pass after the last of them.

    A block that all layers share is run to the end.

    Args:
        block (`Block`): A block of a live model.
        parts (`Sequence[Attention | FFN]`): Those of its parts that are of interest.
        visit (`Callable`): Called as `visit(part, passage)` whenever a part has run.
        hooks (`ExitStack`): Takes the hooks off again.
    """
    residual: dict[str, torch.Tensor] = {}
    entered: set[nn.Module] = set()

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is block.module:
            entered.clear()
        # A projection that also runs on relative positions reads its tokens first.
        if module not in entered:
            entered.add(module)
            residual["now"] = state_of(args, kwargs)

    def leave(part: Part, args: tuple[Any, ...], outputs: torch.Tensor) -> None:
        if part in wanted:
            visit(part, Passage(args[0], outputs, residual["now"]))
        if block.is_pre_norm:
            residual["now"] = residual["now"] + outputs
        if part is parts[-1] and block.repeats == 1:
            raise _Reached

    wanted = set(parts)
    hooks.enter_context(block.module.register_forward_pre_hook(enter, with_kwargs=True))
    for part in (*block.attentions, block.ffn):
        if not block.is_pre_norm and part.inputs:
            # A post-norm block adds the input of each part to its output.
            hooks.enter_context(part.inputs[0].register_forward_pre_hook(enter, with_kwargs=True))
        hook = part.output.register_forward_hook(lambda _, args, outputs, part=part: leave(part, args, outputs))
        hooks.enter_context(hook)


def state_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """The hidden states that a block or projection is called with."""
    return args[0] if args else kwargs["hidden_states"]


def with_state(output: Any, state: torch.Tensor) -> Any:
    """What a block returns, with other hidden states: what else it hands on to the next ones stays."""
    return (state, *output[1:]) if isinstance(output, tuple) else state


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Other forwards for some modules; one that another library had set on the module comes back at the end.

    Args:
        forwards (`Mapping[nn.Module, Callable]`): By module.
    """
    before = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                del module.forward
            else:
                module.forward = forward
