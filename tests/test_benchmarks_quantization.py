"""The benchmark of number formats: cells are of saved models and done once, and its figures say what they are."""

import importlib
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForSequenceClassification

import hf_compress as hc
from hf_compress.evaluation.inference import Predictions
from tests.test_benchmarks_pruning import TinyTeachers


class Teachers(TinyTeachers):
    """As those of the benchmarks of pruning, loaded with other options too."""

    def load(self, task, path, **options):
        return AutoModelForSequenceClassification.from_pretrained(path, **options)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The benchmark, and a bench on a tiny teacher."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    module = importlib.import_module("quantization")
    monkeypatch.setattr("structured_pruning.Bench", lambda options: Teachers(tmp_path / "teachers"))
    return module, module.QuantizationBench(Namespace(teachers=None, data=None, work=tmp_path / "work"))


def test_a_cell_is_of_a_saved_model_and_done_once(tiny, monkeypatch):
    module, bench = tiny
    cell = bench.cell("trec", "int8", 0)
    teacher = bench.teacher("trec")
    expected = bench.outputs("trec", hc.quantize(teacher, hc.Int8DynamicConfig())).logits
    loaded = AutoModelForSequenceClassification.from_pretrained(bench.folder / "saved")
    assert np.array_equal(bench.outputs("trec", loaded).logits, expected)
    exact = bench.outputs("trec", teacher).logits
    assert cell["logit_error"] == pytest.approx(np.linalg.norm(expected - exact) / np.linalg.norm(exact))
    assert cell["agreement"] == (expected.argmax(-1) == exact.argmax(-1)).mean()
    assert cell["disk"]["bytes"] == (bench.folder / "saved" / "model.safetensors").stat().st_size
    # The integers, and a scale for each of the 16 or 64 outputs: 4 bytes for 16 or 64 weights.
    assert 1 / 4 + 1 / 64 < cell["disk"]["covered"] < 1 / 4 + 1 / 16
    monkeypatch.setattr(module.hc, "quantize", None)
    assert bench.cell("trec", "int8", 0) == cell


def test_float32_loses_nothing(tiny):
    _, bench = tiny
    cell = bench.cell("trec", "float32", 0)
    assert (cell["agreement"], cell["logit_error"], cell["disk"]["file"]) == (1.0, 0.0, 1.0)
    assert cell["disk"]["covered"] is None


def test_each_seed_is_another_teacher(tiny):
    _, bench = tiny
    logits = [bench.outputs("trec", bench.teacher("trec", seed)).logits for seed in (0, 1)]
    assert not np.array_equal(*logits)
    for seed in (0, 1):
        cells = {name: bench.cell("trec", name, seed) for name in ("float32", "int8")}
        assert cells["float32"]["logit_error"] == 0
        assert 0 < cells["int8"]["logit_error"] < 0.1
    stored = bench.stored("trec", "int8", 3)
    assert [cell["float32"] for cell in stored] == [bench.cell("trec", "float32", seed)["score"] for seed in (0, 1)]
    assert bench.stored("trec", "nf4", 3) == []


def test_pruned_models_are_made_once(tiny, monkeypatch):
    module, bench = tiny
    # A third is less than this small a model can be cut to.
    monkeypatch.setattr(module, "BUDGET", 0.5)
    assert bench.cell("trec", "fixed-8-static", 1)["score"] >= 0
    cells = [bench.cell("trec", name, 1) for name in ("pruned", "pruned-int8", "pruned-fixed-4")]
    sizes = [cell["disk"]["bytes"] for cell in cells]
    assert sizes == sorted(sizes, reverse=True)
    # All are of one pruned model.
    assert [folder.name for folder in (bench.folder / "pruned").iterdir()] == ["trec-1"]


def test_errors_of_baselines_are_results(tiny, monkeypatch):
    module, bench = tiny

    def broken(bench, task, seed):
        raise AssertionError("N must be divisible")

    monkeypatch.setitem(module.BASELINES, "stock-nf4", broken)
    assert bench.cell("trec", "stock-nf4", 0) == {"error": "AssertionError: N must be divisible"}
    assert "disk" not in bench.cell("trec", "torch.ao-int8", 0)
    assert bench.cell("trec", "stock-llm-int8", 0)["disk"]["covered"] < 0.5
    # Models of ours have to work: this one is too narrow for 4 bits.
    with pytest.raises(ValueError, match="widths that 4 bits can take"):
        bench.cell("trec", "nf4", 0)
    assert not bench.file("trec", "nf4", 0).exists()


def cell_of(score, agreement=0.5, covered=0.25):
    return {"score": score, "float32": 0.8, "rows": 200, "agreement": agreement, "logit_error": 0.1,
            "disk": {"bytes": 10**6, "file": 0.5, "covered": covered}}  # fmt: skip


def test_figures_and_goals(tiny):
    module, _ = tiny
    cells = {name: [] for name in module.METHODS}
    cells["float32"] = [cell_of(0.8, 1.0, None)]
    cells["int8"] = [cell_of(0.8, covered=0.28)]
    cells["fixed-8"] = [cell_of(0.76)]
    cells["fixed-8-static"] = [cell_of(0.76), cell_of(0.8)]
    cells["stock-nf4"] = [{"error": "AssertionError: N\nand more"}]
    cells["torch.ao-int8"] = [{name: value for name, value in cell_of(0.8, None).items() if name != "disk"}]
    tasks = module.report({"trec": cells, "mrpc": {name: [] for name in module.METHODS}})
    assert list(tasks) == ["trec"]
    tasks["trec"]["metric"] = "accuracy"
    found = {goal["goal"]: goal for goal in module.goals(tasks)}
    assert found.pop("int8 keeps at least 99.5 % of the score")["missed_on"] == []
    missed = found.pop("fixed-8 keeps at least 99 % of the score")
    assert missed["found"] == {"trec": pytest.approx(0.95)}
    assert missed["missed_on"] == ["trec"]
    size = found.pop("int8 takes at most 0.27 of the covered bytes")
    assert not size["mean_holds"]
    assert not found
    shown = module.tables(tasks)
    assert "trec, accuracy, 200 rows: one of them is 0.50 points" in shown
    assert "| int8 | 80.00 | 100.00 | 50.00 | 0.1000 | 1.0 | 0.500 | 0.280 |" in shown
    assert "| stock-nf4 | AssertionError: N | | |" in shown
    assert "| torch.ao-int8 | 80.00 | 100.00 |  | 0.1000 | not saved |  |  |" in shown
    assert "mean 0.9500, which does not hold; missed on trec" in shown
    summary = module.summary_table(tasks, module.METHODS)
    assert "| fixed-8-static | 97.5 ± 3.5 | 0.50 |" in summary
    assert "| stock-nf4 | error |  |" in summary


@pytest.mark.parametrize(("logits", "agreement"), [([[3.0], [4.0]], None), ([[3.0, 1.0], [0.0, 4.0]], 0.5)])
def test_closeness(tiny, logits, agreement):
    module, _ = tiny
    exact = np.array(logits)
    labels = np.zeros(len(exact))
    found = module.closeness(Predictions(exact, labels), Predictions(exact * [[1], [-1]], labels))
    assert found == {
        "agreement": agreement,
        "logit_error": pytest.approx(2 * 4 / 5 if agreement is None else 8 / 26**0.5),
    }
