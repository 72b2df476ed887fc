"""4-bit modules lose nothing by what a model goes through; adapters train on them; bad input changes nothing."""

import copy

import bitsandbytes as bnb
import pytest
import torch
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig, Trainer, TrainingArguments

from hf_compress.checkpoint.config import CompressionConfig
from hf_compress.checkpoint.widths import write_widths_
from hf_compress.formats.linear4bit import ExactLinear4bit, make_exact_
from hf_compress.modeling.blocks import find_blocks
from hf_compress.modeling.surgery import keep_neurons_
from hf_compress.quantization.quantize import quantize, quantize_
from tests.modeling.tiny import difference, predict, tiny_batch
from tests.quantization.wide import FFN, FP4, INT8, NF4, wide_model

pytestmark = pytest.mark.bitsandbytes

INPUTS, OUTPUTS = 128, 96


@pytest.fixture(scope="module")
def bert():
    return wide_model("bert", "BertForSequenceClassification")


@pytest.fixture
def pruned(bert):
    model = copy.deepcopy(bert)
    for number, block in enumerate(find_blocks(model)):
        keep_neurons_(block.ffn, range(FFN // 2 if number % 2 else FFN))
    return model


@pytest.fixture(params=[("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True)], ids=str)
def module(request):
    quant_type, is_double = request.param
    generator = torch.Generator().manual_seed(0)
    # Rows of very different sizes: scales in another order cannot be mistaken for the right ones.
    weight = torch.randn(OUTPUTS, INPUTS, generator=generator) * torch.logspace(-2, 2, OUTPUTS)[:, None]
    kind = {"compress_statistics": is_double, "quant_type": quant_type}
    made = bnb.nn.Linear4bit(INPUTS, OUTPUTS, True, torch.bfloat16, **kind)
    made.weight = bnb.nn.Params4bit(weight, requires_grad=False, module=made, **kind).to("cpu")
    make_exact_(made)
    return made.eval()


def state_of(module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_state(module, expected) -> None:
    state = module.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name


@torch.no_grad()
def test_an_inference_changes_no_tensor(module):
    before, inputs = state_of(module), torch.randn(7, INPUTS)
    outputs = module(inputs)
    assert_state(module, before)
    assert torch.equal(module(inputs), outputs)
    copied = copy.deepcopy(module)
    assert torch.equal(copied(inputs), outputs)
    assert_state(copied, before)


@torch.no_grad()
def test_it_computes_what_the_base_class_computes(module):
    stock, inputs = copy.deepcopy(module), torch.randn(2, 7, INPUTS)
    stock.__class__ = bnb.nn.Linear4bit
    assert torch.equal(module(inputs), stock(inputs))


def test_gradients_after_an_inference(module):
    inputs = torch.randn(7, INPUTS)

    def gradient() -> torch.Tensor:
        leaf = inputs.clone().requires_grad_()
        module(leaf).square().sum().backward()
        return leaf.grad

    before = gradient()
    with torch.no_grad():
        module(inputs)
    assert torch.equal(gradient(), before)


@torch.no_grad()
def test_moves_and_training_after_an_inference(module):
    inputs = torch.randn(7, INPUTS)
    before, trained = state_of(module), module.train()(inputs)
    module.eval()(inputs)
    assert torch.equal(module.train()(inputs), trained)
    module.eval()(inputs)
    assert_state(module.to("cpu"), before)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft reads it
@pytest.mark.parametrize("config", [INT8, NF4], ids=["int8", "nf4"])
def test_adapters_train_on_a_pruned_checkpoint(pruned, config, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    quantize(pruned, config).save_pretrained(tmp_path / "model")

    def load():
        return AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", attn_implementation="eager")

    model, batch = load(), tiny_batch(pruned)
    before = predict(model, batch)
    state = state_of(model)
    rows = [{name: tensor[row] for name, tensor in batch.items()} | {"labels": row} for row in range(2)]
    settings = {"max_steps": 2, "learning_rate": 0.01, "use_cpu": True, "report_to": "none", "save_strategy": "no"}
    arguments = TrainingArguments(tmp_path / "run", disable_tqdm=True, **settings)
    with pytest.raises(ValueError, match="quantized"):
        Trainer(model, arguments, train_dataset=rows)
    lora = LoraConfig(r=2, target_modules=["query", "intermediate.dense"], task_type="SEQ_CLS")
    adapted = get_peft_model(model, lora)
    Trainer(adapted, arguments, train_dataset=rows).train()
    after = predict(adapted.eval(), batch)
    assert difference(after, before) > 0
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load(), tmp_path / "adapter").eval()
    assert difference(predict(loaded, batch), after) == 0
    assert_state(load(), state)


def test_casts_of_the_model_are_refused(pruned):
    quantized = quantize(pruned, INT8)
    with pytest.raises(ValueError, match="bitsandbytes"):
        quantized.to(torch.float16)
    with pytest.raises(ValueError, match="half"):
        quantized.half()


def changed(**fields) -> BitsAndBytesConfig:
    config = BitsAndBytesConfig(load_in_4bit=True)
    for name, value in fields.items():
        setattr(config, name, value)
    return config


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        (BitsAndBytesConfig(), ValueError, "neither load_in_8bit nor load_in_4bit"),
        (changed(bnb_4bit_quant_type="int4"), ValueError, "'int4'.*'nf4' or 'fp4'"),
        (changed(llm_int8_threshold=6), TypeError, "llm_int8_threshold must be a float"),
        (changed(llm_int8_threshold=-1.0), ValueError, "llm_int8_threshold=-1.0.*6.0"),
        (changed(llm_int8_threshold=float("nan")), ValueError, "llm_int8_threshold=nan"),
        (changed(llm_int8_has_fp16_weight=True), ValueError, "llm_int8_has_fp16_weight=True is for CUDA"),
        (changed(llm_int8_enable_fp32_cpu_offload=True), ValueError, "offload=True splits.*leave it out"),
        (changed(llm_int8_skip_modules=["no.such.module"]), ValueError, "'no.such.module'"),
        (changed(llm_int8_skip_modules=["bert"]), ValueError, "leaves nothing to quantize"),
    ],
)
def test_bad_configs(bert, config, error, words):
    with pytest.raises(error, match=words):
        quantize(bert, config)


@pytest.mark.parametrize(
    ("value", "config", "words"),
    [
        (float("nan"), FP4, "layer.1.output.dense has infinities or NaN"),
        (float("-inf"), INT8, "layer.1.output.dense has infinities or NaN"),
        (7e4, INT8, "up to 7e\\+04.*float16.*llm_int8_skip_modules"),
    ],
)
def test_bad_weights_leave_the_model_as_it_was(bert, value, config, words):
    model = copy.deepcopy(bert)
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[3, 5] = value
    before, before_config = model.state_dict(), model.config.to_dict()
    kinds = [type(part) for part in model.modules()]
    with pytest.raises(ValueError, match=words):
        quantize_(model, config)
    assert kinds == [type(part) for part in model.modules()]
    assert model.config.to_dict() == before_config
    assert all(tensor.data_ptr() == before[name].data_ptr() for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_rows_and_blocks_of_zeros(bert):
    model = copy.deepcopy(bert)
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[:3] = 0
    for config in (INT8, FP4, NF4):
        assert predict(quantize(model, config), tiny_batch(model)).isfinite().all()


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_is_missing(bert, bits, monkeypatch, tmp_path):
    config = INT8 if bits == 8 else FP4
    quantize(bert, config).save_pretrained(tmp_path)
    monkeypatch.setattr(f"transformers.quantizers.quantizer_bnb_{bits}bit.is_bitsandbytes_available", lambda: False)
    for act in (lambda: quantize(bert, config), lambda: type(bert).from_pretrained(tmp_path)):
        with pytest.raises(ImportError, match="pip install -U bitsandbytes"):
            act()


def test_quantized_models_are_refused(pruned, tmp_path):
    quantized = quantize(pruned, INT8)
    with pytest.raises(ValueError, match="quantized already"):
        quantize(quantized, FP4)
    # Transformers compares the classes of the two configs, and raises before ours is asked.
    write_widths_(pruned)
    pruned.save_pretrained(tmp_path / "float")
    quantized.save_pretrained(tmp_path / "int8")
    for folder in ("float", "int8"):
        with pytest.raises(ValueError, match="CompressionConfig but you are passing a BitsAndBytesConfig"):
            AutoModelForSequenceClassification.from_pretrained(tmp_path / folder, quantization_config=FP4)


def test_a_config_of_a_checkpoint_quantizes_nothing(bert, tmp_path):
    bert.save_pretrained(tmp_path)
    config = CompressionConfig(inner={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.raises(ValueError, match="load it without quantization_config"):
        type(bert).from_pretrained(tmp_path, quantization_config=config)


def test_all_4bit_modules_are_exact_ones(bert, tmp_path):
    quantize(bert, FP4).save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    kinds = {type(module) for module in loaded.modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert kinds == {ExactLinear4bit}
