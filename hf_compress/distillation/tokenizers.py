"""A teacher that reads with another tokenizer than the student: its own inputs, and which token is which word."""

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset, LargeList, List, Value
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from hf_compress.distillation.objective import OWN, POSITIONS

logger = logging.getLogger(__name__)

# Tokenizers without a limit claim one of about 1e30 tokens.
_NO_LIMIT = 10**20
_STRINGS = ("string", "large_string", "string_view")


def add_teacher_inputs(
    dataset: Dataset,
    teacher_tokenizer: PreTrainedTokenizerBase,
    text_columns: Sequence[str] = ("text",),
    max_length: int | None = None,
    student_tokenizer: PreTrainedTokenizerBase | None = None,
    words_column: str | None = None,
) -> Dataset:
    """Tokenizes the texts of a data set for the teacher too, in columns beside the student's.

    Collate the rows with `TeacherCollator`. Student and teacher read the same texts, whatever was cut off for one of
    them.

    Args:
        dataset (`Dataset`): Texts; for token classification, words and what the student's tokenizer made of them.
        teacher_tokenizer (`PreTrainedTokenizerBase`): The teacher's tokenizer.
        text_columns (sequence of `str`, *optional*, defaults to `("text",)`): One column of texts, or two for pairs.
            Unused where `words_column` is given.
        max_length (`int`, *optional*): Tokens that the teacher reads at most, special tokens included. By default what
            its tokenizer says.
        student_tokenizer (`PreTrainedTokenizerBase`, *optional*): The student's tokenizer, for `words_column`.
        words_column (`str`, *optional*): For token classification: the column of lists of words. The data set must
            hold the student's `input_ids` of them, made with `is_split_into_words=True`, cut or padded as you like.
            Both tokenizers must be fast ones; byte-level ones, as of RoBERTa, need `add_prefix_space=True`.

    Returns:
        `Dataset`: With the columns of the teacher's tokenizer under the prefix `teacher_`; for token classification,
        `teacher_positions` too: at each student's token that is the first of a word, the index of the teacher's first
        token of this word, and -1 at all others and where the teacher's truncation cut the word off.

    Raises:
        TypeError: if this is no `Dataset`, or a column does not hold texts or lists of words.
        ValueError: if a column is missing or there already, a tokenizer cannot tell words, or the `input_ids` are not
            what the student's tokenizer makes of the words.
    """
    check_dataset(dataset, "add_teacher_inputs(splits['train'], ...)")
    there = [name for name in dataset.column_names if name.startswith(OWN)]
    if there:
        raise ValueError(
            f"The data set already has the columns {there}, which would be mixed with the new ones: call "
            f"dataset.remove_columns({there}) first."
        )
    limit = teacher_tokenizer.model_max_length if max_length is None else max_length
    options = {"truncation": True, "max_length": limit} if limit < _NO_LIMIT else {}
    dataset = dataset.with_format(None)
    # A tokenizer remembers the last truncation, and would be saved with it.
    teacher_tokenizer = copy.deepcopy(teacher_tokenizer)
    if words_column is not None:
        _check_words(dataset, words_column, student_tokenizer, teacher_tokenizer)
        _warn_of_glued_words(teacher_tokenizer)
        encode = _words_encoder(copy.deepcopy(student_tokenizer), teacher_tokenizer, words_column, options)
    else:
        check_texts(dataset, text_columns)
        encode = _texts_encoder(teacher_tokenizer, list(text_columns), options)
    return dataset.map(encode, batched=True, with_indices=True, desc="Tokenizing for the teacher")


