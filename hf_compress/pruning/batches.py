"""Calibration data: batches of inputs, checked, and which of their tokens are real."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hf_compress.modeling.batches import TARGETS, read_batch
from hf_compress.modeling.tasks import MAIN_INPUTS

logger = logging.getLogger(__name__)

Batch = dict[str, torch.Tensor]


def read_batches(model: nn.Module, data: Iterable[Mapping[str, Any]], with_labels: bool = False) -> list[Batch]:
    """Batches with the columns that a model's forward takes, on its device.

    Args:
        model (`nn.Module`): A Transformers model.
        data (`Iterable[Mapping[str, torch.Tensor]]`): Dicts of tensors with a batch axis; a `DataLoader` included.
        with_labels (`bool`, *optional*, defaults to `False`): Whether labels are to be kept.

    Returns:
        `list[dict[str, torch.Tensor]]`: The batches; the decoder of an encoder-decoder has its inputs.

    Raises:
        ValueError: if there is no batch, one has no input of the model, padding is not marked, or labels are missing.
        TypeError: if the data are no dicts of tensors.
    """
    batches = [read_batch(model, batch) for batch in data]
    if not batches:
        raise ValueError("The calibration data hold no batch: give an iterable of dicts of tensors, a DataLoader say.")
    if with_labels and not all(set(TARGETS) & set(batch) for batch in batches):
        raise ValueError(
            f"use_labels=True, but the batches have the columns {sorted(batches[0])} and no labels: add a column "
            "'labels', or leave use_labels=False, which draws labels from the model."
        )
    if with_labels:
        return batches
    return [{name: value for name, value in batch.items() if name not in TARGETS} for batch in batches]


def token_mask(batch: Mapping[str, torch.Tensor], stack: str, length: int | None = None) -> torch.Tensor:
    """Which tokens of a batch are real, where a stack reads them.

    Args:
        batch (`Mapping[str, torch.Tensor]`): Inputs.
        stack (`str`): `"encoder"` or `"decoder"`.
        length (`int`, *optional*): The length that the stack really sees, where no column tells (images).

    Returns:
        `torch.Tensor`: Booleans, shape (rows, length); of several choices per question, each is a row of its own.
    """
    is_second = stack == "decoder" and "decoder_input_ids" in batch
    name = "decoder_attention_mask" if is_second else "attention_mask"
    if name in batch:
        return (batch[name] != 0).flatten(0, -2)
    first = batch["decoder_input_ids"] if is_second else next(batch[name] for name in MAIN_INPUTS if name in batch)
    # Of embeddings and images, the second axis; that of images is no length, and `length` has to tell.
    rows, seen = first.shape[:2] if first.is_floating_point() else (first.shape[:-1].numel(), first.shape[-1])
    return torch.ones(rows, length or seen, dtype=torch.bool, device=first.device)


def warn_of_few_tokens(batches: Sequence[Batch], stack: str, widest: int, consequence: str) -> None:
    """Warns where there are fewer tokens than weights to be fitted for each output.

    Args:
        batches (`Sequence[dict[str, torch.Tensor]]`): Inputs.
        stack (`str`): Whose tokens count.
        widest (`int`): The most weights of one output.
        consequence (`str`): What comes of it, for the message.
    """
    if any("input_ids" not in batch for batch in batches):
        return  # how many tokens an image makes is not seen from its batch
    n_tokens = sum(int(token_mask(batch, stack).sum()) for batch in batches)
    if n_tokens < widest:
        logger.warning(
            "The calibration data have %d tokens for up to %d weights of each output, so %s: give some hundred texts.",
            n_tokens,
            widest,
            consequence,
        )


def median_batch(batches: Sequence[Batch]) -> Batch:
    """The batch of median size, the one to take times with."""
    return sorted(batches, key=lambda batch: next(iter(batch.values())).numel())[len(batches) // 2]


def check_finite(name: str, values: torch.Tensor) -> None:
    """Refuses what is not finite.

    Args:
        name (`str`): Of the part that the values come from.
        values (`torch.Tensor`): Sums over tokens.

    Raises:
        ValueError: if a value is infinite or no number.
    """
    if not torch.isfinite(values).all():
        raise ValueError(
            f"The activations of {name} hold NaN or infinity on the calibration data: check the model's outputs on "
            "them, and load it in float32 or bfloat16 (`dtype='float32'`) if it is in float16."
        )
