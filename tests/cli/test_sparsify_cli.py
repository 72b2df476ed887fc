"""`hf-compress prune --unstructured` from words to table: the flow of heads and neurons, and figures of its own."""

import json
import re
from dataclasses import fields

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, pipeline

import hf_compress as hc
from hf_compress.cli.main import parse_prune
from hf_compress.jobs.data import load_splits
from hf_compress.jobs.job import PruneJob, SparsifyJob
from hf_compress.jobs.prune import prepare, prune_classifier
from hf_compress.pruning.prune import prune
from hf_compress.pruning.unstructured import measure_sparsity
from hf_compress.pruning.unstructured_config import UnstructuredPruningConfig
from hf_compress.pruning.weight_layers import find_layers
from hf_compress.report.report import markdown
from tests.tiny_job import files_of, make_inputs, model_files, quality, tiny_texts, write_rows

MODEL = {"intermediate_size": 64}


pytestmark = pytest.mark.usefixtures("quiet_surroundings")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"), model=MODEL)


def sparsify_job(inputs, output, **job):
    defaults = {"model": str(inputs / "model"), "dataset": str(inputs / "data"), "max_length": 16, "use_cpu": True}
    return SparsifyJob(**{**defaults, "output_dir": str(output), **job})


@pytest.fixture(scope="module")
def run(inputs):
    """A finished run, and its report."""
    return inputs / "run", prune_classifier(sparsify_job(inputs, inputs / "run"), UnstructuredPruningConfig())


def words_of(inputs, output, *more):
    places = ("--model", inputs / "model", "--dataset", inputs / "data", "--output-dir", output)
    return ["prune", "--unstructured", *places, "--max-length", 16, "--use-cpu", *more]


def zeros_of(model) -> float:
    weights = torch.cat([layer.weight.flatten() for layer in find_layers(model)])
    return (weights == 0).double().mean().item()


# The result


def test_files_of_a_run(run):
    folder, report = run
    names = {"run.json", "report.json", "report.md", "pruned", "sparsity.png"}
    assert {path.name for path in folder.iterdir()} == names
    assert {name.rsplit(".", 1)[-1] for name in files_of(folder / "pruned")} <= {"json", "md", "safetensors", "txt"}
    assert json.loads((folder / "report.json").read_text()) == report


def test_figures_are_those_of_the_saved_models(run, inputs):
    folder, report = run
    dense, pruned = report["models"]
    models = [
        AutoModelForSequenceClassification.from_pretrained(path) for path in (inputs / "model", folder / "pruned")
    ]
    assert pruned["zeros"] == pytest.approx(zeros_of(models[1])) == pytest.approx(0.5, abs=1e-3)
    assert "zeros" not in dense
    batches = prepare(
        sparsify_job(inputs, folder), UnstructuredPruningConfig(), load_splits(str(inputs / "data"))
    ).batches
    assert pruned["layers"] == measure_sparsity(models[1], models[0], batches)
    assert all(values["output_error"] > 0 for values in pruned["layers"].values())
    rows = tiny_texts(16, seed=2)
    classify = pipeline("text-classification", str(folder / "pruned"))
    answers = classify([row["text"] for row in rows])
    right = [answer["label"] == ("bad", "good")[row["label"]] for answer, row in zip(answers, rows, strict=True)]
    assert sum(right) / 16 == pytest.approx(pruned["quality"]["compressed"])


def test_shape_stays_and_files_shrink(run, inputs):
    folder, report = run
    dense, pruned = report["models"]
    assert dense["cost"]["parameters"]["total"] == pruned["cost"]["parameters"]["total"]
    assert dense["cost"]["macs"] == pruned["cost"]["macs"]
    for row, path in ((dense, inputs / "model"), (pruned, folder / "pruned")):
        assert row["cost"]["bytes_on_disk"] == (path / "model.safetensors").stat().st_size
    saved = load_file(folder / "pruned" / "model.safetensors")
    assert sum(name.endswith("_bitmask") for name in saved) == len(pruned["layers"])
    whole = load_file(inputs / "model" / "model.safetensors")
    assert sum(tensor.nbytes for tensor in saved.values()) < 0.65 * sum(tensor.nbytes for tensor in whole.values())


