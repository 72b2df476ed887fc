"""Labels and outputs of words stay together, whatever tokenizers make of the words."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from transformers import BertConfig, BertForSequenceClassification

from hf_compress.distillation.augmentation import AugmentationConfig
from hf_compress.jobs.task_data import read_task
from hf_compress.jobs.word_labels import (
    check_reads_words,
    noisy_sentences,
    tokenize_words,
    word_label_ids,
    word_label_names,
    words_with_tokens,
)
from hf_compress.recipe.steps import DataConfig
from tests.pruning import tiny_tokenizers
from tests.tiny_job import save_tiny_bert, tiny_tokenizer
from tests.tiny_recipe import BertForTokenClassification

WORDS = {"words": [["the", "\u200b", "good", "film"]], "tags": [["O", "O", "B-GOOD", "O"]]}


def test_words_that_have_no_token():
    rows = Dataset.from_dict(WORDS)
    assert words_with_tokens(rows, tiny_tokenizer(), "words", 12) == [[0, 2, 3]]
    # Of 4 tokens, the first and the last are special.
    assert words_with_tokens(rows, tiny_tokenizer(), "words", 4) == [[0, 2]]


def test_outputs_of_words_without_tokens(tmp_path):
    config = DataConfig("mine", text_columns=["words"], label_column="tags", max_length=12)
    data = read_task(config, 0, DatasetDict(train=Dataset.from_dict(WORDS), test=Dataset.from_dict(WORDS)))
    names = dict(enumerate(data.labels))
    save_tiny_bert(tmp_path, BertForTokenClassification, id2label=names, label2id={n: i for i, n in names.items()})
    model, tokenizer = BertForTokenClassification.from_pretrained(tmp_path), tiny_tokenizer()
    with torch.no_grad():
        model.classifier.weight.zero_()
    found = data.outputs(model, tokenizer)
    assert found.labels.tolist() == [[0, 0, 1, 0]]
    logits = model.classifier.bias.tolist()
    np.testing.assert_allclose(found.logits[0], [logits, [1.0, 0.0], logits, logits], rtol=1e-6)


def test_words_are_read_with_the_spaces_between_them():
    rows, labels = Dataset.from_dict({"words": [["the", "price"]]}), [[0, 1]]
    for tokenizer in (tiny_tokenizers.roberta(), tiny_tokenizers.qwen2()):
        with pytest.raises(ValueError, match="as if there were no space .* add_prefix_space=True"):
            tokenize_words(rows, tokenizer, "words", labels, 12)
    for tokenizer in (tiny_tokenizers.gpt2(), tiny_tokenizers.llama(), tiny_tokenizers.xlm_roberta()):
        check_reads_words(tokenizer)


def test_a_tokenizer_is_left_without_the_truncation_of_a_run():
    rows, tokenizer = Dataset.from_dict(WORDS), tiny_tokenizer()
    tokenize_words(rows, tokenizer, "words", [[0, 0, 1, 0]], 4)
    words_with_tokens(rows, tokenizer, "words", 4)
    assert tokenizer.backend_tokenizer.truncation is None


def test_a_missing_label_is_no_label():
    features = Features(words=List(Value("string")), tags=List(ClassLabel(names=["O", "B-PER", "B-LOC"])))
    rows = Dataset.from_dict({"words": [["John", "went"]], "tags": [[1, -1]]}, features)
    model = BertConfig(id2label={0: "O", 1: "B-PER", 2: "B-LOC"}, label2id={"O": 0, "B-PER": 1, "B-LOC": 2})
    with pytest.raises(ValueError, match="Label -1 of row 0 .* is unknown"):
        word_label_ids(rows, "train", "tags", model)
    with pytest.raises(ValueError, match="has the label -100, and labels count from 0"):
        word_label_names(Dataset.from_dict({"words": [["a", "b"]], "tags": [[1, -100]]}), "tags")


def test_words_that_replace_others_bring_their_labels():
    names = {"good": 1, "bad": 2, "the": 0, "film": 0}
    rows = Dataset.from_dict({"words": [["the", "good", "film"], ["the", "bad", "film"]]})
    labels = [[names[word] for word in words] for words in rows["words"]]
    noisy, ids = noisy_sentences(rows, "words", labels, AugmentationConfig(copies=20, word_replacement=0.5))
    assert len(noisy) == 42
    assert [[names[word] for word in words] for words in noisy["words"]] == ids


def test_what_is_left_of_a_word_is_no_word():
    tokenizer = tiny_tokenizers.bert()
    tokenizer.truncation_side = "left"
    rows = Dataset.from_dict({"words": [["unhappyrefund", "the", "train"]]})
    assert tokenize_words(rows, tokenizer, "words", [[1, 0, 0]], 8)["labels"][0] == [-100] * 5 + [0, 0, -100]
    assert words_with_tokens(rows, tokenizer, "words", 8) == [[1, 2]]
    whole = tokenize_words(rows, tokenizer, "words", [[1, 0, 0]], 64)["labels"][0]
    assert [label for label in whole if label != -100] == [1, 0, 0]


@pytest.mark.parametrize(
    ("names", "metric"),
    [
        (("O", "B-PER"), "seqeval"),
        (("B-CITY", "I-CITY"), "seqeval"),
        (("NOUN", "VERB"), "token_accuracy"),
        (("O", "VERB"), "token_accuracy"),
    ],
)
def test_entities_are_told_by_tags(names, metric, tmp_path):
    rows = Dataset.from_dict({"words": [["the", "film"]] * 2, "tags": [list(names)] * 2})
    config = DataConfig("mine", text_columns=["words"], label_column="tags", max_length=12)
    data = read_task(config, 0, DatasetDict(train=rows, test=rows))
    save_tiny_bert(tmp_path, BertForTokenClassification, id2label=dict(enumerate(names)), label2id={})
    model = BertForTokenClassification.from_pretrained(tmp_path)
    assert data.metric(model) == metric
    if metric != "seqeval":
        with pytest.raises(ValueError, match=f"metric='seqeval' counts entities by tags .* are {names[0]}, VERB"):
            read_task(replace(config, metric="seqeval"), 0, DatasetDict(train=rows, test=rows)).metric(model)


def test_tags_that_are_matched_by_number_are_said(caplog):
    features = Features(words=List(Value("string")), tags=List(ClassLabel(names=["O", "B-PER", "B-LOC"])))
    rows = Dataset.from_dict({"words": [["John", "went"]], "tags": [[1, 0]]}, features)
    assert word_label_ids(rows, "train", "tags", BertConfig(num_labels=3)) == [[1, 0]]
    assert "share no name and are matched by number" in caplog.text


@pytest.mark.parametrize(
    ("column", "rows", "message"),
    [
        ("words", {"words": [["the", "film"]], "tags": [["O"]]}, "Row 0 of the split 'validation'"),
        ("text", {"text": ["a", None], "label": [0, 1]}, "'validation' holds no text .* row 1"),
    ],
)
def test_rows_to_choose_on_are_checked(column, rows, message, tmp_path):
    good = (
        {"words": [["the", "film"]], "tags": [["O", "B-PER"]]}
        if column == "words"
        else {"text": ["a", "b"], "label": [0, 1]}
    )
    label = "tags" if column == "words" else "label"
    config = DataConfig("mine", text_columns=[column], label_column=label, max_length=12, eval_split="test")
    splits = DatasetDict(
        train=Dataset.from_dict(good), validation=Dataset.from_dict(rows), test=Dataset.from_dict(good)
    )
    data = read_task(config, 0, splits)
    names = ("O", "B-PER")
    kind = BertForTokenClassification if column == "words" else BertForSequenceClassification
    save_tiny_bert(tmp_path, kind, id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)})
    with pytest.raises((ValueError, TypeError), match=message):
        data.check_held_out(kind.from_pretrained(tmp_path))
