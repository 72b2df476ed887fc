"""Removing a part equals gating all its units with zero."""

import copy
import pickle

import pytest
import torch
from torch import distributed, nn

from hf_compress.modeling.blocks import FFN, find_blocks
from hf_compress.modeling.capture import capture_hidden_states, capture_inputs, capture_qkv, gate_outputs
from hf_compress.modeling.projections import out_width
from hf_compress.modeling.removal import can_remove, remove_attention_, remove_ffn_
from hf_compress.modeling.surgery import keep_heads_, keep_layers_, keep_neurons_, keep_stack_heads_, update_config_
from tests.modeling.test_surgery import CASES, TOLERANCE, generate, pass_by
from tests.modeling.tiny import DECODERS, LAYERS, MODEL_TYPES, difference, predict, tiny_batch, tiny_model

GENERATING = [case for case in CASES if case[0] in DECODERS]


def parts_of(model) -> list:
    return [part for block in find_blocks(model) for part in (*block.attentions, block.ffn)]


def remove_(part) -> None:
    (remove_ffn_ if isinstance(part, FFN) else remove_attention_)(part)


def remove_some(model, choose=lambda number, part: True):
    """A copy without the chosen parts, and the gates that do the same to `model`."""
    small, gates = copy.deepcopy(model), {}
    for number, (whole, part) in enumerate(zip(parts_of(model), parts_of(small), strict=True)):
        if can_remove(part) and choose(number, part):
            gates[whole] = torch.zeros(whole.unit_counts[-1])
            remove_(part)
    return small, gates


def remove_attentions(model, layers: tuple[int, ...] = tuple(range(LAYERS))):
    names = [part.name for block in find_blocks(model) if block.index in layers for part in block.attentions]
    return remove_some(model, lambda _, part: part.name in names)


def assert_same(model, small, gates, inputs) -> None:
    with gate_outputs(gates):
        gated = predict(model, inputs)
    assert difference(gated, predict(model, inputs)) > 1e-2
    assert difference(gated, predict(small, inputs)) <= TOLERANCE


@pytest.mark.parametrize(("model_type", "attention"), CASES)
def test_removed_equals_gated_with_zeros(model_type, attention):
    model = tiny_model(model_type, attention=attention)
    inputs = tiny_batch(model)
    for rest in (0, 1):
        small, gates = remove_some(model, lambda number, _, rest=rest: number % 2 == rest)
        if gates:
            assert_same(model, small, gates, inputs)
        assert type(small) is type(model)
    assert difference(predict(copy.deepcopy(small), inputs), predict(small, inputs)) == 0
    assert difference(predict(pickle.loads(pickle.dumps(small)), inputs), predict(small, inputs)) == 0


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("deberta-v2", {"share_att_key": True}),
        ("deberta-v2", {"conv_kernel_size": 3}),
        ("t5", {"feed_forward_proj": "relu"}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 8}),
        ("modernbert", {"attention_bias": True, "mlp_bias": True, "attention_dropout": 0.1}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}),
    ],
)
def test_variants(model_type, settings):
    model = tiny_model(model_type, **settings)
    small, gates = remove_some(model, lambda number, _: number % 3)
    assert_same(model, small, gates, tiny_batch(model))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_only_biases_of_a_removed_part_are_left(model_type):
    model = tiny_model(model_type)
    parts = parts_of(model)
    for part in [*parts, *parts] if model_type != "t5" else [part for part in parts if can_remove(part)]:
        remove_(part)
        assert part.output.weight.shape == (32, 0)
        assert set(part.unit_counts) == {0}
        if isinstance(part, FFN):
            assert part.width == 0
            assert [out_width(projection) for projection in part.inputs] == [0] * len(part.inputs)
            continue
        assert (part.num_heads, part.num_groups, part.group_size) == (0, 0, 1)
        assert part.inputs == part.extra_inputs == ()
        assert part.head_dim in (4, 6, 8)
        computing = [name for name, weight in part.attributes.named_parameters() if weight.numel()]
        assert all(name.endswith(".bias") or name == f"{part.layout.post_norm}.weight" for name in computing)
    assert not update_config_(model)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_hooks_see_removed_parts(model_type):
    model = tiny_model(model_type)
    small, _ = remove_attentions(model, (1,) if model_type != "albert" else (0,))
    remove_ffn_(find_blocks(small)[0].ffn)
    parts = parts_of(small)
    inputs = tiny_batch(model)
    expected = predict(small, inputs)
    stack = "decoder" if model_type in ("bart", "t5") else None
    with torch.no_grad(), capture_inputs(parts) as seen, capture_hidden_states(small, [0, 1], stack) as states:
        with gate_outputs({part: torch.ones(2, part.unit_counts[-1]) for part in parts}):
            assert difference(predict(small, inputs), expected) == 0
        with gate_outputs({part: torch.ones(part.unit_counts[0]) for part in parts}):
            assert difference(predict(small, inputs), expected) == 0
    assert all(part.unit_counts[-1] == 0 for part in parts if seen[part][0].shape[-1] == 0)
    assert sorted(states) == [0, 1]
    with torch.no_grad(), capture_qkv(small, [1, 2], stack) as captured:
        small(**inputs)
    assert list(captured) == ([2] if model_type != "albert" else [])


