"""Structured pruning of a live model: planned by calibration, then repaired and cut from the first block on."""

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from hf_compress.checkpoint.widths import read_widths, write_widths_
from hf_compress.modeling.blocks import count_layers, find_blocks, find_stacks
from hf_compress.modeling.surgery import keep_layers_
from hf_compress.modeling.tasks import unwrap
from hf_compress.pruning import plan
from hf_compress.pruning.batches import median_batch
from hf_compress.pruning.calibration import Calibration, calibrate
from hf_compress.pruning.config import StructuredPruningConfig
from hf_compress.pruning.costs import Costs
from hf_compress.pruning.cutting import cut_
from hf_compress.pruning.latency import time_forward
from hf_compress.pruning.layers import choose_layers
from hf_compress.pruning.refit import repair_
from hf_compress.pruning.units import Site, allowed_widths, find_sites

logger = logging.getLogger(__name__)

Data = Iterable[Mapping[str, Any]] | Calibration


def prune_structured_(model: nn.Module, config: StructuredPruningConfig, data: Data | None = None) -> None:
    """Cuts heads, neurons or layers of a model in place, down to a budget, and repairs what is left.

    Args:
        model (`nn.Module`): A Transformers model of a known architecture, not quantized.
        config (`StructuredPruningConfig`): What to cut and how.
        data (`Iterable[Mapping[str, torch.Tensor]]` or `Calibration`, *optional*): Batches of inputs, or what
            `calibrate` made of them.

    Raises:
        ValueError: if the budget cannot be met, the data or the model do not fit.
    """
    model = unwrap(model)
    check_prunable(model)
    first = data if isinstance(data, Calibration) else calibrate(model, config, data)
    check_calibration(first, config)
    sites = find_sites(find_blocks(model))
    costs = Costs(config.cost, sites, first.batches, first.latency)
    whole = costs.total(sites)
    if config.units == ("layers",):
        prune_layers_(model, config, first, costs)
    else:
        prune_units_(model, config, first, costs)
    write_widths_(model)
    sites = find_sites(find_blocks(model))
    left = Costs(config.cost, sites, first.batches, first.latency).total(sites)
    logger.info("%.1f %% of the %s are left: %s", 100 * left / whole, config.cost, read_widths(model))
    if config.cost == "latency":
        measured = time_forward(model, median_batch(first.batches))
        logger.info("%s. Predicted now: %.2f ms, measured: %.2f ms.", first.latency.describe(), left, measured)


def prune_units_(model: nn.Module, config: StructuredPruningConfig, first: Calibration, costs: Costs) -> None:
    """Cuts heads and neurons, in as many rounds as the config asks for."""
    # The dense model is what every repair aims at; in a single step, its blocks are read before they are cut.
    reference = copy.deepcopy(model) if config.steps > 1 and config.repair == "least_squares" else model
    whole = costs.total(find_sites(find_blocks(model)))
    for step in range(1, config.steps + 1):
        # Times were measured in the first round, for all widths.
        calibration = first if step == 1 else calibrate(model, replace(config, cost="macs"), first.batches)
        sites = find_sites(find_blocks(model))
        target = config.budget ** (step / config.steps) * whole
        kept = choose_units(sites, config, calibration, costs, target)
        if config.repair != "none":
            repair_(model, reference, sites, kept, config, calibration.batches)
        cut_(model, sites, kept)


def prune_layers_(model: nn.Module, config: StructuredPruningConfig, calibration: Calibration, costs: Costs) -> None:
    """Removes whole layers, in each stack down to the budget's share of that stack."""
    for stack in find_stacks(model):
        sites = [site for site in find_sites(find_blocks(model)) if site.name.split(".")[0] == stack]
        allowed = config.budget * costs.total(sites)
        n_layers = count_layers(model, stack)

        def is_enough(kept: Sequence[int], sites=sites, allowed=allowed, n_layers=n_layers) -> bool:
            return layers_cost(sites, kept, n_layers, costs, config.cost) <= allowed

        keep_layers_(model, choose_layers(model, calibration.batches, is_enough, stack), stack)


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
            left += whole * len(kept) / n_layers
        elif int(place[0]) in kept:
            left += whole
    return left