class TeacherCollator:
    """A collator that also batches the teacher's own columns, as `add_teacher_inputs` made them.

    Rows without such columns, as those of an evaluation may be, are left to the other collator alone.

    Args:
        collator (`Callable`): Makes a batch of the student's columns and the labels.
        teacher_tokenizer (`PreTrainedTokenizerBase`): The teacher's tokenizer, which knows how to pad.

    Raises:
        ValueError: if the tokenizer has no pad token.
    """

    def __init__(self, collator: Callable[[list], dict[str, Any]], teacher_tokenizer: PreTrainedTokenizerBase) -> None:
        if teacher_tokenizer.pad_token is None:
            raise ValueError(
                f"The teacher's tokenizer {teacher_tokenizer.name_or_path!r} has no pad token, so texts of different "
                "lengths cannot be one batch: set teacher_tokenizer.pad_token = teacher_tokenizer.eos_token, and "
                "teacher.config.pad_token_id to its id."
            )
        self.collator = collator
        self.teacher_tokenizer = teacher_tokenizer
        self._pad = DataCollatorWithPadding(teacher_tokenizer)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Makes a batch.

        Args:
            rows (`list[dict]`): Rows of a data set.

        Returns:
            `dict[str, torch.Tensor]`: The other collator's columns; those of the teacher, of shape (batch, teacher's
            length), padded by its tokenizer; and `teacher_positions` of shape (batch, student's length), padded with
            -1 where the student's tokens are padded, and counted in the padded texts of the teacher.

        Raises:
            ValueError: if only some rows have the teacher's columns, or the student's tokens cannot be found again in
                the collated batch.
        """
        own = [{name: value for name, value in row.items() if name.startswith(OWN)} for row in rows]
        others = [{name: value for name, value in row.items() if not name.startswith(OWN)} for row in rows]
        batch = dict(self.collator(others))
        if not any(own):
            return batch
        names = {frozenset(row) for row in own}
        if len(names) > 1 or f"{OWN}input_ids" not in own[0]:
            raise ValueError(
                f"The rows of a batch have the columns {sorted(map(sorted, names))} for the teacher, but each needs "
                "the same ones, with teacher_input_ids: make them with add_teacher_inputs for the whole data set."
            )
        positions = [row.pop(POSITIONS) for row in own] if POSITIONS in own[0] else None
        padded = self._pad([{name.removeprefix(OWN): value for name, value in row.items()} for row in own])
        batch |= {OWN + name: value for name, value in padded.items()}
        if positions is not None:
            batch[POSITIONS] = self._batch_positions(positions, others, own, batch)
        return batch

    def _batch_positions(self, positions, others, own, batch) -> torch.Tensor:
        teacher_length = batch[f"{OWN}input_ids"].shape[1]
        pads_left = self.teacher_tokenizer.padding_side == "left"
        padded = torch.full_like(batch["input_ids"], -1)
        for number, row in enumerate(others):
            found = torch.as_tensor(positions[number])
            if pads_left:
                found = torch.where(found >= 0, found + teacher_length - len(own[number][f"{OWN}input_ids"]), -1)
            start = _start_of(torch.as_tensor(row["input_ids"]), batch["input_ids"][number])
            padded[number, start : start + len(found)] = found
        return padded


def gather_positions(teacher_logits: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """What the teacher says of each of the student's tokens.

    Args:
        teacher_logits (`torch.Tensor` of shape `(batch, teacher's length, classes)`): The teacher's logits.
        positions (`torch.Tensor` of shape `(batch, student's length)`): The teacher's token for each of the student's
            tokens; -1 where there is none.

    Returns:
        `torch.Tensor` of shape `(batch, student's length, classes)`: Zeros where there is none.
    """
    is_missing = (positions < 0)[..., None]
    indices = positions.clamp(min=0)[..., None].expand(-1, -1, teacher_logits.shape[-1])
    return teacher_logits.gather(1, indices).masked_fill(is_missing, 0.0)


def is_same_vocabulary(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> bool:
    """Whether the ids of two tokenizers mean the same tokens, so that one model can read what the other's made.

    Args:
        first (`PreTrainedTokenizerBase`): A tokenizer.
        second (`PreTrainedTokenizerBase`): Another one. It may still split a text differently, for instance because
            it keeps capitals.

    Returns:
        `bool`: True if they have the same tokens, added ones included, under the same ids.
    """
    return first.get_vocab() == second.get_vocab()


def check_texts(dataset: Dataset, text_columns: Sequence[str]) -> None:
    """Raises if columns are not there, or hold no texts.

    Args:
        dataset (`Dataset`): The data set.
        text_columns (sequence of `str`): One column of texts, or two for pairs.

    Raises:
        TypeError: if `text_columns` is one string, or a column holds something else than strings.
        ValueError: if there are none, more than two, or twice the same, or one is not in the data set.
    """
    if isinstance(text_columns, str):
        raise TypeError(
            f"text_columns={text_columns!r} is one string, and a list of names is needed: give ({text_columns!r},)."
        )
    if not 1 <= len(text_columns) <= 2 or len(set(text_columns)) != len(text_columns):
        raise ValueError(
            f"text_columns={list(text_columns)} is no text and no pair of texts: name one column of texts, or two "
            "different ones for pairs."
        )
    for column in text_columns:
        _check_column(dataset, column)
        feature = dataset.features[column]
        if not _is_text(feature):
            raise TypeError(
                f"Column {column!r} holds {feature}, but a text is a string: name a column of strings; join lists of "
                "words to texts first, if their labels are not one per word."
            )


def check_no_gaps(values: Sequence[Any], column: str, rows: Sequence[int]) -> None:
    """Raises if a value is missing.

    Args:
        values (sequence): Part of a column.
        column (`str`): Its name, for the message.
        rows (sequence of `int`): The numbers of its rows, for the message.

    Raises:
        ValueError: if a value is `None`.
    """
    for value, row in zip(values, rows, strict=True):
        if value is None:
            raise ValueError(
                f"Column {column!r} holds None in row {row}, and a model can neither read nor learn that: remove such "
                f"rows with dataset.filter(lambda row: row[{column!r}] is not None)."
            )


def check_dataset(dataset: Any, instead: str) -> None:
    """Raises if data are none that rows can be numbered in.

    Args:
        dataset (any): What was given.
        instead (`str`): What to type with one split of several, for the message.

    Raises:
        TypeError: if they are no `Dataset`.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"The data are of the type {type(dataset).__name__}, but one split with numbered rows is needed: give a "
            f"datasets.Dataset, as in {instead}."
        )


