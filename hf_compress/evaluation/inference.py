"""Running a model over a dataset to measure it: the columns it takes, its task's logits, its labels."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from hf_compress.modeling.autocast import without_autocast
from hf_compress.modeling.layouts import LAYOUTS
from hf_compress.modeling.modes import evaluating
from hf_compress.modeling.tasks import CLASSIFICATION, IGNORED, forward_columns, task_of, unwrap, without_cache

_LABELLED = (*CLASSIFICATION, "token-classification")
_TARGETS = {"labels", "start_positions", "end_positions"}


@dataclass(frozen=True)
class Predictions:
    """What `predict` returns.

    Attributes:
        logits (`np.ndarray`): `(n, classes)`; `(n, length, classes)` where the task labels tokens; `(n, 2, length)`
            for question answering, start then end. Shorter rows are padded with -100.
        labels (`np.ndarray` or `None`): `(n,)`, `(n, classes)` for multi-label, `(n, length)` padded with -100, or
            `(n, 2)` for question answering; `None` where the dataset has none.
    """

    logits: np.ndarray
    labels: np.ndarray | None


@contextmanager
def inference(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode without autograd; on leaving, every submodule has the training flag it had before.

    What accelerate leaves of a training in mixed precision is off too: a saved model has none of it.

    Args:
        models (`nn.Module`): The models to switch.
    """
    with (
        evaluating(*models),
        torch.inference_mode(),
        without_autocast(module for model in models for module in model.modules()),
    ):
        yield


