"""bitsandbytes models come back bit for bit, and the task head and what kernels cannot take stay in floating point."""

import copy
import json
import logging

import bitsandbytes as bnb
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from hf_compress import Int8DynamicConfig
from hf_compress.checkpoint.sparse import mark_sparse_
from hf_compress.formats.linear4bit import ExactLinear4bit
from hf_compress.modeling.blocks import find_blocks, task_head_names
from hf_compress.modeling.surgery import keep_neurons_
from hf_compress.quantization.bitsandbytes_skips import float_patterns
from hf_compress.quantization.quantize import quantize, quantize_
from tests.modeling.tiny import MODEL_TYPES, class_names, difference, predict, tiny_batch, tiny_model
from tests.quantization.test_reload import assert_same, reload
from tests.quantization.wide import FFN, FP4, INT8, NF4, wide_model

pytestmark = pytest.mark.bitsandbytes

CONFIGS = {"int8": INT8, "fp4": FP4, "nf4": NF4}


def quantized_names(model) -> set[str]:
    kinds = (bnb.nn.Linear8bitLt, bnb.nn.Linear4bit)
    return {name for name, module in model.named_modules() if isinstance(module, kinds)}


def state_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model, before) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype, name
        assert torch.equal(after[name], tensor), name


@pytest.fixture(scope="module")
def bert():
    return wide_model("bert", "BertForSequenceClassification")


