"""Pruning of single weights of a live model: all projections inside its blocks, from the first block to the last."""

import copy
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import nn

from hf_compress.checkpoint.sparse import mark_sparse_, sparse_names
from hf_compress.checkpoint.widths import write_widths_
from hf_compress.modeling.projections import write_matrix_
from hf_compress.modeling.tasks import unwrap, without_cache
from hf_compress.pruning.batches import Batch, read_batches, warn_of_few_tokens
from hf_compress.pruning.calibration import Calibration
from hf_compress.pruning.layer_inputs import check_reached, walk, watch_inputs
from hf_compress.pruning.masks import (
    InputMeans,
    Selection,
    blind_scores,
    global_shares,
    outlier_ratio,
    owl_shares,
    pool,
    square_sums,
    true_share,
    wanda_scores,
)
from hf_compress.pruning.sensitivity import frozen
from hf_compress.pruning.sparsegpt import hessian_sums, inverse_factor, prune_compensated, removal_costs
from hf_compress.pruning.unstructured_config import DATA_SCORES, UnstructuredPruningConfig
from hf_compress.pruning.weight_layers import Layer, choose_layers, find_layers, match_layers
from hf_compress.pruning.weight_refit import WeightRepair

logger = logging.getLogger(__name__)

Data = Iterable[Mapping[str, Any]] | Calibration


def prune_unstructured_(model: nn.Module, config: UnstructuredPruningConfig, data: Data | None = None) -> None:
    """Makes weights of the projections inside the blocks 0, in place; saves of the model leave the zeros out.

    Embeddings, task heads, norms, biases and what else is outside of the blocks stay whole, tied weights among them.
    Where all layers share a block, its weights are pruned once, by the inputs of all. Blocks are pruned from the first
    to the last, so that each is fitted to what it gets from pruned ones; a repair holds a copy of the unpruned model.

    Args:
        model (`nn.Module`): A Transformers model of a known architecture, not quantized.
        config (`UnstructuredPruningConfig`): Which weights, how many, and how they are chosen.
        data (`Iterable[Mapping[str, torch.Tensor]]` or `Calibration`, *optional*): Batches of inputs; some hundred
            texts, without labels.

    Raises:
        ValueError: if the model cannot be pruned so, a pattern does not divide a layer, data are missing, not finite,
            or never reach a layer.
        TypeError: if a projection is wrapped, by an adapter say, or the data are no dicts of tensors.
    """
    model = unwrap(model)
    if config.score == "movement":
        raise ValueError(
            "score='movement' adds up what a training does to each weight, and prune() does not train: give the "
            "config to the pruning callback of a Trainer, or take score='sparsegpt'."
        )
    layers = choose_layers(model, config)
    batches = read_calibration(model, layers, config, data)
    reference = copy.deepcopy(model) if config.is_repaired else model
    with frozen(model), frozen(reference):
        shares = allocate(model, layers, config, batches)
        for step in range(1, config.steps + 1):
            progress = step / config.steps
            selections = make_selections(
                config,
                shares,
                lambda selection, progress=progress: selection.after(progress),
                lambda: survey(model, layers, config, batches),
            )
            repair = WeightRepair(model, reference, layers, config.ridge, batches) if config.is_repaired else None
            sweep_(model, layers, config, batches, selections, repair=repair)
    mark_pruned_(model, layers)


def mark_pruned_(model: nn.Module, layers: Sequence[Layer]) -> None:
    """Has later saves leave out the zeros of layers that have some, beside those that did so before; and logs the sum.

    Args:
        model (`nn.Module`): The pruned model.
        layers (`Sequence[Layer]`): What was pruned.
    """
    n_zeros = {layer: (layer.weight == 0).sum().item() for layer in layers}
    sparse = [f"{layer.name}.weight" for layer in layers if n_zeros[layer]]
    # A config that was taken from another model may hold that one's widths.
    write_widths_(model)
    if sparse:
        mark_sparse_(model, [*sparse_names(model), *sparse])
    n_weights = sum(layer.weight.numel() for layer in layers)
    share = 100 * sum(n_zeros.values()) / n_weights
    logger.info("%.2f %% of the %d weights of %d projections are 0.", share, n_weights, len(layers))


