"""Heads and neurons for `pruning_baselines.py`: what they cost, and which stay within a budget.

Lists hold one entry per part: attention and feed-forward network of each layer in turn. A mask is True at the units
that stay. The best head and the best neuron of each layer always do.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_compress.modeling.blocks import FFN, Attention, find_blocks
from hf_compress.modeling.projections import out_width
from hf_compress.modeling.surgery import keep_heads_, keep_neurons_, update_config_

Part = Attention | FFN
Batch = Mapping[str, torch.Tensor]
Batches = Sequence[Batch]
Scope = Literal["layer", "model"]


def parts_of(model: nn.Module) -> list[Part]:
    """Attention and feed-forward network of each layer in turn: heads at even places, neurons at odd ones."""
    return [part for block in find_blocks(model) for part in (block.attention, block.ffn)]


def n_units(part: Part) -> int:
    """Number of heads or of neurons."""
    return part.width if isinstance(part, FFN) else part.num_heads


def by_unit(columns: torch.Tensor, part: Part) -> torch.Tensor:
    """Sums over the inputs of an output projection that belong to one unit."""
    return columns.view(n_units(part), -1).sum(1)


def mean_length(batches: Batches) -> float:
    """Mean number of tokens of the calibration texts."""
    return torch.cat([real_tokens(batch).sum(1) for batch in batches]).double().mean().item()


def real_tokens(batch: Batch) -> torch.Tensor:
    """Which tokens are no padding, shape (batch, length)."""
    return batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()


def unit_macs(part: Part, length: float) -> float:
    """Multiply-accumulates of one head or neuron for one text."""
    hidden_size = out_width(part.output)
    if isinstance(part, FFN):
        return 2 * length * hidden_size
    return (4 * hidden_size + 2 * length) * length * part.head_dim


def count_macs(parts: Sequence[Part], length: float) -> float:
    """Multiply-accumulates of some parts for one text."""
    return sum(n_units(part) * unit_macs(part, length) for part in parts)


def allowance(parts: Sequence[Part], length: float, budget: float) -> float:
    """Multiply-accumulates that may stay.

    Raises:
        ValueError: if they do not suffice for one unit of each part.
    """
    whole, least = count_macs(parts, length), sum(unit_macs(part, length) for part in parts)
    if least > budget * whole:
        raise ValueError(f"One head and one neuron per layer need a budget of {least / whole:.3f}, given is {budget}.")
    return budget * whole


def choose(
    parts: list[Part], scores: list[torch.Tensor], length: float, budget: float, scope: Scope
) -> list[torch.Tensor]:
    """The units with the highest scores, the same share of each layer's heads and neurons, or in one ranking."""
    if scope == "model":
        costs = [unit_macs(part, length) for part in parts]
        return keep_within(scores, costs, allowance(parts, length, budget))
    masks = []
    for start in range(0, len(parts), 2):
        layer = slice(start, start + 2)
        masks += keep_counts(scores[layer], *share_counts(parts[layer], length, budget))
    return masks


def ranking(scores: list[torch.Tensor]) -> torch.Tensor:
    """Units of all layers, numbered through, from the best; the best of each layer come first, since they stay."""
    lifted = [one.index_fill(0, one.argmax(), torch.inf) for one in scores]
    return torch.cat(lifted).argsort(descending=True, stable=True)


def as_masks(units: torch.Tensor, scores: list[torch.Tensor]) -> list[torch.Tensor]:
    """The masks that keep some units, numbered through."""
    sizes = [len(one) for one in scores]
    return list(torch.zeros(sum(sizes), dtype=torch.bool).index_fill(0, units, True).split(sizes))


def keep_counts(scores: list[torch.Tensor], n_heads: int, n_neurons: int) -> list[torch.Tensor]:
    """The best heads and the best neurons, so many of each."""
    heads = as_masks(ranking(scores[::2])[:n_heads], scores[::2])
    neurons = as_masks(ranking(scores[1::2])[:n_neurons], scores[1::2])
    return [mask for pair in zip(heads, neurons, strict=True) for mask in pair]


def keep_within(scores: list[torch.Tensor], costs: list[float], most: float) -> list[torch.Tensor]:
    """The best units of both kinds, each one that still fits into a cost."""
    of_units = [cost for one, cost in zip(scores, costs, strict=True) for _ in one]
    # Rounding errors must not cost a unit.
    left, units = most * (1 + 1e-9), []
    for unit in ranking(scores).tolist():
        if of_units[unit] <= left:
            left -= of_units[unit]
            units.append(unit)
    return as_masks(torch.tensor(units), scores)


def splits(parts: list[Part], length: float, budget: float) -> dict[int, int]:
    """For each number of heads that leaves room for a neuron per layer, how many neurons the budget pays for."""
    heads, neurons = parts[::2], parts[1::2]
    most = allowance(parts, length, budget)
    most_neurons = sum(n_units(part) for part in neurons)
    found = {}
    for n_heads in range(len(heads), sum(n_units(part) for part in heads) + 1):
        left = most - n_heads * unit_macs(heads[0], length)
        # Rounding errors must not cost a neuron.
        n_neurons = math.floor(left / unit_macs(neurons[0], length) + 1e-9)
        if n_neurons >= len(neurons):
            found[n_heads] = min(n_neurons, most_neurons)
    return found


def share_counts(parts: list[Part], length: float, budget: float) -> tuple[int, int]:
    """The same share of heads and of neurons; heads are rounded, and neurons use up what is left of the budget."""
    wanted = budget * sum(n_units(part) for part in parts[::2])
    return min(splits(parts, length, budget).items(), key=lambda split: abs(split[0] - wanted))


def count_after(step: int, n_steps: int, first: int, last: int) -> int:
    """What is left after a step, where all steps remove the same number and the first ones the remainder."""
    removed, remainder = divmod(first - last, n_steps)
    return first - step * removed - min(step, remainder)


def cut(model: PreTrainedModel, masks: list[torch.Tensor]) -> PreTrainedModel:
    """A copy of the model with only the units that the masks keep."""
    pruned = copy.deepcopy(model).eval()
    cut_(pruned, masks)
    return pruned


def cut_(model: PreTrainedModel, masks: list[torch.Tensor]) -> None:
    """Leaves only the units that the masks keep."""
    for part, mask in zip(parts_of(model), masks, strict=True):
        keep = keep_neurons_ if isinstance(part, FFN) else keep_heads_
        keep(part, mask.nonzero().flatten())
    update_config_(model)
