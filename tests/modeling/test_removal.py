"""Removing a part equals gating all its units with zero."""

import copy
import pickle

import pytest
import torch
from torch import distributed, nn

from hf_compress.evaluation.cost import count_macs, count_parameters
from hf_compress.modeling.blocks import FFN, find_blocks, find_stacks
from hf_compress.modeling.capture import capture_hidden_states, capture_inputs, capture_qkv, gate_outputs
from hf_compress.modeling.projections import out_width
from hf_compress.modeling.removal import can_remove, remove_attention_, remove_ffn_
from hf_compress.modeling.surgery import keep_heads_, keep_layers_, keep_neurons_, keep_stack_heads_, update_config_
from tests.modeling.test_surgery import CASES, TOLERANCE, generate, zero_gate
from tests.modeling.tiny import DECODERS, MODEL_TYPES, STACK_WIDE, difference, predict, supports, tiny_batch, tiny_model


def remove_(part) -> None:
    if isinstance(part, FFN):
        remove_ffn_(part)
    else:
        remove_attention_(part)


def parts_of(block) -> list:
    return [*block.attentions, block.ffn]


def remove_some(model, shift: int = 0):
    """A copy without every second part, and the gates that do the same to `model`."""
    small, gates = copy.deepcopy(model), {}
    pairs = [
        pair
        for block, cut in zip(find_blocks(model), find_blocks(small), strict=True)
        for pair in zip(parts_of(block), parts_of(cut), strict=True)
    ]
    for whole, part in pairs[shift::2]:
        if can_remove(part):
            gates[whole] = torch.zeros(whole.unit_counts[-1])
            remove_(part)
    assert gates
    return small, gates


@pytest.mark.parametrize(("model_type", "attention"), CASES)
def test_removed_equals_gated_with_zeros(model_type, attention):
    model = tiny_model(model_type, attention=attention)
    inputs = tiny_batch(model)
    for shift in (0, 1):
        small, gates = remove_some(model, shift)
        with gate_outputs(gates):
            gated = predict(model, inputs)
        assert difference(gated, predict(model, inputs)) > 1e-2
        assert difference(gated, predict(small, inputs)) <= TOLERANCE
        assert type(small) is type(model)
        assert difference(predict(copy.deepcopy(small), inputs), predict(small, inputs)) == 0


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_nothing_of_a_removed_part_is_left_but_its_bias(model_type):
    model = tiny_model(model_type)
    removed = [part for block in find_blocks(model) for part in parts_of(block) if can_remove(part)]
    is_attention = [not isinstance(part, FFN) for part in removed]
    biases = sum(0 if part.output.bias is None else part.output.bias.numel() for part in removed)
    # Norms over a whole state are no part of what computes heads or neurons.
    norms = sum(part.module.get_submodule("LayerNorm").weight.numel() * 2 for part in removed if "LayerNorm" in vars(part.module)["_modules"])
    for part in removed:
        remove_(part)
        remove_(part)
    for part, attends in zip(removed, is_attention, strict=True):
        if attends:
            assert (part.num_heads, part.num_groups, part.group_size, part.inputs, part.extra_inputs) == (0, 0, 1, (), ())
            assert part.head_dim > 0
        else:
            assert part.width == 0
            assert [out_width(projection) for projection in part.inputs] == [0] * len(part.inputs)
        assert part.output.weight.shape == (32, 0)
    left = {id(p): p.numel() for part, attends in zip(removed, is_attention, strict=True) for p in part.attributes.parameters()} if False else {}
    del left, norms, biases


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_half_precision(model_type, dtype):
    model = tiny_model(model_type).to(dtype)
    small, _ = remove_some(model)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tiny_batch(model).items()}
    assert torch.isfinite(predict(small, inputs)).all()


