"""Repairing a live model after units were chosen to go, from the first block to the last."""

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import nn
from tqdm.auto import tqdm

from hf_compress.modeling.blocks import Block, find_blocks
from hf_compress.modeling.projections import read_matrix, spread, write_matrix_
from hf_compress.pruning.batches import Batch, check_finite, token_mask, warn_of_few_tokens
from hf_compress.pruning.config import StructuredPruningConfig
from hf_compress.pruning.repair import Moments, fit_projection, mean_compensation
from hf_compress.pruning.replay import Replay
from hf_compress.pruning.sensitivity import frozen
from hf_compress.pruning.units import Part, Site, count_units, unit_size


def repair_(
    model: nn.Module,
    reference: nn.Module,
    sites: Sequence[Site],
    kept: Mapping[str, torch.Tensor],
    config: StructuredPruningConfig,
    batches: Sequence[Batch],
    removed: Collection[str] = (),
) -> None:
    """Fits the output projections to what the reference gives, from the first block to the last.

    Inputs come from the model whose earlier blocks are pruned and repaired already. The target of a part is what the
    reference's residual stream holds after it, less what the model's holds before it, so that later blocks make up for
    what earlier ones could not. Units that go are left in place with weights of 0; `cut_` takes them out.

    Blocks that go as a whole are passed by. The last part before such a gap aims at the residual stream after the gap.

    Args:
        model (`nn.Module`): Is changed; no unit is cut yet that `kept` leaves out.
        reference (`nn.Module`): The model itself, or one with as many blocks.
        sites (`Sequence[Site]`): Of the model.
        kept (`Mapping[str, torch.Tensor]`): By site, indices of the units that stay.
        config (`StructuredPruningConfig`): `repair` and `ridge`.
        batches (`Sequence[dict[str, torch.Tensor]]`): Calibration data.
        removed (`Collection[str]`, *optional*): Names of the blocks that go, which have weights of their own.

    Raises:
        ValueError: if activations are not finite, or a fit is impossible.
    """
    kept_of = {part.name: kept[site.name] for site in sites for part in site.parts}
    blocks, dense_blocks = find_blocks(model), find_blocks(reference)
    is_changed = model is not reference
    widest = max(site.n_units * unit_size(site.parts[0]) for site in sites)
    warn_of_few_tokens(batches, "encoder", widest, "the repair stays close to the old weights")
    bar = tqdm(total=2 * len(blocks) * len(batches), desc="Repairing layers", unit="pass")
    with frozen(model), frozen(reference), bar:
        dense = Replay(reference, batches, bar.update)
        pruned = Replay(model, batches, bar.update)
        for run in split_at_kept(zip(blocks, dense_blocks, strict=True), removed):
            block = run[0][0]
            stays = block.name not in removed
            parts = [part for part in (*block.attentions, block.ffn) if stays and part.name in kept_of]
            targets = follow(dense, [dense_block for _, dense_block in run], parts)
            for part in parts:
                is_before_gap = part is parts[-1] and len(run) > 1
                # Up to the first cut there is nothing to make up for.
                is_changed = is_changed or is_before_gap or len(kept_of[part.name]) < count_units(part)
                if not is_changed:
                    continue
                moments = Moments()
                add_moments_(moments, pruned, block, part, targets)
                check_finite(part.name, moments.xx())
                check_finite(part.name, moments.xy())
                refit_(part, kept_of[part.name], moments, config)
            for each, _ in run:
                is_changed = is_changed or each.name in removed
                pruned.finish(each, is_passed_by=each.name in removed)


def split_at_kept(blocks: Iterable[tuple[Block, Block]], removed: Collection[str]) -> list[list[tuple[Block, Block]]]:
    """Each block that stays, with those after it that go; those that go before all others are a run of their own.

    Args:
        blocks (`Iterable[tuple[Block, Block]]`): Blocks of the model and of the reference, in their order.
        removed (`Collection[str]`): Names of those that go.

    Returns:
        `list[list[tuple[Block, Block]]]`: Runs of blocks of one stack.
    """
    runs: list[list[tuple[Block, Block]]] = []
    for block, dense_block in blocks:
        if block.name in removed and runs and runs[-1][0][0].stack == block.stack:
            runs[-1].append((block, dense_block))
        else:
            runs.append([(block, dense_block)])
    return runs


def follow(dense: Replay, blocks: Sequence[Block], parts: Sequence[Part]) -> dict[tuple[str, int], list[torch.Tensor]]:
    """Takes the reference through a block and those after it that go, and reads what the block's parts aim at.

    Args:
        dense (`Replay`): Of the reference.
        blocks (`Sequence[Block]`): Of the reference; all but the first go.
        parts (`Sequence[Attention | FFN]`): Of the model's first one, those that may be fitted.

    Returns:
        `dict[tuple[str, int], list[torch.Tensor]]`: As `read_targets` gives them; the last part aims at the residual
        stream after the last block.
    """
    targets = read_targets(dense, blocks[0], {part.name for part in parts}) if parts else {}
    dense.finish(blocks[0])
    for block in blocks[1:]:
        if parts and block is blocks[-1]:
            after = read_targets(dense, block, {block.ffn.name})
            targets |= {(parts[-1].name, number): states for (_, number), states in after.items()}
        dense.finish(block)
    return targets


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
    old = read_matrix(projection).cpu().double()
    weight, bias = old[:, inputs], None
    if config.repair == "least_squares":
        weight, bias = fit_projection(moments, inputs, weight, config.ridge, has_bias)
    elif has_bias:
        bias = mean_compensation(moments, inputs, weight)
    new = torch.zeros_like(old)
    new[:, inputs] = weight
    write_matrix_(projection, new, bias if has_bias else None)
