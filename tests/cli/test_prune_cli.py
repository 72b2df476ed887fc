"""`hf-compress prune` from words to table: figures are those of the files, labels are not needed, nothing is lost."""

import json
import re
from dataclasses import fields

import pytest
import torch
from datasets import Dataset, DatasetDict
from matplotlib.image import imread
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertModel, pipeline

import hf_compress as hc
from hf_compress.checkpoint.widths import read_widths
from hf_compress.cli.main import parse_prune
from hf_compress.jobs.data import load_splits
from hf_compress.jobs.job import PruneJob
from hf_compress.jobs.material import CALIBRATION_BATCH
from hf_compress.jobs.prune import prepare, prune_classifier
from hf_compress.report.report import markdown
from tests.tiny_job import files_of, make_inputs, model_files, quality, tiny_texts, write_rows

MODEL = {"intermediate_size": 64}


pytestmark = pytest.mark.usefixtures("quiet_surroundings")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"), model=MODEL)


def prune_job(inputs, output, **job):
    defaults = {"model": str(inputs / "model"), "dataset": str(inputs / "data"), "max_length": 16, "use_cpu": True}
    return PruneJob(**{**defaults, "output_dir": str(output), **job})


@pytest.fixture(scope="module")
def run(inputs):
    """A finished run, and its report."""
    return inputs / "run", prune_classifier(prune_job(inputs, inputs / "run"), hc.StructuredPruningConfig())


