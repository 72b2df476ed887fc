"""Structured pruning where two of its settings, or one and a property of the model, meet."""

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import pad

import hf_compress as hc
from hf_compress.checkpoint.widths import write_widths_
from hf_compress.modeling.blocks import find_blocks
from hf_compress.modeling.surgery import keep_stack_heads_
from hf_compress.pruning.cutting import cut_
from hf_compress.pruning.units import find_sites
from tests.modeling.tiny import auto_class, difference, predict, tiny_batch, tiny_model


def config(**values):
    return hc.StructuredPruningConfig(**({"multiple_of": 4} | values))


def test_how_far_texts_are_padded_changes_nothing():
    model = tiny_model("bert", "BertForSequenceClassification", intermediate_size=64)
    ids = torch.randint(3, 40, (32, 6), generator=torch.Generator().manual_seed(0))
    texts = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(8)]
    padded = [{name: pad(value, (0, 40)) for name, value in batch.items()} for batch in texts]
    short, long = (hc.calibrate(model, config(), batches).removals for batches in (texts, padded))
    for name, removal in short.items():
        assert torch.equal(removal.order, long[name].order)
        assert torch.allclose(removal.error, long[name].error, rtol=1e-3)


@pytest.mark.parametrize("heads", [[0, 2], [0, 1, 2, 3]])
def test_biases_of_positions_that_nothing_reads(heads, tmp_path):
    model = tiny_model("mpnet")
    keep_stack_heads_(model, heads, "encoder")
    sites = find_sites(find_blocks(model))
    cut_(model, sites, {site.name: [] for site in sites if site.kind == "heads"})
    assert write_widths_(model)
    model.save_pretrained(tmp_path / "once")
    once = auto_class("mpnet").from_pretrained(tmp_path / "once", attn_implementation="eager")
    once.save_pretrained(tmp_path / "twice")
    twice = auto_class("mpnet").from_pretrained(tmp_path / "twice", attn_implementation="eager")
    assert difference(predict(twice, tiny_batch(model)), predict(model, tiny_batch(model))) == 0


def test_rounds_by_scores_of_weights_need_no_data():
    model = tiny_model("bert")
    pruned = hc.prune(model, config(budget=0.5, score="l2", repair="none", cost="params", steps=2))
    assert pruned.num_parameters() < model.num_parameters()


@pytest.mark.parametrize("budget", [0.8, 0.66, 0.5, 0.35])
def test_uniform_heads_are_as_many_as_a_config_can_say(budget):
    sizes = {"hidden_size": 64, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 4}
    model = tiny_model("llama", "LlamaForSequenceClassification", intermediate_size=256, **sizes)
    settings = config(budget=budget, uniform=True, score="activation", units=("heads", "neurons", "layers"))
    assert "quantization_config" not in hc.prune(model, settings, [tiny_batch(model)]).config.to_dict()


def test_a_uniform_result_that_needs_the_plug_in_is_said(caplog):
    model = tiny_model("bert")
    with caplog.at_level(logging.WARNING):
        pruned = hc.prune(model, config(budget=0.5, uniform=True, score="l2", repair="none", cost="params"))
    assert "quantization_config" in pruned.config.to_dict()
    assert "loads only after `import hf_compress`" in caplog.text


@pytest.mark.parametrize("model_type", ["llama", "t5"])
def test_biases_that_are_not_there_repair_nothing(model_type):
    model = tiny_model(model_type)
    with pytest.raises(ValueError, match=r"repair='bias' corrects biases, and the output projections of .* have none"):
        hc.prune(model, config(budget=0.5, score="activation", repair="bias"), [tiny_batch(model)])


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_adapters_are_refused_before_anything_is_cut():
    model = tiny_model("bert")
    adapted = get_peft_model(model, LoraConfig(target_modules=["query", "value"]))
    batch = tiny_batch(model)
    before = predict(model, batch)
    with pytest.raises(TypeError, match="Merge adapters first"):
        hc.prune_(adapted, config(), [batch])
    assert difference(predict(model, batch), before) == 0


@pytest.mark.parametrize("score", ["obs", "l2"])
def test_a_model_of_which_nothing_is_left(score):
    model = tiny_model("bert", "BertForSequenceClassification", intermediate_size=64)
    batch = tiny_batch(model)
    empty = hc.prune(model, config(budget=0.001, units=("heads", "neurons", "layers")), [batch])
    with pytest.raises(ValueError, match="^The 3 layers of BertForSequenceClassification have no head and no neuron"):
        hc.prune(empty, config(score=score), [batch])