def read_calibration(
    model: nn.Module, layers: Sequence[Layer], config: UnstructuredPruningConfig, data: Data | None
) -> list[Batch]:
    """The batches that a config needs: none for scores of the weights alone that nothing makes up for.

    Args:
        model (`nn.Module`): A Transformers model.
        layers (`Sequence[Layer]`): To be pruned.
        config (`UnstructuredPruningConfig`): What is computed.
        data (`Iterable[Mapping[str, torch.Tensor]]` or `Calibration`, *optional*): Batches of inputs.

    Returns:
        `list[dict[str, torch.Tensor]]`: On the model's device.

    Raises:
        ValueError: if data are needed and missing, or do not fit.
        TypeError: if they are no dicts of tensors.
    """
    if not config.needs_data:
        return []
    if isinstance(data, Calibration):
        data = data.batches
    if data is None:
        raise ValueError(
            f"score={config.score!r} with allocation={config.allocation!r} and repair={config.repair!r} is computed "
            "from data, but data=None: give some hundred texts as tokenized batches, or take score='magnitude' with "
            "allocation='uniform' and repair='none'."
        )
    batches = read_batches(model, data)
    if config.score == "sparsegpt" or config.is_repaired:
        widest = max(layer.weight.shape[1] for layer in layers)
        stack = layers[0].block.stack
        warn_of_few_tokens(batches, stack, widest, "what is left is fitted to these texts alone")
    return batches


def make_selection(config: UnstructuredPruningConfig, share: float) -> Selection:
    """How a config chooses the weights of a layer that loses a share of them."""
    return Selection(share, config.ranking == "row", config.group, config.block)


def make_selections(
    config: UnstructuredPruningConfig,
    shares: Mapping[str, float],
    at: Callable[[Selection], Selection],
    score: Callable[[], Mapping[str, torch.Tensor]],
) -> dict[str, Selection]:
    """How the weights of each layer are chosen on the way to its last sparsity.

    Args:
        config (`UnstructuredPruningConfig`): What is ranked together, and patterns.
        shares (`Mapping[str, float]`): By layer, from `allocate`.
        at (`Callable`): Turns the last selection of a layer, or that of all, into the one to be made now.
        score (`Callable`): Gives the scores by which layers compete, of blocks pooled; called for `scope="global"`.

    Returns:
        `dict[str, Selection]`: By layer.
    """
    if config.ranking != "global":
        return {name: at(make_selection(config, share)) for name, share in shares.items()}
    found = global_shares(score(), at(make_selection(config, config.target)).sparsity)
    return {name: make_selection(config, share) for name, share in found.items()}


def allocate(
    model: nn.Module, layers: Sequence[Layer], config: UnstructuredPruningConfig, batches: Sequence[Batch]
) -> dict[str, float]:
    """The sparsity of each layer after the last round.

    Args:
        model (`nn.Module`): The unpruned model.
        layers (`Sequence[Layer]`): To be pruned.
        config (`UnstructuredPruningConfig`): `allocation` and what belongs to it.
        batches (`Sequence[dict[str, torch.Tensor]]`): Calibration data, for `"owl"`.

    Returns:
        `dict[str, float]`: By name.

    Raises:
        ValueError: if an allocation names no layer, or data never reach one.
    """
    shares = {layer.name: config.target for layer in layers}
    if isinstance(config.allocation, Mapping):
        # From the last to the first, so that the first that matches has the last word.
        for pattern, share in reversed(config.allocation.items()):
            shares |= {layer.name: share for layer in match_layers(layers, pattern, "allocation")}
    elif config.allocation == "owl":
        ratios, sizes = [], []
        for mine, means in walk(model, layers, batches, square_sums, "Counting outliers"):
            scores = [wanda_scores(layer.weight, means[layer].mean) for layer in mine]
            ratios.append(outlier_ratio(scores, config.outlier_factor))
            sizes.append(sum(layer.weight.numel() for layer in mine))
        found = owl_shares(ratios, sizes, config.target, config.outlier_spread)
        for (_, mine), share in zip(groupby(layers, lambda layer: layer.block), found, strict=True):
            shares |= {layer.name: share for layer in mine}
    return shares


