import copy
import logging
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from torch import nn

from hf_compress.formats.int8 import Int8Embedding, Int8Linear
from hf_compress.formats.packed import PackedModule
from hf_compress.modeling.blocks import task_head_names
from hf_compress.quantization.config import FloatConfig, Int8DynamicConfig
from hf_compress.quantization.float import DTYPES
from hf_compress.quantization.int8 import smoothing_factors
from hf_compress.quantization.noise import measure_noise
from hf_compress.quantization.quantize import quantize, quantize_
from tests.modeling.tiny import MODEL_TYPES, class_names, difference, predict, tiny_batch, tiny_model

EVERYTHING = Int8DynamicConfig(embeddings=True)


def packed_modules(model: nn.Module) -> dict[str, PackedModule]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedModule)}


def classifier() -> nn.Module:
    return tiny_model("bert", "BertForSequenceClassification")


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_class_predicts_about_the_same(model_type):
    for class_name in class_names(model_type):
        model = tiny_model(model_type, class_name)
        quantized = quantize(model, EVERYTHING)
        packed = packed_modules(quantized)
        assert packed
        assert not any(name.startswith(head) for name in packed for head in task_head_names(model)), class_name
        batch = tiny_batch(model)
        expected, found = predict(model, batch), predict(quantized, batch)
        assert (found - expected).norm() < 0.1 * expected.norm(), class_name


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_rows_do_not_depend_on_the_batch(model_type):
    model = quantize(tiny_model(model_type), EVERYTHING)
    batch = tiny_batch(model)
    with torch.no_grad():
        together = model(**batch).logits
        alone = [model(**{name: value[row : row + 1] for name, value in batch.items()}).logits for row in (0, 1)]
    assert difference(together, torch.cat(alone)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predictions_do_not_depend_on_padding(dtype):
    model = quantize(classifier().to(dtype), EVERYTHING)
    batch = tiny_batch(model)
    unpadded = {name: value[1:, :6] for name, value in batch.items()}
    assert difference(predict(model, batch)[1:], predict(model, unpadded)) < 1e-5


def test_tables_are_packed_only_when_asked_for():
    model = tiny_model("bert", "BertModel")
    assert not any(isinstance(module, Int8Embedding) for module in quantize(model, Int8DynamicConfig()).modules())
    tables = [name for name, module in packed_modules(quantize(model, EVERYTHING)).items() if "embeddings" in name]
    assert tables == ["embeddings.word_embeddings", "embeddings.position_embeddings"]


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_weights_that_are_not_finite(wrong):
    model = classifier()
    name = "bert.encoder.layer.1.intermediate.dense"
    with torch.no_grad():
        model.get_submodule(name).weight[3, 4] = wrong
    untouched = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=rf"{name} hold NaN or infinity.*add '{name}' to exclude"):
        quantize_(model, Int8DynamicConfig())
    assert_untouched(model, untouched)
    quantize_(model, Int8DynamicConfig(exclude=(name,)))


def test_quantized_models_are_refused():
    model = quantize(classifier(), Int8DynamicConfig())
    with pytest.raises(ValueError, match="is quantized already"):
        quantize_(model, Int8DynamicConfig())


def test_unknown_settings_are_refused():
    with pytest.raises(TypeError, match="bits"):
        Int8DynamicConfig(bits=4)
    for share in (-0.1, 1.5):
        with pytest.raises(ValueError, match=f"smooth={share}"):
            Int8DynamicConfig(smooth=share)


