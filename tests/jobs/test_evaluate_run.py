"""One model measured alone and beside its teacher: the figures are those that the functions called by hand give."""

import json
import re

import pytest
import torch
import typer
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForTokenClassification,
    BertModel,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

from hf_compress.cli.evaluate import NOT_KEPT, SeveralValues, spread
from hf_compress.cli.evaluate import evaluate as evaluate_command
from hf_compress.evaluation.cost import count_macs, count_parameters, saved_bytes
from hf_compress.jobs.classifiers import Yardstick, score, score_alone
from hf_compress.jobs.data import label_ids, load_splits, tokenize
from hf_compress.jobs.evaluate import evaluate_model, read_rows
from hf_compress.pruning.vocabulary import prune_vocabulary
from hf_compress.quantization.config import Int8DynamicConfig
from hf_compress.quantization.quantize import quantize
from hf_compress.recipe.steps import DataConfig, MeasureConfig
from tests.evaluation.test_parts import cut_
from tests.modeling.tiny import tiny_model
from tests.tiny_job import NAMES, VOCABULARY, save_tiny_bert, tiny_texts, tiny_tokenizer, write_data, write_rows

RULES = re.compile("[\u2500-\u257f\x1b]")
MEASURE = MeasureConfig(batch_sizes=[2, 4], length=8, n_runs=1)
QUICK = ("--max-length", 16, "--batch-sizes", 2, 4, "--length", 8, "--runs", 1)
app = typer.Typer()
app.command(cls=SeveralValues)(evaluate_command)
pytestmark = pytest.mark.usefixtures("quiet_surroundings")


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A teacher, two smaller models, and data."""
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny_bert(folder / "teacher")
    model = AutoModelForSequenceClassification.from_pretrained(folder / "teacher")
    small = cut_(AutoModelForSequenceClassification.from_pretrained(folder / "teacher"))
    rounded = {"int8": Int8DynamicConfig(), "tables": Int8DynamicConfig(embeddings=True, embedding_bits=4)}
    for name, one in {"small": small, **{name: quantize(model, one) for name, one in rounded.items()}}.items():
        one.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    write_data(folder / "data")
    return folder


def config(inputs, **settings):
    return DataConfig(**{"dataset": str(inputs / "data"), "max_length": 16, **settings})


def yardstick(inputs, model, metric="accuracy", seed=0):
    tokenizer = AutoTokenizer.from_pretrained(inputs / "teacher")
    rows = load_splits(str(inputs / "data"))["test"]
    labels = label_ids(rows, "test", "label", model.config)
    return Yardstick(tokenize(rows, tokenizer, ["text"], labels, 16), tokenizer, metric, 16, seed)


@pytest.mark.parametrize(
    ("name", "metric"),
    [("small", "accuracy"), ("int8", "f1_macro"), ("tables", "accuracy"), ("teacher", "matthews_correlation")],
)
def test_figures_are_those_of_score_retention(inputs, name, metric):
    paths = {one: str(inputs / one) for one in ("teacher", name)}
    report = evaluate_model(paths[name], config(inputs, metric=metric), MEASURE, teacher=paths["teacher"], seed=3)
    models = {one: AutoModelForSequenceClassification.from_pretrained(path).eval() for one, path in paths.items()}
    by_hand = score(models["teacher"], models[name], yardstick(inputs, models["teacher"], metric, seed=3))
    # Rows come in other batches, with other sums of rounding errors.
    assert report["retention"] | {"kl": None} == by_hand | {"kl": None}
    assert report["retention"]["kl"] == pytest.approx(by_hand["kl"], rel=1e-3, abs=1e-6)
    assert report["quality"]["value"] == by_hand["compressed"]
    assert report["quality"]["value"] == score_alone(models[name], yardstick(inputs, models[name], metric))
    low, high = report["quality"]["interval"]
    assert low <= report["quality"]["value"] <= high
    cost = report["cost"]
    assert cost["parameters"] == vars(count_parameters(models[name]))
    assert cost["bytes_on_disk"] == saved_bytes(models[name], paths[name])
    batch = {key: torch.ones(4, 8, dtype=torch.long) for key in ("input_ids", "attention_mask", "token_type_ids")}
    assert cost["macs"] == count_macs(models[name], batch)
    assert report["teacher_cost"]["macs"] == count_macs(models["teacher"], batch)
    assert report["needs_hf_compress"] == (name != "teacher")
    assert list(report["latency"]) == ["2", "4"]
    assert all(
        one["median_s"] / one["teacher"]["median_s"] == pytest.approx(one["ratio"])
        for one in report["latency"].values()
    )
    json.dumps(report, allow_nan=False)


def test_a_model_alone(inputs):
    report = evaluate_model(str(inputs / "small"), config(inputs), MEASURE)
    beside = evaluate_model(str(inputs / "small"), config(inputs), MEASURE, teacher=str(inputs / "teacher"))
    for key in ("quality", "metric", "task", "split", "rows_measured_on"):
        assert report[key] == beside[key]
    assert report["retention"] is report["teacher_cost"] is None
    assert "ratio" not in report["latency"]["2"]
    assert report["quality"]["interval"] != beside["retention"]["retention_interval"]


def test_a_teacher_whose_labels_come_in_another_order(inputs, tmp_path):
    teacher = AutoModelForSequenceClassification.from_pretrained(inputs / "teacher")
    with torch.no_grad():
        teacher.classifier.weight.copy_(teacher.classifier.weight.flip(0).clone())
        teacher.classifier.bias.copy_(teacher.classifier.bias.flip(0).clone())
    names = NAMES[::-1]
    teacher.config.id2label, teacher.config.label2id = dict(enumerate(names)), {n: i for i, n in enumerate(names)}
    teacher.save_pretrained(tmp_path / "teacher")
    tiny_tokenizer().save_pretrained(tmp_path / "teacher")
    rows = [{**row, "label": NAMES[row["label"]]} for row in tiny_texts(16)]
    file = write_rows(tmp_path / "rows.csv", rows)
    data = DataConfig(str(file), max_length=16)
    report = evaluate_model(str(inputs / "teacher"), data, MEASURE, teacher=str(tmp_path / "teacher"))
    assert report["retention"]["agreement"] == 1.0
    assert report["retention"]["retention"] == 1.0
    assert report["split"] == "rows.csv"


def test_a_model_with_a_vocabulary_of_its_own(inputs, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(inputs / "teacher")
    texts = [row["text"] for row in tiny_texts(16, seed=2)]
    small, tokenizer = prune_vocabulary(model, AutoTokenizer.from_pretrained(inputs / "teacher"), texts)
    assert len(tokenizer) < len(VOCABULARY)
    small.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    report = evaluate_model(str(tmp_path), config(inputs), MEASURE, teacher=str(inputs / "teacher"))
    # The texts that it was cut to are those that are measured: nothing changes but the table.
    assert report["retention"]["agreement"] == 1.0
    assert report["retention"]["kl"] == pytest.approx(0, abs=1e-6)
    assert report["cost"]["parameters"]["total"] < report["teacher_cost"]["parameters"]["total"]


def test_numbers(tmp_path):
    save_tiny_bert(tmp_path / "model", num_labels=1)
    write_data(tmp_path / "data", label=lambda row: row["label"] + len(row["text"]) / 100)
    report = evaluate_model(str(tmp_path / "model"), DataConfig(str(tmp_path / "data"), max_length=16), MEASURE)
    assert report["metric"] == "pearsonr"
    assert -1 <= report["quality"]["interval"][0] <= report["quality"]["value"] <= report["quality"]["interval"][1]


def test_labelled_words(tmp_path):
    tags = {0: "O", 1: "B-X", 2: "I-X"}
    save_tiny_bert(
        tmp_path / "model",
        model_class=BertForTokenClassification,
        id2label=tags,
        label2id={name: i for i, name in tags.items()},
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer().backend_tokenizer, pad_token="[PAD]")
    fast.save_pretrained(tmp_path / "model")
    rows = [
        {"words": row["text"].split(), "tags": [i % 3 for i in range(len(row["text"].split()))]}
        for row in tiny_texts(12)
    ]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    data = DataConfig(str(file), text_columns=["words"], label_column="tags", max_length=16)
    report = evaluate_model(str(tmp_path / "model"), data, MEASURE, teacher=str(tmp_path / "model"))
    assert (report["task"], report["metric"]) == ("token-classification", "seqeval")
    assert report["quality"]["value"] == report["retention"]["compressed"] == report["retention"]["teacher"]
    assert report["retention"]["agreement"] == 1.0
    by_token = evaluate_model(
        str(tmp_path / "model"),
        DataConfig(**{**vars(data), "metric": "token_accuracy"}),
        MEASURE,
        teacher=str(tmp_path / "model"),
    )
    assert by_token["quality"]["value"] == by_token["retention"]["compressed"]


@pytest.mark.parametrize("model_type", ["bart", "t5", "gpt2", "modernbert", "roberta", "mpnet"])
def test_architectures(model_type, tmp_path):
    names = {
        "bart": "Bart",
        "t5": "T5",
        "gpt2": "GPT2",
        "modernbert": "ModernBert",
        "roberta": "Roberta",
        "mpnet": "MPNet",
    }
    settings = {} if model_type == "gpt2" else {"eos_token_id": 3}
    model = tiny_model(
        model_type,
        f"{names[model_type]}ForSequenceClassification",
        vocab_size=len(VOCABULARY),
        pad_token_id=0,
        **settings,
    )
    cut_(model).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    file = write_rows(tmp_path / "rows.csv", tiny_texts(6))
    report = evaluate_model(str(tmp_path / "model"), DataConfig(str(file), max_length=16), MEASURE)
    assert 0 <= report["quality"]["value"] <= 1


def test_rows_of_one_split_are_enough(inputs, tmp_path):
    write_rows(tmp_path / "validation.csv", tiny_texts(8))
    rows = read_rows(DataConfig(str(tmp_path)))
    assert (rows.test_split, len(rows.test)) == ("validation", 8)
    assert len(read_rows(DataConfig(str(tmp_path / "validation.csv"))).test) == 8
    write_rows(tmp_path / "train.csv", tiny_texts(4))
    with pytest.raises(ValueError, match="cannot be measured on"):
        read_rows(DataConfig(str(tmp_path), eval_split="train"))


def test_what_cannot_be_measured(inputs, tmp_path):
    save_tiny_bert(tmp_path / "headless", model_class=BertModel)
    with pytest.raises(ValueError, match="holds no trained head for sequence-classification"):
        evaluate_model(str(tmp_path / "headless"), config(inputs), MEASURE)
    with pytest.raises(ValueError, match="metric='pearsonr' does not fit"):
        evaluate_model(str(inputs / "small"), config(inputs, metric="pearsonr"), MEASURE)
    with pytest.raises(ValueError, match="has no column 'nothing'"):
        evaluate_model(str(inputs / "small"), config(inputs, text_columns=["nothing"]), MEASURE)
    too_long = MeasureConfig(batch_sizes=[2], length=500, n_runs=1)
    with pytest.raises(ValueError, match="length=500 tokens.*Give --length"):
        evaluate_model(str(inputs / "small"), config(inputs), too_long)


def test_lists_take_several_words():
    lists = {"--sizes"}
    assert spread(["m", "--sizes", "8", "32", "--x", "1"], lists) == ["m", "--sizes", "8", "--sizes", "32", "--x", "1"]
    assert spread(["--sizes=8", "--x", "1", "m"], lists) == ["--sizes=8", "--x", "1", "m"]
    assert spread(["--sizes", "8"], lists) == ["--sizes", "8"]
    assert spread(["--sizes", "8", "--sizes", "32"], lists) == ["--sizes", "8", "--sizes", "32"]


def test_the_command(inputs, tmp_path, monkeypatch):
    words = (inputs / "small", "--dataset", inputs / "data", *QUICK)
    alone = run(*words)
    assert alone.exit_code == 0, alone.output
    assert not RULES.search(alone.stdout)
    assert re.search(r"accuracy +\d+\.\d % \(95 % interval", alone.stdout)
    beside = run(*words, "--teacher", inputs / "teacher", "--output", tmp_path / "made" / "figures.json", "--json")
    report = json.loads(beside.stdout)
    assert report == json.loads((tmp_path / "made" / "figures.json").read_text())
    assert list(report["latency"]) == ["2", "4"]
    assert report["passed"] is None
    page = run(*words, "--teacher", inputs / "teacher").stdout
    assert re.search(r"kept +\d+\.\d %", page)
    assert re.search(r"batch +ms +95th % +teacher ms +faster", page)
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    assert RULES.search(run(*words).stdout)


@pytest.mark.parametrize(("least", "exit_code"), [(0.5, 0), (1.5, NOT_KEPT)])
def test_the_exit_code_tells_whether_enough_was_kept(inputs, least, exit_code):
    words = (inputs / "teacher", "--teacher", inputs / "teacher", "--dataset", inputs / "data", *QUICK)
    done = run(*words, "--min-retention", least, "--json")
    assert done.exit_code == exit_code
    report = json.loads(done.stdout)
    assert report["passed"] == (exit_code == 0)
    assert f"at least {100 * least:g} %" in run(*words, "--min-retention", least).stdout


def test_what_the_command_refuses(inputs):
    done = run(inputs / "small", "--dataset", inputs / "data", "--min-retention", 0.9)
    assert isinstance(done.exception, ValueError)
    assert "add --teacher" in str(done.exception)
    done = run(inputs / "small", "--dataset", inputs / "data", "--teacher", inputs / "teacher", "--min-retention", -1)
    assert "no share that could be kept" in str(done.exception)


def test_words_that_are_cut_off_are_outside_however_labels_are_numbered(tmp_path):
    rows = [{"words": row["text"].split(), "tags": ["O"] * len(row["text"].split())} for row in tiny_texts(12)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    data = DataConfig(str(file), text_columns=["words"], label_column="tags", max_length=6, metric="token_accuracy")
    found = []
    for number, names in enumerate((["O", "B-X", "B-Y"], ["B-X", "B-Y", "O"])):
        folder = tmp_path / str(number)
        save_tiny_bert(
            folder,
            model_class=BertForTokenClassification,
            id2label=dict(enumerate(names)),
            label2id={name: i for i, name in enumerate(names)},
        )
        fast = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer().backend_tokenizer, pad_token="[PAD]")
        fast.save_pretrained(folder)
        model = BertForTokenClassification.from_pretrained(folder)
        with torch.no_grad():
            model.classifier.weight.zero_()
            model.classifier.bias.copy_(torch.tensor([1.0 if name == "B-X" else 0.0 for name in names]))
        model.save_pretrained(folder)
        found.append(evaluate_model(str(folder), data, MEASURE)["quality"]["value"])
    # Words with tokens are wrong, those without are right.
    assert found[0] == found[1] > 0
