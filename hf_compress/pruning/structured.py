"""Structured pruning of a live model: planned by calibration, then repaired and cut from the first block on."""

import copy
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from hf_compress.checkpoint.widths import read_widths, write_widths_
from hf_compress.modeling.blocks import find_blocks, find_stacks
from hf_compress.modeling.projections import read_matrix
from hf_compress.modeling.surgery import check_layers_can_go, heads_fit_config
from hf_compress.modeling.tasks import unwrap
from hf_compress.pruning import plan
from hf_compress.pruning.batches import median_batch
from hf_compress.pruning.calibration import Calibration, calibrate, gather, score_units
from hf_compress.pruning.config import StructuredPruningConfig
from hf_compress.pruning.costs import Costs
from hf_compress.pruning.cutting import cut_
from hf_compress.pruning.depth import check_layers_left, prune_layers_
from hf_compress.pruning.latency import time_forward
from hf_compress.pruning.refit import repair_
from hf_compress.pruning.units import Site, allowed_widths, find_sites
from hf_compress.pruning.weight_layers import check_not_binary

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
    check_layers(model, config)
    is_calibrated = isinstance(data, Calibration)
    first = data if is_calibrated else gather(model, config, data)
    if is_calibrated:
        check_calibration(first, config, model)
    check_budget(model, config, first)
    first = first if is_calibrated else score_units(model, first)
    costs, whole = find_costs(model, config, first)
    if config.units == ("layers",):
        prune_layers_(model, config, first, costs)
    else:
        prune_units_(model, config, first, costs)
    write_widths_(model)
    method = vars(model.config).get("quantization_config")
    if config.uniform and method is not None and method.widths is not None:
        logger.warning(
            "All layers have the same widths, %s, but the config of %s cannot say so, and the result loads only after "
            "`import hf_compress`: leave its heads alone with units=('neurons',) if stock Transformers is to load it.",
            next(iter(read_widths(model).values())),
            type(model).__name__,
        )
    _, left = find_costs(model, config, first)
    logger.info("%.1f %% of the %s are left: %s", 100 * left / whole, config.cost, read_widths(model))
    if config.cost == "latency":
        measured = time_forward(model, median_batch(first.batches))
        logger.info("%s. Predicted now: %.2f ms, measured: %.2f ms.", first.latency.describe(), left, measured)


def find_costs(model: nn.Module, config: StructuredPruningConfig, calibration: Calibration) -> tuple[Costs, float]:
    """What the sites of a model cost, each and all together.

    Args:
        model (`nn.Module`): As it is now.
        config (`StructuredPruningConfig`): What its `cost` counts.
        calibration (`Calibration`): Lengths of texts, and times.
    """
    sites = find_sites(find_blocks(model))
    costs = Costs(config.cost, sites, calibration.batches, calibration.latency, calibration.lengths)
    return costs, costs.total(sites)


def prune_units_(model: nn.Module, config: StructuredPruningConfig, first: Calibration, costs: Costs) -> None:
    """Cuts heads and neurons, in as many rounds as the config asks for."""
    # The dense model is what every repair aims at; in a single step, its blocks are read before they are cut.
    reference = copy.deepcopy(model) if config.steps > 1 and config.repair == "least_squares" else model
    whole = costs.total(find_sites(find_blocks(model)))
    for step in range(1, config.steps + 1):
        # Times were measured in the first round, for all widths.
        calibration = first if step == 1 else calibrate(model, replace(config, cost="macs"), first.batches or None)
        sites = find_sites(find_blocks(model))
        target = config.budget ** (step / config.steps) * whole
        kept = choose_units(model, sites, config, calibration, costs, target)
        if config.repair != "none":
            repair_(model, reference, sites, kept, config, calibration.batches)
        cut_(model, sites, kept)


def check_prunable(model: nn.Module) -> None:
    """Refuses models whose weights are packed, and those of which nothing is left.

    Args:
        model (`nn.Module`): A Transformers model.

    Raises:
        ValueError: if it is quantized, prepared for weights of one bit, or has neither heads nor neurons.
        TypeError: if it has adapters that are not merged.
    """
    if getattr(model, "is_quantized", False):
        method = model.config.quantization_config
        raise ValueError(
            f"The model {type(model).__name__} is quantized ({type(method).__name__}): single heads and neurons "
            "cannot be cut from packed weights. Prune the full-precision model, then quantize the result."
        )
    check_not_binary(model)
    blocks = find_blocks(model)
    if not find_sites(blocks):
        raise ValueError(
            f"The {len(blocks)} layers of {type(model).__name__} have no head and no neuron left, so nothing can be "
            "cut: prune the model that it was made from to another budget."
        )
    for block in blocks:
        for part in (*block.attentions, block.ffn):
            for projection in (*part.inputs, part.output):
                # Cutting one of them by halves would leave a model that cannot run.
                read_matrix(projection)


def check_budget(
    model: nn.Module, config: StructuredPruningConfig, data: Iterable[Mapping[str, Any]] | Calibration | None = None
) -> None:
    """Refuses a budget that no plan can meet; what units are worth does not matter, and is not computed.

    Args:
        model (`nn.Module`): A Transformers model of a known architecture.
        config (`StructuredPruningConfig`): The budget, and what may go.
        data (`Iterable[Mapping[str, torch.Tensor]]` or `Calibration`, *optional*): Whose lengths count. A budget of
            `cost="latency"` is only checked with a calibration, which holds the times.

    Raises:
        ValueError: if it cannot be met, with the smallest that can; or no layer of the model can be removed.
    """
    model = unwrap(model)
    check_layers(model, config)
    if config.repair == "bias":
        check_biases(model)
    if not isinstance(data, Calibration):
        if config.cost == "latency":
            return
        data = gather(model, config, data)
    costs, whole = find_costs(model, config, data)
    if config.units == ("layers",):
        check_layers_left(model, config, costs)
        return
    curves = [bare_curve(model, site, config, costs) for site in find_sites(find_blocks(model))]
    plan.check_target(curves, config.budget * whole - costs.fixed, costs.fixed, config.uniform)


