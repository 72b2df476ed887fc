"""One batch of the data that a model is calibrated on: checked, with what the model reads."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hf_compress.modeling.tasks import IGNORED, forward_columns, unwrap

TARGETS = ("labels", "start_positions", "end_positions")


def read_batch(model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
    """The columns of a batch that a model's forward takes, on its device.

    Args:
        model (`nn.Module`): A Transformers model.
        batch (`Any`): What the user gave.

    Returns:
        `dict[str, torch.Tensor]`: With labels where there are some, of which what a decoder reads is made.

    Raises:
        ValueError: if the model's main input is missing, or padding is not marked.
        TypeError: if the batch is no dict of tensors.
    """
    model = unwrap(model)
    if not isinstance(batch, Mapping) or not all(isinstance(value, torch.Tensor) for value in batch.values()):
        raise TypeError(
            f"A calibration batch is a {type(batch).__name__}, where a dict of tensors is needed: give what "
            "`tokenizer(texts, padding=True, return_tensors='pt')` returns, or a DataLoader with a data collator."
        )
    wanted = forward_columns(model)
    read = {name: value.to(model.device) for name, value in batch.items() if name in wanted}
    if model.main_input_name not in read and "inputs_embeds" not in read:
        raise ValueError(
            f"A calibration batch has the columns {sorted(batch)}, but {type(model).__name__} needs "
            f"{model.main_input_name!r}: give tokenized batches."
        )
    if model.config.is_encoder_decoder and "labels" in read:
        if hasattr(model, "prepare_decoder_input_ids_from_labels"):
            if "decoder_input_ids" not in read:
                read["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=read["labels"])
            # Position i of the decoder predicts label i; where there is none, it reads padding.
            read.setdefault("decoder_attention_mask", (read["labels"] != IGNORED).long())
    if "input_ids" in read and "attention_mask" not in read:
        _check_unmasked(model, read["input_ids"])
    return read


def read_inputs(model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
    """The columns of a batch that a model predicts from, see `read_batch`: without labels."""
    return {name: value for name, value in read_batch(model, batch).items() if name not in TARGETS}


def _check_unmasked(model: nn.Module, input_ids: torch.Tensor) -> None:
    pad = model.config.get_text_config().pad_token_id
    if pad is not None and (input_ids == pad).any():
        raise ValueError(
            f"A calibration batch has no attention_mask, but holds the padding token {pad}: padding would count as "
            "text. Add the 'attention_mask' that the tokenizer returns."
        )
