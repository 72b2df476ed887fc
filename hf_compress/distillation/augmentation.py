"""Noisy copies of texts, for the teacher to label: small data sets have too few texts to imitate a teacher on."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, LargeList, List, Value, concatenate_datasets
from datasets.features import Features

from hf_compress.distillation.tokenizers import check_dataset, check_no_gaps, check_texts
from hf_compress.modeling.tasks import IGNORED


@dataclass
class AugmentationConfig:
    """How many noisy copies are made of each text, and how noisy they are."""

    copies: int = field(default=6, metadata={"help": "Copies of each text, at least 1, beside the original."})
    word_dropout: float = field(
        default=0.1,
        metadata={"help": "Share of the words that a copy leaves out, from 0 to 1. At least one word always stays."},
    )
    word_replacement: float = field(
        default=0.15,
        metadata={
            "help": "Share of the words that a copy replaces by words of the data set, drawn as often as they occur "
            "in it, from 0 to 1. The two shares are at most 1 together."
        },
    )
    seed: int = field(default=0, metadata={"help": "Of the noise, at least 0: the same seed gives the same copies."})

    def __post_init__(self) -> None:
        for name, least in (("copies", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r} cannot be used: give a whole number of at least {least}.")
        dropout, replacement = self.word_dropout, self.word_replacement
        # Shares such as 0.7 and 0.3 are not exact in binary.
        is_share = dropout >= 0 and replacement >= 0 and dropout + replacement <= 1 + 1e-9
        if not is_share or dropout + replacement == 0:
            raise ValueError(
                f"word_dropout={dropout} and word_replacement={replacement} are no shares of the words, or leave all "
                "copies as they are: give numbers from 0 to 1 with a sum above 0 and at most 1, such as 0.1 and 0.15."
            )


def augment(
    dataset: Dataset,
    config: AugmentationConfig,
    text_columns: Sequence[str] = ("text",),
    label_column: str | None = "label",
    keep_originals: bool = True,
    num_proc: int | None = None,
) -> Dataset:
    """Adds noisy copies of texts that have no label of their own: the teacher labels them.

    Each word of a copy is left out, replaced by another word of the same column, drawn as often as it occurs there, or
    kept. Words are what stands between white space, so texts of a script without it are one word each. Augment the
    training split alone, and before it is tokenized.

    Args:
        dataset (`Dataset`): Texts, labelled or not.
        config (`AugmentationConfig`): How many copies, and how noisy.
        text_columns (sequence of `str`, *optional*, defaults to `("text",)`): One column of texts, or two for pairs,
            each with words of its own.
        label_column (`str`, *optional*, defaults to `"label"`): The column of labels; `None` for texts without.
        keep_originals (`bool`, *optional*, defaults to `True`): Whether the texts themselves are in the result.
        num_proc (`int`, *optional*): Processes to share the work. The copies do not depend on it.

    Returns:
        `Dataset`: The texts as they were, then the copies of the first text, of the second, and so on, with the other
        columns unchanged. The label of a copy is missing, which `DistillationTrainer` skips in the task's loss: -100
        for a class, NaN for a number, a list of NaN for several labels. Where they were of another type, labels of
        classes become int64 and lists of 0 and 1 become lists of float32: -100 is no class of a `ClassLabel`, so read
        the names of its classes from the original data set.

    Raises:
        TypeError: if this is no `Dataset`, a column holds no texts, or the labels are none of the above.
        ValueError: if there are no rows, a column is missing, a text or a label is `None`, lists of labels are not of
            one length, or the texts are tokenized already.
    """
    check_dataset(dataset, "augment(splits['train'], config)")
    check_texts(dataset, text_columns)
    if len(dataset) == 0:
        raise ValueError("The data set has 0 rows, of which no copies can be made: give data with rows.")
    if "input_ids" in dataset.column_names:
        raise ValueError(
            f"The data set has the columns {', '.join(dataset.column_names)}: the input_ids of a copy would still be "
            "those of its original. Augment the texts first, and tokenize the result."
        )
    dataset = dataset.with_format(None)
    missing: dict[str, Any] = {}
    if label_column is not None:
        feature, missing[label_column] = _missing_label(dataset, label_column)
        if feature != dataset.features[label_column]:
            dataset = dataset.cast(Features({**dataset.features, label_column: feature}), num_proc=num_proc)
    noise = _Noise(config, _word_counts(dataset, text_columns), missing)
    rows = np.arange(len(dataset)).repeat(config.copies)
    copies = dataset.select(rows).map(
        noise,
        batched=True,
        with_indices=True,
        features=dataset.features,
        num_proc=num_proc,
        desc="Augmenting",
    )
    return concatenate_datasets([dataset, copies]) if keep_originals else copies


class _Noise:
    """Turns a batch of texts into noisy copies of them. A class, since processes need to be sent it."""

    def __init__(self, config: AugmentationConfig, counts: dict[str, Counter], missing: dict[str, Any]) -> None:
        self.config = config
        self.missing = missing
        self.words = {column: list(counter) for column, counter in counts.items()}
        self.ends = {column: np.cumsum(list(counter.values())) for column, counter in counts.items()}

    def __call__(self, rows: dict[str, list], indices: list[int]) -> dict[str, list]:
        noisy: dict[str, list] = {name: [value] * len(indices) for name, value in self.missing.items()}
        # One generator per copy, so that what a copy gets does not depend on who makes the others.
        generators = [np.random.default_rng([self.config.seed, index]) for index in indices]
        for column in self.words:
            noisy[column] = [
                self._copy(text, column, generator) for text, generator in zip(rows[column], generators, strict=True)
            ]
        return noisy

    def _copy(self, text: str, column: str, generator: np.random.Generator) -> str:
        words = text.split()
        if not words:
            return text
        fate = generator.random(len(words))
        is_kept = fate >= self.config.word_dropout
        is_replaced = is_kept & (fate < self.config.word_dropout + self.config.word_replacement)
        # Among words that are all left out, the largest number is anyone's.
        is_kept[fate.argmax()] = True
        ends = self.ends[column]
        drawn = iter(ends.searchsorted(generator.integers(ends[-1], size=is_replaced.sum()), side="right"))
        return " ".join(
            self.words[column][next(drawn)] if replaced else word
            for word, kept, replaced in zip(words, is_kept, is_replaced, strict=True)
            if kept
        )


def _word_counts(dataset: Dataset, text_columns: Sequence[str]) -> dict[str, Counter]:
    counts: dict[str, Counter] = {column: Counter() for column in text_columns}
    n_seen = 0
    for rows in dataset.select_columns(list(text_columns)).iter(batch_size=1000):
        for column, texts in rows.items():
            check_no_gaps(texts, column, range(n_seen, n_seen + len(texts)))
            counts[column].update(word for text in texts for word in text.split())
        n_seen += len(texts)
    return counts


def _missing_label(dataset: Dataset, column: str) -> tuple[Any, Any]:
    """The type that a column of labels needs for a missing one, and what stands for that."""
    if column not in dataset.column_names:
        raise ValueError(
            f"The data set has no column {column!r}, only {', '.join(dataset.column_names)}: name the one with the "
            "labels as label_column, or give label_column=None for texts without labels."
        )
    feature = dataset.features[column]
    is_list = isinstance(feature, List | LargeList)
    value = feature.feature if is_list else feature
    # A list of `ClassLabel`s names the classes that apply, which is not one 0 or 1 per class.
    is_class = _is_integer(value) or (not is_list and isinstance(value, ClassLabel))
    if not is_class and not _is_float(value):
        raise TypeError(
            f"Column {column!r} holds {feature}, which has no value for a missing label: give ids of classes (see "
            "dataset.class_encode_column), floats for a regression, lists of one 0 or 1 per class for several labels, "
            "or label_column=None for texts without labels."
        )
    lengths, numbers = _lengths_and_numbers(dataset, column, is_list)
    if not is_list:
        return (Value("int64"), IGNORED) if is_class else (feature, math.nan)
    if len(lengths) > 1 or (is_class and not numbers <= {0, 1}):
        raise ValueError(
            f"Column {column!r} holds lists of {min(lengths)} to {max(lengths)} numbers, such as "
            f"{dataset[0][column]}, which are not one 0 or 1 per class: turn ids of classes into such lists first, "
            "since a list with a missing label has no id."
        )
    return List(Value("float32")) if is_class else feature, [math.nan] * lengths.pop()


def _lengths_and_numbers(dataset: Dataset, column: str, is_list: bool) -> tuple[set[int], set[float]]:
    lengths: set[int] = set()
    numbers: set[float] = set()
    n_seen = 0
    for rows in dataset.select_columns([column]).iter(batch_size=1000):
        values = rows[column]
        check_no_gaps(values, column, range(n_seen, n_seen + len(values)))
        n_seen += len(values)
        if is_list:
            lengths.update(map(len, values))
            numbers.update(number for labels in values for number in labels)
    return lengths, numbers


def _is_integer(feature: Any) -> bool:
    return isinstance(feature, Value) and (feature.dtype == "bool" or feature.dtype.startswith(("int", "uint")))


def _is_float(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype.startswith("float")
