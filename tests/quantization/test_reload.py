"""A quantized model comes back bit for bit, before and after an inference, for every architecture and format."""

import copy

import pytest
import torch
import transformers

from hf_compress.formats.packed import PackedEmbedding
from hf_compress.modeling.blocks import find_blocks
from hf_compress.modeling.surgery import keep_neurons_
from hf_compress.quantization.config import BinaryConfig, FixedPointConfig, Int8DynamicConfig
from hf_compress.quantization.quantize import quantize
from tests.modeling.tiny import MODEL_TYPES, difference, predict, tiny_batch, tiny_model

CONFIGS = {
    "binary": BinaryConfig(activations=32),
    "int8": Int8DynamicConfig(),
    "int8_embeddings": Int8DynamicConfig(embeddings=True),
    "fixed_point_4": FixedPointConfig(bits=4, granularity="group"),
    "fixed_point_16": FixedPointConfig(bits=16, granularity="per_tensor", power_of_two=True),
}


def prune_unevenly_(model) -> None:
    for number, block in enumerate(find_blocks(model)):
        keep_neurons_(block.ffn, range(8 + 4 * (number % 3)))


def reload(model, folder):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, attn_implementation="eager")


def assert_same(first, second) -> None:
    tensors = second.state_dict()
    assert first.state_dict().keys() == tensors.keys()
    for name, tensor in first.state_dict().items():
        assert tensor.dtype == tensors[name].dtype, name
        assert torch.equal(tensor, tensors[name]), name
    assert difference(predict(first, tiny_batch(first)), predict(second, tiny_batch(second))) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_pruned", [False, True])
@pytest.mark.parametrize("format_name", CONFIGS)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_before_and_after_an_inference(model_type, format_name, is_pruned, dtype, tmp_path):
    model = tiny_model(model_type)
    if is_pruned:
        prune_unevenly_(model)
    # Unlike `.to`, leaves tables of angles, which no checkpoint holds, as they are computed when a model is loaded.
    for tensor in model.state_dict(keep_vars=True).values():
        tensor.data = tensor.data.to(dtype)
    untouched = copy.deepcopy(model.state_dict())
    quantized = quantize(model, CONFIGS[format_name])
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in model.state_dict().items())
    once = reload(quantized, tmp_path / "once")
    assert_same(once, quantized)
    predict(once, tiny_batch(once))
    assert_same(reload(once, tmp_path / "twice"), quantized)


@pytest.mark.parametrize("config", [FixedPointConfig(bits=8), Int8DynamicConfig(embeddings=True)], ids=type)
@pytest.mark.parametrize(
    ("model_type", "saved", "loaded"),
    [
        ("bert", "BertForSequenceClassification", transformers.BertForMaskedLM),
        ("gpt2", "GPT2ForSequenceClassification", transformers.GPT2LMHeadModel),
    ],
)
def test_rounded_tables_in_a_class_that_ties_them(model_type, saved, loaded, config, tmp_path):
    quantized = quantize(tiny_model(model_type, saved, pad_token_id=1), config)
    quantized.save_pretrained(tmp_path / "saved")
    model = loaded.from_pretrained(tmp_path / "saved", attn_implementation="eager").eval()
    before, after = (dict(one.base_model.named_modules()) for one in (quantized, model))
    packed = [name for name, module in before.items() if isinstance(module, PackedEmbedding)]
    assert packed
    assert all(torch.equal(before[name].weight, after[name].weight) for name in packed)
    assert_same(reload(model, tmp_path / "again").eval(), model)
