"""Hooks read what the model computes, store what was asked for, and go away."""

import math
from contextlib import ExitStack

import pytest
import torch
from torch import distributed, nn

from hf_compress.modeling.blocks import count_layers, find_blocks, find_stacks
from hf_compress.modeling.capture import (
    capture_hidden_states,
    capture_inputs,
    capture_qkv,
    gate_outputs,
    visit_inputs,
)
from tests.modeling.tiny import FFN, HEADS, LAYERS, MODEL_TYPES, difference, predict, supports, tiny_batch, tiny_model

CASES = [
    (model_type, attention)
    for model_type in MODEL_TYPES
    for attention in ("eager", "sdpa")
    if supports(model_type, attention)
]


def count_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize(("model_type", "attention"), CASES)
def test_hidden_states_equal_those_of_transformers(model_type, attention):
    model = tiny_model(model_type, attention=attention)
    inputs = tiny_batch(model)
    with torch.no_grad():
        outputs = model(**inputs, output_hidden_states=True)
    hooks_of_transformers = count_hooks(model)
    for stack in find_stacks(model):
        is_alone = len(find_stacks(model)) == 1
        expected = outputs.hidden_states if is_alone else outputs[f"{stack}_hidden_states"]
        last = count_layers(model, stack)
        with torch.no_grad(), capture_hidden_states(model, range(last + 1), stack) as states:
            model(**inputs)
        assert sorted(states) == list(range(last + 1))
        assert len(expected) == last + 1
        for number in range(last):
            assert difference(states[number], expected[number]) == 0.0
        if model_type not in ("gpt2", "llama", "mistral", "modernbert", "qwen2", "qwen3", "t5", "vit"):
            assert difference(states[last], expected[last]) == 0.0
    assert count_hooks(model) == hooks_of_transformers


def test_hidden_states_keep_their_graph_and_nothing_else_is_stored():
    model = tiny_model("bert")
    with capture_hidden_states(model, [2]) as states:
        model(**tiny_batch(model))
    assert list(states) == [2]
    states[2].sum().backward()
    blocks = find_blocks(model)
    assert blocks[1].ffn.output.weight.grad is not None
    assert blocks[2].ffn.output.weight.grad is None


@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra", "distilbert", "albert", "vit", "gpt2", "bart"])
def test_qkv_give_the_attention_probabilities(model_type):
    model = tiny_model(model_type)
    inputs = tiny_batch(model)
    stack = "encoder" if model_type == "bart" else None
    with torch.no_grad(), capture_qkv(model, [0, 2], stack) as captured:
        outputs = model(**inputs, output_attentions=True)
    attentions = outputs.encoder_attentions if model_type == "bart" else outputs.attentions
    assert sorted(captured) == [0, 2]
    for layer, (q, k, v) in captured.items():
        assert q.shape == k.shape == v.shape
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if "attention_mask" in inputs:
            scores = scores.masked_fill(inputs["attention_mask"][:, None, None] == 0, -torch.inf)
        if model_type == "gpt2":
            scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1) == 1, -torch.inf)
        assert difference(scores.softmax(-1), attentions[layer]) <= 1e-5


@pytest.mark.parametrize(("model_type", "attention"), CASES)
def test_qkv_of_every_architecture(model_type, attention):
    model = tiny_model(model_type, attention=attention)
    for stack in find_stacks(model):
        with torch.no_grad(), capture_qkv(model, [1], stack) as captured:
            model(**tiny_batch(model))
        ((layer, (q, k, v)),) = captured.items()
        part = find_blocks(model, stack)[-1].attention
        assert layer == 1
        assert q.shape[1] == part.num_heads
        assert k.shape[1] == v.shape[1] == HEADS
        assert q.shape[-1] == k.shape[-1] == v.shape[-1] == part.head_dim


def test_deberta_qkv_are_those_of_the_tokens():
    model = tiny_model("deberta-v2", share_att_key=True)
    with torch.no_grad(), capture_qkv(model, [0]) as captured, capture_hidden_states(model, [0]) as states:
        model(**tiny_batch(model))
    part = find_blocks(model)[0].attention
    q = part.inputs[0](states[0]).unflatten(-1, (HEADS, -1)).transpose(1, 2)
    assert difference(captured[0].q, q) == 0.0


def test_cross_attention():
    model = tiny_model("t5")
    with torch.no_grad(), capture_qkv(model, [0], "decoder", "cross") as captured:
        model(**tiny_batch(model))
    assert captured[0].q.shape[2] == 5
    assert captured[0].k.shape[2] == 8
    with pytest.raises(ValueError, match="kind='cross'"), capture_qkv(model, [0], "encoder", "cross"):
        pass


def test_inputs_of_output_projections():
    model = tiny_model("bert")
    first, _, last = find_blocks(model)
    seen = []
    with (
        torch.no_grad(),
        capture_inputs([first.attention, last.ffn]) as inputs,
        capture_hidden_states(model, [3]) as states,
    ):
        with visit_inputs([last.ffn], lambda part, tensor: seen.append((part, tensor.shape))):
            model(**tiny_batch(model))
    assert [tensor.shape for tensor in inputs[first.attention]] == [(2, 8, 32)]
    assert [tensor.shape for tensor in inputs[last.ffn]] == [(2, 8, FFN)]
    assert set(inputs) == {first.attention, last.ffn}
    assert seen == [(last.ffn, (2, 8, FFN))]
    assert states[3].shape == (2, 8, 32)