@pytest.mark.parametrize(("model_type", "attention"), GENERATING)
def test_removed_generates_what_the_gated_one_does(model_type, attention):
    model = tiny_model(model_type, attention=attention)
    for layers in ((0,), (1,), (0, 2)):
        small, gates = remove_attentions(model, layers)
        with gate_outputs(gates):
            tokens, logits = generate(model)
        small_tokens, small_logits = generate(small)
        assert torch.equal(tokens, small_tokens)
        assert difference(logits, small_logits) <= 2 * TOLERANCE


@pytest.mark.parametrize("model_type", DECODERS)
def test_every_way_to_generate(model_type):
    model = tiny_model(model_type, attention="sdpa")
    small, gates = remove_attentions(model, (0, 1))
    inputs = {"input_ids": tiny_batch(model)["input_ids"][:1]}
    for settings in (
        {"num_beams": 3},
        {"cache_implementation": "static", "disable_compile": True},
        {"prompt_lookup_num_tokens": 2},
        {"use_cache": False},
    ):
        settings = settings | {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        with gate_outputs(gates):
            tokens = model.generate(**inputs, **settings)
        assert torch.equal(tokens, small.generate(**inputs, **settings)), settings


@pytest.mark.parametrize(("model_type", "name"), [("bert", "BertLMHeadModel"), ("electra", "ElectraForCausalLM")])
def test_decoders_of_the_bert_family_with_cross_attention(model_type, name):
    model = tiny_model(model_type, name, is_decoder=True, add_cross_attention=True)
    inputs = tiny_batch(model) | {"encoder_hidden_states": torch.randn(2, 5, 32)}
    first = {key: value[:, :4] if key == "input_ids" else value for key, value in inputs.items()}
    second = {key: value[:, 4:] if key == "input_ids" else value for key, value in inputs.items()}
    first["attention_mask"] = inputs["attention_mask"][:, :4]
    for rest in range(3):
        small, gates = remove_some(model, lambda number, _, rest=rest: number % 3 == rest)
        with gate_outputs(gates), torch.no_grad():
            gated = model(**inputs, use_cache=False).logits
        with torch.no_grad():
            past = small(**first, use_cache=True).past_key_values
            assert difference(gated[:, 4:], small(**second, past_key_values=past).logits) <= TOLERANCE


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_attentions_are_returned_with_one_entry_per_layer(model_type):
    model = tiny_model(model_type)
    small, _ = remove_attentions(model, (1,) if model_type != "albert" else (0,))
    outputs = small(**tiny_batch(model), output_attentions=True)
    attentions = outputs["decoder_attentions" if model_type in ("bart", "t5") else "attentions"]
    heads = [block.attention.num_heads for block in find_blocks(small) for _ in range(block.repeats)]
    assert [weights.shape[1] for weights in attentions] == heads[-len(attentions) :]
    assert len(attentions) == len(heads) // (2 if model_type in ("bart", "t5") else 1)


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "llama", "t5", "albert", "modernbert"])
def test_gradients_equal_those_of_the_gated_model(model_type):
    model = tiny_model(model_type)
    small, gates = remove_some(model, lambda number, _: number % 2)
    inputs = tiny_batch(model)
    with gate_outputs(gates):
        model(**inputs).logits.square().sum().backward()
    small(**inputs).logits.square().sum().backward()
    expected = dict(model.named_parameters())
    for name, parameter in small.named_parameters():
        if parameter.numel():
            torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "llama", "t5"])
