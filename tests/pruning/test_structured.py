import copy
import json

import numpy as np
import pytest
import torch

import hf_compress as hc
from hf_compress.checkpoint.widths import read_widths
from hf_compress.modeling.blocks import find_blocks
from hf_compress.pruning import latency
from hf_compress.pruning.batches import token_mask
from hf_compress.pruning.costs import Costs, measure_lengths
from hf_compress.pruning.cutting import cut_
from hf_compress.pruning.refit import repair_
from hf_compress.pruning.structured import choose_units
from hf_compress.pruning.units import find_sites
from tests.modeling.tiny import MODEL_TYPES, auto_class, difference, predict, supports, tiny_batch, tiny_model

SCORES = ("obs", "fisher", "taylor", "activation", "l1", "l2", "linf", "random")


def config(**values):
    return hc.StructuredPruningConfig(**({"multiple_of": 4} | values))


def total_costs(model, settings, batches) -> float:
    sites = find_sites(find_blocks(model))
    return Costs(settings.cost, sites, batches, lengths=measure_lengths(model, batches)).total(sites)


def share(pruned, dense, settings, batches) -> float:
    return total_costs(pruned, settings, batches) / total_costs(dense, settings, batches)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_architecture_is_cut_to_the_budget_and_reloads_exactly(model_type, attention, tmp_path):
    if not supports(model_type, attention):
        pytest.skip(f"{model_type} has no {attention}")
    model = tiny_model(model_type, attention=attention)
    batches = [tiny_batch(model)]
    before = copy.deepcopy(model.state_dict())
    settings = config(budget=0.6)
    pruned = hc.prune(model, settings, batches)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert share(pruned, model, settings, batches) <= 0.6
    assert type(pruned) is type(model)
    assert pruned.training == model.training
    pruned.save_pretrained(tmp_path)
    reloaded = auto_class(model_type).from_pretrained(tmp_path, attn_implementation=attention)
    assert difference(predict(reloaded, batches[0]), predict(pruned, batches[0])) == 0


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_masked_equals_sliced(model_type):
    model = tiny_model(model_type)
    batch = tiny_batch(model)
    sites = find_sites(find_blocks(model))
    kept = {site.name: torch.arange(1, site.n_units - 1) for site in sites}
    repair_(model, model, sites, kept, config(), [batch])
    masked = predict(model, batch)
    cut_(model, sites, kept)
    scale = masked.abs().max().item()
    assert difference(predict(model, batch), masked) <= 1e-5 * max(1.0, scale)


@pytest.mark.parametrize("score", SCORES)
def test_every_score_keeps_the_budget_and_nothing_is_lost_with_all_of_it(score):
    model = tiny_model("bert")
    batches = [tiny_batch(model)]
    whole = hc.prune(model, config(budget=1.0, score=score), batches)
    assert difference(predict(whole, batches[0]), predict(model, batches[0])) == 0
    assert "quantization_config" not in json.loads(whole.config.to_json_string())
    settings = config(budget=0.5, score=score)
    assert 0.4 < share(hc.prune(model, settings, batches), model, settings, batches) <= 0.5


@pytest.mark.parametrize("cost", ["macs", "params", "bytes"])
@pytest.mark.parametrize(
    "changes", [{}, {"scope": "local"}, {"search": "ranking"}, {"steps": 3}, {"units": "neurons"}]
)
def test_budgets_of_every_kind(cost, changes):
    model = tiny_model("bert", intermediate_size=128)
    batches = [tiny_batch(model)]
    settings = config(budget=0.7, cost=cost, **changes)
    assert 0.6 < share(hc.prune(model, settings, batches), model, settings, batches) <= 0.7


def test_parameters_and_bytes_are_those_that_are_there():
    model = tiny_model("bert", "BertModel", intermediate_size=128).bfloat16()
    batches = [tiny_batch(model)]
    pruned = hc.prune(model, config(budget=0.5, cost="params"), batches)
    lost = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in pruned.parameters())
    for cost, size in (("params", 1), ("bytes", 2)):
        settings = config(cost=cost)
        assert total_costs(model, settings, batches) - total_costs(pruned, settings, batches) == pytest.approx(
            lost * size
        )
    assert pruned.dtype == torch.bfloat16