def model_inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a batch that a model's forward takes, on the model's device, without labels.

    Columns that the forward does not know are left out (`token_type_ids` for DistilBERT). Labels are left out too, so
    that no loss is computed, except for an encoder-decoder that has to make its decoder's inputs from them.

    Args:
        model (`nn.Module`): A Transformers model.
        batch (`Mapping`): Tensors by column name.

    Returns:
        `dict`: Keyword arguments of the forward.

    Raises:
        ValueError: if the batch has no input of the model.
    """
    core = unwrap(model)
    wanted = forward_columns(model)
    if not core.config.is_encoder_decoder or "decoder_input_ids" in batch:
        wanted -= _TARGETS
    inputs = {
        name: value.to(core.device) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
        if name in wanted and value is not None
    }
    if not inputs:
        raise ValueError(
            f"The batch has the columns {sorted(batch)}, of which {type(core).__name__} takes none as input. "
            f"Give it a dict of tensors with some of {sorted(wanted)}, e.g. `tokenizer(texts, return_tensors='pt')`."
        )
    return inputs


def task_logits(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """Logits of a model's task head for one batch.

    Args:
        model (`nn.Module`): A Transformers model with a task head.
        batch (`Mapping`): Tensors by column name.

    Returns:
        `torch.Tensor`: `(batch, classes)` or `(batch, length, classes)`; for question answering `(batch, 2, length)`,
        start then end, with -100 at padding so that the answer cannot depend on how far a batch is padded.
    """
    inputs = model_inputs(model, batch)
    if task_of(model) in ("causal-lm", "sequence-classification", "token-classification"):
        inputs |= _positions(model, inputs)
    outputs = model(**without_cache(model, inputs), return_dict=True)
    if task_of(model) != "question-answering":
        return outputs.logits
    logits = torch.stack([outputs.start_logits, outputs.end_logits], dim=1)
    if "attention_mask" in batch:
        is_padding = batch["attention_mask"].to(logits.device)[:, None, :] == 0
        logits = logits.masked_fill(is_padding, IGNORED)
    return logits


def _positions(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Positions that begin at the first token of each row, for batches that are padded on the left."""
    mask = inputs.get("attention_mask")
    if mask is None or mask[:, 0].all() or "position_ids" in inputs or "position_ids" not in forward_columns(model):
        return {}
    layout = LAYOUTS.get(unwrap(model).config.model_type)
    # RoBERTa and its like count the real tokens themselves, from the number of the padding on.
    counts_itself = task_of(model) != "causal-lm" if layout is None else layout.pad_token_is_fixed
    if counts_itself:
        return {}
    return {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def task_labels(task: str, batch: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """Labels of one batch in the layout of `task_logits`.

    Args:
        task (`str`): What `task_of` returns.
        batch (`Mapping`): Tensors by column name.

    Returns:
        `torch.Tensor` or `None`: Labels, -100 where a position does not count. A causal language model without a
        label column predicts its own input, except padding, and never a row's first token, which nothing precedes.
    """
    if task == "question-answering" and {"start_positions", "end_positions"} <= set(batch):
        labels = torch.stack([batch["start_positions"], batch["end_positions"]], dim=1)
        if "attention_mask" not in batch:
            return labels
        # As in a training: an answer that was cut off stands outside of the text.
        is_token = batch["attention_mask"] != 0
        within = (labels >= 0) & (labels < is_token.shape[1])
        return labels.where(within & is_token.gather(1, labels.where(within, 0)), IGNORED)
    if task == "causal-lm" and ("labels" in batch or "input_ids" in batch):
        labels = batch["labels"] if "labels" in batch else batch["input_ids"]
        if "attention_mask" not in batch:
            return labels
        is_token = batch["attention_mask"] != 0
        is_first = is_token & (is_token.cumsum(-1) == 1)
        # The first column is never predicted, and stays as it was given.
        is_first[:, 0] = False
        ignored = is_first if "labels" in batch else is_first | ~is_token
        return labels.masked_fill(ignored, IGNORED)
    return batch.get("labels")


def batches(
    dataset: Sequence[Mapping[str, Any]],
    models: Sequence[nn.Module],
    *,
    processing_class: Any = None,
    data_collator: Callable | None = None,
    batch_size: int = 64,
    label_column: str = "labels",
) -> Iterator[dict[str, torch.Tensor]]:
    """Collated batches of a dataset, in its order, with the columns that any of the models takes.

    Args:
        dataset (`datasets.Dataset` or a sequence of dicts): Tokenised rows.
        models (`Sequence[nn.Module]`): Models of one task.
        processing_class (*optional*): Tokenizer that pads; `None` stacks rows of equal length.
        data_collator (`Callable`, *optional*): Replaces the collator of the task.
        batch_size (`int`, *optional*, defaults to `64`): Rows per batch.
        label_column (`str`, *optional*, defaults to `"labels"`): Column of the labels; by default also `"label"`.

    Yields:
        `dict[str, torch.Tensor]`: One batch, its labels under `"labels"`.

    Raises:
        ValueError: if the dataset is empty, or rows differ in length and nothing can pad them.
    """
    if len(dataset) == 0:
        raise ValueError("The dataset has no rows, so there is nothing to measure. Give a split that has some.")
    columns = set().union(*(forward_columns(model) for model in models))
    task = task_of(models[0])
    collate = data_collator or _default_collator(task, processing_class)
    # Only the default may stand for another column: a name that was given must be there. What a language model reads
    # may have a class beside it.
    names = ("labels", "label") if label_column == "labels" and task in _LABELLED else (label_column,)

    def select_and_collate(rows: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        return dict(collate([_select(row, columns, names) for row in rows]))

    yield from torch.utils.data.DataLoader(dataset, batch_size=batch_size, collate_fn=select_and_collate)


def predict(
    model: nn.Module,
    dataset: Sequence[Mapping[str, Any]],
    *,
    processing_class: Any = None,
    data_collator: Callable | None = None,
    batch_size: int = 64,
    label_column: str = "labels",
    progress: Callable[[int, int], None] | None = None,
) -> Predictions:
    """Logits and labels of a whole dataset, in its order.

    Args:
        model (`nn.Module`): A Transformers model with a task head; its training flags are left as they were.
        dataset (`datasets.Dataset` or a sequence of dicts): Tokenised rows; columns that the model does not take are
            ignored.
        processing_class (*optional*): Tokenizer that pads.
        data_collator (`Callable`, *optional*): Replaces the collator of the task.
        batch_size (`int`, *optional*, defaults to `64`): Rows per forward.
        label_column (`str`, *optional*, defaults to `"labels"`): Column of the labels; by default also `"label"`.
        progress (`Callable[[int, int], None]`, *optional*): Called after each batch with the rows done and in all.

    Returns:
        `Predictions`: float32 logits and the labels. Language models make `(n, length, vocabulary)`: score those with
        `score_retention`, which stores no logits.
    """
    task = task_of(model)
    logits, labels, n_done = [], [], 0
    loader = batches(
        dataset,
        [model],
        processing_class=processing_class,
        data_collator=data_collator,
        batch_size=batch_size,
        label_column=label_column,
    )
    with inference(model):
        for batch in loader:
            logits.append(task_logits(model, batch).float().cpu().numpy())
            batch_labels = task_labels(task, batch)
            if batch_labels is not None:
                labels.append(batch_labels.cpu().numpy())
            n_done += len(logits[-1])
            if progress is not None:
                progress(n_done, len(dataset))
    return Predictions(_pad_and_concatenate(logits), _pad_and_concatenate(labels) if labels else None)


def _select(row: Mapping[str, Any], columns: set[str], names: Sequence[str]) -> dict[str, Any]:
    selected = {name: value for name, value in row.items() if name in columns and name != "labels"}
    source = next((name for name in names if name in row), None)
    if source is None and "labels" not in names:
        raise ValueError(f"There is no column {names[0]!r}; the columns are {', '.join(row)}. Name the labels' one.")
    return selected if source is None else {**selected, "labels": row[source]}


def _default_collator(task: str, processing_class: Any) -> Callable:
    from transformers import data

    if processing_class is None or task == "image-classification":
        return _stack
    if task == "seq2seq-lm":
        return data.DataCollatorForSeq2Seq(processing_class)
    if task in ("token-classification", "masked-lm", "causal-lm"):
        return data.DataCollatorForTokenClassification(processing_class)
    if task == "question-answering":
        # Answers are counted from the first token.
        return lambda rows: processing_class.pad(rows, padding_side="right", return_tensors="pt")
    return data.DataCollatorWithPadding(processing_class)


def _stack(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    from transformers import default_data_collator

    for name, first in rows[0].items():
        is_sequence = isinstance(first, list) or (isinstance(first, np.ndarray | torch.Tensor) and first.ndim > 0)
        lengths = {len(row[name]) for row in rows} if is_sequence else set()
        if len(lengths) > 1:
            raise ValueError(
                f"Column {name!r} has rows of lengths {min(lengths)} to {max(lengths)}, which cannot be stacked. "
                "Pass `processing_class=tokenizer` to pad them, or a `data_collator`."
            )
    return default_data_collator(rows)


def _pad_and_concatenate(arrays: list[np.ndarray]) -> np.ndarray:
    shape = np.max([array.shape[1:] for array in arrays], axis=0).astype(int) if arrays[0].ndim > 1 else ()
    stacked = np.full((sum(map(len, arrays)), *shape), IGNORED, dtype=arrays[0].dtype)
    start = 0
    for array in arrays:
        stacked[(slice(start, start + len(array)), *map(slice, array.shape[1:]))] = array
        start += len(array)
    return stacked
