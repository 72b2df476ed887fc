"""Baselines of structured pruning without retraining, written from their formulas.

Every baseline takes a classifier with the blocks of BERT (each part's output is added to its input, a norm follows),
calibration batches without labels and a budget, and returns a new model that is really cut:

- `random_cut`: units drawn by lot.
- `l2_cut`: the norms of the weights.
- `textpruner_cut`: Yang et al., "TextPruner: A Model Pruning Toolkit for Pre-Trained Language Models" (2022).
- `kwon_cut`: Kwon et al., "A Fast Post-Training Pruning Framework for Transformers" (2022).

The budget is a share of the multiply-accumulates of the blocks at the mean length T of the calibration texts:
4 T d D + 2 T^2 D for a head of width D, 2 T d for a neuron, with hidden size d (as Kwon et al. count). It is never
exceeded, and one head and one neuron of each layer always stay. The two methods with gradients see one gradient per
batch, so the size of the batches matters to them: Kwon et al. take 32 texts.
"""

import copy
from contextlib import suppress
from typing import Literal

import numpy as np
import torch
from pruning_masks import (
    Batch,
    Batches,
    Part,
    Scope,
    by_unit,
    choose,
    count_after,
    cut,
    cut_,
    keep_counts,
    mean_length,
    n_units,
    parts_of,
    ranking,
    real_tokens,
    share_counts,
    splits,
    unit_macs,
)
from scipy.sparse.linalg import lsmr
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from hf_compress.evaluation.inference import model_inputs
from hf_compress.modeling.blocks import Attention
from hf_compress.modeling.capture import gate_outputs
from hf_compress.modeling.projections import in_width
from hf_compress.modeling.tasks import task_of

# Scales of a tuned mask beyond this are taken for a numerical failure in Kwon et al.'s code, as is a solver that
# stops for another reason than that it is done.
LARGEST_SCALE, CONVERGED = 10.0, 2


def random_cut(
    model: PreTrainedModel, batches: Batches, budget: float, seed: int = 0, scope: Scope = "layer"
) -> PreTrainedModel:
    """Keeps heads and neurons drawn by lot, the same share in each layer or of the whole model."""
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.rand(n_units(part), generator=generator) for part in parts_of(model)]
    return cut(model, choose(parts_of(model), scores, mean_length(batches), budget, scope))


def l2_cut(model: PreTrainedModel, batches: Batches, budget: float, scope: Scope = "layer") -> PreTrainedModel:
    """Keeps the units with the largest squared L2 norm per multiply-accumulate.

    Of a head count its rows in the q, k and v projections and its columns in the output projection; of a neuron its
    row and its column. Squares, since they add up over weights as costs do: norms alone would put all heads last.
    """
    length = mean_length(batches)
    scores = []
    for part in parts_of(model):
        squares = part.output.weight.detach().square().sum(0)
        squares = squares + sum(projection.weight.detach().square().sum(1) for projection in part.inputs)
        scores.append(by_unit(squares, part) / unit_macs(part, length))
    return cut(model, choose(parts_of(model), scores, length, budget, scope))


def textpruner_cut(
    model: PreTrainedModel,
    batches: Batches,
    budget: float,
    n_iters: int = 16,
    labels: Literal["soft", "sampled"] = "soft",
    seed: int = 0,
) -> PreTrainedModel:
    """Iterative first-order pruning as in TextPruner, with uneven heads and uneven neurons.

    A unit's importance is |sum of gradient x weight| over its columns of the output projection, summed over batches.
    With uneven neurons TextPruner leaves their rows of the first projection out of it. The same share of heads and of
    neurons stays; their numbers fall linearly, and importances are computed anew before each step.

    Args:
        model: The model; it is not changed.
        batches: Calibration batches.
        budget: Share of the multiply-accumulates that may stay.
        n_iters: Number of steps.
        labels: "soft" is TextPruner's `use_logits`, the cross-entropy with what the whole model says in half
            precision; "sampled" draws labels from the whole model.
        seed: Draws the labels.
    """
    pruned = copy.deepcopy(model).eval()
    targets = half_precision_targets(pruned, batches) if labels == "soft" else sampled_targets(pruned, batches, seed)
    parts = parts_of(pruned)
    first = [sum(n_units(part) for part in kind) for kind in (parts[::2], parts[1::2])]
    last = share_counts(parts, mean_length(batches), budget)
    for step in range(1, n_iters + 1):
        scores = [gradients.abs().sum(0) for gradients in gate_gradients(pruned, batches, targets)]
        counts = [count_after(step, n_iters, *ends) for ends in zip(first, last, strict=True)]
        cut_(pruned, keep_counts(scores, *counts))
    return pruned


