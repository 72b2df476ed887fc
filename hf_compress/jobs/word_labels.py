"""Sentences whose words are labelled: checked, numbered, tokenized, and made noisy."""

import copy
import logging
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from datasets import ClassLabel, Dataset, DatasetDict

from hf_compress.distillation.augmentation import AugmentationConfig
from hf_compress.distillation.tokenizers import whole_words
from hf_compress.jobs.data import ids_of_numbers
from hf_compress.modeling.tasks import IGNORED

logger = logging.getLogger(__name__)

# The label of words that are no entity.
OUTSIDE = "O"

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from hf_compress.recipe.steps import DataConfig


def check_words(splits: DatasetDict, test_split: str, config: "DataConfig") -> None:
    """Raises if the rows to learn from, or those to measure on, are no sentences of labelled words.

    Args:
        splits (`DatasetDict`): The data.
        test_split (`str`): The split to measure on.
        config (`DataConfig`): Names the columns.

    Raises:
        ValueError: with the row and what is wrong with it.
    """
    if "train" not in splits:
        raise ValueError(f"The data set has no split 'train' to learn from, only {', '.join(splits)}.")
    for split in ("train", test_split):
        check_labelled_words(splits[split], split, config)


def check_labelled_words(rows: Dataset, split: str, config: "DataConfig") -> None:
    """Raises if rows are no sentences of labelled words.

    Args:
        rows (`Dataset`): The rows.
        split (`str`): Their split, for the message.
        config (`DataConfig`): Names the columns.

    Raises:
        ValueError: with the row and what is wrong with it.
    """
    if len(config.text_columns) != 1:
        raise ValueError(
            f"text_columns={config.text_columns}, but labels are lists, one per word: name the one column of words."
        )
    column = config.text_columns[0]
    for name in (column, config.label_column):
        if name not in rows.column_names:
            raise ValueError(
                f"The split {split!r} has no column {name!r}; its columns are {', '.join(rows.column_names)}."
            )
    if len(rows) == 0:
        raise ValueError(f"The split {split!r} has 0 rows, from which nothing can be learned: give data with rows.")
    for index, (words, labels) in enumerate(zip(rows[column], rows[config.label_column], strict=True)):
        is_whole = isinstance(words, list) and all(isinstance(word, str) for word in words)
        if not is_whole or not isinstance(labels, list) or len(labels) != len(words) or not words:
            raise ValueError(
                f"Row {index} of the split {split!r} has {words!r:.60} in {column!r} and {labels!r:.60} in "
                f"{config.label_column!r}: both must be lists of one length, of words and of their labels. Texts with "
                "several labels each are for DistillationTrainer, prune and quantize, which take tokenized rows."
            )


def word_label_names(rows: Dataset, label_column: str) -> list[str]:
    """The labels of words that a model without a trained head is to learn, in the order of their ids.

    Args:
        rows (`Dataset`): Checked rows.
        label_column (`str`): The column of lists of labels.

    Raises:
        ValueError: if names and numbers are mixed, or there are fewer than two.
    """
    feature = _item_feature(rows, label_column)
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    values = {label for labels in rows[label_column] for label in labels}
    if all(isinstance(value, str) for value in values):
        # What is cut off, or unlabelled, counts as the first one.
        names = sorted(values, key=lambda name: (name != OUTSIDE, name))
    elif all(isinstance(value, int) and value >= 0 for value in values):
        names = [str(i) for i in range(max(values) + 1)]
    elif all(isinstance(value, int) for value in values):
        raise ValueError(
            f"Column {label_column!r} has the label {min(values)}, and labels count from 0: give every word a label, "
            "or leave its sentence out."
        )
    else:
        raise ValueError(f"Column {label_column!r} mixes names and numbers: write all labels in one of these ways.")
    if len(names) < 2:
        raise ValueError(f"Column {label_column!r} has the labels {names}, which leaves nothing to tell apart.")
    return names


def word_label_ids(rows: Dataset, split: str, label_column: str, config: "PreTrainedConfig") -> list[list[int]]:
    """The labels of words as a model numbers them, by name where there are names.

    Args:
        rows (`Dataset`): Checked rows.
        split (`str`): Their split, for the message.
        label_column (`str`): The column of lists of labels.
        config (`PreTrainedConfig`): The model's config.

    Raises:
        ValueError: if a label is none of the model's.
    """
    feature = _item_feature(rows, label_column)
    by_name, numbers = {str(name): index for index, name in config.id2label.items()}, ids_of_numbers(config)
    shares_names = isinstance(feature, ClassLabel) and bool(set(feature.names) & set(by_name))

    def number(label: Any) -> int | None:
        if shares_names and label >= 0:
            return by_name.get(feature.names[label])
        if isinstance(label, str):
            return by_name.get(label)
        if isinstance(feature, ClassLabel):
            return label if 0 <= label < config.num_labels else None
        return numbers.get(float(label))

    if isinstance(feature, ClassLabel) and not shares_names:
        names = list(config.id2label.values())
        message = "The tags of the data, %s, and of the model, %s, share no name and are matched by number: "
        logger.warning(message + "check the order, or set id2label in the model's config.json.", feature.names, names)
    ids = [[number(label) for label in labels] for labels in rows[label_column]]
    for index, row in enumerate(ids):
        if None in row:
            label = rows[index][label_column][row.index(None)]
            known = ", ".join(f"{i}={config.id2label[i]}" for i in range(config.num_labels))
            raise ValueError(
                f"Label {label!r} of row {index} of the split {split!r} is unknown: the model's labels are {known}. "
                "Rename the labels of the data, or give a model that was trained on them."
            )
    return ids


