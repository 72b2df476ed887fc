"""General distillation for `distillation_quality.py`, once for all tasks, as in TinyBERT (Jiao et al., 2020).

All teachers were fine-tuned from one model, and so start students from one student of that model, which has learned
its hidden states from texts without labels. What a layer of that student learned, the difference from the layer that
it was cut with, is added to the same layer of a student that was cut from a teacher.

The texts are the training rows of the tasks, as the students read them, and others: AG News, CoLA, RTE and WikiText-2.
Half of the pairs are sentences that follow each other, or a sentence and a noisy copy of itself. A row is left out if
one of its sentences is held out or tested on in any of the tasks, which have sentences in common: without regard to
case, blanks and punctuation, STS-B's training rows hold 499 of MRPC's 1,725 test pairs.

A shorter training was tried on held-out rows of MRPC (divergence from the teacher 0.17 instead of 0.22) and of
WNUT-17, whose students start from other layers than the general ones (0.012 instead of 0.013). Four epochs in the
place of one brought nothing more on MRPC and SQuAD.
"""

import random
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets
from quality_embeddings import RATE
from quality_tasks import TASKS, letters, with_noisy_copies

from hf_compress.jobs.data import load_splits

COLUMNS = ["input_ids", "token_type_ids", "attention_mask"]
# Rows of the tasks, all but of the two that have the longest and the most.
TASK_ROWS = {"squad": 3_000, "sst2": 15_000, "trec": None, "wnut_17": None, "stsb": None, "mrpc": None}
N_NEWS, N_SENTENCES, N_FOLLOWING, N_NEAR = 20_000, 12_000, 10_000, 12_000
MAX_LENGTH, MAX_PAIR = 64, 112
# Sentences are the same whose first letters and digits are: some are cut in one data set and not in the other.
N_LETTERS = 60
# What is stored beside the figures of students that start from it.
GENERAL = {"tasks": TASK_ROWS, "news": N_NEWS, "sentences": N_SENTENCES, "following": N_FOLLOWING, "near": N_NEAR,
           "rate": RATE, "without": "sentences of all held-out and test rows"}  # fmt: skip


def general_rows(data: Path, prepared: Callable[[str], dict[str, Dataset]], tokenizer: Any) -> Dataset:
    """What the general student reads.

    Args:
        data (`Path`): The folder of the data sets.
        prepared (`Callable`): Rows of a task by split, as `Task.prepare` makes them.
        tokenizer: The tokenizer of all.
    """
    draw = random.Random(0)
    measured = measured_sentences(prepared, tokenizer)
    unseen = partial(without, measured, tokenizer=tokenizer)
    tasks = [unseen(some(prepared(name)["train"], number)) for name, number in TASK_ROWS.items()]
    pairs = [rows for rows, name in zip(tasks, TASK_ROWS, strict=True) if name in ("stsb", "mrpc")]
    news, cola, rte, wiki = (load_splits(str(data / name)) for name in ("ag_news", "cola", "rte", "wikitext2_raw"))
    headlines = [text for split in news.values() for text in split["text"]]
    draw.shuffle(headlines)
    paragraphs = [split_sentences(text) for split in wiki.values() for text in split["text"]]
    sentences = [one for paragraph in paragraphs for one in paragraph]
    following = [pair for paragraph in paragraphs for pair in zip(paragraph, paragraph[1:], strict=False)]
    draw.shuffle(sentences)
    draw.shuffle(following)
    singles = [*headlines[:N_NEWS], *cola["train"]["sentence"], *sentences[:N_SENTENCES]]
    entailed = list(zip(rte["train"]["sentence1"], rte["train"]["sentence2"], strict=True))
    encoded = unseen(encode(tokenizer, singles))
    parts = [
        *tasks,
        *(rows.map(exchanged) for rows in pairs),
        encoded,
        unseen(encode(tokenizer, [*entailed, *following[:N_FOLLOWING]])),
        near_pairs(encoded.shuffle(seed=1), tokenizer),
    ]
    features = encoded.features
    return concatenate_datasets([part.select_columns([*COLUMNS, "length"]).cast(features) for part in parts]).shuffle(
        0
    )


def measured_sentences(prepared: Callable[[str], dict[str, Dataset]], tokenizer: Any) -> set[str]:
    """The first letters of all sentences of held-out and test rows."""
    found = set()
    for name in TASKS:
        for split in ("held_out", "test"):
            rows = prepared(name)[split]
            found |= {start for row in starts(rows, tokenizer) for start in row}
            if "context" in rows.column_names:
                sentences = {one for text in set(rows["context"]) for one in split_sentences(text)}
                found |= {letters(one)[:N_LETTERS] for one in sentences}
    return found


def without(measured: set[str], rows: Dataset, tokenizer: Any) -> Dataset:
    """The rows none of whose sentences are among the given ones."""
    return rows.select([i for i, row in enumerate(starts(rows, tokenizer)) if measured.isdisjoint(row)])


def starts(rows: Dataset, tokenizer: Any) -> list[list[str]]:
    """The first letters of each row's sentences."""
    texts = tokenizer.batch_decode(list(rows["input_ids"]))
    parts = [text.removeprefix(tokenizer.cls_token).split(tokenizer.sep_token) for text in texts]
    return [[letters(part)[:N_LETTERS] for part in row if part.strip()] for row in parts]


def some(rows: Dataset, number: int | None) -> Dataset:
    return rows if number is None else rows.select(range(min(number, len(rows))))


def split_sentences(paragraph: str) -> list[str]:
    return [one for one in re.split(r"(?<=[.!?])\s+", paragraph.strip()) if len(one.split()) > 3]


def encode(tokenizer: Any, texts: list[str] | list[tuple[str, str]]) -> Dataset:
    length = MAX_LENGTH if isinstance(texts[0], str) else MAX_PAIR
    encoded = tokenizer(texts, truncation=True, max_length=length)
    return Dataset.from_dict({**encoded, "length": [len(ids) for ids in encoded["input_ids"]]})


def exchanged(row: dict[str, Any]) -> dict[str, Any]:
    """A pair the other way round."""
    ids, n_first = row["input_ids"], row["token_type_ids"].index(1)
    return joined(ids[:1], ids[n_first:], ids[1:n_first])


def near_pairs(rows: Dataset, tokenizer: Any) -> Dataset:
    """Texts beside noisy copies of themselves."""
    rows = rows.filter(lambda length: 8 <= length <= MAX_PAIR // 2, input_columns="length")
    rows = rows.select(range(min(N_NEAR, len(rows))))
    copies = with_noisy_copies(rows, tokenizer, 1, can_drop=True).select(range(len(rows), 2 * len(rows)))
    pairs = zip(rows["input_ids"], copies["input_ids"], strict=True)
    return Dataset.from_list([joined(text[:1], text[1:], copy[1:]) for text, copy in pairs])


def joined(start: list[int], first: list[int], second: list[int]) -> dict[str, Any]:
    ids = [*start, *first, *second]
    types = [0] * (len(start) + len(first)) + [1] * len(second)
    return {"input_ids": ids, "token_type_ids": types, "attention_mask": [1] * len(ids), "length": len(ids)}
