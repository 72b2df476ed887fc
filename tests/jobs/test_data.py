"""Data sets load from every format, and whatever does not fit is refused with what was given and what to type."""

import math
import re

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from transformers import AutoModelForSequenceClassification, BertConfig, GPT2Config, GPT2ForSequenceClassification

from hf_compress.jobs.data import (
    check_columns,
    evaluation_split,
    label_ids,
    label_names,
    load_splits,
    tokenize,
)
from hf_compress.jobs.fit import check_length, check_tokenizer
from tests.pruning import tiny_tokenizers
from tests.tiny_job import NAMES, VOCABULARY, save_tiny_bert, tiny_texts, tiny_tokenizer, write_rows

SUFFIXES = (".parquet", ".csv", ".tsv", ".json", ".jsonl")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def config(names=NAMES, **options):
    return BertConfig(id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)}, **options)


def column(values, **features):
    rows = {"text": ["a film"] * len(values), "label": values}
    return Dataset.from_dict(rows, features=Features({"text": Value("string"), **features}) if features else None)


# Loading


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_folder_of_split_files(tmp_path, suffix):
    rows = {"train": tiny_texts(6, seed=1), "test": tiny_texts(4, seed=2)}
    for split in rows:
        write_rows(tmp_path / "data" / f"{split}{suffix}", rows[split])
    splits = load_splits(str(tmp_path / "data"))
    assert {name: list(part) for name, part in splits.items()} == rows


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_single_file_is_the_training_split(tmp_path, suffix):
    rows = tiny_texts(5)
    splits = load_splits(str(write_rows(tmp_path / f"whatever{suffix}", rows)))
    assert {name: list(part) for name, part in splits.items()} == {"train": rows}


def test_sharded_split_is_joined_in_order(tmp_path):
    rows = tiny_texts(7)
    write_rows(tmp_path / "data" / "train-00000-of-00002.parquet", rows[:4])
    write_rows(tmp_path / "data" / "train-00001-of-00002.parquet", rows[4:])
    splits = load_splits(str(tmp_path / "data"))
    assert list(splits) == ["train"]
    assert list(splits["train"]) == rows


def test_folder_saved_by_datasets(tmp_path):
    saved = DatasetDict({"train": column([0, 1], label=ClassLabel(names=["x", "y"]))})
    saved.save_to_disk(tmp_path / "data")
    splits = load_splits(str(tmp_path / "data"))
    assert splits["train"].features == saved["train"].features
    assert list(splits["train"]) == list(saved["train"])


def test_unlabelled_split_beside_labelled_ones(tmp_path):
    write_rows(tmp_path / "data" / "train.csv", tiny_texts(4))
    write_rows(tmp_path / "data" / "validation.csv", tiny_texts(4))
    write_rows(tmp_path / "data" / "test.csv", [{"text": "a film"}])
    splits = load_splits(str(tmp_path / "data"))
    assert splits["test"].column_names == ["text"]
    assert evaluation_split(splits) == "validation"


@pytest.mark.parametrize("name", ["missing.csv", "./missing", "/no/such/folder", "~/no-such-folder"])
def test_missing_path(name):
    with pytest.raises(ValueError, match=f"no file or folder {re.escape(name)}.*check the path"):
        load_splits(name)


def test_folder_without_data_files(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(ValueError, match=r"holds no file of \.parquet, \.csv.*save the splits"):
        load_splits(str(tmp_path))


@pytest.mark.parametrize("other", ["test.json", "test.tsv"])
def test_mixed_formats(tmp_path, other):
    write_rows(tmp_path / "train.csv", tiny_texts(2))
    write_rows(tmp_path / other, tiny_texts(2))
    with pytest.raises(ValueError, match=f"{other}, train.csv cannot be read as one data set.*one format"):
        load_splits(str(tmp_path))


def test_file_of_another_format(tmp_path):
    (tmp_path / "train.txt").write_text("a film")
    with pytest.raises(ValueError, match=r"train\.txt cannot be read.*out of \.parquet"):
        load_splits(str(tmp_path / "train.txt"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.csv", ""),
        ("train.csv", "text,label\n"),
        ("train.csv", "text,label\na,0\nb,1,2\n"),
        ("train.json", "{nope"),
        ("train.parquet", "nope"),
    ],
)
def test_broken_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name} cannot be read as .*or has no rows: .+Correct the file"):
        load_splits(str(tmp_path))