def kwon_cut(
    model: PreTrainedModel,
    batches: Batches,
    budget: float,
    seed: int = 0,
    tune: bool = True,
    reference: Literal["halfway", "dense"] = "halfway",
    failure: Literal["stop", "skip"] = "stop",
) -> PreTrainedModel:
    """Mask search, mask rearrangement and mask tuning of Kwon et al., with the tuned mask folded into the weights.

    Args:
        model: The model; it is not changed.
        batches: Calibration batches.
        budget: Share of the multiply-accumulates that may stay.
        seed: Draws the labels, which come from the model, as the Fisher information wants it.
        tune: Whether to tune the mask.
        reference: Whose outputs it is tuned to: "dense" is the whole model, as in the paper; "halfway" the model
            pruned to the root of the budget, as in its authors' code.
        failure: What follows on a failed solution: "stop" leaves this part and all above as they are, as in the
            authors' code; "skip" only the part itself.
    """
    dense = copy.deepcopy(model).eval()
    gradients = gate_gradients(dense, batches, sampled_targets(dense, batches, seed))
    fisher = [one.double().square().sum(0) for one in gradients]
    parts, length = parts_of(dense), mean_length(batches)
    masks = search_masks(parts, fisher, length, budget)
    masks = [rearranged(mask, one) for mask, one in zip(masks, gradients, strict=True)]
    pruned = cut(dense, masks)
    if tune:
        halfway = reference == "halfway"
        target = cut(dense, search_masks(parts, fisher, length, budget**0.5)) if halfway else dense
        tune_(pruned, target, batches, stops=failure == "stop")
    return pruned


# Gradients


def gate_gradients(model: PreTrainedModel, batches: Batches, targets: list[torch.Tensor]) -> list[torch.Tensor]:
    """Derivatives of each batch's mean cross-entropy by a gate on each unit, per part of shape (batches, units).

    A gate of 1 before the output projection scales the columns W_u of a unit, so its derivative is also the sum of
    gradient x weight over W_u.
    """
    gates = {part: torch.ones(n_units(part), requires_grad=True) for part in parts_of(model)}
    rows = []
    with gate_outputs(gates):
        for batch, target in zip(batches, targets, strict=True):
            logits = model(**model_inputs(model, batch)).logits
            if logits.ndim == 3:
                logits, target = logits[real_tokens(batch)], target[real_tokens(batch)]
            rows.append(torch.autograd.grad(F.cross_entropy(logits, target), list(gates.values())))
    return [torch.stack(column) for column in zip(*rows, strict=True)]


@torch.no_grad()
def sampled_targets(model: PreTrainedModel, batches: Batches, seed: int) -> list[torch.Tensor]:
    """Labels drawn from the model's predictions, as one-hot vectors."""
    generator = torch.Generator().manual_seed(seed)
    targets = []
    for batch in batches:
        p = model(**model_inputs(model, batch)).logits.softmax(-1)
        drawn = torch.multinomial(p.flatten(0, -2), 1, generator=generator)
        targets.append(torch.zeros_like(p).flatten(0, -2).scatter_(1, drawn, 1.0).view_as(p))
    return targets


@torch.no_grad()
def half_precision_targets(model: PreTrainedModel, batches: Batches) -> list[torch.Tensor]:
    """What the model predicts in half precision.

    In full precision the first step would see no gradient at all, since the model agrees with itself.
    """
    half = copy.deepcopy(model).half()
    return [half(**model_inputs(half, batch)).logits.softmax(-1).float() for batch in batches]


# Kwon et al.


def search_masks(parts: list[Part], fisher: list[torch.Tensor], length: float, budget: float) -> list[torch.Tensor]:
    """Mask search: for each number of heads as many neurons as the budget pays for, and the best of these splits."""
    heads, neurons = (torch.cat(kind)[ranking(kind)].cumsum(0) for kind in (fisher[::2], fisher[1::2]))
    best = max(splits(parts, length, budget).items(), key=lambda split: heads[split[0] - 1] + neurons[split[1] - 1])
    return keep_counts(fisher, *best)