def test_saved_model_is_the_pruned_one(run, inputs):
    folder, _ = run
    config = UnstructuredPruningConfig()
    material = prepare(sparsify_job(inputs, folder), config, load_splits(str(inputs / "data")))
    expected = prune(material.model, config, material.batches).state_dict()
    loaded = AutoModelForSequenceClassification.from_pretrained(folder / "pruned").state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.items())


def test_page_speaks_of_zeros(run):
    folder, report = run
    page = (folder / "report.md").read_text()
    assert page == markdown(report)
    assert page.startswith("# 50 % of the blocks' weights made 0\n")
    assert "![Zeros and output errors per layer: pruned](sparsity.png)" in page
    assert "| MB | zeros | faster |" in page
    assert "| 50.0 % |" in page
    assert "score sparsegpt" in page
    assert not re.search(r"MACs|Heads|student|None|\n\n\n", page)


def test_from_words_to_table(inputs, tmp_path, call):
    more = ("--sparsities", "0.5", "0.7", "--score", "wanda", "--exclude", ".*intermediate", ".*layer.0")
    code, out, err = call(*words_of(inputs, tmp_path / "run", *more))
    assert code == 0, err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [model["name"] for model in report["models"]] == ["dense", "pruned-0.5", "pruned-0.7"]
    assert [model["sparsity"] for model in report["models"][1:]] == [0.5, 0.7]
    assert (report["pruning"]["score"], report["pruning"]["exclude"]) == ("wanda", [".*intermediate", ".*layer.0"])
    whole = {name for name, values in report["models"][1]["layers"].items() if not values["sparsity"]}
    assert len(whole) == 6 + 2
    assert re.search(r"pruned-0\.7 .* \d\d\.\d % ", out)
    assert f"pipeline('text-classification', '{tmp_path}/run/pruned-0.5')" in out
    assert "\nimport hf_compress\nfrom transformers import pipeline\n" in out
    assert f"{tmp_path}/run/sparsity-0.7.png" in out
    assert "PruningCallback" in out
    assert "Pruning weights" in err


@pytest.mark.parametrize(
    ("words", "zeros"),
    [
        (("--pattern", "2:4", "--score", "magnitude"), 0.5),
        (("--pattern", "4x1", "--sparsity", "0.75", "--score", "l2"), 0.75),
        (("--allocation", ".*layer.0=0.25", ".*=0.75", "--score", "l1"), (0.25 + 2 * 0.75) / 3),
        (("--score", "random", "--scope", "global", "--sparsity", "0.25"), 0.25),
        (("--allocation", "owl", "--steps", "2"), 0.5),
    ],
)
def test_patterns_and_allocations(inputs, tmp_path, call, words, zeros):
    code, _, err = call(*words_of(inputs, tmp_path / "run", *words))
    assert code == 0, err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["models"][1]["zeros"] == pytest.approx(zeros, abs=0.005)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "pruned")
    assert zeros_of(loaded) == report["models"][1]["zeros"]


def test_dtype_of_the_checkpoint_stays(tmp_path):
    make_inputs(tmp_path, model=MODEL)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    prune_classifier(sparsify_job(tmp_path, tmp_path / "run"), UnstructuredPruningConfig())
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "pruned")
    assert {tensor.dtype for tensor in loaded.state_dict().values() if tensor.is_floating_point()} == {torch.bfloat16}
    assert zeros_of(loaded) == pytest.approx(0.5, abs=1e-3)


def test_labels_of_the_texts_are_not_looked_at(run, inputs, tmp_path):
    write_rows(tmp_path / "data" / "train.csv", [{"text": row["text"]} for row in tiny_texts(24, seed=1)])
    write_rows(tmp_path / "data" / "test.csv", tiny_texts(16, seed=2))
    job = sparsify_job(inputs, tmp_path / "run", dataset=str(tmp_path / "data"))
    report = prune_classifier(job, UnstructuredPruningConfig())
    assert model_files(tmp_path / "run" / "pruned") == model_files(run[0] / "pruned")
    assert quality(report) == quality(run[1])


