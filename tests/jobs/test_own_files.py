"""What users' own models and files hold: classes in their order, stars, patterns in paths, missing files."""

import pytest
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    T5Config,
)

from hf_compress.jobs.data import class_names, ids_of_numbers, label_ids, load_splits, tokenize
from hf_compress.jobs.fit import check_tokenizer
from hf_compress.jobs.word_labels import word_label_ids
from hf_compress.pipeline.compress import compress
from hf_compress.recipe.steps import FinetuneStep, QuantizeStep
from tests.pruning import tiny_tokenizers
from tests.tiny_job import save_tiny_bert, tiny_texts, write_rows
from tests.tiny_recipe import CPU, tiny_data, tiny_recipe

STARS = ["1", "2", "3"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def config(names):
    return BertConfig(id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})


@pytest.mark.parametrize("kind", [BertConfig, DistilBertConfig, GPT2Config, T5Config])
def test_a_tokenizer_whose_files_are_missing(kind, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(save_tiny_bert(tmp_path / "tiny"))
    kind().save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="knows special tokens alone.*tokenizer.save_pretrained"):
        check_tokenizer(AutoTokenizer.from_pretrained(tmp_path / "bare"), model)


# Labels


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_stars_are_names_in_every_format(suffix, tmp_path):
    rows = [{"text": "a film", "label": star} for star in ("3", "1", "2", "1")]
    data = load_splits(str(write_rows(tmp_path / f"rows{suffix}", rows)))["train"]
    assert label_ids(data, "train", "label", config(STARS)) == [2, 0, 1, 0]


def test_numbers_that_are_no_names_are_ids():
    assert ids_of_numbers(config(["bad", "good"])) == {0.0: 0, 1.0: 1}
    assert ids_of_numbers(config(["1", "0"])) == {1.0: 0, 0.0: 1}
    with pytest.raises(ValueError, match="Label 0 of row 0.*0=1, 1=2, 2=3"):
        label_ids(Dataset.from_dict({"label": [0]}), "train", "label", config(STARS))


def test_labels_of_words_that_are_numbers():
    rows = Dataset.from_dict({"tags": [[1, 3], [2]]})
    assert word_label_ids(rows, "train", "tags", config(STARS)) == [[0, 2], [1]]


@pytest.mark.parametrize(
    ("labels", "own", "expected"),
    [
        (["bad", "good"], ["good", "bad"], ["good", "bad"]),
        (["0", "1"], ["good", "bad"], ["good", "bad"]),
        (["0", "1"], ["LABEL_0", "LABEL_1"], ["0", "1"]),
        (["bad", "good"], ["negative", "positive"], ["bad", "good"]),
        (["0", "1", "2"], ["good", "bad"], ["0", "1", "2"]),
    ],
)
def test_classes_of_a_model_that_is_fine_tuned(labels, own, expected):
    assert class_names(labels, config(own)) == expected


def test_a_trained_head_keeps_its_order(tmp_path):
    model = save_tiny_bert(tmp_path / "model", id2label={0: "good", 1: "bad"}, label2id={"good": 0, "bad": 1})
    data = tiny_data(tmp_path / "data")
    for split, n, seed in (("train", 48, 0), ("validation", 20, 1)):
        rows = [{**row, "label": ("bad", "good")[row["label"]]} for row in tiny_texts(n, seed)]
        write_rows(tmp_path / "data" / f"{split}.csv", rows)
    still = FinetuneStep(max_steps=1, learning_rate=1e-12, arguments=CPU)
    report = compress(tiny_recipe(tmp_path, data, [still]), tmp_path / "still")
    alone = compress(tiny_recipe(tmp_path, data, [QuantizeStep("bf16")]), tmp_path / "alone")
    tuned = AutoModelForSequenceClassification.from_pretrained(tmp_path / "still" / "01-finetune")
    assert tuned.config.id2label == {0: "good", 1: "bad"}
    assert AutoModelForSequenceClassification.from_pretrained(model).config.id2label == tuned.config.id2label
    assert report["steps"][0]["quality"]["compressed"] == alone["steps"][0]["quality"]["compressed"]


# Files


def test_a_path_is_no_pattern(tmp_path):
    rows = {"v[12]": tiny_texts(5, seed=1), "v1": tiny_texts(3, seed=2)}
    for folder, some in rows.items():
        write_rows(tmp_path / folder / "train.csv", some)
    assert list(load_splits(str(tmp_path / "v[12]"))["train"]) == rows["v[12]"]


def test_hidden_files_are_no_splits(tmp_path):
    write_rows(tmp_path / "train.csv", tiny_texts(4))
    (tmp_path / "._train.csv").write_bytes(b"\x00\x05\x16\x07")
    assert list(load_splits(str(tmp_path))) == ["train"]


def test_one_saved_set_has_no_splits(tmp_path):
    Dataset.from_list(tiny_texts(4)).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match="is one saved Dataset, without splits: save a DatasetDict"):
        load_splits(str(tmp_path))


def test_texts_without_tokens():
    tokenizer = tiny_tokenizers.gpt2()
    rows = Dataset.from_dict({"text": ["a film", ""]})
    assert tokenizer("")["input_ids"] == []
    with pytest.raises(ValueError, match="Row 1 has no tokens: ''"):
        tokenize(rows, tokenizer, ["text"], None, 16)


def test_a_long_row_to_learn_from_is_found_before_anything_trains(tmp_path):
    data = tiny_data(tmp_path / "data")
    write_rows(tmp_path / "data" / "train.csv", [*tiny_texts(20), {"text": "film " * 60, "label": 1}])
    data.max_length = 64
    recipe = tiny_recipe(tmp_path, data, [FinetuneStep(max_steps=1, arguments=CPU)])
    recipe.measure.length = 8
    with pytest.raises(ValueError, match="cannot read the longest row, of 62 tokens"):
        compress(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
