"""The data of `distillation_quality.py`: six tasks, their rows as model inputs, and how a model is scored on them.

Three sets of rows per task. "train" is learned from; "held_out" decides learning rates and other choices; "test" is
what is reported. Texts that occur in the test rows, character for character, are taken out of the training rows.
"""

import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from hf_compress.evaluation.inference import Predictions
from hf_compress.evaluation.scores import score_of, score_rows
from hf_compress.jobs.data import load_splits, tokenize
from hf_compress.modeling.tasks import IGNORED

MAX_QUESTION = 32
MAX_ANSWER = 30
DROP, REPLACE = 0.1, 0.15


@dataclass(frozen=True)
class Task:
    """One data set.

    Attributes:
        metric: What is reported, as a share of 1.
        model_class: The `AutoModelFor...` class.
        prepare: `(folder, tokenizer)` -> rows by "train", "held_out" and "test", as model inputs.
        score: `(predictions, rows)` -> the metric.
        labels: Names of the classes; none for a regression and for answers.
        can_drop: Whether a noisy copy may leave tokens out; not where labels are positions.
    """

    metric: str
    model_class: Any
    prepare: Callable[[Path, Any], dict[str, Dataset]]
    score: Callable[[Predictions, Dataset], float]
    labels: tuple[str, ...] = ()
    can_drop: bool = True

    @property
    def head(self) -> dict[str, Any]:
        """What the config of a new model has to say about its head."""
        if self.metric == "Spearman":
            return {"num_labels": 1, "problem_type": "regression"}
        if not self.labels:
            return {}
        return {"id2label": dict(enumerate(self.labels)), "label2id": {name: i for i, name in enumerate(self.labels)}}


@dataclass(frozen=True)
class Texts:
    """How a set of labelled texts, or pairs of texts, is read."""

    columns: tuple[str, ...]
    label: str = "label"
    max_length: int = 64
    test: tuple[str, ...] = ("test",)
    held_out: int | None = None  # rows taken from the training rows; the validation rows where None
    is_words: bool = field(default=False)

    def __call__(self, folder: Path, tokenizer: Any) -> dict[str, Dataset]:
        splits = load_splits(str(folder))
        test = concatenate_datasets([splits[name] for name in self.test])
        seen = set(self.texts(test))
        train = splits["train"].select([i for i, text in enumerate(self.texts(splits["train"])) if text not in seen])
        train = train.shuffle(seed=0)
        if self.held_out is None:
            held_out = splits["validation"]
        else:
            cut = len(train) - self.held_out
            train, held_out = train.select(range(cut)), train.select(range(cut, len(train)))
        encode = partial(tokenize_words if self.is_words else self.tokenize, tokenizer=tokenizer)
        return {"train": encode(train), "held_out": by_length(encode(held_out)), "test": by_length(encode(test))}

    def texts(self, rows: Dataset) -> list[tuple]:
        return [tuple(map(str, values)) for values in zip(*(rows[column] for column in self.columns), strict=True)]

    def tokenize(self, rows: Dataset, tokenizer: Any) -> Dataset:
        return tokenize(rows, tokenizer, self.columns, rows[self.label], self.max_length)


def letters(text: str) -> str:
    """A text's letters and digits, in lower case: what is the same in copies that data sets print differently."""
    return re.sub(r"[\W_]+", "", text.lower())


def by_length(rows: Dataset) -> Dataset:
    """The rows measured on in the order of their lengths: batches without padding."""
    return rows.sort("length")


def tokenize_words(rows: Dataset, tokenizer: Any, max_length: int = 96) -> Dataset:
    """Sentences of words; the first piece of each word carries the word's tag."""

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        encoded = tokenizer(row["tokens"], is_split_into_words=True, truncation=True, max_length=max_length)
        words = encoded.word_ids()
        starts = [word is not None and word != before for word, before in zip(words, [None, *words], strict=False)]
        labels = [row["ner_tags"][word] if first else IGNORED for word, first in zip(words, starts, strict=True)]
        return {**encoded, "labels": labels, "length": len(words)}

    return rows.map(encode, remove_columns=rows.column_names)


def accuracy(predictions: Predictions, rows: Dataset) -> float:
    return float((predictions.logits.argmax(-1) == predictions.labels).mean())


def spearman(predictions: Predictions, rows: Dataset) -> float:
    score = score_of("spearmanr", predictions.labels.ravel(), predictions.logits.ravel())
    return score_rows(score, len(rows))


