import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification, T5EncoderModel, Trainer, TrainingArguments
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from hf_compress.checkpoint.config import METHOD, VERSION, CompressionConfig
from hf_compress.checkpoint.quantizer import CompressionQuantizer, register
from hf_compress.checkpoint.widths import cut_to_widths_, read_widths, write_widths_
from hf_compress.modeling.blocks import find_blocks
from hf_compress.modeling.surgery import keep_heads_, keep_neurons_, keep_stack_heads_
from hf_compress.quantization.config import Int8DynamicConfig
from hf_compress.quantization.quantize import quantize
from tests.modeling.tiny import FFN, MODEL_TYPES, auto_class, difference, predict, tiny_batch, tiny_model


def cut_unevenly_(model) -> None:
    """Other neurons in every block, and other heads where the architecture allows it."""
    for n, block in enumerate(find_blocks(model)):
        keep_neurons_(block.ffn, range(n, FFN - 3 * n))
        for attention in block.attentions:
            if not attention.is_stack_wide:
                keep_heads_(attention, [n % 4, 3] if n % 4 != 3 else [3])
            elif block.index == 0:
                keep_stack_heads_(model, [0, 3], block.stack, attention.kind)


def saved_and_reloaded(model, folder, model_type):
    model.save_pretrained(folder)
    return auto_class(model_type).from_pretrained(folder, attn_implementation="eager")


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_an_uneven_model_reloads_exactly_and_again(model_type, tmp_path):
    model = tiny_model(model_type)
    inputs = tiny_batch(model)
    cut_unevenly_(model)
    assert write_widths_(model)
    expected = predict(model, inputs)
    once = saved_and_reloaded(model, tmp_path / "once", model_type)
    assert difference(predict(once, inputs), expected) == 0
    twice = saved_and_reloaded(once, tmp_path / "twice", model_type)
    assert difference(predict(twice, inputs), expected) == 0
    assert type(twice) is type(model)
    assert read_widths(twice) == read_widths(model)


def test_an_even_cut_of_neurons_needs_no_plug_in(tmp_path):
    model = tiny_model("bert")
    cut_unevenly_(model)
    assert write_widths_(model)
    even = tiny_model("bert")
    for block in find_blocks(even):
        keep_neurons_(block.ffn, range(8))
    assert not write_widths_(even)
    even.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def uneven_classifier(folder):
    model = tiny_model("bert", "BertForSequenceClassification", attention="sdpa")
    cut_unevenly_(model)
    write_widths_(model)
    model.save_pretrained(folder)
    return model


def test_a_reloaded_model_is_like_any_other(tmp_path):
    uneven_classifier(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert not model.is_quantized
    assert not hasattr(model.config, "_is_quantized")
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype="bfloat16").dtype == torch.bfloat16
    row = {"input_ids": [0, 5, 6, 2], "attention_mask": [1] * 4, "labels": 1}
    before = model.classifier.weight.detach().clone()
    args = TrainingArguments(str(tmp_path / "run"), max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True)
    Trainer(model, args, train_dataset=[row] * 8).train()
    assert not torch.equal(before, model.classifier.weight)
    assert model.half().dtype == torch.float16


def test_registration_is_idempotent():
    register()
    register()
    assert AUTO_QUANTIZER_MAPPING[METHOD] is CompressionQuantizer


def edited(folder, change) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(version=VERSION + 1), "version 2 of the hf_compress format.*pip install --upgrade"),
        (lambda c: (c.pop("widths"), c.update(version=2, shapes={})), "version 2 of the hf_compress format"),
        (lambda c: c.pop("widths"), "widths=None in quantization_config must map"),
        (lambda c: c.update(version="1"), "version '1'"),
        (lambda c: c.update(surprise=1), "does not know: surprise"),
        (lambda c: c["widths"].pop("encoder.0"), "the model has encoder.0, encoder.1"),
        (lambda c: c["widths"]["encoder.0"].update(ffn=-1), "must map each block to the widths of its parts, from 0"),
        (lambda c: c["widths"]["encoder.0"].update(ffn=10**12), "cannot be cut from"),
        (lambda c: c["widths"]["encoder.0"].update(ffn=2.0), "must map each block"),
        (lambda c: c["widths"]["encoder.0"].update(ffn=True), "must map each block"),
        (lambda c: c["widths"]["encoder.0"].update(other=1), "cannot be cut from"),
        (lambda c: c.update(widths=[1]), "must map each block"),
    ],
)
def test_a_doubtful_config_is_refused_before_it_shapes_anything(change, message, tmp_path):
    uneven_classifier(tmp_path)
    edited(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_an_encoder_loads_alone(tmp_path):
    model = tiny_model("t5")
    for n, block in enumerate(find_blocks(model)):
        keep_neurons_(block.ffn, range(8 + n))
    write_widths_(model)
    model.save_pretrained(tmp_path)
    encoder = T5EncoderModel.from_pretrained(tmp_path)
    assert [block.ffn.width for block in find_blocks(encoder)] == [8, 9, 10]


def test_a_stack_with_one_position_bias_has_one_number_of_heads():
    model = tiny_model("t5")
    widths = read_widths(model)
    widths["encoder.0"]["self"] = 2
    with pytest.raises(ValueError, match=r"widths \[2, 4\].*one position bias"):
        cut_to_widths_(model, widths)


def test_the_config_says_what_it_needs(tmp_path):
    uneven_classifier(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path).quantization_config
    assert config["quant_method"] == METHOD
    assert "import hf_compress" in config["requires"]
    assert CompressionConfig(**config).to_dict() == config


@pytest.mark.parametrize("lost", ["weight", "weight_scale"])
def test_packed_weights_that_are_missing_are_no_weights(lost, tmp_path):
    quantize(tiny_model("bert"), Int8DynamicConfig()).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights[f"bert.encoder.layer.0.intermediate.dense.{lost}"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(
        ValueError, match=rf"lacks bert\.encoder\.layer\.0\.intermediate\.dense\.{lost}, without which"
    ):
        auto_class("bert").from_pretrained(tmp_path)
