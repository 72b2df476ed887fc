import copy
import logging
from dataclasses import replace

import pytest
import torch

from hf_compress.checkpoint.widths import write_widths_
from hf_compress.formats.packed import PackedModule
from hf_compress.modeling.blocks import find_blocks
from hf_compress.modeling.surgery import keep_neurons_
from hf_compress.quantization.config import FixedPointConfig, FloatConfig, Int8DynamicConfig
from hf_compress.quantization.float import cast_
from hf_compress.quantization.quantize import quantize
from tests.modeling.tiny import MODEL_TYPES, difference, predict, tiny_batch, tiny_model

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_cast_model_comes_back_bit_for_bit(model_type, name, tmp_path):
    model = tiny_model(model_type)
    before = copy.deepcopy(model.state_dict())
    cast = quantize(model, FloatConfig(name))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert {str(tensor.dtype) for tensor in cast.state_dict().values()} <= {str(DTYPES[name]), "torch.float32"}
    assert cast.dtype == cast.config.dtype == DTYPES[name]
    cast.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    assert loaded.dtype == loaded.config.dtype == DTYPES[name]
    for key, tensor in cast.state_dict().items():
        assert tensor.dtype == loaded.state_dict()[key].dtype, key
        assert torch.equal(tensor, loaded.state_dict()[key]), key
    batch = tiny_batch(cast)
    if "pixel_values" in batch:
        batch = {"pixel_values": batch["pixel_values"].to(DTYPES[name])}
    assert difference(predict(cast, batch), predict(loaded, batch)) == 0
    # An ordinary checkpoint of an ordinary model.
    assert not hasattr(cast.config, "quantization_config")
    assert not getattr(cast, "is_quantized", False)


def test_what_must_stay_in_float32_stays():
    cast = quantize(tiny_model("t5"), FloatConfig("fp16"))
    kept = {key for key, tensor in cast.state_dict().items() if tensor.dtype == torch.float32}
    assert kept
    assert kept == {key for key in cast.state_dict() if key.split(".")[-2] == "wo"}
    assert not any(tensor.dtype == torch.float32 for tensor in quantize(cast, FloatConfig()).state_dict().values())


@pytest.mark.parametrize("config", [Int8DynamicConfig(), FixedPointConfig(bits=8)], ids=["int8", "fixed"])
def test_integers_leave_alone_what_must_stay_in_float32(config):
    """In float16 the outputs of these projections would overflow."""
    model = tiny_model("t5")
    packed = [name for name, one in quantize(model, config).named_modules() if isinstance(one, PackedModule)]
    half = quantize(quantize(model, FloatConfig("fp16")), config)
    found = [name for name, one in half.named_modules() if isinstance(one, PackedModule)]
    assert found == [name for name in packed if not name.endswith(".wo")]
    excluding = replace(config, exclude=(r".*\.wo",))
    again = quantize(quantize(model, FloatConfig("fp16")), excluding)
    assert found == [name for name, one in again.named_modules() if isinstance(one, PackedModule)]
    assert len(found) < len(packed)


def test_a_pruned_model_is_cast_too(tmp_path):
    model = tiny_model("bert")
    keep_neurons_(find_blocks(model)[1].ffn, range(9))
    write_widths_(model)
    cast = quantize(model, FloatConfig())
    cast.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    assert difference(predict(cast, tiny_batch(cast)), predict(loaded, tiny_batch(cast))) == 0
    assert loaded.dtype == torch.bfloat16


def test_tied_weights_stay_tied():
    cast = quantize(tiny_model("bert"), FloatConfig())
    assert cast.get_input_embeddings().weight is cast.get_output_embeddings().weight


def test_weights_beyond_the_range_are_named_and_nothing_is_changed():
    model = tiny_model("bert")
    with torch.no_grad():
        name, parameter = list(model.named_parameters())[-3]
        parameter.view(-1)[0] = 7e4
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=rf"{name} holds numbers up to 70000, and torch.float16 ends at 65504"):
        cast_(model, FloatConfig("fp16"))
    assert all(tensor.dtype == before[key].dtype for key, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    quantize(model, FloatConfig("bf16"))


def test_a_quantized_model_and_an_unknown_type_are_refused():
    with pytest.raises(ValueError, match="quantized already"):
        quantize(quantize(tiny_model("bert"), FixedPointConfig()), FloatConfig())
    with pytest.raises(ValueError, match="dtype='fp8' is no 16-bit type"):
        FloatConfig("fp8")


@pytest.mark.parametrize(
    ("name", "features", "is_slow"),
    [
        ("bf16", {"avx2"}, True),
        ("bf16", {"avx512_bf16"}, False),
        ("fp16", {"amx_bf16"}, True),
        ("fp16", {"amx_fp16"}, False),
    ],
)
def test_a_cpu_without_the_instructions_is_warned_of(name, features, is_slow, monkeypatch, caplog):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(features, True))
    with caplog.at_level(logging.WARNING):
        quantize(tiny_model("bert"), FloatConfig(name))
    assert (f"This CPU has no instructions for {name}" in caplog.text) is is_slow
