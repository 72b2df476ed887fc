"""What calibration data say about a model's units: in which order they go, and what that costs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from hf_compress.modeling.blocks import FFN, Block, find_blocks
from hf_compress.modeling.capture import visit_inputs
from hf_compress.modeling.projections import read_matrix
from hf_compress.modeling.tasks import unwrap, without_cache
from hf_compress.pruning import scores
from hf_compress.pruning.batches import Batch, check_finite, median_batch, read_batches, token_mask
from hf_compress.pruning.config import BLIND_SCORES, StructuredPruningConfig
from hf_compress.pruning.costs import measure_lengths
from hf_compress.pruning.latency import LatencyTable, measure_latency_table
from hf_compress.pruning.obs import Removal, removal_curve
from hf_compress.pruning.repair import Moments
from hf_compress.pruning.replay import Replay
from hf_compress.pruning.sensitivity import Sensitivity, frozen, measure_sensitivity
from hf_compress.pruning.units import Part, Site, allowed_widths, count_units, find_sites, unit_size

# Tokens that matter to no prediction still count a little, so that nothing is fitted to a handful of tokens alone.
EVEN_SHARE = 0.1
# Units that go at once in the search for their order: of 1536 neurons, in a hundred rounds.
ROUNDS = 96


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` returns: everything that pruning to a budget needs to know of a model and its data.

    Attributes:
        batches (`list[dict[str, torch.Tensor]]`): The inputs, on the model's device.
        removals (`dict[str, Removal]`): By site, the order in which its units go and what that costs.
        config (`StructuredPruningConfig`): What the scores were computed by.
        latency (`LatencyTable`, *optional*): Times at every width, for `cost="latency"`.
        lengths (`dict[str, torch.Tensor]`): By stack, the real tokens of each text, shape (texts,).
    """

    batches: list[Batch]
    removals: dict[str, Removal]
    config: StructuredPruningConfig
    latency: LatencyTable | None = None
    lengths: dict[str, torch.Tensor] = field(default_factory=dict)


def calibrate(
    model: nn.Module, config: StructuredPruningConfig, data: Iterable[Mapping[str, Any]] | None = None
) -> Calibration:
    """Scores the heads and neurons of a model, once for as many budgets as wanted.

    Args:
        model (`nn.Module`): A Transformers model of a known architecture.
        config (`StructuredPruningConfig`): `score`, `cost`, `units`, `use_labels` and `seed` matter here.
        data (`Iterable[Mapping[str, torch.Tensor]]`, *optional*): Batches of inputs; a few hundred texts without
            labels are enough. Norms of weights and random scores need none.

    Returns:
        `Calibration`: Give it to `prune` as `data`.

    Raises:
        ValueError: if data are missing or do not fit, or activations are not finite.
    """
    return score_units(model, gather(model, config, data))


def gather(
    model: nn.Module, config: StructuredPruningConfig, data: Iterable[Mapping[str, Any]] | None = None
) -> Calibration:
    """What `calibrate` does first: reads the data, counts tokens, and measures times where they are asked for.

    What units cost is known then, and whether a budget can be met; what they are worth is not.

    Args:
        model (`nn.Module`): A Transformers model of a known architecture.
        config (`StructuredPruningConfig`): As for `calibrate`.
        data (`Iterable[Mapping[str, torch.Tensor]]`, *optional*): As for `calibrate`.

    Returns:
        `Calibration`: Without removals.

    Raises:
        ValueError: if data are missing or do not fit.
    """
    model = unwrap(model)
    if data is None and config.needs_data:
        raise ValueError(
            f"score={config.score!r} with repair={config.repair!r} and cost={config.cost!r} is computed from data, "
            "but data=None: give some hundred texts as tokenized batches (labels are not needed), or score='l2' with "
            "repair='none'."
        )
    batches = [] if data is None else read_batches(model, data, config.use_labels)
    _check_encoder_states(model, batches)
    sites = find_sites(find_blocks(model))
    latency = _measure_latency(model, sites, batches, config) if config.cost == "latency" else None
    return Calibration(batches, {}, config, latency, measure_lengths(model, batches))


def _check_encoder_states(model: nn.Module, batches: Sequence[Batch]) -> None:
    if getattr(model.config, "is_encoder_decoder", False) or all(
        "encoder_hidden_states" in batch for batch in batches
    ):
        return
    if any(part.kind == "cross" for block in find_blocks(model) for part in block.attentions):
        raise ValueError(
            f"{type(model).__name__} attends to the states of an encoder, and a batch has no encoder_hidden_states: "
            "nothing tells what those attentions are worth. Add them, and encoder_attention_mask."
        )