def rearranged(mask: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """Mask rearrangement: as many units of a layer, chosen with the layer's whole block of the Fisher matrix.

    The loss due to a set of removed units is the squared length of the sum of their gradients. Starting from those
    with the least Fisher information, each other unit is put into the set, and the one whose leaving shortens the sum
    most comes out.
    """
    vectors = gradients.double().T
    order = vectors.square().sum(1).argsort(stable=True)
    is_removed = torch.zeros_like(mask)
    n_removed = int((~mask).sum())
    if n_removed == 0:
        return mask
    is_removed[order[:n_removed]] = True
    total = vectors[is_removed].sum(0)
    for unit in order[n_removed:]:
        is_removed[unit] = True
        total = total + vectors[unit]
        without = (total - vectors).square().sum(1).masked_fill(~is_removed, torch.inf)
        out = without.argmin()
        is_removed[out] = False
        total = total - vectors[out]
    return ~is_removed


@torch.no_grad()
def tune_(
    pruned: PreTrainedModel, reference: PreTrainedModel, batches: Batches, stops: bool = True
) -> list[torch.Tensor]:
    """Mask tuning: one scale per unit, part by part from the input, folded into output projections.

    As in the authors' code, the first attention is left as it is.

    Returns:
        Scales, 1 where a part was not tuned.
    """
    parts, targets = parts_of(pruned), parts_of(reference)
    scales = [torch.ones(n_units(part)) for part in parts]
    for place in range(1, len(parts)):
        part, is_last = parts[place], place == len(parts) - 1
        # Above the last layer, a classifier of texts sees their first token alone.
        first_only = is_last and task_of(pruned) == "sequence-classification"
        matrix, right = normal_equations(pruned, part, reference, targets[place], batches, first_only)
        # As many iterations as CuPy allows, which the authors used; SciPy by itself gives up much earlier.
        change, reason = lsmr(matrix, right, damp=1.0, maxiter=5 * len(right))[:2]
        scale = 1 + torch.from_numpy(change[: n_units(part)]).float()
        if reason > CONVERGED or scale.abs().max() > LARGEST_SCALE:
            if stops:
                break
            continue
        scales[place] = scale
        part.output.weight.mul_(scale.repeat_interleave(in_width(part.output) // n_units(part)))
    return scales


@torch.no_grad()
def normal_equations(
    pruned: PreTrainedModel,
    part: Part,
    reference: PreTrainedModel,
    target: Part,
    batches: Batches,
    first_only: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """A^T A and A^T r of mask tuning's least squares problem, for a change of scales.

    A column of A holds what a unit gives to all tokens, r what the sum of input and outputs lacks to be the
    reference's. With inputs X of the output projection W, A^T A is (W^T W) o (X^T X), summed over the inputs of each
    unit. As in the authors' code, an attention has an intercept, which is then dropped: the norm that follows does not
    see what is the same in all features.
    """
    weight = part.output.weight.double()
    xx, xr, x_sum, r_sum, n_tokens = 0.0, 0.0, 0.0, 0.0, 0
    for batch in batches:
        kept = real_tokens(batch)
        if first_only:
            kept = kept & (torch.arange(kept.shape[1]) == 0)
        x, got = (tensor[kept].double() for tensor in pass_to(pruned, part, batch))
        r = pass_to(reference, target, batch)[1][kept].double() - got
        xx, xr, x_sum = xx + x.T @ x, xr + x.T @ r, x_sum + x.sum(0)
        r_sum, n_tokens = r_sum + r.sum(), n_tokens + len(x)
    shape = (n_units(part), -1, n_units(part), in_width(part.output) // n_units(part))
    matrix = (weight.T @ weight * xx).view(shape).sum((1, 3))
    right = by_unit((weight.T * xr).sum(1), part)
    if isinstance(part, Attention):
        border = by_unit(x_sum * weight.sum(0), part)
        corner = border.new_tensor([n_tokens * len(weight)])
        matrix = torch.cat([torch.cat([matrix, border[:, None]], 1), torch.cat([border, corner])[None]])
        right = torch.cat([right, r_sum[None]])
    return matrix.numpy(), right.numpy()


class Reached(Exception):
    """A forward pass has come as far as it was wanted."""


@torch.no_grad()
def pass_to(model: PreTrainedModel, part: Part, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The input of a part's output projection, and the sum of its output and the part's input."""
    seen: list[torch.Tensor] = []

    def stop(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        seen.extend((args[0], seen[0] + output))
        raise Reached

    with (
        part.inputs[0].register_forward_pre_hook(lambda _, args: seen.append(args[0])),
        part.output.register_forward_hook(stop),
        suppress(Reached),
    ):
        model(**model_inputs(model, batch))
    return seen[1], seen[2]