@pytest.mark.parametrize("name", ["no-such-name", "nobody/no-such-name"])
def test_unknown_name_offline(name):
    with pytest.raises(ValueError, match=f"'{name}' is no file or folder here.*Hub.*Give a path"):
        load_splits(name)


def test_evaluation_split():
    part = column([0, 1])
    splits = DatasetDict({"train": part, "test": part, "dev": part, "extra": part})
    assert evaluation_split(splits) == "dev"
    assert evaluation_split(splits, "extra") == "extra"
    for name in ("nope", "train"):
        with pytest.raises(ValueError, match=f"splits train, test, dev, extra, and {name} cannot.*--eval-split"):
            evaluation_split(splits, name)
    with pytest.raises(ValueError, match="validation or dev or test cannot"):
        evaluation_split(DatasetDict({"train": part}))


# Columns


def test_missing_columns_are_listed_with_the_options():
    rows = Dataset.from_dict({"review": ["a"], "stars": [1]})
    for text, label, missing in (("text", "stars", "text"), ("review", "label", "label")):
        message = f"no column '{missing}'; its columns are review, stars.*--text-columns and --label-column"
        with pytest.raises(ValueError, match=message):
            check_columns(rows, "train", [text], label)


def test_empty_split():
    with pytest.raises(ValueError, match="'test' has 0 rows"):
        check_columns(column([]), "test", ["text"], "label")


@pytest.mark.parametrize("columns", [[], ["text", "text"], ["a", "b", "c"]])
def test_number_of_text_columns(columns):
    with pytest.raises(ValueError, match="one column of texts, or two different"):
        check_columns(column([0]), "train", columns, "label")


def test_rows_without_text_are_counted():
    rows = Dataset.from_dict({"text": ["a", None, "b", None], "label": [0, 1, 0, 1]})
    with pytest.raises(ValueError, match="no text in 2 of 4 rows, the first at row 1: None"):
        check_columns(rows, "train", ["text"], "label")


def test_numbers_are_no_texts():
    with pytest.raises(ValueError, match="no text in 1 of 1 rows, the first at row 0: 7"):
        check_columns(Dataset.from_dict({"text": [7], "label": [0]}), "train", ["text"], "label")


@pytest.mark.parametrize("values", [["x", None], [0, None], [0.5, math.nan], [[1], [2]]])
def test_rows_without_a_label_are_counted(values):
    row = 1 if values[0] in ("x", 0, 0.5) else 0
    with pytest.raises(ValueError, match=rf"'label' .*holds no name and no number in .* the first at row {row}: "):
        check_columns(column(values), "train", ["text"], "label")


def test_empty_cells_of_csv_are_missing_labels(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\na,0\nb,\nc,1\n")
    rows = load_splits(str(tmp_path))["train"]
    with pytest.raises(ValueError, match="in 1 of 3 rows, the first at row 1: None.*In csv, empty cells"):
        check_columns(rows, "train", ["text"], "label")


# Labels


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["b", "a", "b"], ["a", "b"]),
        ([0, 2, 0], ["0", "1", "2"]),
        ([True, False], ["0", "1"]),
        ([0.5, 1.0], None),
    ],
)
def test_label_names(values, names):
    assert label_names(column(values), "label") == names


def test_label_names_of_class_labels_keep_their_order():
    assert label_names(column([0, 0], label=ClassLabel(names=["z", "a"])), "label") == ["z", "a"]


@pytest.mark.parametrize(
    ("values", "message"),
    [([-1, -1], "has the label -1.*Remove rows"), ([0, 0], r"the classes \['0'\]"), (["x", "x"], r"\['x'\]")],
)
def test_labels_that_cannot_be_learned(values, message):
    with pytest.raises(ValueError, match=message):
        label_names(column(values), "label")