# Being stopped, and written over


def interrupt(*arguments, **options):
    raise KeyboardInterrupt


@pytest.mark.parametrize("values", [{"pattern": "4x1"}, {"exclude": ".*layer.0", "allocation": {".*layer.2": 0.25}}])
def test_run_stopped_at_its_second_sparsity(inputs, tmp_path, monkeypatch, values):
    config = UnstructuredPruningConfig(score="magnitude", **values)
    job = sparsify_job(inputs, tmp_path / "run", sparsities=[0.5, 0.75])
    with monkeypatch.context() as patched:

        def stop(model, config, data):
            return prune(model, config, data) if config.sparsity == 0.5 else interrupt()

        patched.setattr("hf_compress.jobs.prune.prune", stop)
        with pytest.raises(KeyboardInterrupt):
            prune_classifier(job, config)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"run.json", "pruned-0.5"}
    place = (tmp_path / "run" / "pruned-0.5").stat()
    prune_classifier(job, config)
    assert (tmp_path / "run" / "pruned-0.5").stat().st_ino == place.st_ino
    unbroken = sparsify_job(inputs, tmp_path / "unbroken", sparsities=[0.5, 0.75])
    prune_classifier(unbroken, config)
    for name in ("pruned-0.5", "pruned-0.75"):
        assert model_files(tmp_path / "run" / name) == model_files(tmp_path / "unbroken" / name)


