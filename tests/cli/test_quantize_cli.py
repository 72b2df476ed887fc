"""`hf-compress quantize` from words to table: figures are those of the files, choices never see the rows measured."""

import json
import re

import pytest
import torch
from datasets import Dataset, DatasetDict
from matplotlib.image import imread
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig, pipeline

import hf_compress as hc
from hf_compress.cli.main import parse_quantize
from hf_compress.formats.packed import PackedModule
from hf_compress.jobs.classifiers import Yardstick, score_alone
from hf_compress.jobs.data import load_splits
from hf_compress.jobs.job import QuantizeJob
from hf_compress.jobs.quantize import prepare, quantize_classifier
from hf_compress.quantization.noise import measure_noise
from hf_compress.recipe.format_options import needs_texts
from hf_compress.report.report import markdown
from tests.tiny_job import files_of, make_inputs, model_files, quality, tiny_texts, write_data, write_rows

MODEL = {"hidden_size": 64, "intermediate_size": 128, "layers": 2}
CONFIGS = {
    "int8": hc.Int8DynamicConfig(),
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "fixed-point": hc.FixedPointConfig(bits=4, granularity="group", activations=8),
}


pytestmark = pytest.mark.usefixtures("quiet_surroundings")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"), model=MODEL)


def quantize_job(inputs, output, **job):
    defaults = {"model": str(inputs / "model"), "dataset": str(inputs / "data"), "max_length": 16, "use_cpu": True}
    return QuantizeJob(**{**defaults, "output_dir": str(output), **job})


@pytest.fixture(scope="module")
def run(inputs):
    """A finished run, and its report."""
    return inputs / "run", quantize_classifier(quantize_job(inputs, inputs / "run"), CONFIGS)


def load(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder)


# The result


def test_files_of_a_run(run):
    folder, report = run
    files = {"run.json", "report.json", "report.md", "formats.png", "noise.png"}
    assert {path.name for path in folder.iterdir()} == files | set(CONFIGS)
    for name in CONFIGS:
        assert {file.rsplit(".", 1)[-1] for file in files_of(folder / name)} <= {"json", "md", "safetensors", "txt"}
    assert json.loads((folder / "report.json").read_text()) == report


def test_saved_models_are_the_quantized_ones(run, inputs):
    material = prepare(quantize_job(inputs, run[0]), CONFIGS, load_splits(str(inputs / "data")))
    assert sum(len(batch["input_ids"]) for batch in material.batches) == 24
    assert all("labels" not in batch for batch in material.batches)
    for name, config in CONFIGS.items():
        expected = hc.quantize(material.model, config, material.batches if needs_texts(config) else None).eval()
        batch = material.batches[0]
        with torch.no_grad():
            assert torch.equal(load(run[0] / name)(**batch).logits, expected(**batch).logits)


def test_figures_are_those_of_the_saved_models(run, inputs):
    folder, report = run
    rows = tiny_texts(16, seed=2)
    assert [model["name"] for model in report["models"]] == ["dense", *CONFIGS]
    for model in report["models"]:
        path = inputs / "model" if model["name"] == "dense" else folder / model["name"]
        answers = pipeline("text-classification", str(path))([row["text"] for row in rows])
        right = [answer["label"] == ("bad", "good")[row["label"]] for answer, row in zip(answers, rows, strict=True)]
        assert model["quality"]["compressed"] == pytest.approx(sum(right) / 16)
        assert model["cost"]["bytes_on_disk"] == (path / "model.safetensors").stat().st_size
        assert model["needs_hf_compress"] == (model["name"] != "dense")
    assert (report["texts_calibrated_on"], report["rows_measured_on"], report["rows_held_out"]) == (24, 16, None)
    sizes = [model["cost"]["bytes_on_disk"] for model in report["models"]]
    assert sizes[0] > sizes[1] > sizes[2] > sizes[3]
    assert len({model["cost"]["parameters"]["total"] for model in report["models"]}) == 1


def test_noise_is_that_of_the_saved_models(run, inputs):
    folder, report = run
    dense = load(inputs / "model")
    for model in report["models"][1:]:
        assert model["kept_in_float"] == []
        if model["name"] == "nf4":
            assert model["noise"] == {}
        else:
            found = measure_noise(load(folder / model["name"]), dense)
            assert {name: one["weights"] for name, one in model["noise"].items()} == {
                name: noise.weights for name, noise in found.items()
            }
    for name in ("formats.png", "noise.png"):
        pixels = imread(folder / name)[..., :3]
        assert (abs(pixels - torch.tensor((0x00, 0x72, 0xB2)).numpy() / 255).max(-1) < 0.02).mean() > 1e-4