def assert_untouched(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    assert not packed_modules(model)
    assert not getattr(model, "is_quantized", False)
    assert "quantization_config" not in vars(model.config)
    assert all(
        torch.equal(tensor.nan_to_num(), tensors[name].nan_to_num()) for name, tensor in model.state_dict().items()
    )


def test_smoothing_factors_are_those_of_the_paper():
    inputs, weights = torch.tensor([16.0, 1.0, 0.0, 4.0]), torch.tensor([4.0, 1.0, 2.0, 0.0])
    assert smoothing_factors(inputs, weights, 0.5).tolist() == [2.0, 1.0, 1.0, 1.0]
    assert smoothing_factors(inputs, weights, 1.0).tolist() == [16.0, 1.0, 1.0, 1.0]
    assert smoothing_factors(inputs, weights, 0.0).tolist() == [0.25, 1.0, 1.0, 1.0]


def test_smoothing_helps_where_channels_are_large(tmp_path):
    model = classifier()
    batch = tiny_batch(model)
    with torch.no_grad():
        # What comes out of each norm has one large channel, as in models with outliers.
        for name, module in model.named_modules():
            if isinstance(module, nn.LayerNorm):
                module.weight[5] *= 60
            elif isinstance(module, nn.Linear) and module.in_features == 32 and name != "classifier":
                module.weight[:, 5] /= 60
    plain = quantize(model, Int8DynamicConfig())
    smooth = quantize(model, Int8DynamicConfig(smooth=0.5), [batch])
    assert all(module.fields == {"smooth": True} for module in packed_modules(smooth).values())
    noise = {id(found): measure_noise(found, model, [batch]) for found in (plain, smooth)}
    query = "bert.encoder.layer.0.attention.self.query"
    assert noise[id(smooth)][query].outputs > noise[id(plain)][query].outputs + 6
    expected = predict(model, batch)
    assert (predict(smooth, batch) - expected).norm() < (predict(plain, batch) - expected).norm()
    smooth.save_pretrained(tmp_path)
    assert torch.equal(predict(type(model).from_pretrained(tmp_path), batch), predict(smooth, batch))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_smoothed_models_come_back(model_type, tmp_path):
    model = tiny_model(model_type)
    batch = tiny_batch(model)
    smooth = quantize(model, Int8DynamicConfig(smooth=0.5, embeddings=True), [batch])
    expected = predict(smooth, batch)
    reference = predict(model, batch)
    assert (expected - reference).norm() < 0.1 * reference.norm()
    smooth.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(predict(again, batch), expected)


def test_smoothing_without_sound_data():
    model = classifier()
    untouched = copy.deepcopy(model.state_dict())
    config = Int8DynamicConfig(smooth=0.5)
    with pytest.raises(ValueError, match=r"smooth=0.5 needs .* data=None"):
        quantize_(model, config)
    with pytest.raises(ValueError, match="hold no batch"):
        quantize_(model, config, [])
    assert_untouched(model, untouched)
    with torch.no_grad():
        model.bert.embeddings.LayerNorm.weight[2] = torch.inf
    with pytest.raises(ValueError, match="hold NaN or infinity at bert.encoder.layer.0"):
        quantize_(model, config, [tiny_batch(model)])
    assert not packed_modules(model)


def test_data_that_are_not_needed_are_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        quantize(classifier(), Int8DynamicConfig(), [])
    assert "smooth=None" in caplog.text


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated", "ignore:Unsupported layer type")
def test_adapters_are_trained_on_top():
    torch.manual_seed(0)
    model = quantize(classifier(), Int8DynamicConfig())
    before = copy.deepcopy(model.state_dict())
    config = LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)
    config._register_custom_module({Int8Linear: lora.Linear})
    adapted = get_peft_model(model, config)
    optimizer = torch.optim.SGD([weight for weight in adapted.parameters() if weight.requires_grad], lr=0.1)
    losses = []
    for _ in range(5):
        loss = adapted(**tiny_batch(model), labels=torch.tensor([0, 1])).loss
        optimizer.zero_grad()
        loss.backward()
        trained = {name: weight.grad for name, weight in adapted.named_parameters() if weight.requires_grad}
        assert len(trained) == 2 * 2 * 3
        assert all(gradient.abs().sum() > 0 for gradient in trained.values())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = adapted.unload().state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_adapters_are_merged_first():
    model = tiny_model("bert", "BertForSequenceClassification")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))
    with pytest.raises(ValueError, match="has adapters.*merge_and_unload"):
        quantize(adapted, Int8DynamicConfig())
    merged = adapted.merge_and_unload()
    assert any(isinstance(module, PackedModule) for module in quantize(merged, Int8DynamicConfig()).modules())


@pytest.mark.parametrize("name", ["bf16", "fp16"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_rest_may_be_of_16_bits(model_type, name, tmp_path):
    model = tiny_model(model_type)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    half = quantize(model, Int8DynamicConfig(dtype=name))
    # The integers are those of the weights in float32, the rest that of a cast model.
    integers, cast = quantize(model, Int8DynamicConfig()).state_dict(), quantize(model, FloatConfig(name)).state_dict()
    is_scale = re.compile(r".*\.weight_scale")
    for key, tensor in half.state_dict().items():
        expected = integers[key] if tensor.dtype == torch.int8 or is_scale.fullmatch(key) else cast[key]
        assert tensor.dtype == expected.dtype, key
        assert torch.equal(tensor, expected), key
    assert half.dtype == half.config.dtype == DTYPES[name]
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    half.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    batch = tiny_batch(half)
    if "pixel_values" in batch:
        batch = {"pixel_values": batch["pixel_values"].to(DTYPES[name])}
    assert difference(predict(half, batch), predict(loaded, batch)) == 0


def test_tables_are_looked_up_in_the_dtype_of_the_rest():
    model = quantize(classifier(), Int8DynamicConfig(embeddings=True, dtype="bf16"))
    table = model.get_input_embeddings()
    assert isinstance(table, Int8Embedding)
    assert table(torch.tensor([[1]])).dtype is torch.bfloat16
    assert table.weight_scale.dtype is torch.float32


def test_what_must_stay_in_float32_beside_float16_stays():
    half = quantize(tiny_model("t5"), Int8DynamicConfig(dtype="fp16"))
    kept = {key for key, tensor in half.state_dict().items() if key.endswith(".wo.weight")}
    assert kept
    assert all(half.state_dict()[key].dtype is torch.float32 for key in kept)


def test_a_rest_out_of_range_leaves_the_model_as_it_was():
    model = classifier()
    with torch.no_grad():
        model.classifier.bias[0] = 1e6
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"classifier\.bias holds numbers up to 1e\+06"):
        quantize_(model, Int8DynamicConfig(dtype="fp16"))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not getattr(model, "is_quantized", False)
    with pytest.raises(ValueError, match="dtype='float16'"):
        Int8DynamicConfig(dtype="float16")