def test_a_uniform_result_needs_no_plug_in(tmp_path):
    model = tiny_model("bert", intermediate_size=128)
    pruned = hc.prune(model, config(budget=0.6, units="neurons", uniform=True), [tiny_batch(model)])
    assert len({widths["ffn"] for widths in read_widths(pruned).values()}) == 1
    pruned.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_one_calibration_serves_several_budgets():
    model = tiny_model("bert")
    batches = [tiny_batch(model)]
    calibration = hc.calibrate(model, config(), batches)
    for budget in (0.8, 0.6, 0.5):
        settings = config(budget=budget)
        from_both = [hc.prune(model, settings, data) for data in (calibration, batches)]
        assert difference(*(predict(pruned, batches[0]) for pruned in from_both)) == 0


def test_repair_brings_the_predictions_closer():
    model = tiny_model("bert", "BertForSequenceClassification", intermediate_size=64)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 40, (64, 12), generator=draw)
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(16)]
    errors = {
        repair: difference(
            predict(hc.prune(model, config(repair=repair), batches), batches[0]), predict(model, batches[0])
        )
        for repair in ("none", "bias", "least_squares")
    }
    assert errors["least_squares"] < errors["bias"] < errors["none"]


def test_padding_does_not_matter_to_what_is_cut_and_how_it_is_repaired():
    model = tiny_model("bert", "BertForSequenceClassification")
    batch = tiny_batch(model)
    alone = [{name: tensor[row : row + 1] for name, tensor in batch.items()} for row in range(2)]
    unpadded = [{name: tensor[:, : int(one["attention_mask"].sum())] for name, tensor in one.items()} for one in alone]
    first, second = (hc.prune(model, config(), batches) for batches in ([batch], unpadded))
    assert read_widths(first) == read_widths(second)
    assert difference(predict(first, batch), predict(second, batch)) < 1e-3


def test_random_scores_follow_the_seed():
    model = tiny_model("bert")
    blind = {"score": "random", "repair": "none", "cost": "params"}
    once, again, other = (hc.prune(model, config(seed=seed, **blind)) for seed in (1, 1, 2))
    same = [torch.equal(a, b) for a, b in zip(once.parameters(), again.parameters(), strict=True)]
    assert all(same)
    assert any(
        a.shape != b.shape or not torch.equal(a, b) for a, b in zip(once.parameters(), other.parameters(), strict=True)
    )


def test_grouped_queries_are_cut_in_whole_groups():
    model = tiny_model("llama")
    pruned = hc.prune(model, config(budget=0.5), [tiny_batch(model)])
    for block in find_blocks(pruned):
        assert block.attention.group_size == 2


