"""What the layers of a live model read: their inputs, of real tokens alone, block after block."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from hf_compress.modeling.blocks import Block, find_blocks
from hf_compress.pruning.batches import Batch, check_finite, token_mask
from hf_compress.pruning.masks import InputMeans
from hf_compress.pruning.replay import Replay
from hf_compress.pruning.weight_layers import Layer


def walk(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Sequence[Batch],
    total: Callable[[torch.Tensor], torch.Tensor],
    what: str,
) -> Iterator[tuple[list[Layer], dict[Layer, InputMeans]]]:
    """Goes through the blocks, and tells what the layers of each read; whoever iterates may change them in between.

    Args:
        model (`nn.Module`): In evaluation mode.
        layers (`Sequence[Layer]`): In the order of their blocks.
        batches (`Sequence[dict[str, torch.Tensor]]`): Calibration data.
        total (`Callable`): What is averaged, see `InputMeans`.
        what (`str`): Said beside the progress bar.

    Returns:
        `Iterator[tuple[list[Layer], dict[Layer, InputMeans]]]`: By block, its layers and their means.

    Raises:
        ValueError: if the data never reach a layer, or what it reads is not finite.
    """
    blocks = find_blocks(model)
    of_block = {block.name: [layer for layer in layers if layer.block.name == block.name] for block in blocks}
    with tqdm(total=2 * len(blocks) * len(batches), desc=what, unit="pass") as bar:
        replay = Replay(model, batches, bar.update)
        for block in blocks:
            mine = of_block[block.name]
            if mine:
                yield mine, _read(replay, block, mine, total)
            bar.update(len(batches))
            replay.finish(block)


def _read(replay: Replay, block: Block, layers: Sequence[Layer], total: Callable) -> dict[Layer, InputMeans]:
    means = {layer: InputMeans(total) for layer in layers}
    with watch_inputs(replay.model, layers, lambda layer, inputs, mask: means[layer].add(inputs, mask)):
        replay.visit(block, (), lambda *_: None)
    for layer in layers:
        check_reached(layer, means[layer].n_tokens)
        check_finite(layer.name, means[layer].mean)
    return means


def check_reached(layer: Layer, n_tokens: int) -> None:
    """Refuses a layer that no token reached.

    Args:
        layer (`Layer`): Of a model that was run.
        n_tokens (`int`): How many tokens it read.

    Raises:
        ValueError: if there was none.
    """
    if n_tokens == 0:
        raise ValueError(
            f"The calibration data never reach {layer.name}, so nothing tells which of its weights matter: give "
            f"batches with all inputs that lead there, or add {layer.name!r} to exclude."
        )


@contextmanager
def watch_inputs(
    model: nn.Module, layers: Iterable[Layer], visit: Callable[[Layer, torch.Tensor, torch.Tensor], None]
) -> Iterator[None]:
    """Calls a function with what each layer reads in a forward pass, and which of it counts.

    A projection that also runs on relative positions is seen with its tokens alone: positions would count once for
    every batch, however many tokens that has.

    Args:
        model (`nn.Module`): The model that is run, with inputs by name.
        layers (`Iterable[Layer]`): Of that model.
        visit (`Callable`): Called as `visit(layer, inputs, mask)`, with inputs of shape (batch, length, inputs) and
            booleans of shape (batch, length).
    """
    batch: Mapping[str, Any] = {}
    seen: set[Layer] = set()

    def start(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal batch
        batch = kwargs
        seen.clear()

    def read(layer: Layer, inputs: torch.Tensor) -> None:
        if layer in seen and layer.block.repeats == 1:
            return
        seen.add(layer)
        visit(layer, inputs, _mask(layer, batch, inputs))

    with ExitStack() as hooks:
        hooks.enter_context(model.register_forward_pre_hook(start, with_kwargs=True))
        for layer in layers:
            hook = layer.module.register_forward_pre_hook(lambda _, args, layer=layer: read(layer, args[0]))
            hooks.enter_context(hook)
        yield


def _mask(layer: Layer, batch: Mapping[str, Any], inputs: torch.Tensor) -> torch.Tensor:
    everything = torch.ones(inputs.shape[:-1], dtype=torch.bool, device=inputs.device)
    if layer.reads == "positions":
        return everything
    if layer.reads == "attended" and "encoder_hidden_states" in batch:
        return batch["encoder_attention_mask"] != 0 if "encoder_attention_mask" in batch else everything
    stack = "encoder" if layer.reads == "attended" else layer.block.stack
    # Of several choices per question, each is a row of its own inside the model.
    return token_mask(batch, stack, inputs.shape[1]).reshape(inputs.shape[:-1]).to(inputs.device)