def test_gradient_checkpointing_and_dropout(model_type):
    model = tiny_model(model_type)
    small, _ = remove_some(model, lambda number, _: number % 2)
    gradients = []
    for is_checkpointing in (False, True):
        small.train().zero_grad()
        if is_checkpointing:
            small.activation_checkpointing_enable()
        torch.manual_seed(0)
        small(**tiny_batch(model)).logits.square().sum().backward()
        gradients.append([parameter.grad for parameter in small.parameters()])
    for expected, gradient in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3)


@pytest.fixture
def process_group():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("model_type", ["distilbert", "qwen3"])
def test_every_parameter_takes_part_in_training(model_type):
    small, _ = remove_some(tiny_model(model_type), lambda number, _: number % 3)
    wrapped = nn.parallel.DistributedDataParallel(small)
    for _ in range(2):  # the second pass is where a parameter without a gradient is found out
        wrapped(**tiny_batch(small)).logits.sum().backward()


def test_layers_are_dropped_beside_removed_parts():
    for model_type in ("gpt2", "qwen2", "bart"):
        small, _ = remove_attentions(tiny_model(model_type), (1,))
        dropped = copy.deepcopy(small)
        keep_layers_(dropped, [1, 2], "decoder")
        pass_by(find_blocks(small, "decoder")[0])
        assert difference(predict(dropped, tiny_batch(small)), predict(small, tiny_batch(small))) <= TOLERANCE
        _, logits = generate(dropped)
        assert torch.isfinite(logits).all()


@pytest.mark.parametrize("model_type", ["mpnet", "t5"])
def test_the_other_attentions_of_a_stack_are_cut_together(model_type):
    model = tiny_model(model_type)
    small, _ = remove_attentions(model, (1,))
    keep_stack_heads_(small, [0, 3], "encoder")
    assert [block.attention.num_heads for block in find_blocks(small, "encoder")] == [2, 0, 2]
    gates = {}
    for part, cut in zip(parts_of(model), parts_of(small), strict=True):
        if cut.unit_counts != part.unit_counts:
            gates[part] = torch.tensor([1.0, 0, 0, 1]) if cut.num_heads else torch.zeros(4)
    assert_same(model, small, gates, tiny_batch(model))


def test_the_owner_of_the_position_bias_stays():
    model = tiny_model("t5")
    first, *others = [block.attention for block in find_blocks(model, "decoder")]
    assert not can_remove(first)
    assert all(can_remove(part) for part in (*others, *find_blocks(model, "decoder")[0].attentions[1:]))
    with pytest.raises(ValueError, match=r"decoder.block.0.layer.0.SelfAttention cannot be removed.*position bias"):
        remove_attention_(first)
    assert first.num_heads == 4
    remove_attention_(others[0])
    with pytest.raises(ValueError, match=r"layers=\[1, 2\] makes layer 1 the first of the decoder"):
        keep_layers_(model, [1, 2], "decoder")
    assert len(find_blocks(model, "decoder")) == LAYERS


def test_nothing_is_left_to_choose_from():
    block = find_blocks(tiny_model("bert"))[0]
    remove_attention_(block.attention)
    remove_ffn_(block.ffn)
    with pytest.raises(ValueError, match="there are no heads, all were removed before"):
        keep_heads_(block.attention, [0])
    with pytest.raises(ValueError, match="there are no neurons, all were removed before"):
        keep_neurons_(block.ffn, [])


def test_no_random_numbers_are_drawn():
    model = tiny_model("gpt2")
    state = torch.get_rng_state()
    remove_some(model)
    assert torch.equal(state, torch.get_rng_state())