def test_labels_of_both_kinds(tmp_path):
    path = write_rows(tmp_path / "train.jsonl", [{"text": "a", "label": 1}, {"text": "b", "label": "x"}])
    rows = load_splits(str(path))["train"]
    with pytest.raises(ValueError, match="mixes names and numbers"):
        label_names(rows, "label")


def test_class_labels_are_matched_by_name():
    rows = column([0, 1, 2, 0], label=ClassLabel(names=["c", "a", "b"]))
    assert label_ids(rows, "train", "label", config(["a", "b", "c"])) == [2, 0, 1, 2]
    # Also where the data have only some of the classes.
    rows = column([0, 1], label=ClassLabel(names=["c", "b"]))
    assert label_ids(rows, "train", "label", config(["a", "b", "c"])) == [2, 1]


def test_class_labels_of_other_names_are_matched_by_number_with_a_warning(caplog):
    rows = column([0, 1], label=ClassLabel(names=["no", "yes"]))
    assert label_ids(rows, "train", "label", BertConfig(num_labels=2)) == [0, 1]
    assert not caplog.records
    assert label_ids(rows, "train", "label", config(["bad", "good"])) == [0, 1]
    assert "share no name and are matched by number" in caplog.text


@pytest.mark.parametrize(
    ("values", "ids"),
    [
        (["good", "bad"], [1, 0]),
        ([1, 0], [1, 0]),
        ([1.0, 0.0], [1, 0]),
        ([True, False], [1, 0]),
    ],
)
def test_names_and_ids(values, ids):
    found = label_ids(column(values), "train", "label", config())
    assert found == ids
    assert all(type(label) is int for label in found)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["good", "ugly"], "'ugly' of row 1 .*'test' is unknown: the model's labels are 0=bad, 1=good.*Rename"),
        ([0, 2], "Label 2 of row 1 "),
        ([-1, -1], "Label -1 of row 0 .*An unlabelled split .*--eval-split"),
        ([0.5, 1.0], "Label 0.5 of row 0 "),
    ],
)
def test_unknown_labels(values, message):
    with pytest.raises(ValueError, match=message):
        label_ids(column(values), "test", "label", config())


def test_unlabelled_class_labels():
    rows = column([-1, 0], label=ClassLabel(names=list(NAMES)))
    with pytest.raises(ValueError, match="Label -1 of row 0"):
        label_ids(rows, "test", "label", config())


@pytest.mark.parametrize("values", [[0.25, 3.0], [1, 2]])
def test_numbers_for_regression(values):
    found = label_ids(column(values), "train", "label", BertConfig(num_labels=1))
    assert found == [float(value) for value in values]
    assert all(type(label) is float for label in found)


def test_names_for_regression():
    with pytest.raises(ValueError, match="Label 'good' of row 0 .*one output and learns numbers"):
        label_ids(column(["good"]), "train", "label", BertConfig(num_labels=1))


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_models_of_several_answers(problem):
    with pytest.raises(ValueError, match="gives 3 answers to a text.*DistillationTrainer"):
        label_ids(column([0, 1]), "train", "label", BertConfig(num_labels=3, problem_type=problem))


# Tokens


def test_tokenizer_of_another_model(tmp_path):
    folder = save_tiny_bert(tmp_path / "model", vocab_size=len(VOCABULARY) - 1)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with pytest.raises(ValueError, match=f"ids up to {len(VOCABULARY) - 1}.*embeds only {len(VOCABULARY) - 1} tokens"):
        check_tokenizer(tiny_tokenizer(), model)


def test_tokenizer_without_padding(tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(save_tiny_bert(tmp_path / "model"))
    tokenizer = tiny_tokenizer()
    check_tokenizer(tokenizer, model)
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="Padding is undefined.*tokenizer.pad_token ="):
        check_tokenizer(tokenizer, model)


def test_a_decoder_pads_with_the_token_that_its_head_passes_over():
    tokenizer = tiny_tokenizers.gpt2()
    sizes = {"vocab_size": len(tokenizer) + 2, "n_embd": 8, "n_layer": 1, "n_head": 1}
    model = GPT2ForSequenceClassification(GPT2Config(**sizes, pad_token_id=tokenizer.pad_token_id))
    check_tokenizer(tokenizer, model)
    model.config.pad_token_id = 0
    with pytest.raises(ValueError, match="Padding is undefined or differs"):
        check_tokenizer(tokenizer, model)


