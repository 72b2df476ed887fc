"""Costs equal what can be worked out by hand."""

import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import (
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_compress.evaluation.cost import count_macs, count_parameters, measure_cost, peak_memory, saved_bytes
from hf_compress.evaluation.latency import compare_latency
from hf_compress.formats import int8, int8_kernels
from hf_compress.quantization.config import Int8DynamicConfig
from hf_compress.quantization.quantize import quantize
from tests.modeling.tiny import MODEL_TYPES, supports, tiny_batch, tiny_model

B, S, H, F, LAYERS, CLASSES = 3, 8, 16, 32, 2, 2
BATCH = {
    "input_ids": torch.arange(B * S).reshape(B, S) + 3,
    "attention_mask": torch.ones(B, S, dtype=torch.long),
    "labels": torch.zeros(B, dtype=torch.long),
    "unknown": torch.zeros(B),
}
LLAMA = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}


def bert_macs(neurons=(F, F), width=(H, H)):
    """`width`: heads times head size, per layer."""
    layers = sum(4 * S * H * w + 2 * S * S * w + 2 * S * H * n for n, w in zip(neurons, width, strict=True))
    return B * (layers + H * H + H * CLASSES)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("has_mask", [True, False])
def test_macs_equal_the_formula(make_bert, attention, has_mask):
    model = make_bert()
    model.set_attn_implementation(attention)
    batch = BATCH if has_mask else {"input_ids": BATCH["input_ids"]}
    if has_mask:
        batch = {**BATCH, "attention_mask": BATCH["attention_mask"].tril()}
    assert count_macs(model, batch) == bert_macs()


def test_macs_fall_with_neurons_as_the_formula_says(make_bert):
    model = make_bert()
    layer = model.bert.encoder.layer[0]
    layer.intermediate.dense = nn.Linear(H, 20)
    layer.output.dense = nn.Linear(20, H)
    assert count_macs(model, BATCH) == bert_macs(neurons=(20, F)) == bert_macs() - B * 2 * S * H * 12


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_macs_agree_between_attentions(model_type):
    counted = set()
    for attention in ("eager", "sdpa"):
        if supports(model_type, attention):
            model = tiny_model(model_type, attention=attention)
            counted.add(count_macs(model, tiny_batch(model)))
    assert len(counted) == 1
    assert counted.pop() > 0


def test_parameters_that_modules_read_as_inputs():
    model = tiny_model("deberta-v2", "DebertaV2ForSequenceClassification", norm_rel_ebd="none")
    normed = tiny_model("deberta-v2", "DebertaV2ForSequenceClassification")
    model.deberta.embeddings.requires_grad_(False)
    trained = [parameter.requires_grad for parameter in model.parameters()]
    assert count_macs(model, tiny_batch(model)) == count_macs(normed, tiny_batch(normed))
    assert [parameter.requires_grad for parameter in model.parameters()] == trained


@pytest.mark.parametrize("kernel", ["fastest", "oneDNN, rounding by FBGEMM", "torch._int_mm", "float32"])
def test_macs_of_quantized_models_equal_those_of_float_ones(make_bert, kernel, monkeypatch):
    if kernel != "fastest":
        kernels = (*int8_kernels.CANDIDATES["cpu"], int8_kernels.FLOAT32)
        chosen = next(one for one in kernels if one.name == kernel)
        monkeypatch.setattr(int8, "kernel_for", lambda device_type: chosen)
    model = quantize(make_bert(), Int8DynamicConfig())
    assert count_macs(model, BATCH) == bert_macs()


def test_macs_of_an_int8_product_equal_those_of_a_float_one(make_bert):
    class Int8Linear(nn.Linear):
        def forward(self, inputs):
            flat = inputs.flatten(0, -2).to(torch.int8)
            product = torch._int_mm(flat, self.weight.to(torch.int8).t().contiguous())
            return product.float().unflatten(0, inputs.shape[:-1])

    model = make_bert()
    model.bert.encoder.layer[0].intermediate.dense = Int8Linear(H, F)
    assert count_macs(model, BATCH) == bert_macs()


def test_parameters_are_split_and_complete(make_bert):
    model = make_bert()
    counted = count_parameters(model)
    assert counted.total == model.num_parameters() == counted.embeddings + counted.encoder + counted.other
    assert counted.encoder == sum(p.numel() for p in model.bert.encoder.layer.parameters())
    assert counted.embeddings == H * (40 + 32 + 2)
    assert counted.other == 2 * H + (H * H + H) + (H * CLASSES + CLASSES)


def test_shared_parameters_count_once(make_bert):
    for model in (
        make_bert(BertForMaskedLM),
        GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)),
        T5ForConditionalGeneration(T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)),
    ):
        counted = count_parameters(model)
        assert counted.total == len(torch.cat([p.flatten() for p in set(model.parameters())]))
        assert counted.total == counted.embeddings + counted.encoder + counted.other


