"""Whole layers: gone down to the budget, what is left repaired, and what cannot be refused at once."""

import json
import logging

import numpy as np
import pytest
import torch

import hf_compress as hc
from hf_compress.modeling.blocks import count_layers, find_blocks, find_stacks
from hf_compress.modeling.surgery import first_layer_stays, keep_layers_
from hf_compress.pruning import latency, structured
from hf_compress.pruning.costs import Costs, measure_lengths
from hf_compress.pruning.depth import repair_layers_
from hf_compress.pruning.layers import run_without
from hf_compress.pruning.refit import repair_
from hf_compress.pruning.replay import Replay
from hf_compress.pruning.sensitivity import task_outputs
from hf_compress.pruning.units import find_sites
from tests.modeling.tiny import MODEL_TYPES, auto_class, difference, predict, tiny_batch, tiny_model

OWN_WEIGHTS = [model_type for model_type in MODEL_TYPES if model_type != "albert"]
REPAIRS = ("none", "bias", "least_squares")


def config(**values):
    return hc.StructuredPruningConfig(**({"units": "layers"} | values))


def total_costs(model, settings, batches) -> float:
    sites = find_sites(find_blocks(model))
    return Costs(settings.cost, sites, batches, lengths=measure_lengths(model, batches)).total(sites)


def random_texts(n_rows: int = 64, n_tokens: int = 12) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, 40, (n_rows, n_tokens), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(16)]


