import copy
import json
import logging
import math
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from torch import nn

from hf_compress.formats.fixed_point_modules import FixedPointEmbedding, FixedPointLinear, minmax_scales
from hf_compress.formats.packed import PackedModule
from hf_compress.modeling.blocks import embedding_names, find_blocks, task_head_names
from hf_compress.modeling.surgery import keep_neurons_
from hf_compress.quantization.config import FixedPointConfig, Int8DynamicConfig
from hf_compress.quantization.fixed_point import fit_inputs, fit_weights, format_fields
from hf_compress.quantization.observers import observe_inputs
from hf_compress.quantization.quantize import quantize, quantize_
from tests.modeling.tiny import MODEL_TYPES, class_names, difference, predict, tiny_batch, tiny_model

SMALLEST = FixedPointConfig(bits=4, granularity="group")


def relative(found: torch.Tensor, reference: torch.Tensor) -> float:
    return float((found - reference).norm() / reference.norm())


def real_outputs(model, batch) -> torch.Tensor:
    """What is predicted at real tokens: ranges are not measured at others."""
    with torch.no_grad():
        logits = model(**batch).logits
    mask = batch.get("decoder_attention_mask", batch.get("attention_mask"))
    return logits if mask is None or mask.shape != logits.shape[:2] else logits[mask.bool()]


def batch_for(model) -> dict[str, torch.Tensor]:
    batch = tiny_batch(model)
    if "decoder_input_ids" in batch:
        batch["decoder_attention_mask"] = torch.ones_like(batch["decoder_input_ids"])
    return batch


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_16_bits_lose_nothing_that_counts(model_type):
    model = tiny_model(model_type)
    batch = batch_for(model)
    expected = real_outputs(model, batch)
    for config in (
        FixedPointConfig(bits=16),
        FixedPointConfig(bits=16, granularity="per_tensor", power_of_two=True),
        FixedPointConfig(bits=16, activations=16),
        FixedPointConfig(bits=16, activations=16, symmetric=False, granularity="group", group_size=10),
    ):
        quantized = quantize(model, config, [batch] if config.activations else None)
        # Activations have one step for all channels, the largest ones included.
        bound = 1e-3 if config.activations is None else 5e-3
        assert relative(real_outputs(quantized, batch), expected) < bound, config


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_quantized_model_is_the_model_with_rounded_weights(model_type):
    for class_name in class_names(model_type):
        model = tiny_model(model_type, class_name)
        quantized = quantize(model, SMALLEST)
        rounded = copy.deepcopy(model)
        packed = {name: module for name, module in quantized.named_modules() if isinstance(module, PackedModule)}
        assert packed
        assert not any(name.startswith(head) for name in packed for head in task_head_names(model)), class_name
        for name, module in packed.items():
            source = rounded.get_submodule(name)
            is_linear = isinstance(source, nn.Linear | nn.Embedding)
            source.weight = nn.Parameter(module.dequantize() if is_linear else module.dequantize().T.contiguous())
        batch = tiny_batch(model)
        assert difference(predict(quantized, batch), predict(rounded, batch)) < 2e-5, class_name


def test_which_tables_are_packed(caplog):
    def packed_tables(model_type, class_name):
        model = tiny_model(model_type, class_name)
        with caplog.at_level(logging.INFO):
            quantized = quantize(model, SMALLEST)
        found = [name for name, module in quantized.named_modules() if isinstance(module, FixedPointEmbedding)]
        assert all(f"{name}" in caplog.text for name in set(embedding_names(model)) - set(found))
        return found

    both = ["embeddings.word_embeddings", "embeddings.position_embeddings"]
    assert packed_tables("bert", "BertModel") == both
    assert packed_tables("gpt2", "GPT2Model") == ["wte", "wpe"]
    # Tied to the head; read as a whole; tied to each other; of a class that scales its rows.
    assert packed_tables("bert", "BertForMaskedLM") == ["bert.embeddings.position_embeddings"]
    assert packed_tables("deberta-v2", "DebertaV2Model") == both
    assert packed_tables("t5", "T5EncoderModel") == []
    assert packed_tables("bart", "BartModel") == []
    model = tiny_model("bert")
    without = quantize(model, FixedPointConfig(bits=4, granularity="group", embeddings=False))
    assert not any(isinstance(module, FixedPointEmbedding) for module in without.modules())


