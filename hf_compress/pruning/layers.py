"""Which layers of a model can go: one after the other, each time the one whose absence changes the predictions least.

A layer that is tried out is passed by: its input takes the place of its output, which is what `keep_layers_` makes of
the model for good.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hf_compress.modeling.blocks import Block, check_stack, count_layers, find_blocks
from hf_compress.modeling.surgery import first_layer_stays
from hf_compress.modeling.tasks import task_of, unwrap, without_cache
from hf_compress.pruning.batches import Batch, token_mask
from hf_compress.pruning.replay import replaced_forwards, state_of, with_state
from hf_compress.pruning.sensitivity import NEVER, OutputKind, frozen, task_outputs

logger = logging.getLogger(__name__)


def choose_layers(
    model: nn.Module,
    batches: Sequence[Batch],
    until: int | Callable[[Sequence[int]], bool],
    stack: str | None = None,
    progress: Callable[[], None] = lambda: None,
) -> list[int]:
    """Chooses the layers to keep, for `keep_layers_`, greedily.

    In every round, each layer that may go is tried: that one goes whose absence changes the predictions of the whole
    model least, by `mean_divergence`, and the others are tried again without it. The model itself is not changed.

    Args:
        model (`nn.Module`): A Transformers model of a known architecture, wrapped or not.
        batches (`Sequence[dict[str, torch.Tensor]]`): Inputs of its forward, without labels. The predictions of the
            whole model for all of them are kept in its dtype.
        until (`int` or `Callable`): How many layers are to go, or a function of the indices of the layers still kept
            that tells whether these are few enough; it is asked before each round.
        stack (`str`, *optional*): Which stack, for models with more than one.
        progress (`Callable`, *optional*): Called after each batch of each round.

    Returns:
        `list[int]`: Indices of the layers to keep, rising. Of two layers that matter alike, the later one is kept;
        where all layers share their weights, only how many are kept matters, and nothing is measured.

    Raises:
        ValueError: if so many layers cannot go, no batch is given, or the predictions are not finite.
    """
    model = unwrap(model)
    stack = check_stack(model, stack)
    kept = list(range(count_layers(model, stack)))
    is_enough = _check_until(until, len(kept), stack)
    is_shared = len(find_blocks(model, stack)) < len(kept)
    if not batches and not is_shared:
        raise ValueError("There is no batch to try out layers with: give some tokenized texts.")
    fixed = {0} if first_layer_stays(model, stack) else set()
    dense: list[torch.Tensor] = []
    while not is_enough(kept):
        if len(kept) == 1:
            raise ValueError(
                f"One layer is left in the {stack}, and that is still too much: allow for more than one layer."
            )
        if is_shared:
            kept.pop()
            continue
        removable = [layer for layer in kept if layer not in fixed]
        found = _try_each(model, batches, dense, kept, removable, stack, progress)
        least = min(removable, key=lambda layer: (found[layer], layer))
        kept.remove(least)
        logger.info("Layer %d of the %s can go: the predictions change by %.4g", least, stack, found[least])
    return kept


def run_without(
    model: nn.Module, batch: Batch, removed: Sequence[int], trials: Sequence[int], stack: str
) -> Iterator[Any]:
    """What a model gives without some of its layers, and then for each further one without that one too.

    Layers before the one that is tried are run only once. Nothing is left behind in the model.

    Args:
        model (`nn.Module`): A Transformers model, in evaluation mode, whose layers have weights of their own.
        batch (`dict[str, torch.Tensor]`): Inputs of its forward.
        removed (`Sequence[int]`): Indices of the layers that are passed by in any case.
        trials (`Sequence[int]`): Indices of the layers that are tried, each alone.
        stack (`str`): Their stack.

    Yields:
        `ModelOutput`: What the forward returns without `removed`; then the same for each of `trials`.
    """
    inputs = without_cache(model, batch)
    blocks = find_blocks(model)
    is_removed = {block.module: block.stack == stack and block.index in removed for block in blocks}
    states: dict[nn.Module, torch.Tensor] = {}
    outputs: dict[nn.Module, Any] = {}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        states[module] = state_of(args, kwargs)
        outputs[module] = with_state(output, states[module]) if is_removed[module] else output
        return outputs[module]

    with ExitStack() as hooks, torch.no_grad():
        for block in blocks:
            hooks.enter_context(block.module.register_forward_hook(record, with_kwargs=True))
        whole = model(**inputs)
    yield whole
    for layer in trials:
        place = _place_of(blocks, stack, layer)
        forwards = {block.module: partial(_give, outputs[block.module]) for block in blocks[:place]}
        tried = blocks[place].module
        forwards[tried] = partial(_give, with_state(outputs[tried], states[tried]))
        later = (block.module for block in blocks[place + 1 :] if is_removed[block.module])
        forwards |= {module: partial(_pass_by, outputs[module]) for module in later}
        with replaced_forwards(forwards), torch.no_grad():
            result = model(**inputs)
        yield result


def mean_divergence(
    dense: torch.Tensor, outputs: torch.Tensor, kind: OutputKind, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """How far predictions have moved, as a mean over items: texts, real tokens, or starts and ends of answers.

    Args:
        dense (`torch.Tensor`): Outputs of the whole model, shape (..., outputs).
        outputs (`torch.Tensor`): Those of the smaller one, of the same shape.
        kind (`str`): `"categorical"`, `"bernoulli"` or `"gaussian"`: which of the formulas below.
        mask (`torch.Tensor`, *optional*): True where an item counts, shape (...).

    Returns:
        `torch.Tensor`: A scalar of float32, 0 where nothing has changed.
    """
    items = _FORMULAS[kind](dense.float(), outputs.float())
    return items.mean() if mask is None else items[mask].mean()


def categorical_divergence(dense_logits: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(dense || smaller) of distributions over classes, in nats.

    Args:
        dense_logits (`torch.Tensor`): Of the whole model, shape (..., classes).
        logits (`torch.Tensor`): Of the smaller one, of the same shape.

    Returns:
        `torch.Tensor`: Shape (...).
    """
    p, q = dense_logits.log_softmax(-1), logits.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def bernoulli_divergence(dense_logits: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(dense || smaller) of labels that are each present or not, in nats, summed over labels.

    Args:
        dense_logits (`torch.Tensor`): Of the whole model, shape (..., labels).
        logits (`torch.Tensor`): Of the smaller one, of the same shape.

    Returns:
        `torch.Tensor`: Shape (...).
    """
    p = dense_logits.sigmoid()
    present = F.logsigmoid(dense_logits) - F.logsigmoid(logits)
    absent = F.logsigmoid(-dense_logits) - F.logsigmoid(-logits)
    return (p * present + (1 - p) * absent).sum(-1)


def squared_error(dense_outputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """The mean square of what values have moved by.

    Args:
        dense_outputs (`torch.Tensor`): Of the whole model, shape (..., values).
        outputs (`torch.Tensor`): Of the smaller one, of the same shape.

    Returns:
        `torch.Tensor`: Shape (...).
    """
    return (outputs - dense_outputs).square().mean(-1)


_FORMULAS: dict[OutputKind, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "categorical": categorical_divergence,
    "bernoulli": bernoulli_divergence,
    "gaussian": squared_error,
}


def _check_until(
    until: int | Callable[[Sequence[int]], bool], n_layers: int, stack: str
) -> Callable[[Sequence[int]], bool]:
    if callable(until):
        return until
    if not 0 <= until < n_layers:
        raise ValueError(
            f"{until} layers cannot go from the {n_layers} of the {stack}: give a number from 0 to {n_layers - 1}, "
            "since one layer has to stay."
        )
    return lambda kept: n_layers - len(kept) == until


def _try_each(
    model: nn.Module,
    batches: Sequence[Batch],
    dense: list[torch.Tensor],
    kept: Sequence[int],
    removable: Sequence[int],
    stack: str,
    progress: Callable[[], None],
) -> dict[int, float]:
    """The divergence without each of the removable layers; the first round also fills `dense`."""
    removed = sorted(set(range(count_layers(model, stack))) - set(kept))
    total = dict.fromkeys(removable, 0.0)
    n_items = 0
    with frozen(model):
        for number, batch in enumerate(batches):
            results = run_without(model, batch, removed, removable, stack)
            whole, kind, mask = _predictions(model, next(results), batch)
            if not removed:
                _check_finite(whole)
                dense.append(whole)
            n_batch = int(mask.sum()) if mask is not None else whole[..., 0].numel()
            for layer, result in zip(removable, results, strict=True):
                outputs, _, _ = _predictions(model, result, batch)
                total[layer] += n_batch * mean_divergence(dense[number], outputs, kind, mask).item()
            n_items += n_batch
            progress()
    # What is not a number compares with nothing, and such a layer is the last to go.
    return {layer: value / n_items if not math.isnan(value) else math.inf for layer, value in total.items()}


def _predictions(model: nn.Module, results: Any, batch: Batch) -> tuple[torch.Tensor, OutputKind, torch.Tensor | None]:
    """Outputs, their kind, and which of them count, `None` for all."""
    outputs, kind = task_outputs(model, results)
    if outputs.ndim < 3:
        return outputs, kind, None
    last_stack = "decoder" if model.config.is_encoder_decoder else "encoder"
    if task_of(model) == "question-answering":
        # An answer is one position, start or end, and never in the padding.
        mask = token_mask(batch, last_stack, outputs.shape[-1])
        return outputs.masked_fill(~mask[:, None, :], NEVER), kind, None
    return outputs, kind, token_mask(batch, last_stack, outputs.shape[1])


def _check_finite(outputs: torch.Tensor) -> None:
    if not outputs.isfinite().all():
        raise ValueError(
            "The whole model gives predictions that are not finite, so no change of them can be told: check its "
            "weights, or load it in float32."
        )


def _place_of(blocks: Sequence[Block], stack: str, layer: int) -> int:
    return next(place for place, block in enumerate(blocks) if (block.stack, block.index) == (stack, layer))


def _give(output: Any, *args: Any, **kwargs: Any) -> Any:
    return output


def _pass_by(output: Any, *args: Any, **kwargs: Any) -> Any:
    return with_state(output, state_of(args, kwargs))