def score_units(model: nn.Module, gathered: Calibration) -> Calibration:
    """Scores the heads and neurons of a model.

    Args:
        model (`nn.Module`): The model.
        gathered (`Calibration`): What `gather` returned.

    Returns:
        `Calibration`: With removals, unless only whole layers may go: these are tried out, not scored.

    Raises:
        ValueError: if activations are not finite.
    """
    if gathered.config.units == ("layers",):
        return gathered
    model = unwrap(model)
    blocks = find_blocks(model)
    return replace(gathered, removals=_removals(model, blocks, find_sites(blocks), gathered.batches, gathered.config))


def _measure_latency(model: nn.Module, sites: list[Site], batches: list[Batch], config) -> LatencyTable:
    levels = {site: allowed_widths(site, config.multiple_of, "layers" in config.units) for site in sites}
    return measure_latency_table(model, sites, levels, median_batch(batches))


def _removals(model, blocks: list[Block], sites: list[Site], batches, config) -> dict[str, Removal]:
    if config.score in BLIND_SCORES:
        generator = torch.Generator().manual_seed(config.seed)
        return {site.name: _ranked(_blind_score(site, config.score, generator)) for site in sites}
    if config.score == "activation":
        return {name: _ranked(score) for name, score in activation_scores(model, blocks, sites, batches).items()}
    n_passes = len(batches) * (1 + len(blocks) * (config.score == "obs"))
    with tqdm(total=n_passes, desc="Scoring units", unit="pass") as bar:
        found = measure_sensitivity(
            model, sites, batches, use_labels=config.use_labels, seed=config.seed, progress=bar.update
        )
        for name, metric in found.metric.items():
            check_finite(name, metric)
        if config.score == "obs":
            return obs_removals(model, blocks, sites, batches, found, bar.update)
        return {name: _ranked(score) for name, score in getattr(found, config.score).items()}


def _ranked(score: torch.Tensor) -> Removal:
    order = score.argsort(stable=True)
    return Removal(order, torch.cat([score.new_zeros(1), score[order].cumsum(0)]))


def _blind_score(site: Site, score: str, generator: torch.Generator) -> torch.Tensor:
    if score == "random":
        return torch.rand(site.n_units, generator=generator, dtype=torch.float64)
    return sum(scores.weight_norm(unit_weights(part), score) for part in site.parts)


def unit_weights(part: Part) -> torch.Tensor:
    """All weights of each unit of a part, shape (units, weights): its rows of the inputs and columns of the output."""
    n_units = count_units(part)
    # Fused projections hold several matrices one after the other.
    n_fused = part.layout.fused if isinstance(part, FFN) else 3 if part.is_fused else 1
    rows = [
        read_matrix(module).unflatten(0, (n_fused, n_units, -1)).movedim(1, 0).flatten(1) for module in part.inputs
    ]
    columns = read_matrix(part.output).unflatten(1, (n_units, -1)).movedim(1, 0).flatten(1)
    return torch.cat([*rows, columns], dim=1)


def activation_scores(
    model: nn.Module, blocks: Sequence[Block], sites: Sequence[Site], batches: Sequence[Batch]
) -> dict[str, torch.Tensor]:
    """Norm of weights times norm of activations, summed over the inputs of each unit; one forward per batch.

    Args:
        model (`nn.Module`): A Transformers model.
        blocks (`Sequence[Block]`): Its blocks.
        sites (`Sequence[Site]`): What to score.
        batches (`Sequence[dict[str, torch.Tensor]]`): Inputs.

    Returns:
        `dict[str, torch.Tensor]`: By site, shape (units,).

    Raises:
        ValueError: if activations are not finite.
    """
    stacks = {part.name: block.stack for block in blocks for part in (*block.attentions, block.ffn)}
    squares = {part.name: 0.0 for site in sites for part in site.parts}
    with frozen(model), torch.no_grad():
        for batch in tqdm(batches, desc="Scoring units", unit="batch"):

            def add(part: Part, inputs: torch.Tensor, batch: Batch = batch) -> None:
                mask = token_mask(batch, stacks[part.name], inputs.shape[1])
                sums = (inputs.float().square() * mask[..., None]).flatten(0, -2).sum(0).cpu().double()
                squares[part.name] = squares[part.name] + sums

            with visit_inputs([part for site in sites for part in site.parts], add):
                model(**without_cache(model, batch))
    for name, value in squares.items():
        check_finite(name, value)
    return {
        site.name: sum(
            scores.activation(read_matrix(part.output).float().cpu(), squares[part.name], unit_size(part))
            for part in site.parts
        )
        for site in sites
    }


