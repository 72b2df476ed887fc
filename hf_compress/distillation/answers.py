"""What a cache stores of a teacher's forward pass: which tensors, of which positions, in which numbers."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, default_data_collator

from hf_compress.distillation.cache_files import Settings
from hf_compress.distillation.cache_keys import KEY_BYTES, example_keys
from hf_compress.distillation.objective import (
    OWN,
    POSITIONS,
    attention_mask,
    decoder_mask,
    embed,
    teacher_inputs,
    with_decoder_inputs,
)
from hf_compress.distillation.signals import Probe, split_name
from hf_compress.modeling.autocast import without_autocast
from hf_compress.modeling.modes import evaluating
from hf_compress.modeling.tasks import CLASSIFICATION, IGNORED, LANGUAGE_MODELS, unwrap, without_cache

LABELS = frozenset({"labels", "label", "label_ids", "start_positions", "end_positions"})
# By how much of the largest number the same text may differ, beside others and alone; bfloat16 has 8 bits.
_ROUNDING = 0.05
_DTYPES = {"fp32": np.float32, "fp16": np.float16}


class Answers:
    """A teacher that is asked about rows, for a cache.

    Args:
        teacher (`nn.Module`): On its device.
        settings (`Settings`): What is stored.
        processing_class (*optional*): Tokenizer that pads.
        data_collator (`Callable`, *optional*): Makes a batch of rows.
        autocast_dtype (`torch.dtype`, *optional*): In which the teacher runs.
    """

    def __init__(
        self,
        teacher: nn.Module,
        settings: Settings,
        processing_class: Any,
        data_collator: Callable | None,
        autocast_dtype: torch.dtype | None,
    ) -> None:
        self.teacher = teacher
        self.settings = settings
        self.autocast_dtype = autocast_dtype
        pads = isinstance(processing_class, PreTrainedTokenizerBase)
        self._collate = data_collator or (DataCollatorWithPadding(processing_class) if pads else default_data_collator)
        self._tail_mass, self._n_tokens = 0.0, 0

    def ask(self, rows: Sequence[Mapping[str, Any]], batch_size: int, first_row: int = 0) -> dict[str, np.ndarray]:
        """The arrays of a block.

        Args:
            rows (sequence of rows): Tokenized.
            batch_size (`int`): Rows per forward.
            first_row (`int`, *optional*): Number of the first one in the data set, for messages.

        Returns:
            `dict[str, np.ndarray]`: `keys` (rows, 16); for each tensor its values, of one row after the other, and
            where it has a row per token, `<name>.offsets` (rows + 1).

        Raises:
            ValueError: if an output is NaN or infinite.
        """
        parts: dict[str, list[np.ndarray]] = {"keys": []}
        lengths: dict[str, list[int]] = {}
        for start in range(0, len(rows), batch_size):
            batch = self._batch(rows[start : start + batch_size])
            keys = b"".join(example_keys(*key_columns(self.settings, batch)))
            parts["keys"].append(np.frombuffer(keys, np.uint8).reshape(-1, KEY_BYTES))
            found = self._run(batch)
            for name, mask in answer_masks(self.settings, batch).items():
                values = found[name].cpu()
                if mask is not None:
                    lengths.setdefault(name, []).extend(mask.sum(1).tolist())
                    values = values[mask]
                self._check(name, values, first_row + start)
                if name == "top_log_probs":
                    self._tail_mass += (1 - values.float().exp().sum(-1)).clamp(min=0).sum().item()
                    self._n_tokens += len(values)
                parts.setdefault(name, []).append(self._stored(name, values))
        arrays = {name: np.concatenate(part) for name, part in parts.items()}
        for name, each in lengths.items():
            arrays[f"{name}.offsets"] = np.concatenate([[0], np.cumsum(each)]).astype(np.int64)
        return arrays

    def check_padding(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Raises where answers depend on how far a text is padded, of which its key knows nothing.

        Args:
            rows (sequence of rows): A sample of the data set.

        Raises:
            ValueError: if so.
        """
        everything = self._batch(rows)
        if "pixel_values" in everything:
            return
        real = _own_mask(everything)
        counts = real.sum(1)
        if real[counts > 0, 0].all():
            return
        shortest = rows[int(counts.where(counts > 0, counts.max() + 1).argmin())]
        found = []
        for some in ([shortest, rows[int(counts.argmax())]], [shortest]):
            batch = self._batch(some)
            answers, masks = self._run(batch), answer_masks(self.settings, batch)
            names = [name for name in masks if name != "top_indices"]
            found.append([_comparable(name, answers[name][0].cpu(), masks[name]) for name in names])
        for beside, alone in zip(*found, strict=True):
            if alone.numel() and (beside - alone).abs().max() > _ROUNDING * alone.abs().max():
                raise ValueError(
                    f"The data are padded on the left, and {type(unwrap(self.teacher)).__name__} counts positions "
                    "from there: what it says of a text depends on the others in the batch, and cannot be stored. Pad "
                    "on the right (tokenizer.padding_side = 'right'), or train without a cache."
                )

    def digest(self, rows: Sequence[Mapping[str, Any]]) -> str:
        """A hash of rows, in their order.

        Args:
            rows (sequence of rows): A sample.

        Returns:
            `str`: 32 hexadecimal digits.
        """
        keys = b"".join(example_keys(*key_columns(self.settings, self._batch(rows))))
        return hashlib.blake2b(keys, digest_size=KEY_BYTES).hexdigest()

    @property
    def tail_mass(self) -> float:
        """Mean probability of the classes that were left out, over the tokens asked about; 0 where none was."""
        return self._tail_mass / max(self._n_tokens, 1)

    def bytes_per_row(self, rows: Sequence[Mapping[str, Any]]) -> float:
        """How much a row takes on average, found by asking about one of them.

        Args:
            rows (sequence of rows): A sample.

        Returns:
            `float`: Bytes.
        """
        arrays = self.ask(rows[:1], batch_size=1)
        masks = answer_masks(self.settings, self._batch(rows))
        total = float(KEY_BYTES)
        for name, mask in masks.items():
            width = arrays[name].itemsize * math.prod(arrays[name].shape[1:])
            total += width if mask is None else 8 + width * mask.sum().item() / len(rows)
        return total

    def _batch(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        columns = set(self.settings.columns)
        known = columns | LABELS | {POSITIONS} | {OWN + name for name in columns}
        kept = [{name: value for name, value in row.items() if name in known} for row in rows]
        return dict(self._collate(kept))

    @torch.no_grad()
    def _run(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        model, task = self.teacher, self.settings.task
        device = next(model.parameters()).device
        decoding = with_decoder_inputs(task, model, batch)
        inputs = {n: v.to(device) for n, v in teacher_inputs(decoding, self.settings.columns).items()}
        inputs = without_cache(model, inputs)
        autocast = torch.autocast(device.type, self.autocast_dtype) if self.autocast_dtype else nullcontext()
        probe = Probe(model, self.settings.signals)
        try:
            # Without what a training in mixed precision left, which is no part of the fingerprint.
            with evaluating(model), without_autocast(model.modules()), autocast:
                outputs = dict(model(**inputs, return_dict=True))
            outputs |= probe.take()
        finally:
            probe.close()
        if task == "feature-extraction":
            mask = None if "pixel_values" in batch else _own_mask(batch).to(device)
            outputs["embedding"] = embed(outputs["last_hidden_state"], mask, self.settings.pooling)
        if self.settings.precision == "top-k":
            log_probs = (outputs["logits"].float() / self.settings.temperature).log_softmax(-1)
            outputs["top_log_probs"], outputs["top_indices"] = log_probs.topk(self.settings.top_k, dim=-1)
        return outputs

    def _stored(self, name: str, values: torch.Tensor) -> np.ndarray:
        if name == "top_indices":
            return values.numpy().astype(np.uint16 if unwrap(self.teacher).config.vocab_size <= 2**16 else np.int32)
        dtype = _DTYPES.get(self.settings.precision, np.float16)
        return values.float().numpy().astype(dtype)

    def _check(self, name: str, values: torch.Tensor, first_row: int) -> None:
        if name == "top_indices":
            return
        largest = values.float().abs().max().item() if values.numel() else 0.0
        if not np.isfinite(largest):
            raise ValueError(
                f"The teacher gives NaN or infinity ({name}) in the rows from {first_row} on: check its weights and "
                "those rows, and run it in float32 or bf16 where float16 overflows."
            )
        if self.settings.precision != "fp32" and largest > float(np.finfo(np.float16).max):
            raise ValueError(
                f"The teacher's {name} reach {largest:.3g} in the rows from {first_row} on, more than float16 can "
                "hold: build the cache with precision='fp32'."
            )


def _comparable(name: str, values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The answers to the first text of a batch; logits without what all classes have in common, which says nothing."""
    values = values.float() if mask is None else values[mask[0]].float()
    return values - values.mean(-1, keepdim=True) if name == "logits" and values.shape[-1] > 1 else values


def answer_masks(settings: Settings, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor | None]:
    """Which tensors a cache stores, and of which positions.

    Args:
        settings (`Settings`): Of the cache.
        batch (`Mapping`): A collated batch.

    Returns:
        `dict[str, torch.Tensor or None]`: By name, booleans of shape (batch, length); `None` for one value per row.
    """
    task = settings.task
    masks: dict[str, torch.Tensor | None] = {}
    if task in CLASSIFICATION:
        masks["logits"] = None
    elif task == "feature-extraction":
        masks["embedding"] = None
    elif task == "question-answering":
        masks["start_logits"] = masks["end_logits"] = _own_mask(batch)
    else:
        mask = _token_mask(task, batch)
        names = ("top_indices", "top_log_probs") if settings.precision == "top-k" else ("logits",)
        masks |= dict.fromkeys(names, mask)
    for name in settings.signals:
        if "pixel_values" in batch:
            masks[name] = None
        elif task == "seq2seq-lm" and split_name(name)[1] == "decoder":
            masks[name] = decoder_mask(batch)
        else:
            masks[name] = _own_mask(batch)
    return masks


def key_columns(
    settings: Settings, batch: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """All that decides a teacher's stored answers to a batch, and which of its values are real.

    Args:
        settings (`Settings`): Of the cache.
        batch (`Mapping`): A collated batch.

    Returns:
        `tuple[dict, dict]`: Columns, and masks by the name of a column, as `example_keys` takes them.
    """
    columns = teacher_inputs(batch, settings.columns)
    masks = {}
    if "pixel_values" not in batch:
        real = _own_mask(batch)
        of_decoder = decoder_mask(batch) if settings.task == "seq2seq-lm" else None
        for name, value in columns.items():
            mask = of_decoder if name.startswith("decoder_") else real
            if mask is not None and value.shape == mask.shape:
                masks[name] = mask
    if settings.task in LANGUAGE_MODELS and settings.task != "causal-lm" and "labels" in batch:
        # Where the labels are decides which positions are stored.
        columns["labels"] = batch["labels"]
        masks["labels"] = decoder_mask(batch) if settings.task == "seq2seq-lm" else _own_mask(batch)
    return columns, masks


def _own_mask(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Where the texts that the teacher reads are real."""
    own = {name: batch[OWN + name] for name in ("attention_mask", "input_ids") if OWN + name in batch}
    return attention_mask(own or batch)


def _token_mask(task: str, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if task == "seq2seq-lm":
        return decoder_mask(batch)
    if task == "masked-lm" and "labels" in batch:
        return batch["labels"] != IGNORED
    return _own_mask(batch)
