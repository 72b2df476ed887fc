"""What a run of `hf-compress prune` does in its own way, for heads and neurons and for single weights."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from hf_compress.checkpoint.widths import read_widths
from hf_compress.modeling.blocks import Block, find_blocks
from hf_compress.pruning.batches import Batch
from hf_compress.pruning.calibration import Calibration, calibrate
from hf_compress.pruning.config import StructuredPruningConfig
from hf_compress.pruning.figure import draw_widths
from hf_compress.pruning.sparsity_figure import draw_sparsity
from hf_compress.pruning.structured import check_budget, check_prunable
from hf_compress.pruning.unstructured import allocate, measure_sparsity
from hf_compress.pruning.unstructured_config import UnstructuredPruningConfig
from hf_compress.pruning.weight_layers import choose_layers, find_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Config = StructuredPruningConfig | UnstructuredPruningConfig
Data = Sequence[Batch] | Calibration
Entries = dict[str, Any]


class Kind(NamedTuple):
    """One kind of pruning.

    Attributes:
        share (`str`): The field of its config that says how much, and of which each model of a run has its own.
        figure (`str`): What its figures' files are called.
        check (`Callable`): `(model, config, batches)`: raises what does not depend on scores, before anything is
            written.
        get_data (`Callable`): `(model, config, batches)`: brings the model into the dtype to prune in, in place, and
            returns what `prune` takes for all models of a run.
        compare (`Callable`): `(dense, pruned, batches)`: what the report says of each of the two models.
        draw (`Callable`): `(dense, pruned, path, title)`: draws what `compare` returned.
    """

    share: str
    figure: str
    check: Callable[["PreTrainedModel", Any, Sequence[Batch]], None]
    get_data: Callable[["PreTrainedModel", Any, Sequence[Batch]], Data]
    compare: Callable[["PreTrainedModel", "PreTrainedModel", Sequence[Batch]], tuple[Entries, Entries]]
    draw: Callable[[Entries, Entries, Path, str], None]


def kind_of(config: Config) -> Kind:
    """The kind of pruning that a config asks for.

    Args:
        config (`StructuredPruningConfig` or `UnstructuredPruningConfig`): How to prune.

    Returns:
        `Kind`: What is done its own way.

    Raises:
        TypeError: if the config is of another type.
    """
    if type(config) not in _KINDS:
        known = " or ".join(known.__name__ for known in _KINDS)
        raise TypeError(f"A {type(config).__name__} is no config that a classifier can be pruned by: give {known}.")
    return _KINDS[type(config)]


def uses_labels(config: Config) -> bool:
    """Whether the labels of the texts to calibrate with are needed."""
    return isinstance(config, StructuredPruningConfig) and config.use_labels


# Heads and neurons


def check_units(model: "PreTrainedModel", config: StructuredPruningConfig, batches: Sequence[Batch]) -> None:
    """Raises if no plan can meet a budget, whatever units are worth; measured times are left to the pruning.

    Args:
        model (`PreTrainedModel`): The model to prune.
        config (`StructuredPruningConfig`): The budget, and what may be cut.
        batches (`Sequence[dict[str, torch.Tensor]]`): The texts, whose lengths count.

    Raises:
        ValueError: if it cannot be met, or the model is quantized.
    """
    check_prunable(model)
    check_budget(model, config, batches)


def calibrate_for(model: "PreTrainedModel", config: StructuredPruningConfig, batches: Sequence[Batch]) -> Calibration:
    """What serves all budgets of a run.

    Args:
        model (`PreTrainedModel`): Comes to be in float32: scores and fits suffer from half precision. Only where times
            are measured, those of its own dtype count.
        config (`StructuredPruningConfig`): What is scored.
        batches (`Sequence[dict[str, torch.Tensor]]`): The texts.

    Returns:
        `Calibration`: For `prune`.
    """
    return calibrate(model if config.cost == "latency" else model.float(), config, batches)


def compare_widths(
    dense: "PreTrainedModel", pruned: "PreTrainedModel", batches: Sequence[Batch]
) -> tuple[Entries, Entries]:
    """The widths of the blocks of both models, each under its name in the dense model.

    Args:
        dense (`PreTrainedModel`): The model before it was pruned.
        pruned (`PreTrainedModel`): The model; where whole layers went, the names of later ones have moved.
        batches (`Sequence[dict[str, torch.Tensor]]`): Not needed.

    Returns:
        `tuple[dict, dict]`: `"widths"` of each, as `read_widths` gives them.
    """
    before, after = read_widths(dense), read_widths(pruned)
    if before.keys() != after.keys():
        # Where whole layers go, the others stay in order, and all but the outputs of their parts as they are.
        places = iter(zip(before, find_blocks(dense), strict=True))
        blocks = zip(after.values(), find_blocks(pruned), strict=True)
        after = {next(name for name, other in places if _is_same(block, other)): widths for widths, block in blocks}
    return {"widths": before}, {"widths": after}


def _is_same(block: Block, other: Block) -> bool:
    first, second = (
        [projection for part in (*each.attentions, each.ffn) for projection in part.inputs] for each in (block, other)
    )
    return all(torch.equal(one.weight, two.weight) for one, two in zip(first, second, strict=True))


# Single weights


def check_weights(model: "PreTrainedModel", config: UnstructuredPruningConfig, batches: Sequence[Batch]) -> None:
    """Raises if names or patterns do not fit the layers of a model, or it cannot be pruned without a training.

    Args:
        model (`PreTrainedModel`): The model to prune.
        config (`UnstructuredPruningConfig`): How.
        batches (`Sequence[dict[str, torch.Tensor]]`): Not needed.

    Raises:
        ValueError: if so, or the model is quantized.
    """
    if config.score == "movement":
        raise ValueError(
            "score='movement' adds up what a training does to each weight, and nothing is trained here: give the "
            "config to the PruningCallback of a Trainer, or take score='sparsegpt'."
        )
    layers = choose_layers(model, config)
    if config.allocation != "owl":
        allocate(model, layers, config, [])


def texts_for(
    model: "PreTrainedModel", config: UnstructuredPruningConfig, batches: Sequence[Batch]
) -> Sequence[Batch]:
    """What serves all sparsities of a run: the texts, since each layer is scored after those before it were pruned.

    Args:
        model (`PreTrainedModel`): Comes to be in float32: weights that make up for others suffer from half precision.
        config (`UnstructuredPruningConfig`): Not needed.
        batches (`Sequence[dict[str, torch.Tensor]]`): The texts.

    Returns:
        `Sequence[dict[str, torch.Tensor]]`: For `prune`.
    """
    model.float()
    return batches


def compare_weights(
    dense: "PreTrainedModel", pruned: "PreTrainedModel", batches: Sequence[Batch]
) -> tuple[Entries, Entries]:
    """How sparse a model is, in all and by layer, and how much the outputs of each layer changed.

    Args:
        dense (`PreTrainedModel`): The model before it was pruned.
        pruned (`PreTrainedModel`): The model.
        batches (`Sequence[dict[str, torch.Tensor]]`): The texts that outputs are compared on.

    Returns:
        `tuple[dict, dict]`: Nothing, and of the pruned model `"zeros"`, the share of the weights inside the blocks
        that are 0, and `"layers"`, as `measure_sparsity` gives them.
    """
    weights = [layer.weight for layer in find_layers(pruned)]
    zeros = sum((weight == 0).sum().item() for weight in weights) / sum(weight.numel() for weight in weights)
    return {}, {"zeros": zeros, "layers": measure_sparsity(pruned, dense, batches)}


_KINDS = {
    StructuredPruningConfig: Kind(
        share="budget",
        figure="widths",
        check=check_units,
        get_data=calibrate_for,
        compare=compare_widths,
        draw=lambda dense, pruned, path, title: draw_widths(dense["widths"], pruned["widths"], path, title),
    ),
    UnstructuredPruningConfig: Kind(
        share="sparsity",
        figure="sparsity",
        check=check_weights,
        get_data=texts_for,
        compare=compare_weights,
        draw=lambda dense, pruned, path, title: draw_sparsity(pruned["layers"], path, title),
    ),
}