@pytest.mark.parametrize("repair", ["none", "least_squares"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_whole_layers_go_down_to_the_budget(model_type, repair, tmp_path):
    model = tiny_model(model_type)
    batches = [tiny_batch(model)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = config(budget=0.7, repair=repair)
    pruned = hc.prune(model, settings, batches)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert total_costs(pruned, settings, batches) <= 0.7 * total_costs(model, settings, batches)
    pruned.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    reloaded = auto_class(model_type).from_pretrained(tmp_path, attn_implementation="eager")
    assert difference(predict(reloaded, batches[0]), predict(pruned, batches[0])) == 0


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_nothing_changes_where_all_layers_stay(model_type):
    model = tiny_model(model_type)
    whole = hc.prune(model, config(budget=1.0), [tiny_batch(model)])
    assert all(map(torch.equal, whole.state_dict().values(), model.state_dict().values()))


def test_a_repair_with_nothing_to_make_up_for_changes_nothing():
    model = tiny_model("bert")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sites = find_sites(find_blocks(model))
    kept = {site.name: torch.arange(site.n_units) for site in sites}
    repair_(model, model, sites, kept, config(), [tiny_batch(model)], ())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("model_type", OWN_WEIGHTS)
def test_a_repaired_model_that_passes_layers_by_equals_the_one_without_them(model_type):
    for place in (0, 1, -1):
        model = tiny_model(model_type)
        batch = tiny_batch(model)
        kept, removed = {}, {}
        for stack in find_stacks(model):
            layers = list(range(count_layers(model, stack)))
            gone = layers[place] if place or not first_layer_stays(model, stack) else 1
            kept[stack], removed[stack] = [layer for layer in layers if layer != gone], [gone]
        before = predict(model, batch)
        repair_layers_(model, config(), kept, [batch])
        assert difference(predict(model, batch), before) > 1e-3
        for stack in list(kept)[:-1]:
            keep_layers_(model, kept[stack], stack)
        last = list(kept)[-1]
        (masked,) = run_without(model, batch, removed[last], [], last)
        keep_layers_(model, kept[last], last)
        with torch.no_grad():
            sliced = model(**batch)
        outputs = [task_outputs(model, results)[0] for results in (masked, sliced)]
        assert difference(*outputs) <= 1e-5 * max(1.0, outputs[0].abs().max().item())


@pytest.mark.parametrize("gone", [[0], [1], [3], [1, 2], [0, 3]])
@pytest.mark.parametrize("model_type", ["bert", "gpt2"])
def test_repair_brings_the_states_closer(model_type, gone):
    kept = {stack: [layer for layer in range(4) if layer not in gone] for stack in ("encoder", "decoder")}
    batches = random_texts()
    errors = {}
    for repair in REPAIRS:
        model = tiny_model(model_type, {"bert": "BertModel", "gpt2": "GPT2Model"}[model_type], num_hidden_layers=4)
        (stack,) = find_stacks(model)
        dense = torch.cat([model(**batch).last_hidden_state for batch in batches])
        if repair != "none":
            repair_layers_(model, config(repair=repair), kept, batches)
        keep_layers_(model, kept[stack])
        pruned = torch.cat([model(**batch).last_hidden_state for batch in batches])
        errors[repair] = (pruned - dense).square().mean().item()
    assert errors["least_squares"] < errors["none"]
    assert errors["least_squares"] < errors["bias"]


def test_a_block_that_is_passed_by_hands_on_what_it_got():
    model = tiny_model("t5")
    batch = tiny_batch(model)
    replay, states = Replay(model, [batch]), []

    def read(number, part, passage) -> None:
        states.append(passage.residual)

    first, second, third = find_blocks(model, "encoder")
    replay.finish(first)
    replay.visit(second, [second.attention], read)
    replay.finish(second, is_passed_by=True)
    replay.visit(third, [third.attention], read)
    assert difference(*states) == 0
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())


def test_shared_layers_are_not_repaired_and_that_is_said(caplog):
    model = tiny_model("albert")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with caplog.at_level(logging.WARNING, logger="hf_compress"):
        pruned = hc.prune(model, config(budget=0.7), [tiny_batch(model)])
    assert "share their weights, so that what is left is not repaired" in caplog.text
    assert all(torch.equal(value, before[name]) for name, value in pruned.state_dict().items())


def test_a_budget_of_time_counts_what_no_cut_saves(monkeypatch):
    # Weights in place of milliseconds.
    def count(calls, device, n_warmup, n_runs):
        weights = [sum(p.numel() for p in call.func.parameters() if p.ndim > 1) for call in calls]
        return np.tile(weights, (n_runs, 1))

    monkeypatch.setattr(latency, "time_in_turn", count)
    model = tiny_model("bert", num_hidden_layers=5)
    batches = [tiny_batch(model)]
    calibration = hc.calibrate(model, config(cost="latency", multiple_of=4), batches)
    for budget, n_left in ((1.0, 5), (0.7, 3)):
        settings = config(budget=budget, cost="latency", multiple_of=4)
        pruned = hc.prune(model, settings, calibration)
        weights = [sum(p.numel() for p in m.parameters() if p.ndim > 1) for m in (pruned, model)]
        assert weights[0] <= budget * weights[1]
        assert count_layers(pruned) == n_left
    with pytest.raises(ValueError, match="with one layer in the encoder"):
        hc.prune(model, config(budget=0.2, cost="latency", multiple_of=4), calibration)


# Refused at once


@pytest.fixture
def _no_work(monkeypatch):
    """Fails where something is scored or tried out."""

    def fail(*_, **__):
        raise AssertionError("work was done before the check")

    monkeypatch.setattr(structured, "score_units", fail)
    monkeypatch.setattr("hf_compress.pruning.depth.choose_layers", fail)


@pytest.mark.usefixtures("_no_work")
@pytest.mark.parametrize("model_type", ["bert", "modernbert", "t5", "albert"])
def test_a_budget_below_one_layer_is_refused_at_once(model_type):
    model = tiny_model(model_type)
    batches = [tiny_batch(model)]
    with pytest.raises(ValueError, match=r"budget of 0\.100 .* with one layer in the \w+, .* Give budget=0\.\d+ or"):
        hc.prune(model, config(budget=0.1), batches)
    with pytest.raises(ValueError, match="with one layer in the"):
        structured.check_budget(model, config(budget=0.1), batches)


@pytest.mark.usefixtures("_no_work")
def test_a_model_that_cannot_do_without_a_layer_is_refused_at_once(monkeypatch):
    model = tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True)
    batches = [tiny_batch(model)]
    with pytest.raises(ValueError, match="cannot be removed with scale_attn_by_inverse_layer_idx=True"):
        structured.check_budget(model, config(budget=0.7), batches)
    monkeypatch.setattr(structured, "gather", None)
    with pytest.raises(ValueError, match="cannot be removed with scale_attn_by_inverse_layer_idx=True"):
        hc.prune(model, config(budget=0.7), batches)