def check_layers(model: nn.Module, config: StructuredPruningConfig) -> None:
    """Refuses models of which no layer can be removed, where layers are to go.

    Args:
        model (`nn.Module`): A Transformers model of a known architecture.
        config (`StructuredPruningConfig`): Whether layers are to go.

    Raises:
        ValueError: if the config of the model forbids it.
    """
    if config.units == ("layers",) and config.budget < 1:
        for stack in find_stacks(model):
            check_layers_can_go(model, stack)


def check_biases(model: nn.Module) -> None:
    """Refuses models without a bias that could make up for what is cut.

    Args:
        model (`nn.Module`): A Transformers model of a known architecture.

    Raises:
        ValueError: if no output projection has one.
    """
    if all(part.output.bias is None for site in find_sites(find_blocks(model)) for part in site.parts):
        raise ValueError(
            f"repair='bias' corrects biases, and the output projections of {type(model).__name__} have none: give "
            "repair='least_squares', or 'none'."
        )


def check_calibration(calibration: Calibration, config: StructuredPruningConfig, model: nn.Module) -> None:
    """Refuses a calibration of another model, or whose scores are others than those asked for.

    Args:
        calibration (`Calibration`): What `calibrate` returned.
        config (`StructuredPruningConfig`): What is asked for now.
        model (`nn.Module`): What is to be pruned.

    Raises:
        ValueError: if the model, `score`, `use_labels` or `seed` differ, or data are missing.
    """
    for name in ("score", "use_labels", "seed"):
        then, now = getattr(calibration.config, name), getattr(config, name)
        if then != now:
            raise ValueError(f"The calibration was made with {name}={then!r}, and {name}={now!r} is asked for now: "
                             "call calibrate again with this config.")  # fmt: skip
    now = {site.name: site.n_units for site in find_sites(find_blocks(model))}
    then = {name: len(removal.order) for name, removal in calibration.removals.items()}
    if then and then != now:
        raise ValueError(
            f"The calibration is of a model with the widths {then}, and the model to be pruned has {now}: call "
            "calibrate again with this model."
        )
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
    model: nn.Module,
    sites: Sequence[Site],
    config: StructuredPruningConfig,
    calibration: Calibration,
    costs: Costs,
    target: float,
) -> dict[str, torch.Tensor]:
    """Which units stay, within a target.

    Args:
        model (`nn.Module`): The model.
        sites (`Sequence[Site]`): All of it; those whose units the config leaves alone are kept whole.
        config (`StructuredPruningConfig`): What may be cut and how it is planned.
        calibration (`Calibration`): Scores of the units.
        costs (`Costs`): What they cost.
        target (`float`): The cost that must not be exceeded.

    Returns:
        `dict[str, torch.Tensor]`: By site, rising indices of the units that stay.

    Raises:
        ValueError: if the target cannot be met.
    """
    curves = [make_curve(model, site, config, calibration, costs) for site in sites]
    allowed, whole = target - costs.fixed, plan.total_cost(curves)
    # A budget of everything, which rounding made a little less.
    allowed = whole if math.isclose(target, whole + costs.fixed, rel_tol=1e-9) else allowed
    plan.check_target(curves, allowed, costs.fixed, config.uniform)
    levels = search(curves, allowed, config)
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


def make_curve(
    model: nn.Module, site: Site, config: StructuredPruningConfig, calibration: Calibration, costs: Costs
) -> plan.Curve:
    """Error and cost of a site at each width that it may get.

    Args:
        model (`nn.Module`): The model.
        site (`Site`): Heads or neurons.
        config (`StructuredPruningConfig`): Which widths are allowed.
        calibration (`Calibration`): Holds its errors.
        costs (`Costs`): What its units cost.

    Returns:
        `Curve`: From all units to the fewest.

    Raises:
        ValueError: if `multiple_of` is larger than the site.
    """
    curve = bare_curve(model, site, config, costs)
    if site.kind not in config.units:
        return curve
    return replace(curve, error=calibration.removals[site.name].error.numpy()[site.n_units - curve.kept])


def bare_curve(model: nn.Module, site: Site, config: StructuredPruningConfig, costs: Costs) -> plan.Curve:
    """Like `make_curve`, as if no removal did any harm.

    Args:
        model (`nn.Module`): The model.
        site (`Site`): Heads or neurons.
        config (`StructuredPruningConfig`): Which widths are allowed.
        costs (`Costs`): What its units cost.
    """
    may_be_cut = site.kind in config.units
    # No stock config can say that a part of all layers is gone.
    may_go = "layers" in config.units and not config.uniform
    widths = allowed_widths(site, config.multiple_of, may_go) if may_be_cut else [site.n_units]
    if config.uniform and site.kind == "heads":
        size = site.parts[0].group_size
        widths = [width for width in widths if width == site.n_units or heads_fit_config(model, width * size)]
    kept = np.array(widths)
    # Sites that stay whole need not agree in a uniform plan.
    kind = site.kind if may_be_cut else site.name
    return plan.Curve(kept, np.zeros(len(kept)), costs.at(site.name, kept), kind)