def test_the_smallest_format_on_disk(tmp_path):
    model = tiny_model("bert", "BertModel", hidden_size=64, intermediate_size=96)
    # 9 bytes for 16 numbers, and here no group is filled up.
    quantize(model, SMALLEST).save_pretrained(tmp_path)
    n_covered = n_bytes = 0
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            if name.endswith("weight") and len(file.get_slice(name).get_shape()) == 3:
                weight = model.get_submodule(name.removesuffix(".weight")).weight
                scales = file.get_tensor(f"{name}_scale_bfloat16")
                n_covered += weight.numel()
                n_bytes += file.get_tensor(name).nbytes + scales.nbytes
    assert n_covered > 0.9 * model.num_parameters()
    assert n_bytes == n_covered * 9 / 16
    entries = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["formats"]
    fields = {"bits": 4, "granularity": "group", "group_size": 32, "power_of_two": False, "symmetric": True}
    assert [{key: entry[key] for key in fields} for entry in entries] == [fields, fields]


@pytest.mark.parametrize("symmetric", [True, False])
def test_results_do_not_depend_on_the_batch_or_on_padding(symmetric):
    model = tiny_model("bert", "BertForSequenceClassification")
    batch = tiny_batch(model)
    config = FixedPointConfig(activations=8, symmetric=symmetric)
    quantized = quantize(model, config, [batch])
    together = predict(quantized, batch)
    alone = torch.cat([predict(quantized, {key: value[i : i + 1] for key, value in batch.items()}) for i in (0, 1)])
    unpadded = predict(quantized, {key: value[1:, :6] for key, value in batch.items()})
    assert difference(together, alone) < 1e-5
    assert difference(together[1:], unpadded) < 1e-5
    # Nor does what padding holds, while ranges are measured.
    other = copy.deepcopy(batch)
    other["input_ids"][1, 6:] = 33
    again = quantize(model, config, [other])
    for first, second in zip(quantized.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(first, second)


def test_ranges_are_those_of_real_tokens():
    model = tiny_model("bart")
    batch = tiny_batch(model)
    batch["decoder_input_ids"] = batch["input_ids"].clone()  # of the same shape as the encoder's
    batch["decoder_attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["decoder_attention_mask"][0, 3:] = 0
    attentions = find_blocks(model, "decoder")[0].attentions
    query, key = attentions[1].inputs[:2]
    modules = {"query": query, "key": key, "ffn": find_blocks(model)[0].ffn.output}
    seen = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
        for name, module in modules.items()
    ]
    found = observe_inputs(model, modules, [batch | {"unknown": torch.ones(1)}])
    for hook in hooks:
        hook.remove()
    masks = {"query": batch["decoder_attention_mask"], "key": batch["attention_mask"], "ffn": batch["attention_mask"]}
    for name, mask in masks.items():
        real = seen[name][mask.bool()]
        assert (found[name].lower, found[name].upper) == (real.min(), real.max())
        assert found[name].values()[1].sum() == real.numel()


@pytest.mark.parametrize("ranges", ["minmax", "percentile", "mse"])
def test_ranges_of_weights_and_activations(ranges):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(20, 70, generator=generator) ** 3
    for granularity in ("per_channel", "per_tensor", "group"):
        config = FixedPointConfig(bits=4, granularity=granularity, ranges=ranges, percentile=90)
        fields = format_fields(config)
        scales, zeros = fit_weights(weight, config)
        whole, _ = minmax_scales(weight, fields)
        assert scales.shape == zeros.shape == whole.shape
        assert (scales <= whole).all()
        is_whole = ranges == "minmax" or (ranges == "percentile" and granularity == "group")
        assert torch.equal(scales, whole) is is_whole
        if ranges == "mse":
            error = [
                (FixedPointLinear.from_scales(weight, None, (steps, zeros), **fields).dequantize() - weight).norm()
                for steps in (scales, whole)
            ]
            assert error[0] < error[1]
    model = tiny_model("bert")
    projection = find_blocks(model)[0].ffn.output
    histogram = observe_inputs(model, {"ffn": projection}, [tiny_batch(model)])["ffn"]
    config = FixedPointConfig(activations=4, ranges=ranges, symmetric=False, percentile=90)
    scale, zero = fit_inputs(histogram, config)
    assert scale.shape == zero.shape == (1,)
    full = (max(histogram.upper, 0) - min(histogram.lower, 0)) / 15
    assert scale <= full * (1 + 1e-6)
    assert ranges == "mse" or (float(scale) > full * (1 - 1e-6)) is (ranges == "minmax")


def test_fraction_bits_are_stored(tmp_path):
    model = tiny_model("bert", "BertForSequenceClassification")
    quantized = quantize(model, FixedPointConfig(power_of_two=True, activations=8), [tiny_batch(model)])
    for name, module in quantized.named_modules():
        if isinstance(module, FixedPointLinear):
            n = module.weight_fraction_bits
            assert n.dtype == module.input_fraction_bits.dtype == torch.int8
            largest = model.get_submodule(name).weight.abs().amax(1, keepdim=True)
            # One bit more would not hold the largest weight.
            assert (largest * 2.0**n <= 127.5).all()
            assert (largest * 2.0 ** (n + 1) > 127).all()
    quantized.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    assert difference(predict(quantized, tiny_batch(model)), predict(loaded, tiny_batch(model))) == 0


def test_uneven_widths():
    model = tiny_model("bert")
    for number, block in enumerate(find_blocks(model)):
        keep_neurons_(block.ffn, range(5 + 12 * number % 17))
    expected = predict(model, tiny_batch(model))
    for size in (2, 7, 32, 1000):
        quantized = quantize(model, FixedPointConfig(bits=12, granularity="group", group_size=size))
        assert relative(predict(quantized, tiny_batch(model)), expected) < 3e-3


def test_zero_rows_are_numbers():
    model = tiny_model("bert")
    projection = find_blocks(model)[0].ffn.inputs[0]
    with torch.no_grad():
        projection.weight[3] = 0
        find_blocks(model)[1].ffn.output.weight.zero_()
    for config in (SMALLEST, FixedPointConfig(symmetric=False), FixedPointConfig(power_of_two=True, ranges="mse")):
        assert predict(quantize(model, config), tiny_batch(model)).isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 1}, "bits=1 are no fixed-point format: give 2 to 16"),
        ({"bits": 17}, "bits=17"),
        ({"bits": 8.0}, "bits=8.0"),
        ({"activations": 3}, "activations=3 bits cannot be had: give 4 to 16"),
        ({"granularity": "rows"}, "granularity='rows' is unknown"),
        ({"group_size": 1}, "group_size=1 is no size"),
        ({"ranges": "max"}, "ranges='max' are unknown"),
        ({"percentile": 50}, "percentile=50 must be above 50"),
        ({"percentile": math.nan}, "percentile=nan"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        FixedPointConfig(**settings)


def test_errors_leave_the_model_as_it_was():
    model = tiny_model("bart").train()
    batch = tiny_batch(model)
    config = FixedPointConfig(activations=8)
    only_padding = batch | {"attention_mask": torch.zeros_like(batch["attention_mask"])}
    before = copy.deepcopy(model.state_dict())
    ffn = find_blocks(model)[0].ffn
    cases = [
        (None, "data=None"),
        ([], "hold no batch"),
        ([{"input_ids": [1, 2]}], "batch is a dict"),
        ([{"attention_mask": batch["attention_mask"]}], "needs 'input_ids'"),
        ([only_padding], "never reach model.encoder"),
    ]
    for data, message in cases:
        with pytest.raises((ValueError, TypeError), match=message):
            quantize_(model, config, data)
    saved = ffn.output.weight[0, 0].item()
    with torch.no_grad():
        ffn.output.weight[0, 0] = torch.inf
    for setting in (config, SMALLEST):
        with pytest.raises(ValueError, match=rf"weights of {ffn.output_name} hold NaN or infinity"):
            quantize_(model, setting, [batch])
    with torch.no_grad():
        ffn.output.weight[0, 0] = saved
        ffn.inputs[0].bias[1] = torch.inf
    with pytest.raises(ValueError, match=rf"activations of {ffn.output_name} hold NaN or infinity"):
        quantize_(model, config, [batch])
    with torch.no_grad():
        ffn.inputs[0].bias.copy_(before[f"{ffn.name}.{ffn.layout.inputs[0]}.bias".strip(".")])
    assert model.training
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert "quantization_config" not in vars(model.config)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_inputs_that_are_always_zero_have_no_range():
    model = tiny_model("bert")
    ffn = find_blocks(model)[0].ffn
    with torch.no_grad():
        ffn.inputs[0].weight.zero_()
        ffn.inputs[0].bias.zero_()
    with pytest.raises(ValueError, match=rf"{ffn.output_name} reads zeros alone"):
        quantize(model, FixedPointConfig(activations=8), [tiny_batch(model)])
    quantize(model, FixedPointConfig(activations=8, exclude=(ffn.output_name,)), [tiny_batch(model)])


def test_data_that_are_not_needed_are_warned_of(caplog):
    model = tiny_model("bert")
    quantize(model, FixedPointConfig(), [tiny_batch(model)])
    assert "The data are not read, because activations=None" in caplog.text


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_tables_zero_points_and_ranges_of_activations_come_back(model_type, tmp_path):
    model = tiny_model(model_type, class_names(model_type)[0])
    batch = tiny_batch(model)
    config = FixedPointConfig(bits=5, granularity="group", group_size=6, symmetric=False, activations=8)
    quantized = quantize(model, config, [batch])
    quantized.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.float16):
        loaded = type(model).from_pretrained(tmp_path, attn_implementation="eager", dtype=dtype)
        for name, tensor in quantized.state_dict().items():
            other = loaded.state_dict()[name]
            assert torch.equal(tensor, other) if tensor.dtype == other.dtype else dtype == torch.float16, name
        packed = [module for module in loaded.modules() if isinstance(module, PackedModule)]
        originals = [module for module in quantized.modules() if isinstance(module, PackedModule)]
        for module, original in zip(packed, originals, strict=True):
            assert torch.equal(module.dequantize(), original.dequantize())
        if dtype == torch.float32:
            assert difference(predict(loaded, batch), predict(quantized, batch)) == 0


@pytest.mark.parametrize(
    "config",
    [Int8DynamicConfig(embeddings=True, embedding_bits=4), FixedPointConfig(bits=8, embedding_bits=3)],
    ids=["int8 with 4", "8 with 3"],
)
def test_tables_of_fewer_bits(config, tmp_path):
    model = tiny_model("bert", "BertForSequenceClassification")
    whole, small = (quantize(model, one) for one in (replace(config, embedding_bits=8), config))
    whole.save_pretrained(tmp_path / "whole")
    small.save_pretrained(tmp_path / "small")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "small")]
    assert sizes[1] < sizes[0]
    again = type(model).from_pretrained(tmp_path / "small")
    for (name, tensor), other in zip(small.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name
    for name in embedding_names(small):
        assert isinstance(small.get_submodule(name), FixedPointEmbedding)
        assert json.loads(json.dumps(small.get_submodule(name).fields))["bits"] == config.embedding_bits


@pytest.mark.parametrize("kind", [Int8DynamicConfig, FixedPointConfig])
def test_bits_of_tables_that_are_not_rounded(kind):
    with pytest.raises(ValueError, match="^embedding_bits=4 says how tables .* leaves them .*: give embeddings=True"):
        kind(embeddings=False, embedding_bits=4)