def test_page_speaks_of_quantization(run):
    folder, report = run
    page = (folder / "report.md").read_text()
    assert page == markdown(report)
    assert page.startswith("# Quantized to int8, nf4 and fixed-point\n")
    assert "](formats.png)" in page
    assert "](noise.png)" in page
    assert "16 rows, calibrated on 24 texts; bits/weight" in page
    assert "fixed-point (bits 4, symmetric True, granularity group" in page
    assert not re.search("student|pruned|\n\n\n", page)


def test_from_words_to_table(inputs, tmp_path, call):
    words = ["--model", inputs / "model", "--dataset", inputs / "data", "--max-length", 16, "--use-cpu"]
    output = tmp_path / "run"
    code, out, err = call("quantize", *words, "--formats", "bf16", "int8", "--embeddings", "--output-dir", output)
    assert code == 0, err
    report = json.loads((output / "report.json").read_text())
    assert report["quantization"] == {
        "bf16": {"dtype": "bf16"},
        "int8": {"exclude": [], "embeddings": True, "embedding_bits": 8, "smooth": None, "dtype": None},
    }
    for name in ("dense", "bf16", "int8"):
        assert f"\n{name} " in out
    assert " bits/weight " in out
    assert f"pipeline('text-classification', '{output}/bf16')" in out
    assert "is a stock checkpoint and needs no plug-in" in out
    assert f"{output}/formats.png" in out


# Inputs


def test_pruned_models_are_quantized(inputs, tmp_path):
    model = load(inputs / "model")
    batch = {"input_ids": torch.randint(5, 30, (8, 6)), "attention_mask": torch.ones(8, 6, dtype=torch.long)}
    narrow = hc.prune(model, hc.StructuredPruningConfig(budget=0.7, multiple_of=64), [batch])
    sparse = hc.prune(narrow, hc.UnstructuredPruningConfig(sparsity=0.5, score="magnitude"))
    sparse.save_pretrained(tmp_path / "pruned")
    for file in (inputs / "model").glob("tokenizer*"):
        (tmp_path / "pruned" / file.name).write_bytes(file.read_bytes())
    job = quantize_job(inputs, tmp_path / "run", model=str(tmp_path / "pruned"))
    configs = {"int8": hc.Int8DynamicConfig(), "fixed-point": hc.FixedPointConfig()}
    dense, *quantized = quantize_classifier(job, configs)["models"]
    for one in quantized:
        assert one["cost"]["parameters"]["total"] == dense["cost"]["parameters"]["total"]
        expected = hc.quantize(load(tmp_path / "pruned"), configs[one["name"]])
        with torch.no_grad():
            assert torch.equal(load(tmp_path / "run" / one["name"])(**batch).logits, expected(**batch).logits)


def test_quantized_models_are_refused(run, inputs, tmp_path):
    job = quantize_job(inputs, tmp_path / "run", model=str(run[0] / "int8"))
    with pytest.raises(ValueError, match="is quantized already .* load the model in floating point"):
        quantize_classifier(job, CONFIGS)
    assert not (tmp_path / "run").exists()


def test_only_formats_with_ranges_need_texts(inputs, tmp_path):
    write_rows(tmp_path / "data" / "test.csv", tiny_texts(16, seed=2))
    job = quantize_job(inputs, tmp_path / "run", dataset=str(tmp_path / "data"))
    with pytest.raises(ValueError, match="no split 'train'"):
        quantize_classifier(job, CONFIGS)
    report = quantize_classifier(job, {"int8": CONFIGS["int8"]})
    assert report["texts_calibrated_on"] == 0
    assert "without calibration" in markdown(report)


# A loss that is allowed


@pytest.mark.parametrize("metric", ["accuracy", "f1_macro"])
def test_score_is_that_of_the_report(run, inputs, metric):
    material = prepare(quantize_job(inputs, run[0]), CONFIGS, load_splits(str(inputs / "data")))
    yardstick = Yardstick(material.test, material.tokenizer, metric, 8, 0)
    options = {"metric": metric, "processing_class": material.tokenizer}
    kept = hc.score_retention(material.model, material.model, material.test, **options)
    assert score_alone(material.model, yardstick) == pytest.approx(kept.compressed)


def splits_of(**sizes) -> DatasetDict:
    """Splits in which each text is another one."""
    words = map(str, range(1000))

    def rows(n):
        return Dataset.from_list([{**row, "text": f"{row['text']} {next(words)}"} for row in tiny_texts(n)])

    return DatasetDict({name: rows(n) for name, n in sizes.items()})


