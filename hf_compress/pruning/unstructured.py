"""Pruning of single weights of a live model: all projections inside its blocks, from the first block to the last."""

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from tqdm.auto import tqdm

from hf_compress.modeling.blocks import Block, embedding_names, find_blocks, join, task_head_names
from hf_compress.modeling.projections import read_matrix, write_matrix_
from hf_compress.modeling.tasks import unwrap
from hf_compress.pruning import masks
from hf_compress.pruning.batches import Batch, check_finite, read_batches, token_mask
from hf_compress.pruning.masks import Selection, SquareMeans
from hf_compress.pruning.repair import Moments
from hf_compress.pruning.replay import Replay
from hf_compress.pruning.sensitivity import frozen
from hf_compress.pruning.sparsegpt import inverse_factor, prune_compensated, removal_costs
from hf_compress.pruning.unstructured_config import DATA_SCORES, UnstructuredPruningConfig

logger = logging.getLogger(__name__)

Statistics = Moments | SquareMeans


@dataclass(frozen=True, eq=False)
class Layer:
    """One projection inside a block, an `nn.Linear` or `Conv1D`.

    Attributes:
        name (`str`): Dotted name in the model.
        module (`nn.Module`): The projection.
        block (`Block`): The block that it is in.
        reads (`str`): What its inputs are: the `"tokens"` of its stack, those of the `"source"` that it attends to, or
            `"positions"`, which are the same in every batch.
    """

    name: str
    module: nn.Module
    block: Block
    reads: Literal["tokens", "source", "positions"] = "tokens"

    @property
    def weight(self) -> torch.Tensor:
        """Shape (outputs, inputs), whatever the orientation of the module."""
        return read_matrix(self.module)


def prune_unstructured_(
    model: nn.Module, config: UnstructuredPruningConfig, data: Iterable[Mapping[str, Any]] | None = None
) -> None:
    """Makes weights of the projections inside the blocks 0, in place.

    Embeddings, task heads, norms, biases and what else is outside of the blocks stay whole; tied weights are outside
    too, but where layers share a block, its weights are pruned once, by the inputs of all layers. Blocks are pruned
    from the first to the last, so that each is fitted to the inputs that it gets from pruned ones.

    Args:
        model (`nn.Module`): A Transformers model of a known architecture, not quantized.
        config (`UnstructuredPruningConfig`): Which weights, how many, and how they are chosen.
        data (`Iterable[Mapping[str, torch.Tensor]]`, *optional*): Batches of inputs, some hundred texts without labels.

    Raises:
        ValueError: if the model cannot be pruned so, a pattern does not divide a layer, data are missing, not finite,
            or never reach a layer.
        TypeError: if a projection is wrapped, by an adapter say, or the data are no dicts of tensors.
    """
    model = unwrap(model)
    check_model(model, config)
    layers = choose_layers(model, config)
    batches = read_batches(model, data) if config.needs_data and data is not None else []
    if config.needs_data and data is None:
        raise ValueError(
            f"score={config.score!r} with allocation={config.allocation!r} is computed from data, but data=None: give "
            "some hundred texts as tokenized batches, or take score='magnitude'."
        )
    generator = torch.Generator().manual_seed(config.seed)
    with frozen(model):
        shares = allocate(model, layers, config, batches)
        for step in range(1, config.steps + 1):
            selections = select(model, layers, config, batches, shares, step / config.steps)
            sweep_(model, layers, config, batches, selections, generator)
    n_zeros = sum((layer.weight == 0).sum().item() for layer in layers)
    n_weights = sum(layer.weight.numel() for layer in layers)
    logger.info("%.2f %% of the %d weights of %d layers are 0.", 100 * n_zeros / n_weights, n_weights, len(layers))
