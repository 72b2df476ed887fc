import math

import pytest
import torch

from hf_compress.formats.packed import PackedLinear
from hf_compress.quantization.config import FixedPointConfig, Int8DynamicConfig
from hf_compress.quantization.noise import measure_noise, signal_to_noise
from hf_compress.quantization.quantize import quantize
from tests.modeling.tiny import MODEL_TYPES, tiny_batch, tiny_model
from tests.quantization.without_float64 import WithoutFloat64


def test_a_tenth_of_the_error_is_20_decibels():
    signal = torch.tensor([3.0, 4.0])
    assert signal_to_noise(signal, signal * 0.9) == pytest.approx(20)
    assert signal_to_noise(signal, signal * 0.99) == pytest.approx(40)
    assert signal_to_noise(signal, torch.zeros(2)) == pytest.approx(0)
    assert signal_to_noise(signal, signal) == math.inf
    assert signal_to_noise(torch.zeros(2), signal) == -math.inf
    assert signal_to_noise(signal, torch.full((2,), torch.inf)) == -math.inf
    assert math.isnan(signal_to_noise(signal, torch.full((2,), torch.nan)))


def test_sums_are_taken_where_there_is_float64():
    signal = torch.tensor([3.0, 4.0])
    on_device = signal.as_subclass(WithoutFloat64)
    assert signal_to_noise(on_device, on_device * 0.9) == signal_to_noise(signal, signal * 0.9)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_packed_module_is_measured(model_type):
    model = tiny_model(model_type)
    batch = tiny_batch(model)
    int8 = measure_noise(quantize(model, Int8DynamicConfig(embeddings=True)), model, [batch, batch])
    assert all(noise.weights > 35 and (noise.outputs is None or noise.outputs > 25) for noise in int8.values())
    assert sum(noise.outputs is not None for noise in int8.values()) > 0.9 * len(int8)
    fewer = measure_noise(quantize(model, FixedPointConfig(bits=4, granularity="group")), model)
    assert all(noise.weights < int8[name].weights - 10 for name, noise in fewer.items())
    assert all(noise.outputs is None for noise in fewer.values())


def test_outputs_are_those_of_the_module_on_its_own():
    model = tiny_model("bert", "BertForSequenceClassification")
    batch = tiny_batch(model)
    quantized = quantize(model, Int8DynamicConfig())
    name = "bert.encoder.layer.2.output.dense"
    read = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: read.append(args[0]))
    found = measure_noise(quantized, model, [batch])
    handle.remove()
    inputs = read[0][batch["attention_mask"].bool()]
    with torch.no_grad():
        expected = signal_to_noise(model.get_submodule(name)(inputs), quantized.get_submodule(name)(inputs))
    assert found[name].outputs == pytest.approx(expected)
    # What padding holds does not count.
    batch["input_ids"][1, 6:] = 33
    assert measure_noise(quantized, model, [batch])[name].outputs == pytest.approx(expected, rel=1e-4)


def test_models_that_do_not_belong_together():
    model = tiny_model("bert")
    quantized = quantize(model, Int8DynamicConfig())
    with pytest.raises(ValueError, match="has no weights in a number format"):
        measure_noise(model, quantized)
    with pytest.raises(ValueError, match="has no module .* in floating point"):
        measure_noise(quantized, quantized)
    with pytest.raises(ValueError, match="has no module .* in floating point"):
        measure_noise(quantized, tiny_model("distilbert"))
    assert any(isinstance(module, PackedLinear) for module in quantized.modules())