def test_one_kind_replaces_the_other_only_when_asked(inputs, tmp_path):
    job = {"model": str(inputs / "model"), "dataset": str(inputs / "data"), "max_length": 16, "use_cpu": True}
    heads = PruneJob(**job, output_dir=str(tmp_path / "run"))
    prune_classifier(heads, hc.StructuredPruningConfig(score="l2", repair="none"))
    config = UnstructuredPruningConfig(score="magnitude")
    before = files_of(tmp_path / "run")
    with pytest.raises(ValueError, match="holds a finished run"):
        prune_classifier(sparsify_job(inputs, tmp_path / "run"), config)
    assert files_of(tmp_path / "run") == before
    prune_classifier(sparsify_job(inputs, tmp_path / "run", overwrite=True), config)
    names = {"run.json", "report.json", "report.md", "pruned", "sparsity.png"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == names


# Options


def test_help_shows_every_option_of_both_kinds(call):
    code, out, _ = call("prune", "--help")
    assert code == 0
    assert "--unstructured" in out
    for table in (SparsifyJob, UnstructuredPruningConfig, PruneJob, hc.StructuredPruningConfig):
        for field in fields(table):
            assert f"--{field.name.replace('_', '-')} " in out
    assert out.count("--score ") == 2
    assert out.count("--n-texts ") == 1


def test_every_option_is_parsed():
    job = {
        "model": "m", "dataset": "d", "output_dir": "o", "dataset_name": "sst2", "text_columns": ["a", "b"],
        "label_column": "y", "eval_split": "dev", "max_length": 64, "metric": "f1", "overwrite": True,
        "sparsities": [0.5, 0.25], "n_texts": 9, "eval_batch_size": 8, "use_cpu": True,
    }  # fmt: skip
    config = {
        "sparsity": 0.3, "score": "wanda", "scope": "row", "pattern": (32, 1), "allocation": {"a.*": 0.1, "b": 0.2},
        "steps": 3, "exclude": ("c", "d"), "damping": 0.1, "precision": "float64", "sweep_width": 16,
        "repair": "none", "ridge": 0.2,
        "outlier_factor": 7.0, "outlier_spread": 0.1, "seed": 3,
    }  # fmt: skip
    texts = {"pattern": "32x1", "allocation": ["a.*=0.1", "b=0.2"]}
    words = ["--unstructured"]
    for name, value in (job | config | texts).items():
        values = value if isinstance(value, list | tuple) else [value]
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    assert parse_prune(words) == (SparsifyJob(**job), UnstructuredPruningConfig(**config))
    assert job.keys() == SparsifyJob.__dataclass_fields__.keys()
    assert config.keys() <= UnstructuredPruningConfig.__dataclass_fields__.keys()
    least = ["--model", "m", "--dataset", "d", "--output-dir", "o", "--unstructured"]
    assert parse_prune(least) == (SparsifyJob("m", "d", "o"), UnstructuredPruningConfig())
    for words, value in ((["owl"], "owl"), (["uniform"], "uniform"), (["a=b=0.5"], {"a=b": 0.5})):
        assert parse_prune([*least, "--allocation", *words])[1].allocation == value
    assert parse_prune([*least, "--pattern", "2:4"])[1] == UnstructuredPruningConfig(pattern="2:4")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--unstructured --budget 0.5", r"--budget is no option here \(did you mean --sparsity\?\). It is for heads"
         " and neurons: leave out --unstructured"),
        ("--sparsities 0.5 0.7", r"--sparsities is no option here \(did you mean --budgets\?\). It is for single"
         " weights: add --unstructured"),
        ("--sweep-width=16", "--sweep-width=16 is no option here.* It is for single weights: add --unstructured"),
        ("--unstructured --use_labels", "--use_labels is no option here.* leave out --unstructured"),
        ("--unstructured --sparsty 0.5", r"--sparsty is no option \(did you mean --sparsity\?\). .*prune --help"),
        ("--unstructured --score obs", "invalid choice: 'obs'"),
        ("--unstructured --sparsity 1", r"sparsity=1.0 is no share of weights"),
        ("--unstructured --sparsities 0.5 0.5", r"names a sparsity twice"),
        ("--unstructured --pattern 4:2", "pattern='4:2' is no n:m pattern.*or '32x1' for blocks"),
        ("--unstructured --pattern 0x4", r"pattern=\(0, 4\) is no block"),
        ("--unstructured --pattern 2:4 --sparsities 0.7", "contradict each other"),
        ("--unstructured --allocation a=0.5 owl", "allocation='a=0.5 owl' is not made of NAME=SHARE"),
        ("--unstructured --allocation even", "allocation='even' is unknown"),
        ("--unstructured --allocation a=2", "is no share of weights to prune"),
    ],
)  # fmt: skip
def test_errors_are_one_paragraph(call, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.csv").write_text("text,label\na,0\n")
    least = ["--model", "m", "--dataset", "data.csv", "--output-dir", "o"]
    code, out, err = call("prune", *least, *words.split())
    assert (code, out) == (1, "")
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert re.search(message, err), err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("job", "config", "message"),
    [
        ({"metric": "pearsonr"}, {}, "choose one of accuracy"),
        ({}, {"pattern": "3:5"}, "does not divide .* which has 16 outputs and 16 inputs"),
        ({}, {"pattern": "3x1"}, r"pattern=\(3, 1\) does not divide"),
        ({}, {"exclude": "nothing"}, "'nothing', which matches none of the 18 projections"),
        ({}, {"exclude": ".*"}, "leaves none of the 18 projections"),
        ({}, {"allocation": {"nothing": 0.5}}, "'nothing', which matches none"),
        ({}, {"score": "movement"}, "adds up what a training does"),
        ({"n_texts": 0}, {}, "n_texts=0 counts texts"),
    ],
)
def test_bad_input_makes_no_folder(inputs, tmp_path, job, config, message):
    with pytest.raises(ValueError, match=message):
        prune_classifier(sparsify_job(inputs, tmp_path / "run", **job), UnstructuredPruningConfig(**config))
    assert not (tmp_path / "run").exists()


def test_config_of_another_kind_is_refused(inputs, tmp_path):
    with pytest.raises(TypeError, match="A StudentConfig is no config .* UnstructuredPruningConfig"):
        prune_classifier(sparsify_job(inputs, tmp_path / "run"), hc.StudentConfig(num_layers=1))
    assert not (tmp_path / "run").exists()
