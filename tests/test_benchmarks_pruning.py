"""The pruning baselines of the benchmarks keep to their budgets and do what their formulas say."""

import importlib
from functools import partial
from pathlib import Path

import pytest
import torch

from hf_compress.modeling.capture import gate_outputs
from tests.modeling.tiny import HEADS, difference, predict, tiny_batch, tiny_model

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