def logits(folder, texts):
    """Of a saved model, for each text alone, without any code of the command."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.inference_mode():
        return torch.stack([model(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts])


# The result


def test_files_of_a_run(run):
    folder, report = run
    assert {path.name for path in folder.iterdir()} == {"run.json", "report.json", "report.md", "pruned", "widths.png"}
    assert {name.rsplit(".", 1)[-1] for name in files_of(folder / "pruned")} <= {"json", "md", "safetensors", "txt"}
    assert json.loads((folder / "report.json").read_text()) == report


def test_figures_are_those_of_the_saved_models(run, inputs):
    folder, report = run
    rows = tiny_texts(16, seed=2)
    texts, labels = [row["text"] for row in rows], torch.tensor([row["label"] for row in rows])
    dense_decisions = logits(inputs / "model", texts).argmax(-1)
    assert [model["name"] for model in report["models"]] == ["dense", "pruned"]
    for place, model in zip((inputs / "model", folder / "pruned"), report["models"], strict=True):
        decisions = logits(place, texts).argmax(-1)
        assert model["quality"]["compressed"] == pytest.approx((decisions == labels).double().mean().item())
        assert model["quality"]["agreement"] == pytest.approx((decisions == dense_decisions).double().mean().item())
        tensors = load_file(place / "model.safetensors")
        assert model["cost"]["parameters"]["total"] == sum(tensor.numel() for tensor in tensors.values())
        loaded = AutoModelForSequenceClassification.from_pretrained(place)
        assert model["widths"] == read_widths(loaded)
    dense, pruned = report["models"]
    assert (dense["needs_hf_compress"], pruned["needs_hf_compress"]) == (False, True)
    assert pruned["cost"]["macs"] < 0.55 * dense["cost"]["macs"]
    assert (report["texts_calibrated_on"], report["rows_measured_on"]) == (24, 16)


def test_saved_model_is_the_pruned_one(run, inputs):
    folder, _ = run
    config = hc.StructuredPruningConfig()
    material = prepare(prune_job(inputs, folder), config, load_splits(str(inputs / "data")))
    expected = hc.prune(material.model, config, material.batches).state_dict()
    saved = load_file(folder / "pruned" / "model.safetensors")
    assert saved.keys() == expected.keys()
    for name, value in saved.items():
        assert torch.equal(value, expected[name])
    # Neither truncation nor padding of the run is left in it.
    assert files_of(folder / "pruned")["tokenizer.json"] == files_of(inputs / "model")["tokenizer.json"]


def test_what_to_type_next_works(run):
    folder, report = run
    classify = pipeline("text-classification", str(folder / "pruned"))
    labels = [answer["label"] for answer in classify([row["text"] for row in tiny_texts(16, seed=2)])]
    right = [("bad", "good")[row["label"]] for row in tiny_texts(16, seed=2)]
    accuracy = sum(label == name for label, name in zip(labels, right, strict=True)) / 16
    assert accuracy == pytest.approx(quality(report)[1]["compressed"])


def test_figure_shows_heads_and_neurons(run):
    pixels = imread(run[0] / "widths.png")[..., :3]
    for colour in ((0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00)):
        assert (abs(pixels - torch.tensor(colour).numpy() / 255).max(-1) < 0.02).mean() > 0.01


def test_page_speaks_of_pruning(run):
    folder, report = run
    page = (folder / "report.md").read_text()
    assert page == markdown(report)
    assert page.startswith("# Pruned to 50 % of the blocks' MACs\n")
    assert "](widths.png)" in page
    assert "16 rows, calibrated on 24 texts" in page
    assert "units heads neurons, score obs" in page
    assert "student" not in page
    assert "\n\n\n" not in page


def test_from_words_to_table(inputs, tmp_path, call):
    words = ["--model", inputs / "model", "--dataset", inputs / "data", "--budgets", "0.8", "0.5", "--max-length", 16]
    code, out, err = call("prune", *words, "--output-dir", tmp_path / "run", "--score", "taylor", "--use-cpu")
    assert code == 0, err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [model["name"] for model in report["models"]] == ["dense", "pruned-0.8", "pruned-0.5"]
    assert report["pruning"]["score"] == "taylor"
    for model in report["models"]:
        assert f"\n{model['name']} " in out
    assert f"pipeline('text-classification', '{tmp_path}/run/pruned-0.8')" in out
    assert "\nimport hf_compress\nfrom transformers import pipeline\n" in out
    assert "student" not in out
    assert f"{tmp_path}/run/widths-0.5.png" in out
    assert "Scoring units" in err
    assert err.count("Repairing layers") >= 2


def test_stock_checkpoints_need_no_import(inputs, tmp_path, call):
    words = ["--model", inputs / "model", "--dataset", inputs / "data", "--units", "layers", "--budget", "0.7"]
    code, out, err = call("prune", *words, "--output-dir", tmp_path / "run", "--use-cpu")
    assert code == 0, err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    dense, pruned = report["models"]
    assert "stock checkpoint and needs no plug-in" in out
    assert "import hf_compress" not in out
    # Layers are named as in the dense model.
    kept = [int(name.removeprefix("encoder.")) for name in pruned["widths"]]
    weights = [load_file(path / "model.safetensors") for path in (inputs / "model", tmp_path / "run" / "pruned")]
    assert len(kept) == 2
    for new, old in enumerate(kept):
        names = [f"bert.encoder.layer.{index}.intermediate.dense.weight" for index in (old, new)]
        assert torch.equal(weights[0][names[0]], weights[1][names[1]])
    assert dense["widths"].keys() > pruned["widths"].keys()


# Texts


def test_texts_are_chosen_by_the_seed_and_sorted(inputs, tmp_path):
    rows = Dataset.from_list([{**row, "text": f"{row['text']} film"} for row in tiny_texts(100)])
    splits = DatasetDict({"train": rows, "test": rows})

    def batches(seed, n_texts):
        config = hc.StructuredPruningConfig(seed=seed)
        return prepare(prune_job(inputs, tmp_path, n_texts=n_texts), config, splits).batches

    first = batches(0, 70)
    assert [len(batch["input_ids"]) for batch in first] == [CALIBRATION_BATCH, CALIBRATION_BATCH, 70 - 64]
    lengths = [batch["attention_mask"].sum(1).tolist() for batch in first]
    assert sum(lengths, []) == sorted(sum(lengths, []))
    assert all("labels" not in batch for batch in first)
    for one, same in zip(first, batches(0, 70), strict=True):
        assert torch.equal(one["input_ids"], same["input_ids"])
    other = batches(1, 70)
    assert any(not torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, other, strict=True))
    assert sum(len(batch["input_ids"]) for batch in batches(0, 512)) == 100


def test_labels_of_the_texts_are_not_looked_at(run, inputs, tmp_path):
    write_rows(tmp_path / "data" / "train.csv", [{"text": row["text"]} for row in tiny_texts(24, seed=1)])
    write_rows(tmp_path / "data" / "test.csv", tiny_texts(16, seed=2))
    job = prune_job(inputs, tmp_path / "run", dataset=str(tmp_path / "data"))
    report = prune_classifier(job, hc.StructuredPruningConfig())
    assert model_files(tmp_path / "run" / "pruned") == model_files(run[0] / "pruned")
    assert quality(report) == quality(run[1])
    again = prune_job(inputs, tmp_path / "labels", dataset=str(tmp_path / "data"))
    with pytest.raises(ValueError, match="'train' has no column 'label'"):
        prune_classifier(again, hc.StructuredPruningConfig(use_labels=True))


def test_labels_are_used_where_asked_for(run, inputs, tmp_path):
    prune_classifier(prune_job(inputs, tmp_path / "run"), hc.StructuredPruningConfig(use_labels=True))
    assert model_files(tmp_path / "run" / "pruned") != model_files(run[0] / "pruned")


def test_dtype_of_the_checkpoint_stays(tmp_path):
    make_inputs(tmp_path, model=MODEL)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    prune_classifier(prune_job(tmp_path, tmp_path / "run"), hc.StructuredPruningConfig())
    saved = load_file(tmp_path / "run" / "pruned" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}


# Several budgets, and being stopped


def interrupt(*arguments, **options):
    raise KeyboardInterrupt


def test_several_budgets_from_one_calibration(run, inputs, tmp_path, monkeypatch):
    calls = []

    def count(model, config, data):
        calls.append(config.score)
        return hc.calibrate(model, config, data)

    monkeypatch.setattr("hf_compress.jobs.prune_kinds.calibrate", count)
    prune_classifier(prune_job(inputs, tmp_path / "run", budgets=[0.8, 0.5]), hc.StructuredPruningConfig())
    # The others only ask whether the budgets can be met.
    assert calls.count("obs") == 1
    assert model_files(tmp_path / "run" / "pruned-0.5") == model_files(run[0] / "pruned")
    names = {"run.json", "report.json", "report.md", "pruned-0.8", "pruned-0.5", "widths-0.8.png", "widths-0.5.png"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == names


def test_run_stopped_at_its_second_budget(run, inputs, tmp_path, monkeypatch):
    job, config = prune_job(inputs, tmp_path / "run", budgets=[0.8, 0.5]), hc.StructuredPruningConfig()
    with monkeypatch.context() as patched:

        def stop(model, config, data):
            return hc.prune(model, config, data) if config.budget == 0.8 else interrupt()

        patched.setattr("hf_compress.jobs.prune.prune", stop)
        with pytest.raises(KeyboardInterrupt):
            prune_classifier(job, config)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"run.json", "pruned-0.8"}
    place = (tmp_path / "run" / "pruned-0.8").stat()
    prune_classifier(job, config)
    assert (tmp_path / "run" / "pruned-0.8").stat().st_ino == place.st_ino
    assert model_files(tmp_path / "run" / "pruned-0.5") == model_files(run[0] / "pruned")


def test_run_stopped_while_measuring_prunes_nothing_again(run, inputs, tmp_path, monkeypatch):
    job, config = prune_job(inputs, tmp_path / "run"), hc.StructuredPruningConfig()
    with monkeypatch.context() as patched:
        patched.setattr("hf_compress.jobs.prune.measure", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prune_classifier(job, config)
    monkeypatch.setattr("hf_compress.jobs.prune.prune", interrupt)
    assert quality(prune_classifier(job, config)) == quality(run[1])


def test_finished_runs_are_replaced_only_when_asked(inputs, tmp_path):
    config = hc.StructuredPruningConfig(score="l2", repair="none")
    prune_classifier(prune_job(inputs, tmp_path / "run", budgets=[0.8, 0.5]), config)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    before = files_of(tmp_path / "run")
    for options, message in (({}, "holds a finished run"), ({"overwrite": True, "max_length": 2}, "--max-length 3")):
        with pytest.raises(ValueError, match=message):
            prune_classifier(prune_job(inputs, tmp_path / "run", **options), config)
        assert files_of(tmp_path / "run") == before
    prune_classifier(prune_job(inputs, tmp_path / "run", overwrite=True), config)
    names = {"run.json", "report.json", "report.md", "pruned", "widths.png", "notes.txt"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == names


# Options


def test_help_shows_every_option(call):
    code, out, _ = call("prune", "--help")
    assert code == 0
    for field in (*fields(PruneJob), *fields(hc.StructuredPruningConfig)):
        assert f"--{field.name.replace('_', '-')} " in out
    assert out.count("required") == 3


def test_every_option_is_parsed():
    job = {
        "model": "m", "dataset": "d", "output_dir": "o", "dataset_name": "sst2", "text_columns": ["a", "b"],
        "label_column": "y", "eval_split": "dev", "max_length": 64, "metric": "f1", "overwrite": True,
        "budgets": [0.5, 0.25], "n_texts": 9, "eval_batch_size": 8, "use_cpu": True,
    }  # fmt: skip
    config = {
        "budget": 0.3, "cost": "params", "units": ("heads", "layers"), "score": "fisher", "scope": "local",
        "search": "ranking", "uniform": False, "multiple_of": 4, "steps": 2, "repair": "bias", "ridge": 0.2,
        "use_labels": True, "seed": 3,
    }  # fmt: skip
    words = []
    for name, value in (job | config).items():
        values = value if isinstance(value, list | tuple) else [value]
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    assert parse_prune(words) == (PruneJob(**job), hc.StructuredPruningConfig(**config))
    assert job.keys() == PruneJob.__dataclass_fields__.keys()
    assert config.keys() == hc.StructuredPruningConfig.__dataclass_fields__.keys()
    least = ["--model", "m", "--dataset", "d", "--output-dir", "o"]
    assert parse_prune(least) == (PruneJob("m", "d", "o"), hc.StructuredPruningConfig())
    assert parse_prune([*least, "--uniform", "--units", "neurons"])[1].uniform


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "required: --model, --dataset, --output_dir/--output-dir"),
        ("--bugdet 0.5", r"--bugdet is no option \(did you mean --budget\?\).*prune --help"),
        ("--cost time", "invalid choice: 'time'"),
        ("--units head", "units=.*'head'.* give one or more of 'heads', 'neurons', 'layers'"),
        ("--budget 2", "budget=2.0 is no share"),
        ("--budgets 0.5 2", "budget=2.0 is no share"),
        ("--budgets 0.5 0.5", "names a budget twice"),
        ("--n-texts 0", "n_texts=0 counts texts"),
        ("--dataset no.csv", "There is no file or folder no.csv"),
    ],
)
def test_errors_are_one_paragraph(call, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    least = "--model m --dataset d --output-dir o".split() if words else []
    code, out, err = call("prune", *least, *words.split())
    assert (code, out) == (1, "")
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert re.search(message, err), err
    assert not (tmp_path / "o").exists()


# Bad input leaves nothing behind


@pytest.mark.parametrize(
    ("job", "config", "message"),
    [
        ({"metric": "pearsonr"}, {}, "choose one of accuracy"),
        ({"text_columns": ["nope"]}, {}, "no column 'nope'; its columns are text, label"),
        ({"eval_split": "validation"}, {}, "validation cannot be measured on"),
        ({"max_length": 2}, {}, "--max-length 3 or more"),
        ({}, {"budget": 0.1}, "cannot be met"),
        ({"budgets": [0.5, 0.1]}, {}, "cannot be met"),
        ({}, {"multiple_of": 100}, "multiple_of=100 is larger than the 64 neurons"),
    ],
)
def test_bad_input_makes_no_folder(inputs, tmp_path, job, config, message):
    with pytest.raises(ValueError, match=message):
        prune_classifier(prune_job(inputs, tmp_path / "run", **job), hc.StructuredPruningConfig(**config))
    assert not (tmp_path / "run").exists()


def test_head_that_was_never_trained(tmp_path):
    make_inputs(tmp_path, model={"model_class": BertModel})
    with pytest.raises(
        ValueError, match=r"holds no trained task head \(missing: classifier.bias, classifier.weight\)"
    ):
        prune_classifier(prune_job(tmp_path, tmp_path / "run"), hc.StructuredPruningConfig())
    assert not (tmp_path / "run").exists()


def test_files_of_others_stay(inputs, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not of a run of hf-compress"):
        prune_classifier(prune_job(inputs, tmp_path, overwrite=True), hc.StructuredPruningConfig())
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["notes.txt"]


def test_results_may_not_replace_the_model(run, inputs):
    before = files_of(run[0])
    job = prune_job(inputs, run[0], model=str(run[0] / "pruned"), overwrite=True)
    with pytest.raises(ValueError, match="lies in the output folder"):
        prune_classifier(job, hc.StructuredPruningConfig())
    assert files_of(run[0]) == before