def _check_column(dataset: Dataset, column: str) -> None:
    if column not in dataset.column_names:
        raise ValueError(
            f"The data set has no column {column!r}, only {', '.join(dataset.column_names)}: name one of these."
        )


def _is_text(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype in _STRINGS


def _check_words(
    dataset: Dataset,
    words_column: str,
    student_tokenizer: PreTrainedTokenizerBase | None,
    teacher_tokenizer: PreTrainedTokenizerBase,
) -> None:
    _check_column(dataset, words_column)
    feature = dataset.features[words_column]
    if not (isinstance(feature, List | LargeList) and _is_text(feature.feature)):
        raise TypeError(
            f"Column {words_column!r} holds {feature}, but words are a list of strings per row: name such a column as "
            "words_column, or leave it out where a label belongs to a whole text."
        )
    if student_tokenizer is None:
        raise ValueError(
            f"words_column={words_column!r} is given, but no student_tokenizer, which alone knows the words of the "
            "student's tokens: give the tokenizer that made input_ids."
        )
    for whose, tokenizer in (("student", student_tokenizer), ("teacher", teacher_tokenizer)):
        if not tokenizer.is_fast:
            raise ValueError(
                f"The {whose}'s tokenizer is a {type(tokenizer).__name__}, which does not say which token belongs to "
                "which word: load it as a fast one, with AutoTokenizer.from_pretrained(...)."
            )
    if "input_ids" not in dataset.column_names:
        raise ValueError(
            f"The data set has the columns {', '.join(dataset.column_names)}, but no input_ids of the student, to "
            "whose tokens the teacher's are matched: tokenize the words for the student first, with "
            "student_tokenizer(words, is_split_into_words=True, truncation=True)."
        )


def _warn_of_glued_words(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "in in"
    if tokenizer([text.split()], is_split_into_words=True)["input_ids"][0] != tokenizer(text)["input_ids"]:
        logger.warning(
            "The teacher's tokenizer reads a list of words as if no spaces were between them, which a teacher may "
            "never have seen: load it with add_prefix_space=True, or set add_prefix_space of its "
            "backend_tokenizer.pre_tokenizer, unless the teacher was trained in this way."
        )


def _texts_encoder(tokenizer: PreTrainedTokenizerBase, columns: list[str], options: dict[str, Any]) -> Callable:
    def encode(rows: dict[str, list], indices: list[int]) -> dict[str, list]:
        for column in columns:
            check_no_gaps(rows[column], column, indices)
        encoded = tokenizer(*(rows[column] for column in columns), **options)
        return {OWN + name: value for name, value in encoded.items()}

    return encode


def _words_encoder(
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    column: str,
    options: dict[str, Any],
) -> Callable:
    def encode(rows: dict[str, list], indices: list[int]) -> dict[str, list]:
        words = rows[column]
        check_no_gaps(words, column, indices)
        encoded = teacher_tokenizer(words, is_split_into_words=True, **options)
        whole = student_tokenizer(words, is_split_into_words=True, verbose=False)
        positions = []
        for number, ids in enumerate(rows["input_ids"]):
            ours = whole.word_ids(number)
            if whole["input_ids"][number] != ids:
                ours = _word_ids(student_tokenizer, words[number], ids, indices[number])
            positions.append(_align(ours, whole_words(encoded, number, teacher_tokenizer)))
        return {**{OWN + name: value for name, value in encoded.items()}, POSITIONS: positions}

    return encode


def whole_words(encoded: Any, row: int, tokenizer: PreTrainedTokenizerBase) -> list[int | None]:
    """The word of each token, without what is left of one whose beginning was cut off.

    Args:
        encoded (`BatchEncoding`): Rows of words, tokenized.
        row (`int`): Which of them.
        tokenizer (`PreTrainedTokenizerBase`): That they were tokenized by, which knows the side that it cuts.

    Returns:
        `list[int or None]`: Places of words; `None` for other tokens.
    """
    words = encoded.word_ids(row)
    first = next((place for place, word in enumerate(words) if word is not None), None)
    if tokenizer.truncation_side == "right" or first is None or encoded[row].offsets[first][0] == 0:
        return words
    return [None if word == words[first] else word for word in words]


def _word_ids(tokenizer: PreTrainedTokenizerBase, words: list[str], ids: list[int], row: int) -> list[int | None]:
    """The words of a row's tokens that were cut or padded to their number."""
    # Whether the row was cut or padded is not known: with its own length as the limit, both give what they gave.
    padding = "max_length" if tokenizer.pad_token is not None else False
    again = tokenizer([words], is_split_into_words=True, truncation=True, padding=padding, max_length=len(ids))
    if again["input_ids"][0] != ids:
        raise ValueError(
            f"The {len(ids)} input_ids of row {row} are not what the student's tokenizer makes of its {len(words)} "
            "words, so the words of the tokens are unknown: give the student_tokenizer that made them, and make them "
            "with student_tokenizer(words, is_split_into_words=True, truncation=True)."
        )
    return again.word_ids(0)


def _align(student_words: list[int | None], teacher_words: list[int | None]) -> list[int]:
    firsts: dict[int, int] = {}
    for index, word in enumerate(teacher_words):
        if word is not None:
            firsts.setdefault(word, index)
    positions, seen = [], {None}
    for word in student_words:
        positions.append(-1 if word in seen else firsts.get(word, -1))
        seen.add(word)
    return positions


def _start_of(ids: torch.Tensor, padded: torch.Tensor) -> int:
    """Where a row's tokens begin in its padded form."""
    n_padding = len(padded) - len(ids)
    for start in (0, n_padding):
        if n_padding >= 0 and torch.equal(padded[start : start + len(ids)], ids):
            return start
    raise ValueError(
        f"A row of {len(ids)} input_ids does not begin or end the row of {len(padded)} that the collator made of it, "
        "so the teacher's tokens cannot be matched to the student's: use a collator that pads and changes no ids, "
        "such as DataCollatorForTokenClassification."
    )