def tokenize_words(
    rows: Dataset,
    tokenizer: "PreTrainedTokenizerBase",
    column: str,
    labels: Sequence[Sequence[int]],
    max_length: int,
) -> Dataset:
    """Turns sentences into model inputs; the first token of each word carries its label.

    Args:
        rows (`Dataset`): Checked rows.
        tokenizer (`PreTrainedTokenizerBase`): A fast one.
        column (`str`): The column of words.
        labels (sequence of lists of `int`): One per word.
        max_length (`int`): Tokens per row at most.

    Returns:
        `Dataset`: The tokenizer's columns, `labels` with -100 where no word begins, and `length` in tokens.

    Raises:
        ValueError: if the tokenizer cannot tell the words of its tokens, or would join them.
    """
    check_reads_words(tokenizer)
    # A tokenizer remembers the last truncation, and would be saved with it.
    tokenizer = copy.deepcopy(tokenizer)

    def encode(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        encoded = tokenizer(batch[column], is_split_into_words=True, truncation=True, max_length=max_length)
        all_labels = []
        for place, index in enumerate(indices):
            starts = _starts(whole_words(encoded, place, tokenizer))
            all_labels.append([IGNORED if word is None else labels[index][word] for word in starts])
        return {**encoded, "labels": all_labels, "length": [len(ids) for ids in encoded["input_ids"]]}

    kept = rows.select_columns([column])
    return kept.map(encode, batched=True, with_indices=True, remove_columns=[column], desc="Tokenizing")


def check_reads_words(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raises if a tokenizer cannot be given words one by one.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.

    Raises:
        ValueError: if it cannot tell which word a token is of, or reads words as if there were no space between them.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} is no fast tokenizer, so it cannot tell which word a token is of: load it "
            "with AutoTokenizer, use_fast=True."
        )
    # Byte-level ones write a space into the token behind it.
    apart = tokenizer(["a", "a"], is_split_into_words=True, add_special_tokens=False)
    if apart["input_ids"] != tokenizer("a a", add_special_tokens=False)["input_ids"]:
        raise ValueError(
            f"{type(tokenizer).__name__} reads a list of words as if there were no space between them: load it with "
            "add_prefix_space=True, and save it beside the model. If that changes nothing, set "
            "tokenizer.backend_tokenizer.pre_tokenizer.add_prefix_space = True."
        )


def words_with_tokens(
    rows: Dataset, tokenizer: "PreTrainedTokenizerBase", column: str, max_length: int
) -> list[list[int]]:
    """Which words of each sentence `tokenize_words` gives a labelled token.

    Not those that are cut off, nor those that tokenizers drop, such as a zero-width space.

    Args:
        rows (`Dataset`): Checked rows.
        tokenizer (`PreTrainedTokenizerBase`): A fast one.
        column (`str`): The column of words.
        max_length (`int`): Tokens per row at most.

    Returns:
        `list[list[int]]`: Places of words, in order.
    """
    # As in `tokenize_words`.
    tokenizer = copy.deepcopy(tokenizer)
    encoded = tokenizer(rows[column][:], is_split_into_words=True, truncation=True, max_length=max_length)
    starts = [_starts(whole_words(encoded, row, tokenizer)) for row in range(len(rows))]
    return [[word for word in row if word is not None] for row in starts]


def _starts(words: Sequence[int | None]) -> list[int | None]:
    """The word that begins at each token, from the word that each token is of."""
    return [None if word == before else word for word, before in zip(words, [None, *words[:-1]], strict=True)]


def noisy_sentences(
    rows: Dataset, column: str, labels: Sequence[Sequence[int]], config: AugmentationConfig
) -> tuple[Dataset, list[list[int]]]:
    """Sentences and noisy copies of them, in which words are left out or replaced by others with their labels.

    Args:
        rows (`Dataset`): Checked rows.
        column (`str`): The column of words.
        labels (sequence of lists of `int`): One per word.
        config (`AugmentationConfig`): How many copies, and how noisy.

    Returns:
        `tuple[Dataset, list[list[int]]]`: The column of words, originals first, and the labels.
    """
    draw = random.Random(config.seed)
    sentences = [(words, list(ids)) for words, ids in zip(rows[column], labels, strict=True)]
    known = [pair for words, ids in sentences for pair in zip(words, ids, strict=True)]

    def change(words: list[str], ids: list[int]) -> tuple[list[str], list[int]]:
        kept = [i for i in range(len(words)) if draw.random() >= config.word_dropout] or [0]
        noisy = [draw.choice(known) if draw.random() < config.word_replacement else (words[i], ids[i]) for i in kept]
        return [word for word, _ in noisy], [label for _, label in noisy]

    sentences += [change(*sentence) for sentence in sentences[:] for _ in range(config.copies)]
    return Dataset.from_dict({column: [words for words, _ in sentences]}), [ids for _, ids in sentences]


def _item_feature(rows: Dataset, column: str) -> Any:
    return getattr(rows.features[column], "feature", None)
