"""Structured pruning of a live model: planned by calibration, then repaired and cut from the first block on."""

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from hf_compress.checkpoint.widths import read_widths, write_widths_
from hf_compress.modeling.blocks import Block, find_blocks
from hf_compress.modeling.projections import read_matrix, spread, write_matrix_
from hf_compress.modeling.removal import can_remove, remove_attention_, remove_ffn_
from hf_compress.modeling.surgery import keep_heads_, keep_neurons_, keep_stack_heads_
from hf_compress.modeling.tasks import unwrap
from hf_compress.pruning import plan
from hf_compress.pruning.batches import Batch, check_finite, text_length, token_mask
from hf_compress.pruning.calibration import Calibration, calibrate
from hf_compress.pruning.config import StructuredPruningConfig
from hf_compress.pruning.costs import site_cost
from hf_compress.pruning.repair import Moments, fit_projection, mean_compensation
from hf_compress.pruning.replay import Replay
from hf_compress.pruning.sensitivity import frozen
from hf_compress.pruning.units import Part, Site, count_units, find_sites, unit_size

logger = logging.getLogger(__name__)

USUAL_LENGTH = 128.0

Data = Iterable[Mapping[str, Any]] | Calibration


def prune_structured_(model: nn.Module, config: StructuredPruningConfig, data: Data | None = None) -> None:
    """Cuts heads and neurons of a model in place, down to a budget, and repairs what is left.

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
    # The dense model is what every repair aims at; in a single step, its blocks are read before they are cut.
    reference = copy.deepcopy(model) if config.steps > 1 and config.repair == "least_squares" else model
    whole = total_costs(model, config, first.batches)
    for step in range(1, config.steps + 1):
        calibration = first if step == 1 else calibrate(model, config, first.batches)
        target = config.budget ** (step / config.steps) * whole
        prune_to_(model, reference, config, calibration, target)
    write_widths_(model)
    left = total_costs(model, config, first.batches) / whole
    logger.info("Kept %.1f %% of the %s of the blocks: %s", 100 * left, config.cost, read_widths(model))


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
    if config.needs_data and not calibration.batches:
        raise ValueError(
            f"repair={config.repair!r} with cost={config.cost!r} is computed from data, and the calibration has none: "
            "give calibrate some hundred texts as tokenized batches."
        )


def prune_to_(
    model: nn.Module,
    reference: nn.Module,
    config: StructuredPruningConfig,
    calibration: Calibration,
    target: float,
) -> None:
    """One round: plan, repair, cut.

    Args:
        model (`nn.Module`): Is changed.
        reference (`nn.Module`): What the repair aims at: the model itself, or a dense copy of it.
        config (`StructuredPruningConfig`): What to cut and how.
        calibration (`Calibration`): Of the model as it is now.
        target (`float`): The cost that must not be exceeded.
    """
    sites = find_sites(find_blocks(model))
    kept = choose_units(model, sites, config, calibration, target)
    if config.repair != "none":
        repair_(model, reference, sites, kept, config, calibration.batches)
    cut_(model, sites, kept)


def choose_units(
    model: nn.Module,
    sites: Sequence[Site],
    config: StructuredPruningConfig,
    calibration: Calibration,
    target: float,
) -> dict[str, torch.Tensor]:
    """Which units stay, within a target.

    Args:
        model (`nn.Module`): The model that was calibrated.
        sites (`Sequence[Site]`): All of its sites; those whose units the config leaves alone are kept whole.
        config (`StructuredPruningConfig`): What may be cut and how it is planned.
        calibration (`Calibration`): Scores of the units.
        target (`float`): The cost that must not be exceeded.

    Returns:
        `dict[str, torch.Tensor]`: By site, rising indices of the units that stay.

    Raises:
        ValueError: if the target cannot be met.
    """
    costs = unit_costs(sites, config, calibration.batches)
    curves = [make_curve(site, costs[site.name], calibration, config) for site in sites]
    levels = search(curves, target, config)
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


def make_curve(site: Site, unit_cost: float, calibration: Calibration, config: StructuredPruningConfig) -> plan.Curve:
    """Error and cost of a site at each width that it may get.

    Args:
        site (`Site`): Heads or neurons.
        unit_cost (`float`): Cost of one unit.
        calibration (`Calibration`): Holds its errors.
        config (`StructuredPruningConfig`): Which widths are allowed.

    Returns:
        `Curve`: From all units to the fewest.

    Raises:
        ValueError: if `multiple_of` is larger than the site.
    """
    if site.kind not in config.units:
        return plan.Curve(np.array([site.n_units]), np.zeros(1), np.array([site.n_units * unit_cost]), site.name)
    step = config.multiple_of if site.kind == "neurons" else 1
    if step > site.n_units:
        raise ValueError(
            f"multiple_of={step} is larger than the {site.n_units} neurons of {site.name}: give at most that."
        )
    kept = list(range(site.n_units // step * step, 0, -step))
    if kept[0] != site.n_units:
        kept.insert(0, site.n_units)
    if "layers" in config.units and all(can_remove(part) for part in site.parts):
        kept.append(0)
    kept = np.array(kept)
    error = calibration.removals[site.name].error.numpy()[site.n_units - kept]
    return plan.Curve(kept, error, kept * unit_cost, site.kind)


def unit_costs(sites: Sequence[Site], config: StructuredPruningConfig, batches: Sequence[Batch]) -> dict[str, float]:
    """The cost of one unit of each site, by the config's measure."""
    stacks = {site.name.split(".")[0] for site in sites}
    # Without data, the length only shifts the weight between heads and neurons.
    lengths = {stack: text_length(batches, stack) if batches else (USUAL_LENGTH, USUAL_LENGTH) for stack in stacks}
    return {site.name: site_cost(site, config.cost, *lengths[site.name.split(".")[0]]) for site in sites}


