"""Losses of large vocabularies in chunks, so that the logits of a whole batch never exist at once.

The student runs without its output layer; its last hidden states are turned into logits some tokens at a time, and
each chunk's logits are computed again in the backward pass instead of being kept.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_compress.modeling.modes import evaluating
from hf_compress.modeling.tasks import unwrap


@contextmanager
def bypassed_head(model: nn.Module | None) -> Iterator[None]:
    """Lets a language model return what enters its output layer in the place of logits.

    Args:
        model (`nn.Module` or `None`): The model, wrapped or not; `None` changes nothing.

    Raises:
        TypeError: if the output layer is no `nn.Linear`.
    """
    if model is None:
        yield
        return
    head = unwrap(model).get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise TypeError(
            f"The output layer of {type(unwrap(model)).__name__} is a {type(head).__name__}, which cannot be run in "
            "chunks: set logits_chunk=0."
        )

    def pass_on(hidden: torch.Tensor) -> torch.Tensor:
        # The layer has to stand in the graph of the forward: a wrapper that looks there for unused parameters would
        # else not wait for their gradients.
        for parameter in head.parameters():
            hidden = hidden + 0.0 * parameter.flatten()[0].to(hidden.dtype)
        return hidden

    # What places a model on several devices keeps a forward of its own on the instance.
    own = vars(head).get("forward")
    head.forward = pass_on
    try:
        yield
    finally:
        del head.forward
        if own is not None:
            head.forward = own


def in_chunks(
    compute: Callable[[slice], Mapping[str, torch.Tensor]], n_items: int, chunk: int
) -> dict[str, torch.Tensor]:
    """Values of all items, computed some at a time and recomputed in the backward pass.

    Args:
        compute (`Callable`): Gives values of shape `(items of the slice,)` by name.
        n_items (`int`): Items in all.
        chunk (`int`): Items at a time.

    Returns:
        `dict[str, torch.Tensor]`: Values of shape `(n_items,)` by name.
    """
    parts: list[Mapping[str, torch.Tensor]] = []
    for start in range(0, max(n_items, 1), chunk):
        where = slice(start, min(start + chunk, n_items))
        parts.append(checkpoint(compute, where, use_reentrant=False, preserve_rng_state=False))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@torch.no_grad()
def check_head(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Raises if a model does more with its output layer than to apply it last.

    Args:
        model (`nn.Module`): A language model, wrapped or not.
        inputs (`Mapping`): Inputs of its forward.

    Raises:
        ValueError: if its logits are not those that the output layer alone gives.
    """
    model = unwrap(model)
    try:
        with evaluating(model):
            logits = model(**inputs, return_dict=True)["logits"]
            with bypassed_head(model):
                hidden = model(**inputs, return_dict=True)["logits"]
            expected = model.get_output_embeddings()(hidden)
        is_last = torch.allclose(logits.float(), expected.float(), rtol=1e-2, atol=1e-2)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        # What comes behind does not fit the width of the hidden states.
        is_last = False
    if not is_last:
        raise ValueError(
            f"{type(model).__name__} changes its logits behind the output layer, so they cannot be computed in "
            "chunks: set logits_chunk=0."
        )
