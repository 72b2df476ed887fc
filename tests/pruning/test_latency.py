"""A latency table is falling, adds up to the whole model, and predicts exactly where time adds up exactly.

Where a value matters, the clock counts weights in place of milliseconds: no test depends on timing.
"""

import json

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_compress.checkpoint.widths import read_widths
from hf_compress.modeling.blocks import find_blocks
from hf_compress.modeling.removal import can_remove
from hf_compress.modeling.surgery import keep_neurons_
from hf_compress.pruning import latency
from hf_compress.pruning.latency import check_prediction, measure_latency_table, predict_latency, time_in_turn
from hf_compress.pruning.units import find_sites
from tests.modeling.tiny import FFN, HEADS, MODEL_TYPES, difference, predict, tiny_batch, tiny_model


def sites_of(model):
    return find_sites(find_blocks(model))


def all_levels(sites) -> dict:
    lowest = {site: 0 if all(map(can_remove, site.parts)) else 1 for site in sites}
    return {site: range(site.n_units, lowest[site] - 1, -1 if site.kind == "heads" else -8) for site in sites}


def measure(model, **settings):
    sites = sites_of(model)
    return measure_latency_table(model, sites, all_levels(sites), tiny_batch(model), n_warmup=1, n_runs=2, **settings)


def count_weights(module) -> float:
    """Weights that multiply something in a forward pass, as often as they do."""
    repeated = {id(block.module): block.repeats for block in find_blocks(module)} if is_model(module) else {}
    own = sum(sub.weight.numel() for sub in module.modules() if isinstance(sub, nn.Linear | Conv1D))
    again = (
        (repeats - 1) * count_weights(sub) for sub in module.modules() if (repeats := repeated.get(id(sub), 1)) > 1
    )
    return own + sum(again)


def is_model(module) -> bool:
    return isinstance(module, PreTrainedModel)


@pytest.fixture
def rounds(monkeypatch) -> list[list[float]]:
    """Counts weights in place of time, and tells what was measured together."""
    found = []

    def count(calls, device, n_warmup, n_runs):
        for call in calls:
            call()
        found.append([count_weights(call.func) for call in calls])
        return np.tile(found[-1], (n_runs, 1))

    monkeypatch.setattr(latency, "time_in_turn", count)
    return found


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_prediction_is_exact_where_time_adds_up(model_type, rounds):
    model = tiny_model(model_type)
    table = measure(model)
    assert table.total == count_weights(model)
    sites = sites_of(model)
    kept = {site.name: 1 + index % site.n_units for index, site in enumerate(sites)}
    for plan in (kept, {name: width for name, width in kept.items() if "ffn" not in name}, {}):
        predicted, measured = check_prediction(model, tiny_batch(model), table, plan)
        assert predicted == pytest.approx(measured)
    removed = {site.name: 0 for site in sites if all(map(can_remove, site.parts))}
    assert len(removed) >= len(sites) - 2
    predicted, measured = check_prediction(model, tiny_batch(model), table, removed)
    assert predicted == pytest.approx(measured)


@pytest.mark.parametrize("model_type", ["bert", "t5", "albert", "vit"])
def test_measured_table_is_falling_and_adds_up(model_type):
    model = tiny_model(model_type)
    table = measure(model)
    assert list(table.times) == list(table.levels) == [site.name for site in sites_of(model)]
    for name, times in table.times.items():
        assert times.shape == (len(table.levels[name]),)
        assert (np.diff(times) <= 0).all()
        if table.levels[name][-1] == 0:
            assert times[-1] == 0
    whole = {name: levels[0] for name, levels in table.levels.items()}
    assert predict_latency(table, {}) == pytest.approx(table.total)
    assert predict_latency(table, whole) == pytest.approx(table.total)
    least = {name: levels[-1] for name, levels in table.levels.items()}
    assert -1e-9 <= predict_latency(table, least) <= table.total + 1e-9
    assert check_prediction(model, tiny_batch(model), table, least)[0] == predict_latency(table, least)


def test_conditions_are_told():
    table = measure(tiny_model("bert").bfloat16())
    assert (table.device, table.dtype, table.batch_size, table.sequence_length) == ("cpu", "bfloat16", 2, 8)
    assert (table.threads, table.n_warmup, table.n_runs) == (torch.get_num_threads(), 1, 2)
    for fact in ("batch 2 x 8 tokens", "bfloat16", "cpu", f"{table.threads} threads", "median of 2", "all 6 sites"):
        assert fact in table.describe()
    read = json.loads(json.dumps(table.to_dict()))
    assert read["levels"]["encoder.0.self"] == [4, 3, 2, 1, 0]
    assert read["times"]["encoder.2.ffn"] == table.times["encoder.2.ffn"].tolist()
    assert (read["total"], read["processor"]) == (table.total, table.processor)


def test_images_have_no_length():
    table = measure(tiny_model("vit"))
    assert table.sequence_length is None
    assert "batch 2, float32" in table.describe()