def total_costs(model: nn.Module, config: StructuredPruningConfig, batches: Sequence[Batch]) -> float:
    """The cost of all heads and neurons of a model, by the config's measure."""
    sites = find_sites(find_blocks(model))
    costs = unit_costs(sites, config, batches)
    return sum(costs[site.name] * site.n_units for site in sites)


def repair_(
    model: nn.Module,
    reference: nn.Module,
    sites: Sequence[Site],
    kept: Mapping[str, torch.Tensor],
    config: StructuredPruningConfig,
    batches: Sequence[Batch],
) -> None:
    """Fits the output projections to what the reference gives, from the first block to the last.

    Inputs come from the model whose earlier blocks are pruned and repaired already. The target of a part is what the
    reference's residual stream holds after it, less what the model's holds before it, so that later blocks make up for
    what earlier ones could not. Units that go are left in place with weights of 0; `cut_` takes them out.

    Args:
        model (`nn.Module`): Is changed; no unit is cut yet that `kept` leaves out.
        reference (`nn.Module`): The model itself, or one with as many blocks.
        sites (`Sequence[Site]`): Of the model.
        kept (`Mapping[str, torch.Tensor]`): By site, indices of the units that stay.
        config (`StructuredPruningConfig`): `repair` and `ridge`.
        batches (`Sequence[dict[str, torch.Tensor]]`): Calibration data.

    Raises:
        ValueError: if activations are not finite, or a fit is impossible.
    """
    kept_of = {part.name: kept[site.name] for site in sites for part in site.parts}
    blocks, dense_blocks = find_blocks(model), find_blocks(reference)
    is_changed = model is not reference
    warn_of_few_tokens(sites, batches)
    bar = tqdm(total=2 * len(blocks) * len(batches), desc="Repairing layers", unit="pass")
    with frozen(model), frozen(reference), bar:
        dense = Replay(reference, batches, bar.update)
        pruned = Replay(model, batches, bar.update)
        for block, dense_block in zip(blocks, dense_blocks, strict=True):
            parts = [part for part in (*block.attentions, block.ffn) if part.name in kept_of]
            targets = read_targets(dense, dense_block, {part.name for part in parts})
            dense.finish(dense_block)
            for part in parts:
                # Up to the first cut there is nothing to make up for.
                is_changed = is_changed or len(kept_of[part.name]) < count_units(part)
                if not is_changed:
                    continue
                moments = Moments()
                add_moments_(moments, pruned, block, part, targets)
                check_finite(part.name, moments.xx())
                refit_(part, kept_of[part.name], moments, config)
            pruned.finish(block)