def test_pruning_twice_is_pruning():
    model = tiny_model("bert", intermediate_size=64)
    batches = [tiny_batch(model)]
    once = hc.prune(model, config(budget=0.7), batches)
    twice = hc.prune(once, config(budget=0.7), batches)
    assert share(twice, model, config(), batches) <= 0.49


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 0}, "budget=0 is no share"),
        ({"budget": 1.5}, "budget=1.5 is no share"),
        ({"score": "magic"}, "score='magic' is unknown: give one of 'obs'"),
        ({"units": ("heads", "toes")}, "give one or more of 'heads'"),
        ({"multiple_of": 0}, "multiple_of=0"),
        ({"ridge": -1.0}, "ridge=-1.0"),
        ({"uniform": True, "scope": "local"}, "leave scope='global'"),
        ({"score": "l2", "use_labels": True}, "takes no derivative"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def nan_batch(model):
    with torch.no_grad():
        model.get_input_embeddings().weight[5] = float("nan")
    batch = tiny_batch(model)
    batch["input_ids"][0, 3] = 5
    return batch


def test_bad_input_is_refused():
    model = tiny_model("bert", "BertForSequenceClassification")
    batch = tiny_batch(model)
    refused = [
        (config(), None, "is computed from data, but data=None"),
        (config(), [], "hold no batch"),
        (config(), [{"input_ids": batch["input_ids"]}], "no attention_mask, but holds the padding token 1"),
        (config(use_labels=True), [batch], "no labels: add a column"),
        (config(budget=0.01), [batch], r"cannot be met.*Give budget=0\.\d+ or more"),
        (config(multiple_of=100), [batch], "larger than the 24 neurons"),
    ]
    for settings, data, message in refused:
        with pytest.raises(ValueError, match=message):
            hc.prune(model, settings, data)
    with pytest.raises(TypeError, match="a dict of tensors is needed"):
        hc.prune(model, config(), ["a text"])
    with pytest.raises(TypeError, match="does not say how to prune"):
        hc.prune(model, {"budget": 0.5}, [batch])
    with pytest.raises(ValueError, match="hold NaN or infinity"):
        hc.prune(model, config(), [nan_batch(model)])


def test_a_calibration_by_another_score_is_refused():
    model = tiny_model("bert")
    calibration = hc.calibrate(model, config(score="l2"), [tiny_batch(model)])
    with pytest.raises(ValueError, match="made with score='l2', and score='obs' is asked for"):
        hc.prune(model, config(), calibration)


def test_a_calibration_of_another_model_is_refused():
    calibration = hc.calibrate(tiny_model("bert"), config(), [tiny_batch(tiny_model("bert"))])
    with pytest.raises(ValueError, match="is of a model with the widths .*'encoder.0.ffn': 24"):
        hc.prune(tiny_model("bert", intermediate_size=32), config(), calibration)


def test_a_calibration_of_whole_layers_is_refused_for_heads():
    model = tiny_model("bert")
    calibration = hc.calibrate(model, config(units="layers"), [tiny_batch(model)])
    with pytest.raises(ValueError, match="need scores of heads and neurons"):
        hc.prune(model, config(), calibration)


def test_the_mask_of_a_decoder_is_its_own():
    batch = {"input_ids": torch.ones(2, 5), "attention_mask": torch.tensor([[1] * 5, [1] * 3 + [0] * 2])}
    assert token_mask(batch, "encoder").sum() == 8
    batch |= {"decoder_input_ids": torch.ones(2, 4)}
    assert token_mask(batch, "decoder").shape == (2, 4)
    assert token_mask(batch, "decoder").all()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_sub_layers_go_where_they_may(model_type, tmp_path):
    model = tiny_model(model_type)
    batches = [tiny_batch(model)]
    settings = config(budget=0.15, units=("heads", "neurons", "layers"))
    pruned = hc.prune(model, settings, batches)
    assert share(pruned, model, settings, batches) <= 0.15
    assert 0 in {width for widths in read_widths(pruned).values() for width in widths.values()}
    pruned.save_pretrained(tmp_path)
    reloaded = auto_class(model_type).from_pretrained(tmp_path, attn_implementation="eager")
    assert difference(predict(reloaded, batches[0]), predict(pruned, batches[0])) == 0


@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_sub_layers_go_in_several_steps(model_type):
    model = tiny_model(model_type)
    batches = [tiny_batch(model)]
    settings = config(budget=0.15, units=("heads", "neurons", "layers"), steps=3)
    pruned = hc.prune(model, settings, batches)
    assert share(pruned, model, settings, batches) <= 0.15
    again = hc.prune(pruned, config(budget=0.9, units=("heads", "neurons", "layers")), batches)
    assert share(again, pruned, settings, batches) <= 0.9


def test_a_budget_of_time_is_met_by_the_table(monkeypatch):
    # Weights in place of milliseconds.
    def count(calls, device, n_warmup, n_runs):
        weights = [sum(p.numel() for p in call.func.parameters() if p.ndim > 1) for call in calls]
        return np.tile(weights, (n_runs, 1))

    monkeypatch.setattr(latency, "time_in_turn", count)
    model = tiny_model("bert", intermediate_size=256)
    batches = [tiny_batch(model)]
    settings = config(budget=0.7, cost="latency", multiple_of=32)
    calibration = hc.calibrate(model, settings, batches)
    pruned = hc.prune(model, settings, calibration)
    weights = [sum(p.numel() for p in m.parameters() if p.ndim > 1) for m in (pruned, model)]
    assert 0.65 < weights[0] / weights[1] <= 0.7
    with pytest.raises(ValueError, match="needs a table of times"):
        hc.prune(model, settings, hc.calibrate(model, config(), batches))


@pytest.mark.parametrize(
    "config",
    [
        hc.StructuredPruningConfig(0.6, score="l2", repair="none", multiple_of=1),
        hc.UnstructuredPruningConfig(0.5, score="magnitude", repair="none"),
    ],
)
def test_models_prepared_for_one_bit_are_refused(config):
    model = tiny_model("bert")
    hc.fake_quantize_(model, hc.BinaryConfig(activations=8), [tiny_batch(model)])
    with pytest.raises(ValueError, match="prepared for weights of one bit"):
        hc.prune(model, config)


def test_a_decoder_that_reads_an_encoder_wants_its_states():
    model = tiny_model("bart", "BartForCausalLM")
    batch = tiny_batch(model)
    config = hc.StructuredPruningConfig(budget=0.6, multiple_of=4)
    with pytest.raises(ValueError, match="no encoder_hidden_states: nothing tells"):
        hc.prune(model, config, [batch])
    states = torch.randn(*batch["input_ids"].shape, model.config.d_model)
    pruned = hc.prune(model, config, [batch | {"encoder_hidden_states": states}])
    assert pruned.num_parameters() < model.num_parameters()


def test_choices_are_refused_by_name():
    model = tiny_model("bert", "BertForMultipleChoice")
    with pytest.raises(ValueError, match="The task of a BertForMultipleChoice is unknown"):
        hc.prune(model, hc.StructuredPruningConfig(budget=0.6, multiple_of=4), [tiny_batch(model)])


def test_an_encoder_of_t5_alone_is_pruned():
    model = tiny_model("t5", "T5EncoderModel")
    config = hc.StructuredPruningConfig(budget=0.6, multiple_of=4)
    assert hc.prune(model, config, [tiny_batch(model)]).num_parameters() < model.num_parameters()


def test_widths_of_another_model_are_not_written(tmp_path):
    model = tiny_model("bert")
    pruned = hc.prune(model, config(budget=0.5, score="l2", repair="none"))
    dense = type(model)(copy.deepcopy(pruned.config)).eval()
    thin = hc.prune(dense, hc.UnstructuredPruningConfig(0.5, score="magnitude", repair="none"))
    thin.save_pretrained(tmp_path)
    inputs = tiny_batch(model)
    again = auto_class("bert").from_pretrained(tmp_path, attn_implementation="eager")
    assert difference(predict(again, inputs), predict(thin, inputs)) == 0


@pytest.mark.parametrize("fixed", [0.1, 0.7, 1.3, 2.9])
def test_a_budget_of_everything_cuts_nothing(fixed):
    model = tiny_model("bert")
    settings = config(budget=1.0, score="l2", repair="none", multiple_of=1)
    calibration = hc.calibrate(model, settings, [tiny_batch(model)])
    sites = find_sites(find_blocks(model))
    costs = Costs(settings.cost, sites, calibration.batches, lengths=calibration.lengths)
    costs.fixed = fixed
    # One step of floating point less than everything.
    target = np.nextafter(costs.total(sites), 0.0)
    kept = choose_units(model, sites, settings, calibration, costs, target)
    assert {name: len(units) for name, units in kept.items()} == {site.name: site.n_units for site in sites}