def check_prunable(model: nn.Module) -> None:
    """Refuses models whose weights are packed.

    Args:
        model (`nn.Module`): A Transformers model.

    Raises:
        ValueError: if it is quantized.
    """
    if getattr(model, "is_quantized", False):
        method = model.config.quantization_config
        raise ValueError(
            f"The model {type(model).__name__} is quantized ({type(method).__name__}): single heads and neurons "
            "cannot be cut from packed weights. Prune the full-precision model, then quantize the result."
        )


def check_calibration(calibration: Calibration, config: StructuredPruningConfig) -> None:
    """Refuses a calibration whose scores are others than those asked for.

    Args:
        calibration (`Calibration`): What `calibrate` returned.
        config (`StructuredPruningConfig`): What is asked for now.

    Raises:
        ValueError: if `score`, `use_labels` or `seed` differ, or data are missing.
    """
    for name in ("score", "use_labels", "seed"):
        then, now = getattr(calibration.config, name), getattr(config, name)
        if then != now:
            raise ValueError(f"The calibration was made with {name}={then!r}, and {name}={now!r} is asked for now: "
                             "call calibrate again with this config.")  # fmt: skip
    if config.units != ("layers",) and not calibration.removals:
        raise ValueError(
            f"units={config.units} need scores of heads and neurons, which a calibration with units='layers' does not "
            "hold: call calibrate again with these units."
        )
    if config.cost == "latency" and calibration.latency is None:
        raise ValueError(
            "cost='latency' needs a table of times, which a calibration with another cost does not hold: call "
            "calibrate again with cost='latency'."
        )
    if config.needs_data and not calibration.batches:
        raise ValueError(
            f"repair={config.repair!r} with cost={config.cost!r} is computed from data, and the calibration has "
            "none: give calibrate some hundred texts as tokenized batches."
        )


def choose_units(
    sites: Sequence[Site],
    config: StructuredPruningConfig,
    calibration: Calibration,
    costs: Costs,
    target: float,
) -> dict[str, torch.Tensor]:
    """Which units stay, within a target.

    Args:
        sites (`Sequence[Site]`): All of a model; those whose units the config leaves alone are kept whole.
        config (`StructuredPruningConfig`): What may be cut and how it is planned.
        calibration (`Calibration`): Scores of the units.
        costs (`Costs`): What they cost.
        target (`float`): The cost that must not be exceeded.

    Returns:
        `dict[str, torch.Tensor]`: By site, rising indices of the units that stay.

    Raises:
        ValueError: if the target cannot be met.
    """
    curves = [make_curve(site, config, calibration, costs) for site in sites]
    levels = search(curves, target - costs.fixed, config)
    return {
        site.name: calibration.removals[site.name].order[site.n_units - int(curve.kept[level]) :].sort().values
        for site, curve, level in zip(sites, curves, levels, strict=True)
    }


def search(curves: Sequence[plan.Curve], target: float, config: StructuredPruningConfig) -> plan.Plan:
    """The plan that a config asks for, within a target."""
    if config.uniform:
        return plan.uniform_plan(curves, target)
    if config.scope == "local":
        return plan.local_plan(curves, target)
    return (plan.dynamic_plan if config.search == "dynamic" else plan.ranking_plan)(curves, target)


def make_curve(site: Site, config: StructuredPruningConfig, calibration: Calibration, costs: Costs) -> plan.Curve:
    """Error and cost of a site at each width that it may get.

    Args:
        site (`Site`): Heads or neurons.
        config (`StructuredPruningConfig`): Which widths are allowed.
        calibration (`Calibration`): Holds its errors.
        costs (`Costs`): What its units cost.

    Returns:
        `Curve`: From all units to the fewest.

    Raises:
        ValueError: if `multiple_of` is larger than the site.
    """
    if site.kind not in config.units:
        kept = np.array([site.n_units])
        return plan.Curve(kept, np.zeros(1), costs.at(site.name, kept), site.name)
    kept = np.array(allowed_widths(site, config.multiple_of, "layers" in config.units))
    error = calibration.removals[site.name].error.numpy()[site.n_units - kept]
    return plan.Curve(kept, error, costs.at(site.name, kept), site.kind)