def entity_f1(predictions: Predictions, rows: Dataset, names: tuple[str, ...]) -> float:
    def tags(ids: np.ndarray) -> list[list[str]]:
        kept = predictions.labels != IGNORED
        return [[names[i] for i in row[mask]] for row, mask in zip(ids, kept, strict=True)]

    score = score_of("seqeval", tags(predictions.labels), tags(predictions.logits.argmax(-1)))
    return score_rows(score, len(rows))


class Answers:
    """SQuAD, one window per question.

    Training rows are cut to `max_length` tokens by a window that holds the answer, at a random place of it. The rows
    measured on are questions whose whole paragraph fits, so that nothing is cut and no answer is looked at. Whole
    articles are held out of the training rows.
    """

    def __init__(self, max_length: int, n_held_out: int, n_test: int) -> None:
        self.max_length, self.n_held_out, self.n_test = max_length, n_held_out, n_test

    def __call__(self, folder: Path, tokenizer: Any) -> dict[str, Dataset]:
        splits = load_splits(str(folder))
        titles = sorted(set(splits["train"]["title"]))
        random.Random(0).shuffle(titles)
        held = set(titles[: len(titles) // 4])
        train = splits["train"].filter(lambda title: title not in held, input_columns="title").shuffle(seed=0)
        held_out = splits["train"].filter(lambda title: title in held, input_columns="title").shuffle(seed=0)
        test = splits["validation"].shuffle(seed=0)
        encode = partial(self.encode, tokenizer=tokenizer)
        keep = {"input_columns": "length", "function": lambda length: 0 < length <= self.max_length}
        rows = {
            "train": train.map(partial(encode, cuts=True), remove_columns=train.column_names).filter(**keep),
            "held_out": held_out.map(partial(encode, cuts=False), remove_columns=["id", "title", "question"]),
            "test": test.map(partial(encode, cuts=False), remove_columns=["id", "title", "question"]),
        }
        for name, number in (("held_out", self.n_held_out), ("test", self.n_test)):
            fitting = rows[name].filter(**keep)
            rows[name] = by_length(fitting.select(range(min(number, len(fitting)))))
        return rows

    def encode(self, row: dict[str, Any], tokenizer: Any, cuts: bool) -> dict[str, Any]:
        question = tokenizer(row["question"], add_special_tokens=False)["input_ids"][:MAX_QUESTION]
        context = tokenizer(row["context"], add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = context["input_ids"], context["offset_mapping"]
        first_character = row["answers"]["answer_start"][0]
        last_character = first_character + len(row["answers"]["text"][0]) - 1
        first = sum(end <= first_character for _, end in offsets)
        last = sum(start <= last_character for start, _ in offsets) - 1
        room, start = self.max_length - 3 - len(question), 0
        if cuts and len(ids) > room:
            low, high = max(0, last - room + 1), min(first, len(ids) - room)
            start = random.Random(row["id"]).randint(low, high) if low <= high else -1
            ids, offsets = ids[start : start + room], offsets[start : start + room]
        begin = len(question) + 2
        inputs = [tokenizer.cls_token_id, *question, tokenizer.sep_token_id, *ids, tokenizer.sep_token_id]
        return {
            "input_ids": inputs,
            "token_type_ids": [0] * begin + [1] * (len(ids) + 1),
            "attention_mask": [1] * len(inputs),
            "start_positions": first - start + begin,
            "end_positions": last - start + begin,
            "length": len(inputs) if start >= 0 else 0,
            "offsets": [list(pair) for pair in offsets],
        }


def answer_f1(predictions: Predictions, rows: Dataset) -> float:
    """SQuAD's F1 of the best answer inside the paragraph, of at most `MAX_ANSWER` tokens."""
    references, found = [], []
    for index, (row, (starts, ends)) in enumerate(zip(rows, predictions.logits, strict=True)):
        begin, n = len(row["input_ids"]) - 1 - len(row["offsets"]), len(row["offsets"])
        spans = starts[begin : begin + n, None] + ends[None, begin : begin + n]
        spans = np.where(np.triu(np.ones((n, n))) * np.tri(n, n, MAX_ANSWER - 1) > 0, spans, -np.inf)
        first, last = divmod(int(spans.argmax()), n)
        text = row["context"][row["offsets"][first][0] : row["offsets"][last][1]]
        references.append({"id": str(index), "answers": {"text": row["answers"]["text"]}})
        found.append({"id": str(index), "prediction_text": text})
    return score_rows(score_of("squad_f1", references, found), len(rows)) / 100


ENTITIES = ("corporation", "creative-work", "group", "location", "person", "product")
TAGS = ("O", *(f"{begin}-{name}" for name in ENTITIES for begin in "BI"))

TASKS: dict[str, Task] = {
    "sst2": Task(
        "accuracy",
        AutoModelForSequenceClassification,
        Texts(("sentence",), test=("validation", "test"), held_out=2_000),
        accuracy,
        ("negative", "positive"),
    ),
    "trec": Task(
        "accuracy",
        AutoModelForSequenceClassification,
        Texts(("text",), "coarse_label", held_out=500),
        accuracy,
        ("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"),
    ),
    "mrpc": Task(
        "accuracy",
        AutoModelForSequenceClassification,
        Texts(("sentence1", "sentence2"), max_length=96),
        accuracy,
        ("not_equivalent", "equivalent"),
    ),
    "stsb": Task(
        "Spearman", AutoModelForSequenceClassification, Texts(("sentence1", "sentence2"), max_length=96), spearman
    ),
    "wnut_17": Task(
        "entity F1",
        AutoModelForTokenClassification,
        Texts(("tokens",), is_words=True),
        partial(entity_f1, names=TAGS),
        TAGS,
    ),
    "squad": Task("answer F1", AutoModelForQuestionAnswering, Answers(128, 800, 1_500), answer_f1, can_drop=False),
}


@dataclass(frozen=True)
class Plan:
    """What was chosen for a task: how its teacher is trained, and the budget of every student."""

    teacher_rate: float
    teacher_epochs: float
    teacher_batch: int
    rows: int
    epochs: int
    batch: int
    plain: tuple[float, ...]  # learning rates to choose from
    layers: str = "spread"  # which of the teacher's layers all its students start from
    general: bool = True  # whether its distilled students start from the general one
    distilled: tuple[float, ...] = (8e-4,)
    textbrewer: tuple[float, ...] = (8e-4,)
    fewer_epochs: int | None = None  # which those that read no noisy copies may choose in the place of `epochs`

    def steps(self, n_rows: int, epochs: int) -> int:
        return math.ceil(min(self.rows, n_rows) / self.batch) * epochs


PLANS = {
    "trec": Plan(1e-4, 4, 32, rows=5_500, epochs=12, batch=32, plain=(1e-4, 3e-4)),
    "wnut_17": Plan(2e-4, 5, 32, rows=3_394, epochs=6, batch=16, plain=(2e-4, 5e-4), layers="first", general=False),
    "stsb": Plan(2e-4, 5, 32, rows=5_749, epochs=6, batch=16, plain=(1e-4, 3e-4)),
    "mrpc": Plan(1e-4, 4, 32, rows=3_668, epochs=12, batch=32, plain=(1e-4, 3e-4)),
    "sst2": Plan(8e-5, 1, 96, rows=67_349, epochs=1, batch=32, plain=(1e-4, 3e-4)),
    "squad": Plan(2e-4, 2, 48, rows=9_534, epochs=6, batch=16, plain=(2e-4, 5e-4), fewer_epochs=2),
}


def with_noisy_copies(rows: Dataset, tokenizer: Any, n_copies: int, can_drop: bool) -> Dataset:
    """The rows, and copies of them in which some tokens are missing and some are others, drawn from the rows.

    On tokens and not on words, which fits pairs of texts, tags and answers alike. Labels are those of the originals.
    """
    draw = random.Random(0)
    columns = ("input_ids", "token_type_ids", "attention_mask", "labels")
    aligned = [name for name in columns if name in rows.column_names and isinstance(rows[0][name], list)]
    special = set(tokenizer.all_special_ids)
    tokens = [token for ids in rows["input_ids"] for token in ids if token not in special]
    drop = DROP if can_drop else 0.0

    def change(row: dict[str, Any]) -> dict[str, Any]:
        kept = [i for i, token in enumerate(row["input_ids"]) if token in special or draw.random() >= drop]
        new = {name: [row[name][i] for i in kept] for name in aligned}
        ids = [
            token if token in special or draw.random() >= REPLACE else draw.choice(tokens)
            for token in new["input_ids"]
        ]
        return {**new, "input_ids": ids, "length": len(ids)}

    copies = [rows.map(change, load_from_cache_file=False) for _ in range(n_copies)]
    return concatenate_datasets([rows, *copies])