def survey(
    model: nn.Module,
    layers: Sequence[Layer],
    config: UnstructuredPruningConfig,
    batches: Sequence[Batch],
    gone: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Scores of all layers of the model as it is, of blocks pooled, to rank them together.

    Scores that stand for errors of outputs are taken relative to the outputs of their layer.

    Args:
        model (`nn.Module`): Is not changed.
        layers (`Sequence[Layer]`): To be pruned.
        config (`UnstructuredPruningConfig`): `score`, `pattern` and `seed`.
        batches (`Sequence[dict[str, torch.Tensor]]`): Calibration data, where scores need them.
        gone (`Mapping[str, torch.Tensor]`, *optional*): By layer, masks of weights that are to rank lowest.

    Returns:
        `dict[str, torch.Tensor]`: By name of the layer.

    Raises:
        ValueError: if data never reach a layer or are not finite.
    """
    if config.score not in DATA_SCORES:
        generator = torch.Generator().manual_seed(config.seed)
        found = [(layer, blind_scores(layer.weight, config.score, generator)) for layer in layers]
    else:
        found = [
            (layer, _relative_scores(layer, means[layer], config))
            for mine, means in walk(model, layers, batches, _total(config), "Scoring weights")
            for layer in mine
        ]
    return {layer.name: pool(_lower(layer, scores.float(), gone), config.block) for layer, scores in found}


def sweep_(
    model: nn.Module,
    layers: Sequence[Layer],
    config: UnstructuredPruningConfig,
    batches: Sequence[Batch],
    selections: Mapping[str, Selection],
    gone: Mapping[str, torch.Tensor] | None = None,
    repair: WeightRepair | None = None,
) -> dict[str, torch.Tensor]:
    """Prunes all layers once, in place, each by what it reads after those before it were pruned.

    Args:
        model (`nn.Module`): Is changed.
        layers (`Sequence[Layer]`): To be pruned.
        config (`UnstructuredPruningConfig`): `score` and what belongs to it.
        batches (`Sequence[dict[str, torch.Tensor]]`): Calibration data, where scores need them.
        selections (`Mapping[str, Selection]`): By layer, how many weights go, those that are 0 already included.
        gone (`Mapping[str, torch.Tensor]`, *optional*): By layer, masks of weights that go before all others. Not for
            `"sparsegpt"`, which makes up for what goes with weights that were 0, and chooses among all.
        repair (`WeightRepair`, *optional*): Makes up for what went, before the next block is pruned.

    Returns:
        `dict[str, torch.Tensor]`: By layer, the mask of what went, of shape (outputs, inputs).

    Raises:
        ValueError: if data never reach a layer or are not finite, or a Hessian cannot be inverted.
    """
    masks: dict[str, torch.Tensor] = {}

    def zero_(layer: Layer, scores: torch.Tensor) -> None:
        masks[layer.name] = selections[layer.name].mask(_lower(layer, scores, gone))
        write_matrix_(layer.module, layer.weight.masked_fill(masks[layer.name], 0))

    if config.score not in DATA_SCORES:
        generator = torch.Generator().manual_seed(config.seed)
        for layer in layers:
            zero_(layer, blind_scores(layer.weight, config.score, generator))
        for name, _ in groupby(layers, lambda layer: layer.block.name) if repair else ():
            repair.repair_(name)
        return masks
    for mine, means in walk(model, layers, batches, _total(config), "Pruning weights"):
        for layer in mine:
            selection = selections[layer.name]
            if config.score == "wanda":
                zero_(layer, wanda_scores(layer.weight, means[layer].mean))
            elif selection.is_empty:
                masks[layer.name] = torch.zeros_like(layer.weight, dtype=torch.bool)
            else:
                factor = _factor(layer, means[layer], config)
                left = prune_compensated(layer.weight, factor, selection, config.sweep_width)
                write_matrix_(layer.module, left)
                masks[layer.name] = left == 0
        if repair:
            repair.repair_(mine[0].block.name)
    return masks


def _lower(layer: Layer, scores: torch.Tensor, gone: Mapping[str, torch.Tensor] | None) -> torch.Tensor:
    return scores if gone is None else scores.masked_fill(gone[layer.name], -torch.inf)


def _total(config: UnstructuredPruningConfig) -> Callable[[torch.Tensor], torch.Tensor]:
    return square_sums if config.score == "wanda" else hessian_sums


def _factor(layer: Layer, means: InputMeans, config: UnstructuredPruningConfig) -> torch.Tensor:
    hessian = means.mean.to(layer.weight.device, getattr(torch, config.precision))
    return inverse_factor(hessian, config.damping)


def _relative_scores(layer: Layer, means: InputMeans, config: UnstructuredPruningConfig) -> torch.Tensor:
    # An error counts by how large it is beside the outputs of its layer: layers differ in scale by far.
    if config.score == "wanda":
        scores = wanda_scores(layer.weight, means.mean)
        return scores / scores.norm().clamp_min(torch.finfo(scores.dtype).tiny)
    costs = removal_costs(layer.weight, _factor(layer, means, config))
    outputs = ((layer.weight.cpu().double() @ means.mean) * layer.weight.cpu()).sum()
    return costs / max(outputs.item(), torch.finfo(costs.dtype).tiny)


def measure_sparsity(
    model: nn.Module,
    reference: nn.Module | None = None,
    batches: Iterable[Mapping[str, Any]] | None = None,
) -> dict[str, dict[str, float]]:
    """How sparse each projection inside the blocks is, and how much its outputs changed.

    The change is ||X (W' - W)^T|| / ||X W^T||, where X is what the layer reads in `model`: its own part of the error,
    without what came in from layers before it.

    Args:
        model (`nn.Module`): The pruned model.
        reference (`nn.Module`, *optional*): The model before.
        batches (`Iterable[Mapping[str, torch.Tensor]]`, *optional*): Inputs; needed with `reference`.

    Returns:
        `dict[str, dict[str, float]]`: By dotted name of the layer, `"sparsity"`, the share of its weights that are 0,
        and with a reference `"output_error"`.

    Raises:
        ValueError: if only one of `reference` and `batches` is given, the models do not match, or the data never reach
            a layer.
    """
    if (reference is None) != (batches is None):
        raise ValueError("An output error needs both: give reference, the model before, and batches, or neither.")
    model = unwrap(model)
    layers = find_layers(model)
    found = {layer.name: {"sparsity": true_share(layer.weight == 0)} for layer in layers}
    if reference is None:
        return found
    for name, error in _output_errors(model, unwrap(reference), layers, read_batches(model, batches)).items():
        found[name]["output_error"] = error
    return found


def _output_errors(
    model: nn.Module, reference: nn.Module, layers: Sequence[Layer], batches: Sequence[Batch]
) -> dict[str, float]:
    dense = {layer.name: layer.weight.float() for layer in find_layers(reference)}
    shapes = {(layer.name, layer.weight.shape) for layer in layers}
    differing = sorted(shapes ^ {(name, weight.shape) for name, weight in dense.items()})
    if differing:
        raise ValueError(
            f"{differing[0][0]} is not of the same shape in model and reference: give the model as it was before."
        )
    squares = {layer: [0.0, 0.0, 0] for layer in layers}

    def add(layer: Layer, inputs: torch.Tensor, mask: torch.Tensor) -> None:
        tokens, old = inputs[mask].float(), dense[layer.name].to(inputs.device)
        squares[layer][0] += (tokens @ (layer.weight.float() - old).T).square().sum().item()
        squares[layer][1] += (tokens @ old.T).square().sum().item()
        squares[layer][2] += len(tokens)

    with frozen(model), torch.no_grad(), watch_inputs(model, layers, add):
        for batch in batches:
            model(**without_cache(model, batch))
    for layer, (_, _, n_tokens) in squares.items():
        check_reached(layer, n_tokens)
    return {layer.name: (error / max(whole, 1e-30)) ** 0.5 for layer, (error, whole, _) in squares.items()}