def test_tokens_equal_the_tokenizers_own():
    rows = tiny_texts(9)
    tokenizer = tiny_tokenizer()
    encoded = tokenize(Dataset.from_list(rows), tokenizer, ["text"], [row["label"] for row in rows], 6)
    assert set(encoded.column_names) == {"input_ids", "token_type_ids", "attention_mask", "length", "labels"}
    for row, tokens in zip(rows, encoded, strict=True):
        expected = tokenizer(row["text"], truncation=True, max_length=6)
        assert {name: tokens[name] for name in expected} == dict(expected)
        assert tokens["length"] == len(expected["input_ids"]) <= 6
        assert tokens["labels"] == row["label"]


def test_pairs_are_one_row():
    rows = Dataset.from_dict({"a": ["the film", "a plot"], "b": ["was good", "is bad"], "label": [1, 0]})
    tokenizer = tiny_tokenizer()
    encoded = tokenize(rows, tokenizer, ["a", "b"], [1, 0], 16)
    assert encoded["input_ids"][:] == tokenizer(rows["a"][:], rows["b"][:])["input_ids"]
    assert encoded["token_type_ids"][0] == [0, 0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("name", ["length", "labels", "input_ids"])
def test_columns_of_the_users_do_not_matter(name):
    rows = tiny_texts(5)
    ids = [row["label"] for row in rows]
    expected = tokenize(Dataset.from_list(rows), tiny_tokenizer(), ["text"], ids, 16)
    crowded = Dataset.from_list([{**row, name: "of the user's"} for row in rows])
    encoded = tokenize(crowded, tiny_tokenizer(), ["text"], ids, 16)
    assert encoded.features == expected.features
    assert list(encoded) == list(expected)


def test_label_column_named_labels():
    rows = Dataset.from_list([{"text": row["text"], "labels": NAMES[row["label"]]} for row in tiny_texts(4)])
    ids = label_ids(rows, "train", "labels", config())
    assert tokenize(rows, tiny_tokenizer(), ["text"], ids, 16)["labels"][:] == [0, 1, 0, 1]


@pytest.mark.parametrize(("columns", "least"), [(["text"], 3), (["text", "other"], 5)])
def test_room_for_the_text(columns, least):
    rows = Dataset.from_dict({"text": ["good film"], "other": ["bad film"]})
    assert tokenize(rows, tiny_tokenizer(), columns, [0], least)["length"][:] == [least]
    with pytest.raises(ValueError, match=f"max_length={least - 1} leaves no room.*--max-length {least} or more"):
        tokenize(rows, tiny_tokenizer(), columns, [0], least - 1)


def test_rows_beyond_the_last_position(tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(save_tiny_bert(tmp_path / "model"))
    rows = Dataset.from_dict({"text": ["good", "film " * 40], "label": [0, 1]})
    check_length(model, tokenize(rows, tiny_tokenizer(), ["text"], [0, 1], 32))
    with pytest.raises(ValueError, match="longest row, of 33 tokens.*--max-length"):
        check_length(model, tokenize(rows, tiny_tokenizer(), ["text"], [0, 1], 33))


def test_only_numbers_are_parts_of_a_split(tmp_path):
    for n, name in enumerate(("train-0", "train-1", "train-old", "validation-matched", "test"), start=1):
        write_rows(tmp_path / "data" / f"{name}.csv", tiny_texts(n))
    splits = load_splits(str(tmp_path / "data"))
    assert {name: len(rows) for name, rows in splits.items()} == {
        "train": 3,
        "train_old": 3,
        "validation_matched": 4,
        "test": 5,
    }


def test_rows_that_a_quotation_mark_joins_are_refused(tmp_path):
    lines = ["text\tlabel", "good one\t1", '"Quoted start, he said\t0', "middle\t1", '"Another start\t0', "last\t1"]
    (tmp_path / "train.tsv").write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match="quotation mark at the beginning of a text in column 'text' joins rows"):
        load_splits(str(tmp_path))
