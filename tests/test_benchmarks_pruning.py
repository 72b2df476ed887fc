"""Benchmarks of pruning: baselines keep to their budgets and do what their formulas say, and cells are right."""

import importlib
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

from hf_compress.jobs.data import tokenize
from hf_compress.modeling.capture import gate_outputs
from tests.modeling.tiny import HEADS, difference, predict, tiny_batch, tiny_model
from tests.tiny_job import save_tiny_bert, tiny_texts, tiny_tokenizer

CUTS = ("random_cut", "l2_cut", "textpruner_cut", "kwon_cut")


@pytest.fixture
def baselines(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    return importlib.import_module("pruning_baselines")


def classifier(task="Sequence"):
    return tiny_model("bert", f"BertFor{task}Classification", num_labels=3)


def calibration(model):
    return [tiny_batch(model, tuple(range(3, 3 + size))) for size in (35, 20, 10, 5)]


def macs(baselines, model):
    length, hidden_size, head_dim = 7.0, 32, 8
    head = 4 * length * hidden_size * head_dim + 2 * length**2 * head_dim
    heads, neurons = ([baselines.n_units(part) for part in baselines.parts_of(model)[i::2]] for i in (0, 1))
    assert min(heads + neurons) >= 1
    return sum(heads) * head + sum(neurons) * 2 * length * hidden_size


@pytest.mark.parametrize("task", ["Sequence", "Token"])
@pytest.mark.parametrize("budget", [0.2, 0.7])
@pytest.mark.parametrize("name", CUTS)
def test_budget_is_used_and_not_exceeded(baselines, name, budget, task):
    model = classifier(task)
    batches = calibration(model)
    before = predict(model, batches[0])
    pruned = getattr(baselines, name)(model, batches, budget)
    share = macs(baselines, pruned) / macs(baselines, model)
    # At the least one head and neuron per layer stay: here a quarter of the heads, and rounding counts in each layer.
    assert budget - 0.1 < share <= budget
    assert predict(pruned, batches[0]).isfinite().all()
    assert torch.equal(predict(model, batches[0]), before)


@pytest.mark.parametrize("name", CUTS)
def test_whole_budget_changes_nothing(baselines, name):
    model = classifier()
    batches = calibration(model)
    assert (
        difference(predict(getattr(baselines, name)(model, batches, 1.0), batches[0]), predict(model, batches[0])) == 0
    )


def test_too_small_budget_is_refused(baselines):
    model = classifier()
    for name in CUTS:
        with pytest.raises(ValueError, match="need a budget of"):
            getattr(baselines, name)(model, calibration(model), 0.05)


@pytest.mark.parametrize("name", ["random_cut", "l2_cut"])
def test_scopes(baselines, name):
    model = classifier()
    for scope in ("layer", "model"):
        pruned = getattr(baselines, name)(model, calibration(model), 0.5, scope=scope)
        heads = [baselines.n_units(part) for part in baselines.parts_of(pruned)[::2]]
        assert scope == "model" or heads == [HEADS // 2] * 3
        assert macs(baselines, pruned) <= 0.5 * macs(baselines, model)


def test_gate_gradients_are_sums_of_gradient_times_weight(baselines):
    model, batch = classifier(), tiny_batch(classifier())
    targets = baselines.sampled_targets(model, [batch], seed=0)
    gradients = baselines.gate_gradients(model, [batch], targets)
    torch.nn.functional.cross_entropy(model(**batch).logits, targets[0]).backward()
    for part, found in zip(baselines.parts_of(model), gradients, strict=True):
        weight = part.output.weight
        expected = baselines.by_unit((weight.grad * weight).sum(0), part)
        assert torch.allclose(found[0], expected, atol=1e-6)


def test_rearrangement_keeps_counts_and_does_not_lose_more(baselines):
    gradients = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(10) >= 5
    mask = mask[gradients.square().sum(0).argsort().argsort()]
    found = baselines.rearranged(mask, gradients)
    assert found.sum() == mask.sum()

    def loss(kept):
        return gradients[:, ~kept].sum(1).square().sum()

    assert loss(found) < loss(mask)


@pytest.mark.parametrize("task", ["Sequence", "Token"])
def test_normal_equations(baselines, task):
    model = classifier(task)
    batches = calibration(model)
    pruned = baselines.l2_cut(model, batches, 0.6)
    for place in (2, 5):
        part, target = baselines.parts_of(pruned)[place], baselines.parts_of(model)[place]
        first_only = place == 5 and task == "Sequence"
        matrix, right = baselines.normal_equations(pruned, part, model, target, batches, first_only)
        columns, lacking = [], []
        for batch in batches:
            kept = batch["attention_mask"].bool()
            if first_only:
                kept[:, 1:] = False
            x, got = (tensor[kept].double() for tensor in baselines.pass_to(pruned, part, batch))
            lacking.append(baselines.pass_to(model, target, batch)[1][kept].double() - got)
            size = x.shape[1] // baselines.n_units(part)
            given = [
                x[:, start : start + size] @ part.output.weight.double()[:, start : start + size].T
                for start in range(0, x.shape[1], size)
            ]
            given += [torch.ones_like(got)] if place == 2 else []
            columns.append(torch.stack([one.flatten() for one in given], 1))
        a, r = torch.cat(columns), torch.cat(lacking).flatten()
        assert torch.allclose(torch.from_numpy(matrix), a.T @ a)
        assert torch.allclose(torch.from_numpy(right), a.T @ r)


@pytest.mark.parametrize("reference", ["halfway", "dense"])
def test_folded_scales_are_gates(baselines, monkeypatch, reference):
    model = classifier()
    batches = calibration(model)
    masks, scales = [], []
    rearranged, tune = baselines.rearranged, baselines.tune_
    monkeypatch.setattr(baselines, "rearranged", lambda *args: masks.append(rearranged(*args)) or masks[-1])
    monkeypatch.setattr(baselines, "tune_", lambda *args, **kwargs: scales.extend(tune(*args, **kwargs)))
    kwon = partial(baselines.kwon_cut, model, batches, 0.5)
    tuned = kwon(reference=reference)
    assert any((scale != 1).any() for scale in scales[1:])
    assert (scales[0] == 1).all()
    gates = {
        part: torch.zeros(baselines.n_units(part)).masked_scatter(mask, scale)
        for part, mask, scale in zip(baselines.parts_of(model), masks, scales, strict=True)
    }
    batch = tiny_batch(model)
    with gate_outputs(gates):
        gated = predict(model, batch)
    assert difference(predict(tuned, batch), gated) <= 1e-5
    assert difference(predict(kwon(tune=False), batch), gated) > 1e-3


class TinyTeachers:
    """What cells need of the benchmark that trains the teachers."""

    def __init__(self, folder):
        self.folder, self.tokenizer = folder, tiny_tokenizer()
        save_tiny_bert(folder / "trec-teacher", layers=6, intermediate_size=64)

    def teacher(self, task, seed=0):
        folder = self.folder / f"{task}-teacher-{seed}"
        if seed and not folder.exists():
            save_tiny_bert(folder, layers=6, intermediate_size=64, initializer_range=0.3 + seed / 10)

    def load(self, task, path):
        return AutoModelForSequenceClassification.from_pretrained(path)

    def prepared(self, task):
        rows = {"train": tiny_texts(24, seed=1), "test": tiny_texts(16, seed=2)}
        sets = {name: Dataset.from_list(texts) for name, texts in rows.items()}
        return {name: tokenize(one, self.tokenizer, ["text"], one["label"], 16) for name, one in sets.items()}

    def collator(self, task):
        return DataCollatorWithPadding(self.tokenizer)

    def stored(self, name):
        return {"test": 0.75} if name == "trec-teacher" else None


@pytest.fixture
def sparse(monkeypatch, tmp_path):
    """The benchmark of single weights, and a bench on a tiny teacher."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    module = importlib.import_module("unstructured_pruning")
    monkeypatch.setattr("structured_pruning.Bench", lambda options: TinyTeachers(tmp_path / "teachers"))
    options = Namespace(teachers=None, data=None, work=tmp_path / "work")
    return module, module.OneShotBench(options), module.TrainedBench(options)


def test_cells_of_single_weights_are_of_saved_models_and_done_once(sparse, monkeypatch):
    module, bench, _ = sparse
    cells = {
        (method, level): bench.cell("trec", method, level, 0)
        for method, level in (
            ("magnitude", "2:4"),
            ("sparsegpt", "0.5"),
            ("sparsegpt", "0.8"),
            ("sparsegpt-8", "0.8"),
            ("ours", "0.5"),
            ("magnitude-repaired-8", "0.8"),
        )
    }
    for (_, level), cell in cells.items():
        share = 0.5 if level == "2:4" else float(level)
        assert cell["sparsity"] == pytest.approx(share, abs=0.003)
        # In float32, with a bit for each weight.
        assert cell["disk"]["weights"] == pytest.approx(1 - cell["sparsity"] + 1 / 32)
        assert cell["disk"]["weights"] < cell["disk"]["file"] < 1
    assert module.sparsity(AutoModelForSequenceClassification.from_pretrained(bench.folder / "saved")) > 0.79
    monkeypatch.setattr(module.hc, "prune", None)
    assert bench.cell("trec", "sparsegpt", "0.8", 0) == cells["sparsegpt", "0.8"]
    tasks = bench.report(seeds=3)
    assert tasks["trec"]["methods"]["sparsegpt"]["0.8"]["mean"] == cells["sparsegpt", "0.8"]["score"]
    found = tasks["trec"]["goals"]
    gained = 100 * (cells["sparsegpt-8", "0.8"]["score"] - cells["sparsegpt", "0.8"]["score"])
    gains = {"wanda": None, "sparsegpt": pytest.approx(gained), "magnitude-repaired": None, "ours": None}
    assert found["8 rounds over 1 at 80 %, points"] == gains
    lost = {method: pytest.approx(75 - 100 * cells[method, "0.5"]["score"]) for method in ("sparsegpt", "ours")}
    assert found["below dense at 50 %, points"] == lost
    shown = module.table(tasks, {"trec": {"dense": 0.75, "magnitude": {"mean": 0.6, "sd": None, "retention": 0.8}}})
    assert "trec, accuracy, dense 75.0" in shown
    assert "| bytes of the weights | 53.1 |  |  | 23." in shown
    assert "- magnitude: 60.0, retention 80.00 %" in shown


@pytest.mark.parametrize(("scores", "holds"), [((0.4, 0.5, 0.6, 0.6), True), ((0.4, 0.6, 0.5, 0.7), False)])
def test_the_order_that_is_aimed_at(sparse, scores, holds):
    module, _, _ = sparse
    names = ("random", "magnitude", "wanda", "sparsegpt")
    methods = {name: {"0.7": {"scores": [score]}} for name, score in zip(names, scores, strict=True)}
    assert module.goals(0.9, methods)["random < magnitude < wanda <= sparsegpt at 70 %"] is holds
    assert module.goals(0.9, {})["random < magnitude < wanda <= sparsegpt at 70 %"] is None


@pytest.mark.parametrize("kind", ["magnitude", "sparsegpt"])
def test_trained_cells_end_at_their_sparsity(sparse, kind):
    module, _, bench = sparse
    before = bench.small("trec", kind, 0)
    assert module.sparsity(before) == pytest.approx(0 if kind == "magnitude" else 0.8, abs=0.003)
    cell = bench.cell("trec", kind, 0)
    found = bench.report(seeds=3)["trec"][kind]
    assert found["mean"] == cell["score"]
    assert found["retention"] == pytest.approx(cell["score"] / 0.75)
    # A model of another sparsity gets no score.
    with pytest.raises(RuntimeError, match="of the weights are 0"):
        bench.score("trec", bench.teacher("trec"))


def test_cells_of_single_weights_keep_their_meaning(sparse):
    module, _, _ = sparse
    configs = {method: module.config_of(method, "0.8", seed=0) for method in module.METHODS}
    assert {method for method, config in configs.items() if config.is_repaired} == {
        "ours", "ours-8", "magnitude-repaired", "magnitude-repaired-8",
    }  # fmt: skip
    assert configs["ours"] == module.UnstructuredPruningConfig(0.8)
    assert {method for method in module.METHODS if module.levels_of(method) == ("0.8",)} == {
        method for method, config in configs.items() if config.steps == 8
    }
    assert list(module.seeds_of("magnitude", 3)) == [0]
    assert list(module.seeds_of("magnitude-repaired", 3)) == [0, 1, 2]