@pytest.mark.parametrize(
    ("sizes", "test_split", "held_out", "n_rows"),
    [
        ({"train": 30, "test": 8}, "test", "train", 3),
        ({"train": 30, "validation": 9, "test": 8}, "test", "validation", 9),
        ({"train": 30, "validation": 9, "test": 8}, None, "train", 3),
        ({"dev": 9, "test": 8}, "test", "dev", 9),
    ],
)
def test_rows_held_out_are_not_those_measured(inputs, tmp_path, monkeypatch, sizes, test_split, held_out, n_rows):
    splits, seen = splits_of(**sizes), {}

    def spy(job, test, texts, held):
        seen.update(test=test, texts=texts, held=held)
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_compress.jobs.quantize.load_material", spy)
    configs = CONFIGS if "train" in sizes else {"int8": CONFIGS["int8"]}
    with pytest.raises(KeyboardInterrupt):
        prepare(quantize_job(inputs, tmp_path, max_drop=0.01, eval_split=test_split), configs, splits)
    assert (seen["held"].split, len(seen["held"].rows)) == (held_out, n_rows)
    assert set(seen["held"].rows["text"]) <= set(splits[held_out]["text"])
    for other in (seen["test"], seen["texts"]):
        assert other is None or not set(seen["held"].rows["text"]) & set(other.rows["text"])
    assert seen["texts"] is None or len(seen["texts"].rows) == 30 - n_rows * (held_out == "train")


def test_no_rows_to_hold_out(inputs, tmp_path):
    with pytest.raises(ValueError, match="have test only, and 'test' is measured on: add .* or leave --max-drop out"):
        quantize_classifier(quantize_job(inputs, tmp_path / "run", max_drop=0.01), CONFIGS, splits_of(test=8))


def test_costly_module_stays_in_floating_point(inputs, tmp_path, monkeypatch):
    name = "bert.encoder.layer.1.output.dense"
    rows = []

    def score(model, yardstick):
        rows.append(len(yardstick.rows))
        return float(type(model.get_submodule(name)) is torch.nn.Linear)

    monkeypatch.setattr("hf_compress.jobs.quantize.score_alone", score)
    report = quantize_classifier(quantize_job(inputs, tmp_path / "run", max_drop=0.5), {"int8": CONFIGS["int8"]})
    assert report["models"][1]["kept_in_float"] == [name]
    assert type(load(tmp_path / "run" / "int8").get_submodule(name)) is torch.nn.Linear
    assert set(rows) == {3}
    page = markdown(report)
    assert f"In floating point besides the task head, in int8: {name}." in page
    assert "at most 0.5 is lost on 3 rows of train, which the model may know by heart; none of them is" in page


def test_loss_that_cannot_be_kept_leaves_no_folder(inputs, tmp_path, monkeypatch):
    def score(model, yardstick):
        return float(not any(isinstance(module, PackedModule) for module in model.modules()))

    monkeypatch.setattr("hf_compress.jobs.quantize.score_alone", score)
    with pytest.raises(ValueError, match="max_drop=0.1 cannot be kept"):
        quantize_classifier(quantize_job(inputs, tmp_path / "run", max_drop=0.1), {"int8": CONFIGS["int8"]})
    assert not (tmp_path / "run").exists()


# A format chosen by its time


def interrupt(*arguments, **options):
    raise KeyboardInterrupt


def test_choice_is_made_once(inputs, tmp_path, monkeypatch, call):
    words = ["--model", inputs / "model", "--dataset", inputs / "data", "--max-length", 16, "--use-cpu", "--auto"]
    words += ["--formats", "nf4", "int8", "--cost-batch", 4, "--output-dir", tmp_path / "run"]
    with monkeypatch.context() as patched:
        patched.setattr("hf_compress.jobs.quantize.quantize_missing", interrupt)
        # Here float32 is the choice, and the fastest of the others is taken.
        patched.setattr("hf_compress.recommend.choose", lambda times, tolerance: "float32")
        with pytest.raises(KeyboardInterrupt):
            quantize_classifier(*parse_quantize([str(word) for word in words]))
    choice = json.loads((tmp_path / "run" / "choice.json").read_text())
    times = {one["name"]: one["median_s"] for one in choice["candidates"]}
    assert choice["choice"] == min(("nf4", "int8"), key=times.__getitem__)
    assert choice["conditions"]["batch_size"] == 4
    monkeypatch.setattr("hf_compress.recommend.recommend_format", interrupt)
    code, out, err = call("quantize", *words)
    assert code == 0, err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [model["name"] for model in report["models"]] == ["dense", choice["choice"]]
    assert report["latency"]["conditions"]["batch_size"] == 4
    assert choice["table"] in markdown(report)
    assert f"\n{choice['choice']} " in out


