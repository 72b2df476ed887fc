"""Copies are noisy as asked, never empty, without a label, and the same whoever makes them."""

import math
import re
from collections import Counter

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from transformers import default_data_collator

from hf_compress.distillation.augmentation import AugmentationConfig, augment
from hf_compress.distillation.objective import step_counts

TEXTS = ["the cat sat on the mat", "dogs  bark\nat night", "a", "no film was ever so long and so dull as this one"]


def labelled(labels=(0, 1, 0, 1), feature=None, **columns):
    rows = {"text": TEXTS, "label": list(labels), **columns}
    dataset = Dataset.from_dict(rows)
    return dataset if feature is None else dataset.cast(Features({**dataset.features, "label": feature}))


def copies_of(dataset, keep_originals=False, text_columns=("text",), label_column="label", **config):
    return augment(dataset, AugmentationConfig(**config), text_columns, label_column, keep_originals)


def words_of(texts):
    return Counter(word for text in texts for word in text.split())


def test_texts_come_first_and_unchanged_then_the_copies_of_each():
    dataset = labelled(id=["p", "q", "r", "s"])
    result = copies_of(dataset, keep_originals=True, copies=3)
    assert result.column_names == dataset.column_names
    assert result.select(range(4)).to_dict() == dataset.to_dict()
    assert result["id"][4:] == [name for name in "pqrs" for _ in range(3)]
    assert result.select(range(4, 16)).to_dict() == copies_of(dataset, copies=3).to_dict()


def test_copies_are_the_same_for_a_seed_and_any_number_of_processes():
    dataset, config = labelled(), AugmentationConfig(copies=5, seed=3)
    one = augment(dataset, config).to_dict()
    assert augment(dataset, config).to_dict() == one
    assert augment(dataset, config, num_proc=2).to_dict() == one
    assert augment(dataset, AugmentationConfig(copies=5, seed=4)).to_dict() != one


def test_copies_of_a_text_differ():
    long = Dataset.from_dict({"text": [" ".join(map(str, range(40)))] * 2})
    assert len(set(copies_of(long, label_column=None, copies=8)["text"])) == 16


def test_what_is_given_stays_as_it_was():
    dataset = labelled(feature=ClassLabel(names=["no", "yes"]))
    before, features = dataset.to_dict(), dict(dataset.features)
    copies_of(dataset, copies=2)
    assert dataset.to_dict() == before
    assert dict(dataset.features) == features


def test_dropout_alone_leaves_words_out_in_their_order():
    for original, copy in zip(
        [text for text in TEXTS for _ in range(20)],
        copies_of(labelled(), copies=20, word_dropout=0.4, word_replacement=0.0)["text"],
        strict=True,
    ):
        remaining = iter(original.split())
        assert all(word in remaining for word in copy.split())


@pytest.mark.parametrize(("dropout", "replacement"), [(1.0, 0.0), (0.9, 0.1)])
def test_at_least_one_word_stays(dropout, replacement):
    copies = copies_of(labelled(), copies=50, word_dropout=dropout, word_replacement=replacement)["text"]
    assert all(copy.split() for copy in copies)
    if dropout == 1.0:
        of_the_first = Counter(copies[:50])
        assert all(len(copy.split()) == 1 for copy in copies)
        assert set(of_the_first) == set(TEXTS[0].split()), "each word can be the one that stays"


def test_replacement_alone_keeps_the_number_of_words_and_draws_from_the_texts():
    copies = copies_of(labelled(), copies=20, word_dropout=0.0, word_replacement=1.0)["text"]
    lengths = [len(text.split()) for text in TEXTS for _ in range(20)]
    assert [len(copy.split()) for copy in copies] == lengths
    assert set(words_of(copies)) <= set(words_of(TEXTS))
    two = Dataset.from_dict({"text": ["rare", "words"]})
    copies = copies_of(two, label_column=None, copies=50, word_dropout=0.0, word_replacement=1.0)["text"]
    assert set(copies[:50]) == set(copies[50:]) == {"rare", "words"}


def test_shares_and_frequencies_are_those_asked_for():
    dataset = Dataset.from_dict({"text": ["a a a b " * 250] * 20})
    kept = copies_of(dataset, label_column=None, copies=1, word_dropout=0.3, word_replacement=0.0)["text"]
    assert sum(words_of(kept).values()) / 20_000 == pytest.approx(0.7, abs=0.02)
    drawn = copies_of(dataset, label_column=None, copies=1, word_dropout=0.0, word_replacement=1.0)["text"]
    assert words_of(drawn)["a"] / 20_000 == pytest.approx(0.75, abs=0.02)
    marked = Dataset.from_dict({"text": [" ".join(f"{row}.{i}" for i in range(1000)) for row in range(20)]})
    copies = copies_of(marked, label_column=None, copies=1, word_dropout=0.1, word_replacement=0.2)["text"]
    stayed = sum(len(set(m.split()) & set(c.split())) for m, c in zip(marked["text"], copies, strict=True))
    # A word drawn is one of the same text in one of twenty draws.
    assert stayed / 20_000 == pytest.approx(0.7, abs=0.02)


def test_each_column_of_a_pair_draws_from_its_own_words():
    pairs = Dataset.from_dict(
        {"question": ["who is it", "where"], "answer": ["Ann", "in London now"], "label": [0, 1]}
    )
    copies = copies_of(pairs, text_columns=("question", "answer"), copies=20, word_dropout=0.1, word_replacement=0.9)
    assert set(words_of(copies["question"])) <= set(words_of(pairs["question"]))
    assert set(words_of(copies["answer"])) <= set(words_of(pairs["answer"]))