def test_shared_layers_run_once_per_layer():
    model = tiny_model("albert")
    (block,) = find_blocks(model)
    with torch.no_grad(), capture_inputs([block.ffn]) as inputs:
        model(**tiny_batch(model))
    assert len(inputs[block.ffn]) == LAYERS


def make_gates(model: nn.Module, batch_size: int) -> dict:
    generator = torch.Generator().manual_seed(3)
    parts = [part for block in find_blocks(model) for part in (*block.attentions, block.ffn)]
    return {part: torch.rand(batch_size, part.unit_counts[-1], generator=generator).requires_grad_() for part in parts}


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "llama", "t5", "albert", "modernbert"])
def test_gates_with_a_batch_axis_yield_the_gradient_of_every_sample(model_type):
    model = tiny_model(model_type)
    inputs = tiny_batch(model)
    gates = make_gates(model, 2)
    with gate_outputs(gates):
        model(**inputs).logits.square().sum().backward()
    for sample in range(2):
        alone = {part: gate[sample].detach().requires_grad_() for part, gate in gates.items()}
        with gate_outputs(alone):
            model(
                **{name: value[sample : sample + 1] for name, value in inputs.items()}
            ).logits.square().sum().backward()
        for part, gate in gates.items():
            assert gate.grad[sample].abs().max() > 0
            torch.testing.assert_close(gate.grad[sample], alone[part].grad, rtol=1e-3, atol=1e-3)


def test_gates_act_on_heads_or_on_whole_groups():
    model = tiny_model("llama")
    part = find_blocks(model)[0].attention
    of_groups = torch.rand(part.num_groups)
    with gate_outputs({part: of_groups}):
        expected = predict(model, tiny_batch(model))
    with gate_outputs({part: of_groups.repeat_interleave(part.group_size)}):
        assert difference(expected, predict(model, tiny_batch(model))) == 0.0


def test_wrong_gates():
    model = tiny_model("llama")
    part = find_blocks(model)[0].attention
    with (
        pytest.raises(ValueError, match=r"shape \(5,\), but that has 4 or 8 units"),
        gate_outputs({part: torch.ones(5)}),
    ):
        pass
    with pytest.raises(ValueError, match="batch size 3, but its input has 2"), gate_outputs({part: torch.ones(3, 8)}):
        model(**tiny_batch(model))
    assert count_hooks(model) == 0


@pytest.mark.parametrize(
    "open_hooks",
    [
        lambda model: capture_hidden_states(model, [0, 3]),
        lambda model: capture_qkv(model, [0]),
        lambda model: capture_inputs([find_blocks(model)[0].ffn]),
        lambda model: gate_outputs({find_blocks(model)[0].ffn: torch.ones(FFN)}),
    ],
)
def test_hooks_go_away_after_an_error(open_hooks):
    model = tiny_model("bert")

    def fail():
        assert count_hooks(model) > 0
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), open_hooks(model):
        fail()
    assert count_hooks(model) == 0


def test_wrong_layers():
    model = tiny_model("bert")
    with pytest.raises(ValueError, match=r"layers has \[4\].*number 0"), capture_hidden_states(model, [4]):
        pass
    with pytest.raises(ValueError, match="there are 3 layers in the encoder"), capture_qkv(model, [3]):
        pass


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [("bert", {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}), ("t5", {"dropout_rate": 0.0})],
)
def test_gradient_checkpointing_changes_no_gradient(model_type, settings):
    gradients = []
    for is_checkpointing in (False, True):
        model = tiny_model(model_type, **settings).train()
        if is_checkpointing:
            model.activation_checkpointing_enable()
        with capture_hidden_states(model, [1, LAYERS], "encoder") as states, capture_qkv(model, [1], "encoder") as qkv:
            for _ in range(2):
                model.zero_grad()
                model(**tiny_batch(model))
                sum(tensor.square().mean() for tensor in (*states.values(), *qkv[1])).backward()
        gradients.append([parameter.grad for block in find_blocks(model) for parameter in block.module.parameters()])
    for expected, gradient in zip(*gradients, strict=True):
        assert (expected is None) == (gradient is None)
        if expected is not None:
            torch.testing.assert_close(gradient, expected)


@pytest.fixture
def process_group():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_distributed_model_under_autocast():
    model = tiny_model("bert")
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    gate = torch.ones(2, HEADS, requires_grad=True)
    with ExitStack() as hooks:
        hooks.enter_context(gate_outputs({find_blocks(wrapped)[0].attention: gate}))
        states = hooks.enter_context(capture_hidden_states(wrapped, [3]))
        qkv = hooks.enter_context(capture_qkv(wrapped, [0]))
        with torch.autocast("cpu", torch.bfloat16):
            wrapped(**tiny_batch(model)).logits.float().sum().backward()
    assert qkv[0].q.dtype == torch.bfloat16
    assert states[3].shape == (2, 8, 32)
    assert gate.grad.shape == (2, HEADS)
    assert count_hooks(model) == 0