@pytest.mark.parametrize("format_name", CONFIGS)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_before_and_after_an_inference(model_type, format_name, tmp_path):
    model = wide_model(model_type)
    # Of all formats and architectures, half are pruned.
    if (MODEL_TYPES.index(model_type) + list(CONFIGS).index(format_name)) % 2:
        for number, block in enumerate(find_blocks(model)):
            keep_neurons_(block.ffn, range(FFN // 2 if number % 2 else FFN))
    untouched = state_of(model)
    quantized = quantize(model, CONFIGS[format_name])
    assert_unchanged(model, untouched)
    before = state_of(quantized)
    once = reload(quantized, tmp_path / "once")
    assert_same(once, quantized)
    assert_unchanged(quantized, before)
    outputs = predict(once, tiny_batch(once))
    twice = reload(once, tmp_path / "twice")
    assert_same(twice, quantized)
    assert difference(outputs, predict(once, tiny_batch(once))) == 0


@pytest.mark.parametrize("format_name", CONFIGS)
@pytest.mark.parametrize("model_type", ["bert", "gpt2"])
def test_turned_back_into_floating_point(model_type, format_name, tmp_path):
    model = wide_model(model_type)
    keep_neurons_(find_blocks(model)[0].ffn, range(FFN // 2))
    quantized = reload(quantize(model, CONFIGS[format_name]), tmp_path / "quantized")
    expected = predict(quantized, tiny_batch(model))
    back = quantized.dequantize()
    assert not quantized_names(back)
    reloaded = reload(back, tmp_path / "float")
    assert_same(reloaded, back)
    outputs = predict(reloaded, tiny_batch(model))
    # Not equal: activations of 8 bits, and scales of 4-bit blocks, are rounded once more while they run.
    assert (outputs - expected).norm() < 0.05 * expected.norm()


def test_formats_of_our_own_are_not_turned_back(bert):
    with pytest.raises(ValueError, match="BertForSequenceClassification is in a number format of hf_compress"):
        quantize(bert, Int8DynamicConfig()).dequantize()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_stock_rules_quantize_the_same_modules(model_type):
    for class_name in class_names(model_type):
        model = tiny_model(model_type, class_name)
        heads = task_head_names(model)
        quantized = quantize(model, INT8)
        names = quantized_names(quantized)
        patterns = quantized.config.quantization_config.inner["llm_int8_skip_modules"]
        patterns = patterns + list(model._keep_in_fp32_modules or [])
        stock = {
            name
            for name, module in model.named_modules()
            if (isinstance(module, Conv1D) or type(module) is nn.Linear) and should_convert_module(name, patterns)
        }
        assert names == stock
        assert names
        assert not any(name == head or name.startswith(f"{head}.") for name in names for head in heads)


def change_config(folder, change) -> None:
    file = folder / "config.json"
    fields = json.loads(file.read_text())
    change(fields)
    file.write_text(json.dumps(fields))


@pytest.mark.parametrize("config", [FP4, NF4], ids=("fp4", "nf4"))
def test_a_dense_checkpoint_holds_a_stock_one(bert, config, tmp_path):
    quantized = quantize(bert, config)
    quantized.save_pretrained(tmp_path)
    change_config(tmp_path, lambda fields: fields.update(quantization_config=fields["quantization_config"]["inner"]))
    stock = type(bert).from_pretrained(tmp_path, attn_implementation="eager")
    assert type(stock.config.quantization_config) is BitsAndBytesConfig
    assert quantized_names(stock) == quantized_names(quantized)
    assert difference(predict(stock, tiny_batch(bert)), predict(quantized, tiny_batch(bert))) == 0


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_packed_weights_are_never_taken_for_weights(model_type, config, tmp_path):
    model = wide_model(model_type)
    quantize(model, config).save_pretrained(tmp_path)
    # As Transformers does where hf_compress was not imported.
    change_config(tmp_path, lambda fields: fields.pop("quantization_config"))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        type(model).from_pretrained(tmp_path)


def test_integers_of_the_shape_of_the_weights_load_too(bert, tmp_path):
    quantized = quantize(bert, INT8)
    quantized.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    integers = {name: tensor[0] for name, tensor in stored.items() if tensor.dtype == torch.int8}
    assert integers
    save_file(stored | integers, file, {"format": "pt"})
    assert_same(type(bert).from_pretrained(tmp_path, attn_implementation="eager"), quantized)


@pytest.mark.parametrize("config", [INT8, FP4], ids=("int8", "fp4"))
def test_checkpoints_load_into_other_classes(bert, config, tmp_path):
    quantized = quantize(bert, config)
    quantized.save_pretrained(tmp_path / "head")
    base = transformers.AutoModel.from_pretrained(tmp_path / "head", attn_implementation="eager")
    assert difference(predict(base, tiny_batch(bert)), predict(quantized.bert, tiny_batch(bert))) == 0
    base.save_pretrained(tmp_path / "base")
    headed = type(bert).from_pretrained(tmp_path / "base", attn_implementation="eager")
    assert type(headed.classifier) is nn.Linear
    assert difference(predict(headed.bert, tiny_batch(bert)), predict(base, tiny_batch(bert))) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [INT8, NF4], ids=("int8", "nf4"))
def test_checkpoints_load_in_another_dtype(bert, config, dtype, tmp_path):
    quantize(bert, config).save_pretrained(tmp_path)
    model = type(bert).from_pretrained(tmp_path, dtype=dtype, attn_implementation="eager")
    plain = [weight for weight in model.parameters() if type(weight) is nn.Parameter and weight.is_floating_point()]
    assert {weight.dtype for weight in plain} == {dtype}
    assert model(**tiny_batch(model)).logits.dtype == dtype


def test_the_gate_tries_what_bitsandbytes_takes():
    model = wide_model("bert", "BertForSequenceClassification", intermediate_size=96)

    def score(model) -> float:
        return -0.01 * len(quantized_names(model))

    whole = quantized_names(quantize(model, NF4))
    kept = quantize(model, NF4, evaluate=score, max_drop=0.01 * (len(whole) - 2))
    assert quantized_names(kept) < whole
    assert len(quantized_names(kept)) == len(whole) - 2


def test_a_suffix_does_not_skip_other_modules():
    model = wide_model("bert", "BertForSequenceClassification")
    excluded = "bert.encoder.layer.1.output.dense"
    quantized = quantize(model, BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=[excluded]))
    names = quantized_names(quantized)
    assert excluded not in names
    assert "bert.encoder.layer.1.attention.output.dense" in names
    # A name that others end in becomes an expression that they do not.
    model.dense = nn.Linear(4, 4)
    patterns = float_patterns(model, names)
    assert not should_convert_module("dense", patterns)
    assert all(should_convert_module(name, patterns) for name in names if name != excluded)


def test_user_skips_are_added_to_the_head(bert):
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=[r".*\.layer\.0", "bert.pooler"])
    names = quantized_names(quantize(bert, config))
    assert names == {name for name in quantized_names(quantize(bert, INT8)) if ".layer.0." not in name} - {
        "bert.pooler.dense"
    }
    assert config.llm_int8_skip_modules == [r".*\.layer\.0", "bert.pooler"]


def test_odd_widths_stay_in_float_and_are_reported(tmp_path, caplog):
    model = wide_model("bert")
    block = find_blocks(model)[1]
    keep_neurons_(block.ffn, range(FFN - 24))
    quantized = quantize(model, FP4)
    assert "2 of 18 projections" in caplog.text
    assert "multiple_of=64" in caplog.text
    odd = {f"{block.name}.intermediate.dense", f"{block.name}.output.dense"}
    assert quantized_names(quantize(model, INT8)) - quantized_names(quantized) == odd
    assert_same(reload(quantized, tmp_path), quantized)
    with pytest.raises(ValueError, match="None of the 18 projections.*load_in_8bit"):
        quantize(tiny_model("bert"), FP4)


def test_sparse_weights_that_stay_in_float_stay_sparse(bert, tmp_path):
    model = copy.deepcopy(bert)
    names = ["classifier.weight", "bert.embeddings.word_embeddings.weight"]
    inner = "bert.encoder.layer.0.attention.self.query.weight"
    with torch.no_grad():
        for name in (*names, inner):
            model.get_parameter(name)[:, 4:] = 0
    mark_sparse_(model, [*names, inner])
    quantized = quantize(model, FP4)
    assert set(quantized.config.quantization_config.sparse) == set(names)
    once = reload(quantized, tmp_path / "once")
    assert_same(once, quantized)
    assert_same(reload(once, tmp_path / "twice"), quantized)


def test_casts_are_said_once(bert, caplog):
    quantized = quantize(bert, INT8)
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    for _ in range(3):
        predict(quantized, tiny_batch(bert))
    logger.warning("another message")
    logger.warning("another message")
    messages = [record.getMessage() for record in caplog.records if record.name == logger.name]
    assert sum("inputs will be cast" in message for message in messages) <= 1
    assert messages.count("another message") == 2


def one_module(model, **fields) -> nn.Module:
    return quantize(model, BitsAndBytesConfig(**fields)).bert.encoder.layer[0].intermediate.dense


def test_the_threshold_saves_outliers(bert):
    torch.manual_seed(0)
    exact = bert.bert.encoder.layer[0].intermediate.dense
    inputs = torch.randn(5, exact.in_features) * torch.tensor([30.0] + [1.0] * (exact.in_features - 1))
    rounded, mixed = (one_module(bert, load_in_8bit=True, llm_int8_threshold=limit)(inputs) for limit in (0.0, 6.0))
    assert (mixed - exact(inputs)).norm() < 0.5 * (rounded - exact(inputs)).norm()


def test_fields_of_4bit_configs_have_their_effect(bert):
    fields = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    plain = one_module(bert, **fields)
    assert plain.weight.quant_state.quant_type == "nf4"
    assert plain.state_dict()["weight.absmax"].dtype == torch.float32
    assert one_module(bert, load_in_4bit=True).weight.quant_state.quant_type == "fp4"
    double = one_module(bert, **fields, bnb_4bit_use_double_quant=True)
    assert double.state_dict()["weight.absmax"].dtype == torch.uint8
    half = one_module(bert, **fields, bnb_4bit_compute_dtype=torch.bfloat16)
    inputs = torch.randn(5, half.in_features)
    assert half(inputs).dtype == torch.float32
    assert torch.equal(half(inputs), half(inputs).to(torch.bfloat16).float())
    assert not torch.equal(half(inputs), plain(inputs))


def test_other_types_of_storage(bert, tmp_path):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage="bfloat16")
    quantized = quantize(bert, config)
    outputs = predict(quantized, tiny_batch(bert))
    once = reload(quantized, tmp_path / "once")
    assert once.bert.pooler.dense.weight.dtype == torch.bfloat16
    assert difference(predict(once, tiny_batch(bert)), outputs) == 0
    assert difference(predict(reload(once, tmp_path / "twice"), tiny_batch(bert)), outputs) == 0


def test_without_a_threshold_rows_do_not_depend_on_each_other(bert):
    quantized = quantize(bert, BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0))
    batch = tiny_batch(bert)
    alone = [predict(quantized, {name: tensor[row : row + 1] for name, tensor in batch.items()}) for row in range(2)]
    assert difference(predict(quantized, batch), torch.cat(alone)) <= 1e-5


def test_in_place_quantization_is_the_same(bert):
    model = copy.deepcopy(bert)
    quantize_(model, NF4)
    assert_same(model, quantize(bert, NF4))
    assert all(type(model.get_submodule(name)) is ExactLinear4bit for name in quantized_names(model))
