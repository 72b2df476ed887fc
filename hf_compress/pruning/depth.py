"""Whole layers of a live model: removed down to a budget, and the others repaired."""

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from hf_compress.modeling.blocks import count_layers, find_blocks, find_stacks
from hf_compress.modeling.surgery import first_layer_stays, keep_layers_
from hf_compress.pruning.batches import Batch
from hf_compress.pruning.calibration import Calibration
from hf_compress.pruning.config import StructuredPruningConfig
from hf_compress.pruning.costs import Costs, stack_of
from hf_compress.pruning.layers import choose_layers
from hf_compress.pruning.plan import budget_error
from hf_compress.pruning.refit import repair_
from hf_compress.pruning.units import Site, find_sites

logger = logging.getLogger(__name__)


def prune_layers_(model: nn.Module, config: StructuredPruningConfig, calibration: Calibration, costs: Costs) -> None:
    """Removes whole layers, in each stack down to the budget's share of that stack, and repairs the others."""
    kept = {}
    for stack, (sites, allowed) in stack_budgets(model, config, costs).items():
        n_layers = count_layers(model, stack)

        def is_enough(kept: Sequence[int], sites=sites, allowed=allowed, n_layers=n_layers) -> bool:
            return layers_cost(sites, kept, n_layers, costs, config.cost) <= allowed

        kept[stack] = choose_layers(model, calibration.batches, is_enough, stack)
    if config.repair != "none":
        repair_layers_(model, config, kept, calibration.batches)
    for stack, layers in kept.items():
        keep_layers_(model, layers, stack)


def repair_layers_(
    model: nn.Module, config: StructuredPruningConfig, kept: Mapping[str, Sequence[int]], batches: Sequence[Batch]
) -> None:
    """Fits the layers that stay to the whole model; where all layers share their weights, there is nothing to fit.

    Args:
        model (`nn.Module`): Is changed; all its layers are there still.
        config (`StructuredPruningConfig`): `repair` and `ridge`.
        kept (`Mapping[str, Sequence[int]]`): By stack, indices of the layers that stay.
        batches (`Sequence[dict[str, torch.Tensor]]`): Calibration data.
    """
    blocks = find_blocks(model)
    removed = {block.name for block in blocks if block.repeats == 1 and block.index not in kept[block.stack]}
    if any(block.repeats != len(kept[block.stack]) for block in blocks if block.repeats > 1):
        logger.warning(
            "All layers of %s share their weights, so that what is left is not repaired: train it for a while, or cut "
            "heads and neurons.",
            type(model).__name__,
        )
    if not removed:
        return
    sites = find_sites(blocks)
    repair_(model, model, sites, {site.name: torch.arange(site.n_units) for site in sites}, config, batches, removed)


def stack_budgets(
    model: nn.Module, config: StructuredPruningConfig, costs: Costs
) -> dict[str, tuple[list[Site], float]]:
    """What each stack may cost, where whole layers go: the same share of each.

    Args:
        model (`nn.Module`): All its layers are there still.
        config (`StructuredPruningConfig`): The budget.
        costs (`Costs`): Of the whole model.

    Returns:
        `dict[str, tuple[list[Site], float]]`: By stack, its sites and the cost that they must not exceed.
    """
    sites = find_sites(find_blocks(model))
    whole = costs.total(sites)
    share = (config.budget * whole - costs.fixed) / (whole - costs.fixed)
    found = {}
    for stack in find_stacks(model):
        of_stack = [site for site in sites if stack_of(site) == stack]
        n_layers = count_layers(model, stack)
        found[stack] = (of_stack, share * layers_cost(of_stack, range(n_layers), n_layers, costs, config.cost))
    return found


def layers_cost(sites: Sequence[Site], kept: Sequence[int], n_layers: int, costs: Costs, kind: str) -> float:
    """What is left of the cost of a stack with some of its layers.

    Args:
        sites (`Sequence[Site]`): Of the whole stack.
        kept (`Sequence[int]`): Indices of the layers that stay.
        n_layers (`int`): How many there are.
        costs (`Costs`): Of the whole stack.
        kind (`str`): What they count.

    Returns:
        `float`: Their cost.
    """
    left = 0.0
    for site in sites:
        whole = float(costs.at(site.name, np.array(site.n_units)))
        _, *place = site.name.split(".")
        if site.repeats > 1 and kind in ("params", "bytes"):
            left += whole
        elif site.repeats > 1 or len(place) == 1:
            # In this order, all layers cost exactly what the site does.
            left += whole * (len(kept) / n_layers)
        elif int(place[0]) in kept:
            left += whole
    return left


def check_layers_left(model: nn.Module, config: StructuredPruningConfig, costs: Costs) -> None:
    """Refuses a budget that a stack exceeds with the cheapest of its layers alone.

    Args:
        model (`nn.Module`): A Transformers model of a known architecture.
        config (`StructuredPruningConfig`): The budget.
        costs (`Costs`): Of the whole model.

    Raises:
        ValueError: with the smallest budget that can be met.
    """
    whole = costs.total(find_sites(find_blocks(model)))
    for stack, (sites, allowed) in stack_budgets(model, config, costs).items():
        n_layers = count_layers(model, stack)
        candidates = [0] if first_layer_stays(model, stack) else range(n_layers)
        least = min(layers_cost(sites, [layer], n_layers, costs, config.cost) for layer in candidates)
        if least > allowed:
            of_stack = layers_cost(sites, range(n_layers), n_layers, costs, config.cost)
            smallest = (costs.fixed + least / of_stack * (whole - costs.fixed)) / whole
            raise budget_error(
                config.budget, smallest, f"with one layer in the {stack}", "or cut heads and neurons too"
            )