def warn_of_few_tokens(sites: Sequence[Site], batches: Sequence[Batch]) -> None:
    """Warns where there are fewer tokens than weights to be fitted for each output."""
    n_tokens = sum(int(token_mask(batch, "encoder").sum()) for batch in batches)
    widest = max(site.n_units * unit_size(site.parts[0]) for site in sites)
    if n_tokens < widest:
        logger.warning(
            "The calibration data have %d tokens for up to %d weights of each output, so the repair stays close to "
            "the old weights: give some hundred texts.",
            n_tokens,
            widest,
        )


def read_targets(dense: Replay, block: Block, names: set[str]) -> dict[tuple[str, int], list[torch.Tensor]]:
    """The residual stream after each part of a block, by name of the part and number of the batch."""
    targets: dict[tuple[str, int], list[torch.Tensor]] = {}

    def read(number: int, part: Part, passage) -> None:
        targets.setdefault((part.name, number), []).append(passage.outputs + passage.residual)

    dense.visit(block, [part for part in (*block.attentions, block.ffn) if part.name in names], read)
    return targets


def add_moments_(moments: Moments, pruned: Replay, block: Block, part: Part, targets) -> None:
    """Gathers what a part's projection is fitted by."""

    def add(number: int, part: Part, passage) -> None:
        # One after the other, where all layers share a block that is run several times.
        target = targets[part.name, number].pop(0) - passage.residual
        mask = token_mask(pruned.batches[number], block.stack, passage.inputs.shape[1])
        moments.add(passage.inputs, target, mask.float())

    pruned.visit(block, [part], add)


def refit_(part: Part, kept: torch.Tensor, moments: Moments, config: StructuredPruningConfig) -> None:
    """Gives a part's output projection new weights: 0 for the units that go."""
    projection = part.output
    has_bias = projection.bias is not None
    inputs = torch.tensor(spread(kept.tolist(), unit_size(part)), dtype=torch.long)
    old = read_matrix(projection).double().cpu()
    weight, bias = old[:, inputs], None
    if config.repair == "least_squares":
        weight, bias = fit_projection(moments, inputs, weight, config.ridge, has_bias)
    elif has_bias:
        bias = mean_compensation(moments, inputs, weight)
    new = torch.zeros_like(old)
    new[:, inputs] = weight
    write_matrix_(projection, new, bias if has_bias else None)


def cut_(model: nn.Module, sites: Sequence[Site], kept: Mapping[str, torch.Tensor]) -> None:
    """Takes units out of a model.

    Args:
        model (`nn.Module`): Is changed.
        sites (`Sequence[Site]`): Of the model.
        kept (`Mapping[str, torch.Tensor]`): By site, indices of the units that stay; none where all of it goes.
    """
    for site in sites:
        units = kept[site.name].tolist()
        if len(units) == site.n_units:
            continue
        if len(site.parts) > 1 or (site.kind == "heads" and site.parts[0].is_stack_wide):
            keep_stack_heads_(model, units, *site.name.split("."))
        elif site.kind == "heads":
            keep_heads_(site.parts[0], units) if units else remove_attention_(site.parts[0])
        else:
            keep_neurons_(site.parts[0], units) if units else remove_ffn_(site.parts[0])