def test_an_empty_text_stays_empty():
    pairs = Dataset.from_dict({"title": ["", " "], "text": ["some words", "more"]})
    copies = copies_of(pairs, text_columns=("title", "text"), label_column=None, copies=3)
    assert copies["title"][:] == [""] * 3 + [" "] * 3


# Labels


@pytest.mark.parametrize("feature", [ClassLabel(names=["no", "yes"]), Value("int64"), Value("uint8"), Value("bool")])
def test_a_copy_has_no_class(feature):
    result = copies_of(labelled(feature=feature), keep_originals=True, copies=1)
    assert result.features["label"] == Value("int64")
    assert result["label"][:] == [0, 1, 0, 1] + [-100] * 4


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_copy_has_no_number(dtype):
    result = copies_of(labelled([0.5, 1.0, 1.5, 2.0], Value(dtype)), keep_originals=True, copies=1)
    assert result.features["label"] == Value(dtype)
    assert result["label"][:4] == [0.5, 1.0, 1.5, 2.0]
    assert all(isinstance(label, float) and math.isnan(label) for label in result["label"][4:])


@pytest.mark.parametrize("feature", [List(Value("float64")), List(Value("int64")), List(Value("bool"), length=3)])
def test_a_copy_has_no_list_of_labels(feature):
    lists = [[0, 1, 1], [0, 0, 0], [1, 1, 1], [1, 0, 0]]
    result = copies_of(labelled(lists, feature), keep_originals=True, copies=1)
    assert result["label"][:4] == lists
    assert all(isinstance(label, float) for labels in result["label"] for label in labels)
    assert all(len(labels) == 3 and all(map(math.isnan, labels)) for labels in result["label"][4:])


@pytest.mark.parametrize("labels", [(0, 1, 2, 1), (0.5, 1.5, 2.0, 1.0), ([0, 1], [1, 1], [0, 0], [1, 0])])
def test_the_loss_of_the_task_counts_the_originals_alone(labels):
    result = copies_of(labelled(labels), keep_originals=True, copies=2).remove_columns("text")
    batch = default_data_collator([{**row, "input_ids": [1, 2]} for row in result])
    counts = step_counts("sequence-classification", batch)
    assert (counts["items"], counts["labelled"]) == (12, 4)
    assert batch["labels"].dtype == (torch.int64 if labels == (0, 1, 2, 1) else torch.float32)


def test_texts_without_labels():
    texts = Dataset.from_dict({"text": TEXTS})
    assert copies_of(texts, label_column=None, copies=2).features == texts.features


# What cannot work


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"copies": 0}, "copies=0 .* at least 1"),
        ({"copies": 1.5}, "copies=1.5 .* whole number"),
        ({"seed": -1}, "seed=-1 .* at least 0"),
        ({"word_dropout": -0.1}, "word_dropout=-0.1"),
        ({"word_replacement": math.nan}, "word_replacement=nan"),
        ({"word_dropout": 0.6, "word_replacement": 0.5}, "at most 1"),
        ({"word_dropout": 0.0, "word_replacement": 0.0}, "leave all copies as they are"),
    ],
)
def test_settings_that_cannot_work(config, message):
    with pytest.raises(ValueError, match=message):
        AugmentationConfig(**config)


def test_shares_may_be_all_of_the_words():
    AugmentationConfig(word_dropout=0.7, word_replacement=0.3)


@pytest.mark.parametrize(
    ("dataset", "options", "error", "message"),
    [
        (DatasetDict(train=labelled()), {}, TypeError, "as in augment(splits['train'], config)"),
        (labelled().select([]), {}, ValueError, "0 rows"),
        (labelled(), {"text_columns": "text"}, TypeError, "give ('text',)"),
        (labelled(), {"text_columns": ()}, ValueError, "no pair of texts"),
        (labelled(), {"text_columns": ("text", "text")}, ValueError, "two different ones"),
        (labelled(), {"text_columns": ("sentence",)}, ValueError, "no column 'sentence', only text, label"),
        (labelled(), {"text_columns": ("label",)}, TypeError, "but a text is a string"),
        (labelled(words=[["a", "b"]] * 4), {"text_columns": ("words",)}, TypeError, "but a text is a string"),
        (labelled(), {"label_column": "labels"}, ValueError, "label_column=None for texts without labels"),
        (labelled(["a", "b", "a", "b"]), {}, TypeError, "class_encode_column"),
        (labelled([None] * 4), {}, TypeError, "label_column=None"),
        (labelled([0, None, 1, 0]), {}, ValueError, "None in row 1"),
        (labelled([[0, 1], None, [1, 1], [0, 0]]), {}, ValueError, "None in row 1"),
        (labelled([[0], [0, 1], [1], [0]]), {}, ValueError, "lists of 1 to 2 numbers"),
        (labelled([[3], [0], [1], [2]]), {}, ValueError, "such as [3]"),
        (labelled([[1]] * 4, List(ClassLabel(names=["x", "y"]))), {}, TypeError, "one 0 or 1 per class"),
        (labelled(input_ids=[[1, 2]] * 4), {}, ValueError, "Augment the texts first"),
        (Dataset.from_dict({"text": ["a", None], "label": [0, 1]}), {}, ValueError, "'text' holds None in row 1"),
    ],
)
def test_data_that_cannot_be_augmented(dataset, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        copies_of(dataset, **options)
