"""The layers whose single weights can be pruned: the projections inside the blocks, and what they read."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from hf_compress.modeling.blocks import Block, embedding_names, find_blocks, task_head_names
from hf_compress.modeling.patterns import matching_names
from hf_compress.modeling.projections import read_matrix
from hf_compress.pruning.unstructured_config import UnstructuredPruningConfig

logger = logging.getLogger(__name__)

Source = Literal["tokens", "attended", "positions"]


@dataclass(frozen=True, eq=False)
class Layer:
    """One projection inside a block, an `nn.Linear` or `Conv1D`.

    Attributes:
        name (`str`): Dotted name in the model.
        module (`nn.Module`): The projection.
        block (`Block`): The block that it is in.
        reads (`str`): What its inputs are: the `"tokens"` of its stack; the `"attended"` ones of the encoder, in a
            cross-attention; or relative `"positions"`, the same in every batch.
    """

    name: str
    module: nn.Module
    block: Block
    reads: Source = "tokens"

    @property
    def weight(self) -> torch.Tensor:
        """A view of shape (outputs, inputs), whatever the orientation of the module."""
        return read_matrix(self.module)


def find_layers(model: nn.Module) -> list[Layer]:
    """All projections inside the blocks of a model that have weights left.

    Args:
        model (`nn.Module`): A Transformers model of a known architecture.

    Returns:
        `list[Layer]`: In the order of the blocks.

    Raises:
        TypeError: if one is neither `nn.Linear` nor `Conv1D`, or its weights are packed.
    """
    names = {module: name for name, module in model.named_modules()}
    layers = [
        Layer(names[projection], projection, block, reads)
        for block in find_blocks(model)
        for projection, reads in _projections(block)
    ]
    return [layer for layer in layers if layer.weight.numel()]


def _projections(block: Block) -> Iterator[tuple[nn.Module, Source]]:
    for attention in block.attentions:
        for place, projection in enumerate(attention.inputs):
            yield projection, "attended" if attention.kind == "cross" and place > 0 else "tokens"
        yield from ((projection, "positions") for projection in attention.extra_inputs)
        yield attention.output, "tokens"
    yield from ((projection, "tokens") for projection in (*block.ffn.inputs, block.ffn.output))


def match_layers(layers: Sequence[Layer], pattern: str, origin: str) -> list[Layer]:
    """The layers whose name, or that of a module that they are in, a pattern matches as a whole.

    Args:
        layers (`Sequence[Layer]`): From `find_layers`.
        pattern (`str`): A regular expression; a dotted name is one.
        origin (`str`): Where the pattern was given, for the message.

    Returns:
        `list[Layer]`: At least one.

    Raises:
        ValueError: if the pattern is no regular expression, or matches none.
    """
    names = [layer.name for layer in layers]
    found = set(matching_names(names, pattern, origin, "projections inside the blocks"))
    return [layer for layer in layers if layer.name in found]


def check_not_binary(model: nn.Module) -> None:
    """Refuses models that were prepared for weights of one bit.

    Args:
        model (`nn.Module`): A Transformers model.

    Raises:
        ValueError: if it was.
    """
    if any(hasattr(module, "threshold") and hasattr(module, "log_scale") for module in model.modules()):
        raise ValueError(
            f"This {type(model).__name__} was prepared for weights of one bit, among which there is no 0, and whose "
            "inputs have thresholds that no cut follows: prune first, then call fake_quantize_ on the result."
        )


def choose_layers(model: nn.Module, config: UnstructuredPruningConfig) -> list[Layer]:
    """The layers that a config asks to prune; what stays whole is logged.

    Args:
        model (`nn.Module`): A Transformers model.
        config (`UnstructuredPruningConfig`): `exclude` and `pattern`.

    Returns:
        `list[Layer]`: One per weight: where some share one, the first.

    Raises:
        ValueError: if the model is quantized, nothing is left to prune, a pattern does not divide a layer, or a weight
            is tied to one that stays whole.
    """
    if getattr(model, "is_quantized", False):
        method = type(model.config.quantization_config).__name__
        raise ValueError(
            f"The model {type(model).__name__} is quantized ({method}): its weights are packed, and none of them can "
            "be made 0. Prune the full-precision model, then quantize the result."
        )
    check_not_binary(model)
    every = find_layers(model)
    excluded = {layer for pattern in config.exclude for layer in match_layers(every, pattern, "exclude")}
    layers = [layer for layer in every if layer not in excluded]
    if not layers:
        raise ValueError(f"exclude={config.exclude} leaves none of the {len(every)} projections: name fewer.")
    for layer in layers:
        check_layer(layer, config)
    logger.info(
        "Pruning %d projections inside the blocks. Whole stay the embeddings (%s), the task head (%s), norms, biases, "
        "what else is outside the blocks, and %s.",
        len(layers),
        ", ".join(embedding_names(model)) or "none",
        ", ".join(task_head_names(model)) or "none",
        ", ".join(layer.name for layer in every if layer in excluded) or "no projection inside them",
    )
    return untied(model, layers)


def check_layer(layer: Layer, config: UnstructuredPruningConfig) -> None:
    """Refuses what does not divide a layer, and weights that are not finite.

    Args:
        layer (`Layer`): To be pruned.
        config (`UnstructuredPruningConfig`): `pattern`.

    Raises:
        ValueError: if so.
    """
    outputs, inputs = layer.weight.shape
    rows, columns = config.block
    columns = config.group[1] if config.group else columns
    if outputs % rows or inputs % columns:
        raise ValueError(
            f"pattern={config.pattern!r} does not divide {layer.name}, which has {outputs} outputs and {inputs} "
            f"inputs: give a pattern whose sizes do, or add {layer.name!r} to exclude."
        )
    if not torch.isfinite(layer.weight).all():
        raise ValueError(
            f"{layer.name} has weights that are NaN or infinite and cannot be ranked: load a model without them."
        )


def untied(model: nn.Module, layers: Sequence[Layer]) -> list[Layer]:
    """The first layer of each weight, and no weight that is also used where it has to stay whole.

    Args:
        model (`nn.Module`): Holds the layers.
        layers (`Sequence[Layer]`): To be pruned.

    Returns:
        `list[Layer]`: Each with a weight of its own.

    Raises:
        ValueError: if a weight is tied to one outside of these layers.
    """
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    names = {layer.name for layer in layers}
    first: dict[int, Layer] = {}
    for layer in layers:
        users_of_it = users[id(layer.module.weight)]
        outside = [name for name in users_of_it if name not in names]
        if outside:
            raise ValueError(
                f"The weight of {layer.name} is tied to that of {outside[0]}, which stays whole: add {layer.name!r} "
                "to exclude, or untie them."
            )
        first.setdefault(id(layer.module.weight), layer)
    tied = sorted({layer.name for layer in layers} - {layer.name for layer in first.values()})
    if tied:
        logger.info("Tied to weights of earlier layers, and pruned with those: %s.", ", ".join(tied))
    return list(first.values())