def test_equal_blocks_are_measured_once(rounds):
    model = tiny_model("bert")
    table = measure(model)
    assert len(rounds) == 2
    assert table.times["encoder.0.ffn"].tolist() == table.times["encoder.2.ffn"].tolist()
    keep_neurons_(find_blocks(model)[1].ffn, range(8))
    table = measure(model)
    assert len(rounds) == 2 + 4
    assert table.times["encoder.0.ffn"][-2:].tolist() == table.times["encoder.1.ffn"].tolist()


def test_of_many_levels_some_are_measured(rounds):
    model = tiny_model("bert")
    sites = sites_of(model)
    levels = {site: range(site.n_units, -1, -1) for site in sites}
    table = measure_latency_table(model, sites, levels, tiny_batch(model), n_warmup=0, n_runs=1)
    n_whole = 1
    assert sorted(len(found) - n_whole for found in rounds) == [HEADS + 1, latency.MOST_WIDTHS]
    per_neuron = table.times["encoder.0.ffn"][0] / FFN
    assert table.times["encoder.0.ffn"] == pytest.approx(per_neuron * np.arange(FFN, -1, -1))


def test_noise_is_smoothed_and_slow_minutes_cancel():
    widths = [0, 8, 16, 24]
    runs = np.array([[100.0, 10, 30, 20, 40]])
    found, times = latency._smooth(widths, runs, total=100.0)
    assert found.tolist() == widths
    assert times.tolist() == [0, 15, 15, 30]
    assert latency._smooth(widths, 3 * runs, total=100.0)[1] == pytest.approx(times)
    # Without a removed part, the line through the two smallest widths tells what is left at 0.
    assert latency._smooth([1, 3], np.array([[100.0, 20, 40]]), total=100.0)[1].tolist() == [10, 30]


def test_model_is_left_as_it_was():
    model = tiny_model("t5").train()
    batch = tiny_batch(model) | {"labels": torch.zeros(2, 5, dtype=torch.long)}
    parameters, widths = list(model.parameters()), read_widths(model)
    before = [parameter.clone() for parameter in parameters]
    sites = sites_of(model)
    levels = {site: [site.n_units, 2] for site in sites}
    table = measure_latency_table(model, sites, levels, batch, n_warmup=0, n_runs=1)
    check_prediction(model, batch, table, {"encoder.self": 2, "decoder.cross": 3, "decoder.1.ffn": 8})
    assert read_widths(model) == widths
    assert all(module.training and not module._forward_pre_hooks for module in model.modules())
    for parameter, value in zip(parameters, before, strict=True):
        assert parameter.requires_grad
        assert torch.equal(parameter, value)


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "t5"])
def test_a_cut_copy_has_only_the_weights_of_its_own_that_were_cut(model_type):
    model = tiny_model(model_type)
    before = predict(model, tiny_batch(model))
    site = next(site for site in sites_of(model) if site.kind == "neurons")
    small = latency._cut_copy(model, {site.name: 8})
    assert [site.n_units for site in sites_of(small) if site.kind == "neurons"][0] == 8
    own = {name for name, parameter in small.named_parameters() if parameter is not model.get_parameter(name)}
    assert own
    assert all(name.startswith(find_blocks(model)[0].name) for name in own)
    assert difference(predict(model, tiny_batch(model)), before) == 0


def test_calls_take_turns():
    called = []
    calls = [lambda: called.append("a"), lambda: called.append("b")]
    times = time_in_turn(calls, torch.device("cpu"), n_warmup=1, n_runs=2)
    assert times.shape == (2, 2)
    assert (times >= 0).all()
    assert "".join(called) == "ababab"


@pytest.mark.parametrize("levels", [[], [4, 4, 2], [2, 4], [3, 2], [4, 2, -1]])
def test_refuses_levels_that_do_not_fall_from_all_units(levels):
    model = tiny_model("bert")
    sites = sites_of(model)
    with pytest.raises(ValueError, match=r"The levels .* of encoder.1.self do not fall from all"):
        measure_latency_table(model, sites, all_levels(sites) | {sites[2]: levels}, tiny_batch(model))


def test_refuses_what_is_not_there(rounds):
    model = tiny_model("t5")
    sites = sites_of(model)
    with pytest.raises(ValueError, match=r"encoder.self cannot be removed as a whole"):
        measure_latency_table(model, sites, all_levels(sites) | {sites[0]: [4, 0]}, tiny_batch(model))
    with pytest.raises(ValueError, match="no site"):
        measure_latency_table(model, [], {}, tiny_batch(model))
    levels = {site: [site.n_units, 1] for site in sites}
    table = measure_latency_table(model, sites, levels, tiny_batch(model), n_warmup=0, n_runs=1)
    with pytest.raises(ValueError, match=r"no sites \['encoder.9.ffn'\]"):
        predict_latency(table, {"encoder.9.ffn": 8})
    with pytest.raises(ValueError, match="encoder.self cannot keep 0 units"):
        predict_latency(table, {"encoder.self": 0})
    with pytest.raises(ValueError, match="encoder.1.ffn cannot keep 99 units"):
        check_prediction(model, tiny_batch(model), table, {"encoder.1.ffn": 99})
