"""Binary models: quantized after training, mechanically without, and the same after a reload."""

import logging

import pytest
import torch

from hf_compress.formats.binary import FLOAT, BinaryLinear, input_levels, round_inputs
from hf_compress.modeling.projections import in_width, out_width
from hf_compress.quantization.binary import fit_input_scale
from hf_compress.quantization.config import BinaryConfig
from hf_compress.quantization.modules import choose_modules
from hf_compress.quantization.quantize import quantize, quantize_
from hf_compress.quantization.training import fake_quantize_
from tests.modeling.tiny import MODEL_TYPES, difference, predict, tiny_batch, tiny_model


def binary_model(model_type: str, bits: int):
    model = tiny_model(model_type)
    return model, quantize(model, BinaryConfig(activations=bits), [tiny_batch(model)])


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_learned_inputs_come_back_bit_for_bit(model_type, tmp_path):
    _, quantized = binary_model(model_type, bits=1)
    quantized.save_pretrained(tmp_path)
    reloaded = type(quantized).from_pretrained(tmp_path, attn_implementation="eager")
    tensors = reloaded.state_dict()
    assert quantized.state_dict().keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in quantized.state_dict().items())
    batch = tiny_batch(reloaded)
    assert difference(predict(quantized, batch), predict(reloaded, batch)) == 0


def test_projections_take_one_bit_per_weight_and_embeddings_stay():
    model, quantized = binary_model("bert", bits=4)
    for name, module in choose_modules(model).items():
        packed = quantized.get_submodule(name)
        assert isinstance(packed, BinaryLinear)
        assert packed.weight.nbytes == out_width(module) * -(-in_width(module) // 8)
    assert torch.equal(quantized.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_inputs_that_are_never_negative_need_no_sign():
    model = tiny_model("bert", hidden_act="relu")
    quantized = quantize(model, BinaryConfig(activations=4), [tiny_batch(model)])
    signs = {name: module.fields["signed"] for name, module in quantized.named_modules() if "fields" in vars(module)}
    assert {signed for name, signed in signs.items() if name.endswith("layer.0.output.dense")} == {False}
    assert {signed for name, signed in signs.items() if "query" in name} == {True}


@pytest.mark.parametrize(("bits", "is_signed"), [(1, True), (1, False), (2, True), (4, False), (8, True)])
def test_a_fitted_scale_loses_least(bits, is_signed):
    values = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    values = values if is_signed else values.relu()
    scale, lost = fit_input_scale(values, bits, is_signed)

    def loss(candidate):
        rounded = candidate * round_inputs(values / candidate, bits, is_signed)
        return (rounded - values).square().sum() / values.square().sum()

    assert loss(scale) == pytest.approx(lost.item(), rel=1e-4)
    largest = values.abs().max() / input_levels(bits, is_signed)[1]
    assert all(lost <= loss(largest * share) * 1.05 + 1e-6 for share in torch.linspace(0.05, 1, 40))
    assert fit_input_scale(torch.zeros(5), bits, is_signed)[0] == 1


def test_without_training_it_warns_and_says_what_to_do(caplog):
    model = tiny_model("bert")
    with caplog.at_level(logging.WARNING, "hf_compress"):
        quantize(model, BinaryConfig(activations=FLOAT))
    assert "was not trained" in caplog.text
    assert "fake_quantize_(model, config, data)" in caplog.text
    caplog.clear()
    fake_quantize_(model, BinaryConfig(activations=FLOAT))
    quantize(model, BinaryConfig(activations=FLOAT))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_without_data_nothing_is_done():
    model = tiny_model("bert")
    before = predict(model, tiny_batch(model))
    with pytest.raises(ValueError, match="activations=1 needs data"):
        quantize_(model, BinaryConfig())
    assert difference(predict(model, tiny_batch(model)), before) == 0


def test_weights_that_are_not_finite_are_refused():
    model = tiny_model("bert")
    model.bert.encoder.layer[1].output.dense.weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match="layer.1.output.dense hold NaN or infinity"):
        quantize(model, BinaryConfig(activations=FLOAT))


def test_excluded_modules_stay_in_floating_point():
    model = tiny_model("bert")
    quantized = quantize(model, BinaryConfig(activations=FLOAT, exclude=("bert.encoder.layer.1",)))
    packed = {name for name, module in quantized.named_modules() if isinstance(module, BinaryLinear)}
    assert packed == {name for name in choose_modules(model) if not name.startswith("bert.encoder.layer.1.")}


@pytest.mark.parametrize("settings", [{"weights": 2}, {"activations": 3}, {"activations": 0}])
def test_unknown_bits_are_refused(settings):
    with pytest.raises(ValueError, match="bits are not"):
        BinaryConfig(**settings)