def obs_removals(
    model: nn.Module,
    blocks: Sequence[Block],
    sites: Sequence[Site],
    batches: Sequence[Batch],
    sensitivity: Sensitivity,
    progress: Callable[[], None],
) -> dict[str, Removal]:
    """Orders of removal by optimal brain surgery in the metric of the Fisher information, block by block.

    What is lost when the outputs of a part change by D x is taken as tr(G D A D^T), with G the second moments of the
    gradient at the outputs and A those of the inputs, each token weighted by the length of its gradient: K-FAC
    (Martens and Grosse, 2015) as the quadratic form of optimal brain surgery.

    Args:
        model (`nn.Module`): A Transformers model.
        blocks (`Sequence[Block]`): Its blocks.
        sites (`Sequence[Site]`): What to score.
        batches (`Sequence[dict[str, torch.Tensor]]`): Inputs.
        sensitivity (`Sensitivity`): Of the same model, sites and batches.
        progress (`Callable`): Called after each batch of each block.

    Returns:
        `dict[str, Removal]`: By site.

    Raises:
        ValueError: if activations are not finite.
    """
    site_of = {part.name: site for site in sites for part in site.parts}
    curves: dict[str, list[tuple[torch.Tensor, torch.Tensor, int]]] = {site.name: [] for site in sites}
    removals = {}
    with frozen(model):
        replay = Replay(model, batches, progress)
        for block in blocks:
            parts = [part for part in (*block.attentions, block.ffn) if part.name in site_of]
            moments = {part.name: Moments() for part in parts}
            n_tokens = {
                part.name: _count_tokens(batches, block.stack, sensitivity.tokens[part.name]) for part in parts
            }

            def add(number: int, part: Part, passage, moments=moments, block=block, n_tokens=n_tokens) -> None:
                mask = token_mask(batches[number], block.stack, passage.inputs.shape[1])
                moments[part.name].add(
                    passage.inputs, None, token_weights(sensitivity, part, number, mask, n_tokens[part.name])
                )

            replay.visit(block, parts, add)
            replay.finish(block)
            for part in parts:
                root = _root(sensitivity.metric[part.name])
                has_bias = part.output.bias is not None
                gram = moments[part.name].xx(has_bias)
                check_finite(part.name, gram)
                weight = root @ read_matrix(part.output).cpu().double()
                curves[site_of[part.name].name].append((weight, gram.cpu(), unit_size(part)))
            for site in {site_of[part.name] for part in parts}:
                if len(curves[site.name]) == len(site.parts):
                    removals[site.name] = _joint_removal(curves.pop(site.name), site)
    return removals


def _joint_removal(curves: list[tuple[torch.Tensor, torch.Tensor, int]], site: Site) -> Removal:
    step = max(1, site.n_units // ROUNDS)
    found = [removal_curve(weight, gram, size, step=step) for weight, gram, size in curves]
    if len(found) == 1:
        return found[0]
    # Parts that must keep the same units: each unit costs what it costs in all of them together.
    total = torch.zeros(site.n_units, dtype=torch.float64)
    for removal in found:
        total[removal.order] += removal.error.diff()
    return _ranked(total)


def _root(metric: torch.Tensor) -> torch.Tensor:
    """A matrix R with R^T R = metric."""
    values, vectors = torch.linalg.eigh(metric)
    return values.clamp_min(0).sqrt()[:, None] * vectors.T


def _count_tokens(batches: Sequence[Batch], stack: str, norms: Sequence[torch.Tensor]) -> int:
    """Real tokens of all batches; of each, the length comes from numbers of shape (batch, length)."""
    masks = (token_mask(batch, stack, of_batch.shape[1]) for batch, of_batch in zip(batches, norms, strict=True))
    return sum(int(mask.sum()) for mask in masks)


def token_weights(
    sensitivity: Sensitivity, part: Part, number: int, mask: torch.Tensor, n_tokens: int
) -> torch.Tensor:
    """Weights of the tokens of a batch: by how much the predictions depend on them, and a little evenly.

    Args:
        sensitivity (`Sensitivity`): Where gradients were measured.
        part (`Attention` or `FFN`): At whose outputs.
        number (`int`): Number of the batch.
        mask (`torch.Tensor`): Which tokens are real, shape (batch, length).
        n_tokens (`int`): How many are, in all batches.

    Returns:
        `torch.Tensor`: Mean about 1 over all real tokens of all batches, 0 where there is none, shape (batch, length).
    """
    norms = sensitivity.tokens[part.name]
    mean = sum(norm.double().sum() for norm in norms) / max(1, n_tokens)
    relative = norms[number].to(mask.device) / mean.clamp_min(torch.finfo(torch.float32).tiny).float().to(mask.device)
    return mask * ((1 - EVEN_SHARE) * relative + EVEN_SHARE)
