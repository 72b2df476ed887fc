"""What a run that trains nothing works with: a classifier, texts to calibrate with and rows to measure on, checked."""

import logging
import math
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer, DataCollatorWithPadding

from hf_compress.jobs.classifiers import choose_metric, load_classifier
from hf_compress.jobs.data import check_columns, label_ids, tokenize
from hf_compress.jobs.fit import check_length, check_tokenizer
from hf_compress.jobs.job import CalibratedJob

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

CALIBRATION_BATCH = 32
# At most so many rows are held out, and so large a share of `train`.
HELD_OUT_ROWS, HELD_OUT_SHARE = 1000, 0.1


class Part(NamedTuple):
    """Rows that a run reads.

    Attributes:
        split (`str`): The split that they are of.
        rows (`Dataset`): As they are in the data, with checked columns.
        is_labelled (`bool`): Whether their labels are read.
    """

    split: str
    rows: Dataset
    is_labelled: bool


class Material(NamedTuple):
    """What a run works with, checked.

    Attributes:
        model (`PreTrainedModel`): The model to compress.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        batches (`list[dict[str, torch.Tensor]]`): Texts to calibrate with; empty where none are needed.
        test (`Dataset`): Tokenized rows to measure on.
        metric (`str`): What quality is measured by.
        held_out (`Dataset`, *optional*): Tokenized rows to choose something on, which are not measured on.
        held_out_split (`str`, *optional*): The split that they are of.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    batches: list[dict[str, torch.Tensor]]
    test: Dataset
    metric: str
    held_out: Dataset | None = None
    held_out_split: str | None = None


def load_material(job: CalibratedJob, test: Part, texts: Part | None, held_out: Part | None = None) -> Material:
    """Loads model and tokenizer, checks them against the data and each other, and tokenizes.

    Args:
        job (`CalibratedJob`): Names the model, the columns and the metric.
        test (`Part`): Rows to measure on.
        texts (`Part` or `None`): Rows to calibrate with.
        held_out (`Part`, *optional*): Rows to choose something on.

    Returns:
        `Material`: With the model on the job's device.

    Raises:
        ValueError: if a label, the tokenizer, the task head, the metric or the length does not fit.
    """
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    model = load_classifier(job.model)
    check_tokenizer(tokenizer, model)
    metric = choose_metric(job.metric, model)

    def encode(part: Part) -> Dataset:
        labels = label_ids(part.rows, part.split, job.label_column, model.config) if part.is_labelled else None
        return tokenize(part.rows, tokenizer, job.text_columns, labels, job.max_length)

    parts = {name: part for name, part in (("texts", texts), ("test", test), ("held_out", held_out)) if part}
    encoded = {name: encode(part) for name, part in parts.items()}
    check_length(model, max(encoded.values(), key=lambda rows: max(rows["length"])))
    n_texts = len(encoded["texts"]) if texts else 0
    logger.info("%d texts to calibrate with, %d of the split %s to measure on.", n_texts, len(test.rows), test.split)
    batches = calibration_batches(encoded["texts"], DataCollatorWithPadding(tokenizer)) if texts else []
    return Material(
        model.to(device_of(job.use_cpu)),
        tokenizer,
        batches,
        encoded["test"],
        metric,
        encoded.get("held_out"),
        held_out.split if held_out else None,
    )


def draw(rows: Dataset, n_rows: int, seed: int) -> Dataset:
    """Some rows, chosen by chance.

    Args:
        rows (`Dataset`): All of them.
        n_rows (`int`): How many, at most.
        seed (`int`): Of the choice.

    Returns:
        `Dataset`: In the order in which they were drawn.
    """
    return rows.select(random.Random(seed).sample(range(len(rows)), min(n_rows, len(rows))))


def hold_out(job: CalibratedJob, splits: DatasetDict, test_split: str, seed: int) -> tuple[Part, Dataset | None]:
    """Rows to choose something on: never those that are measured on.

    Args:
        job (`CalibratedJob`): The columns.
        splits (`DatasetDict`): The data.
        test_split (`str`): The split that is measured on.
        seed (`int`): Of the choice of rows.

    Returns:
        `tuple[Part, Dataset or None]`: Up to 1000 rows of `validation` or `dev`, or of a tenth of `train`; and what
        is left of `train`, if there is any.

    Raises:
        ValueError: if there is no such split, a column does not fit, or `train` has a single row.
    """
    split = next((name for name in ("validation", "dev") if name in splits and name != test_split), "train")
    if split not in splits:
        raise ValueError(
            f"Rows have to be held out for a choice, but the data have {', '.join(splits)} only, and {test_split!r} "
            "is measured on: add a file such as validation.csv, or leave --max-drop out."
        )
    rows = splits[split]
    check_columns(rows, split, job.text_columns, job.label_column)
    if split != "train":
        return Part(split, draw(rows, HELD_OUT_ROWS, seed), True), splits.get("train")
    if len(rows) < 2:
        raise ValueError("The split 'train' has a single row, so none can be held out: leave --max-drop out.")
    # By chance, because rows are often sorted by label.
    mixed = draw(rows, len(rows), seed)
    n_rows = min(HELD_OUT_ROWS, math.ceil(HELD_OUT_SHARE * len(rows)))
    return Part(split, mixed.select(range(n_rows)), True), mixed.select(range(n_rows, len(rows)))


def device_of(use_cpu: bool) -> torch.device:
    """Where to compress and measure: on the accelerator, if there is one.

    Args:
        use_cpu (`bool`): Whether it is left alone.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if accelerator is None or use_cpu else accelerator


def by_length(rows: Dataset) -> Dataset:
    """Rows from the shortest to the longest, so that batches have little padding.

    Args:
        rows (`Dataset`): Tokenized rows, as `tokenize` returns them.

    Returns:
        `Dataset`: All of them; those of one length in the same order.
    """
    lengths = rows["length"][:]
    return rows.select(sorted(range(len(lengths)), key=lambda row: lengths[row]))


def calibration_batches(texts: Dataset, collate: Callable) -> list[dict[str, torch.Tensor]]:
    """Batches of texts of similar length.

    Args:
        texts (`Dataset`): Tokenized rows, as `tokenize` returns them.
        collate (`Callable`): Pads them.

    Returns:
        `list[dict[str, torch.Tensor]]`: From the shortest texts to the longest.
    """
    rows = list(by_length(texts).remove_columns("length"))
    return [dict(collate(rows[i : i + CALIBRATION_BATCH])) for i in range(0, len(rows), CALIBRATION_BATCH)]