def test_only_formats_that_are_timed_can_be_chosen(inputs, tmp_path):
    with pytest.raises(ValueError, match="fixed-point cannot be chosen by its time: give formats out of bf16, fp16"):
        quantize_classifier(quantize_job(inputs, tmp_path / "run", auto=True), {"fixed-point": hc.FixedPointConfig()})
    assert not (tmp_path / "run").exists()


# Being stopped


def test_run_stopped_at_its_second_format(run, inputs, tmp_path, monkeypatch):
    job = quantize_job(inputs, tmp_path / "run")
    with monkeypatch.context() as patched:

        def stop(model, config, data):
            return hc.quantize(model, config, data) if config is CONFIGS["int8"] else interrupt()

        patched.setattr("hf_compress.jobs.quantize.quantize", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize_classifier(job, CONFIGS)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"run.json", "int8"}
    place = (tmp_path / "run" / "int8").stat()
    with monkeypatch.context() as patched:
        patched.setattr("hf_compress.jobs.quantize.measure", interrupt)
        with pytest.raises(KeyboardInterrupt):
            quantize_classifier(job, CONFIGS)
    monkeypatch.setattr("hf_compress.jobs.quantize.quantize", interrupt)
    assert quality(quantize_classifier(job, CONFIGS)) == quality(run[1])
    assert (tmp_path / "run" / "int8").stat().st_ino == place.st_ino
    for name in CONFIGS:
        assert model_files(tmp_path / "run" / name) == model_files(run[0] / name)


def test_finished_runs_are_replaced_only_when_asked(run, inputs):
    before = files_of(run[0])
    for job, message in (({}, "holds a finished run"), ({"max_length": 2, "overwrite": True}, "--max-length 3")):
        with pytest.raises(ValueError, match=message):
            quantize_classifier(quantize_job(inputs, run[0], **job), CONFIGS)
        assert files_of(run[0]) == before


# Bad input leaves nothing behind


@pytest.mark.parametrize(
    ("job", "configs", "message"),
    [
        ({"metric": "pearsonr"}, CONFIGS, "choose one of accuracy"),
        ({"text_columns": ["nope"]}, CONFIGS, "no column 'nope'; its columns are text, label"),
        ({"max_length": 2}, CONFIGS, "--max-length 3 or more"),
        ({}, {}, "names no format"),
        ({}, {"int8": hc.Int8DynamicConfig(exclude=("nothing",))}, "'nothing', which matches none"),
        ({}, {"x": BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["a("])}, "is no regular expression"),
    ],
)
def test_bad_input_makes_no_folder(inputs, tmp_path, job, configs, message):
    with pytest.raises(ValueError, match=message):
        quantize_classifier(quantize_job(inputs, tmp_path / "run", **job), configs)
    assert not (tmp_path / "run").exists()


def test_what_is_found_while_quantizing_takes_the_folder_back(tmp_path):
    make_inputs(tmp_path, model={"layers": 1})
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match="None of the 7 projections has widths that 4 bits can take"):
        quantize_classifier(quantize_job(tmp_path, tmp_path / "run"), {"nf4": CONFIGS["nf4"]})
    assert not list((tmp_path / "run").iterdir())
    # What was saved before stays, and so does what the run was asked for.
    with pytest.raises(ValueError, match="4 bits can take"):
        quantize_classifier(quantize_job(tmp_path, tmp_path / "run"), {"int8": CONFIGS["int8"], "nf4": CONFIGS["nf4"]})
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"run.json", "int8"}


def test_config_of_another_kind_is_refused(inputs, tmp_path):
    with pytest.raises(TypeError, match="A str does not say how to quantize"):
        quantize_classifier(quantize_job(inputs, tmp_path / "run"), {"int8": "int8"})
    assert not (tmp_path / "run").exists()


def test_regression(tmp_path):
    make_inputs(tmp_path, model={**MODEL, "num_labels": 1, "problem_type": "regression"})
    write_data(tmp_path / "data", label=lambda row: row["label"] + 0.5)
    report = quantize_classifier(
        quantize_job(tmp_path, tmp_path / "run", max_drop=1.0), {"int8": hc.Int8DynamicConfig()}
    )
    assert report["metric"] == "pearsonr"


def test_a_changed_model_is_not_continued(tmp_path):
    make_inputs(tmp_path, model={**MODEL})
    job = quantize_job(tmp_path, tmp_path / "run")
    quantize_classifier(job, {"int8": CONFIGS["int8"]})
    (tmp_path / "run" / "report.json").unlink()
    make_inputs(tmp_path, model={**MODEL, "layers": 1})
    with pytest.raises(
        ValueError, match=r"other settings \(the model's or the data's contents are others\)[.] Repeat"
    ):
        quantize_classifier(job, {"int8": CONFIGS["int8"]})