def test_packed_weights_count_as_the_matrix_they_stand_for(make_bert):
    class Packed(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.in_features, self.out_features = linear.in_features, linear.out_features
            self.register_buffer("bits", torch.zeros(linear.weight.numel() // 8, dtype=torch.uint8))
            self.register_buffer("scale", torch.ones(linear.out_features))
            self.bias = linear.bias

    model = make_bert()
    expected = count_parameters(model)
    layer = model.bert.encoder.layer[1]
    layer.intermediate.dense = Packed(layer.intermediate.dense)
    assert count_parameters(model) == expected
    layer.output.dense.register_buffer("mask", torch.ones(H, F, dtype=torch.bool))
    assert count_parameters(model) == expected


def test_unknown_architecture_gives_no_guess(make_bert, caplog):
    model = OPTForCausalLM(
        OPTConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, ffn_dim=32, num_attention_heads=2)
    )
    model.config.model_type = "no-such-model"
    with caplog.at_level(logging.WARNING):
        counted = count_parameters(model)
    assert counted.total == model.num_parameters()
    assert counted.encoder is None
    assert counted.other is None
    assert "not told apart" in caplog.text


def test_bytes_are_those_of_the_files(make_bert, tmp_path):
    model = make_bert()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    assert saved_bytes(model, tmp_path) == sum(os.path.getsize(file) for file in files)
    model.save_pretrained(tmp_path / "whole")
    assert saved_bytes(model) == os.path.getsize(tmp_path / "whole" / "model.safetensors")
    with pytest.raises(ValueError, match="save_pretrained"):
        saved_bytes(model, tmp_path / "none")


def test_peak_memory_is_the_weights_and_the_highest_sum_of_allocations(make_bert, capfd):
    model = make_bert()

    class Steps(nn.Module):
        def forward(self, hidden_states, *args, **kwargs):
            first = torch.zeros(250_000)  # 1 MB
            second = first + 1  # 2 MB held
            del first
            third = second * 2  # 2 MB held
            fourth = third + 1  # 3 MB held, the peak
            return hidden_states + fourth[0]

    model.bert.pooler = Steps()
    weights = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    # What the forward itself holds at that moment is a few kB.
    assert 3_000_000 <= peak_memory(model, BATCH) - weights <= 3_050_000
    assert peak_memory(model, BATCH) == peak_memory(model, BATCH)
    assert "KINETO_LOG_LEVEL" not in os.environ
    assert capfd.readouterr().err == ""


def test_cost_is_json_and_leaves_the_model_as_it_was(make_bert, tmp_path):
    model = make_bert().train()
    model.bert.encoder.eval()
    flags = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    cost = measure_cost(model, BATCH, path=tmp_path, n_warmup=1, n_runs=3)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    facts = json.loads(json.dumps(cost.to_dict()))
    assert facts["parameters"]["total"] == model.num_parameters()
    assert facts["macs"] == bert_macs()
    assert facts["bytes_on_disk"] == saved_bytes(model)
    assert facts["latency"]["dtype"] == "float32"
    assert facts["latency"]["examples_per_s"] == pytest.approx(B / facts["latency"]["median_s"])
    assert 0 < facts["latency"]["median_s"] <= facts["latency"]["p95_s"]
    conditions = facts["conditions"]
    assert (conditions["device"], conditions["batch_size"], conditions["sequence_length"]) == ("cpu", B, S)
    assert conditions["threads"] == torch.get_num_threads()
    assert conditions["torch_version"] == torch.__version__


def test_latency_is_measured_in_turn(make_bert):
    models = {"first": make_bert(), "second": make_bert(num_hidden_layers=1).to(torch.bfloat16)}
    order = []
    for name, model in models.items():
        model.register_forward_pre_hook(lambda *_, name=name: order.append(name))
    result = compare_latency(models, BATCH, n_warmup=1, n_runs=3)
    assert order == ["first", "second"] * 4
    assert list(result.latency) == list(models)
    assert result.ratio["first"] == 1
    assert result.ratio["second"] == result.latency["second"].median_s / result.latency["first"].median_s
    assert result.latency["second"].dtype == "bfloat16"
    json.dumps(result.to_dict())


def test_errors_say_what_to_do(make_bert):
    with pytest.raises(ValueError, match="at least one model"):
        compare_latency({}, BATCH)
    with pytest.raises(ValueError, match="n_runs=0"):
        compare_latency({"model": make_bert()}, BATCH, n_runs=0)
    with pytest.raises(ValueError, match="takes none as input"):
        measure_cost(make_bert(), {"words": torch.zeros(1)})


def test_importing_the_costs_is_light():
    code = (
        "import sys, hf_compress.evaluation.cost; "
        "print(sorted({'datasets', 'evaluate', 'sklearn', 'scipy', 'seqeval'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"


def test_packed_tables_count_as_tables():
    model = tiny_model("bert")
    packed = quantize(model, Int8DynamicConfig(embeddings=True))
    assert count_parameters(packed) == count_parameters(model)


def test_weights_that_are_there_twice_count_once(make_bert, tmp_path):
    make_bert().save_pretrained(tmp_path)
    once = saved_bytes(None, tmp_path)
    (tmp_path / "consolidated.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes())
    assert saved_bytes(None, tmp_path) == once
