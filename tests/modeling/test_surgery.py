"""Cutting a unit equals gating it with zero; dropping a layer equals passing it by."""

import copy

import pytest
import torch
from torch import nn

from hf_compress.modeling.blocks import count_layers, find_blocks, find_stacks
from hf_compress.modeling.capture import gate_outputs
from hf_compress.modeling.surgery import (
    keep_heads_,
    keep_layers_,
    keep_neurons_,
    keep_stack_heads_,
    update_config_,
)
from tests.modeling.tiny import (
    DECODERS,
    FFN,
    MODEL_TYPES,
    STACK_WIDE,
    auto_class,
    class_names,
    difference,
    predict,
    supports,
    tiny_batch,
    tiny_model,
)

TOLERANCE = 1e-5
CASES = [
    (model_type, attention)
    for model_type in MODEL_TYPES
    for attention in ("eager", "sdpa")
    if supports(model_type, attention)
]


def zero_gate(size: int, kept: list[int]) -> torch.Tensor:
    return torch.zeros(size).index_fill(0, torch.tensor(kept), 1.0)


def cut_unevenly(model, model_type: str):
    """A copy with other heads and neurons in every block, and the gates that do the same to `model`."""
    small, gates = copy.deepcopy(model), {}
    for number, (block, cut) in enumerate(zip(find_blocks(model), find_blocks(small), strict=True)):
        neurons = [index for index in range(FFN) if (index + number) % (number + 3)]
        gates[block.ffn] = zero_gate(FFN, neurons)
        keep_neurons_(cut.ffn, neurons)
        if model_type in STACK_WIDE:
            continue
        for place, (whole, part) in enumerate(zip(block.attentions, cut.attentions, strict=True)):
            heads = [3, 0, 2][: 1 + (number + place) % 3]
            gates[whole] = zero_gate(whole.num_groups, heads)
            keep_heads_(part, heads)
    if model_type in STACK_WIDE:
        gates |= cut_stacks(model, small)
    return small, gates


def cut_stacks(model, small) -> dict:
    gates = {}
    for stack, kind, heads in (("encoder", "self", [0, 2]), ("decoder", "self", [1, 2, 3]), ("decoder", "cross", [3])):
        if stack in find_stacks(model):
            keep_stack_heads_(small, heads, stack, kind)
            attentions = [
                part for block in find_blocks(model, stack) for part in block.attentions if part.kind == kind
            ]
            gates |= {part: zero_gate(part.num_heads, heads) for part in attentions}
    return gates


@pytest.mark.parametrize(("model_type", "attention"), CASES)
def test_gated_equals_sliced_for_every_class(model_type, attention):
    for name in class_names(model_type):
        model = tiny_model(model_type, name, attention)
        inputs = tiny_batch(model)
        small, gates = cut_unevenly(model, model_type)
        with gate_outputs(gates):
            gated = predict(model, inputs)
        assert difference(gated, predict(model, inputs)) > 1e-2, name
        assert difference(gated, predict(small, inputs)) <= TOLERANCE, name
        assert type(small) is type(model)


@pytest.mark.parametrize(
    "settings", [{"share_att_key": True}, {"pos_att_type": ["c2p"]}, {"relative_attention": False}]
)
def test_deberta_variants(settings):
    model = tiny_model("deberta-v2", **settings)
    small, gates = cut_unevenly(model, "deberta-v2")
    with gate_outputs(gates):
        assert difference(predict(model, tiny_batch(model)), predict(small, tiny_batch(model))) <= TOLERANCE


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_ungated_t5_and_biases(attention):
    for model_type, settings in (
        ("t5", {"feed_forward_proj": "relu"}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 8}),
        ("modernbert", {"attention_bias": True, "mlp_bias": True}),
    ):
        model = tiny_model(model_type, attention=attention, **settings)
        small, gates = cut_unevenly(model, model_type)
        with gate_outputs(gates):
            assert difference(predict(model, tiny_batch(model)), predict(small, tiny_batch(model))) <= TOLERANCE


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("bert", "BertLMHeadModel"),
        ("electra", "ElectraForCausalLM"),
        ("roberta", "RobertaForCausalLM"),
        ("xlm-roberta", "XLMRobertaForCausalLM"),
    ],
)
def test_decoders_of_the_bert_family_with_cross_attention(model_type, name):
    model = tiny_model(model_type, name, is_decoder=True, add_cross_attention=True)
    inputs = tiny_batch(model) | {"encoder_hidden_states": torch.randn(2, 5, 32)}
    small, gates = cut_unevenly(model, model_type)
    assert [part.kind for block in find_blocks(small) for part in block.attentions] == ["self", "cross"] * 3
    with gate_outputs(gates):
        gated = model(**inputs, use_cache=False).logits
    assert difference(gated, small(**inputs, use_cache=False).logits) <= TOLERANCE


def generate(model) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = tiny_batch(model)
    inputs.pop("decoder_input_ids", None)
    if not model.config.is_encoder_decoder:
        inputs = {name: tensor.flip(1) for name, tensor in inputs.items()}
    result = model.generate(
        **inputs,
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return result.sequences, torch.stack(result.logits)


@pytest.mark.parametrize(("model_type", "attention"), [case for case in CASES if case[0] in DECODERS])
def test_cut_model_generates_what_the_gated_one_does(model_type, attention):
    model = tiny_model(model_type, attention=attention)
    small, gates = cut_unevenly(model, model_type)
    with gate_outputs(gates):
        tokens, logits = generate(model)
    small_tokens, small_logits = generate(small)
    assert torch.equal(tokens, small_tokens)
    assert difference(logits, small_logits) <= 2 * TOLERANCE


def pass_by(block) -> torch.utils.hooks.RemovableHandle:
    """Make a block hand on what it takes in."""

    def hook(module, args, output):
        return (args[0], *output[1:]) if isinstance(output, tuple) else args[0]

    return block.module.register_forward_hook(hook)


def kept_layers(model_type: str) -> dict[str, list[int]]:
    first = {"modernbert": {"encoder": [0, 2, 3]}, "bart": {"encoder": [2], "decoder": [0, 2]}}
    first["t5"] = {"encoder": [1], "decoder": [1, 2]}
    only = "decoder" if model_type in DECODERS else "encoder"
    return first.get(model_type, {only: [1, 2]})


@pytest.mark.parametrize(("model_type", "attention"), [case for case in CASES if case[0] != "albert"])
def test_dropped_layers_equal_layers_passed_by(model_type, attention, tmp_path):
    model = tiny_model(model_type, attention=attention)
    inputs = tiny_batch(model)
    small = copy.deepcopy(model)
    for stack, layers in kept_layers(model_type).items():
        keep_layers_(small, layers, stack)
        assert count_layers(small, stack) == len(layers)
        for block in find_blocks(model, stack):
            if block.index not in layers:
                pass_by(block)
    assert difference(predict(model, inputs), predict(small, inputs)) <= TOLERANCE
    small.save_pretrained(tmp_path)
    reloaded = auto_class(model_type).from_pretrained(tmp_path, attn_implementation=attention)
    assert difference(predict(reloaded, inputs), predict(small, inputs)) == 0.0
    if model_type in DECODERS:
        tokens, logits = generate(small)
        reloaded_tokens, reloaded_logits = generate(reloaded)
        assert torch.equal(tokens, reloaded_tokens)
        assert difference(logits, reloaded_logits) == 0.0
        assert difference(without_cache(small, tokens), logits[-1]) <= 2 * TOLERANCE


def without_cache(model, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of the last generated token from one pass over the whole sequence."""
    inputs = tiny_batch(model)
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens[:, :-1]
    else:
        mask = inputs["attention_mask"].flip(1)
        inputs = {"input_ids": tokens[:, :-1], "attention_mask": nn.functional.pad(mask, (0, 5), value=1)}
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits[:, -1]


def test_layer_indices_and_layer_types_follow():
    model = tiny_model("qwen2")
    assert model.config.layer_types == ["full_attention", "full_attention", "sliding_attention"]
    keep_layers_(model, [0, 2])
    assert model.config.layer_types == ["full_attention", "sliding_attention"]
    assert [block.attention.module.layer_idx for block in find_blocks(model)] == [0, 1]


def test_shared_layers_can_only_be_counted(tmp_path):
    model = tiny_model("albert")
    fresh = tiny_model("albert", num_hidden_layers=2)
    assert count_layers(model) == 3
    keep_layers_(model, [0, 2])
    assert count_layers(model) == 2
    inputs = tiny_batch(model)
    assert difference(predict(model, inputs), predict(fresh, inputs)) == 0.0
    model.save_pretrained(tmp_path)
    reloaded = auto_class("albert").from_pretrained(tmp_path, attn_implementation="eager")
    assert difference(predict(model, inputs), predict(reloaded, inputs)) == 0.0


def test_layers_that_no_config_can_express():
    with pytest.raises(ValueError, match="without a norm"):
        keep_layers_(tiny_model("modernbert"), [1, 2])
    with pytest.raises(ValueError, match="convolution"):
        keep_layers_(tiny_model("deberta-v2", conv_kernel_size=3), [1, 2])
    with pytest.raises(ValueError, match="scaled by the index"):
        keep_layers_(tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True), [0, 1])
    with pytest.raises(ValueError, match="give stack='encoder' or stack='decoder'"):
        keep_layers_(tiny_model("t5"), [0, 1])
    with pytest.raises(ValueError, match="stack='middle'"):
        keep_layers_(tiny_model("bert"), [0], stack="middle")


def test_deberta_convolution_stays_with_the_first_layer():
    model = tiny_model("deberta-v2", conv_kernel_size=3)
    small = copy.deepcopy(model)
    keep_layers_(small, [0, 2])
    pass_by(find_blocks(model)[1])
    assert difference(predict(model, tiny_batch(model)), predict(small, tiny_batch(model))) <= TOLERANCE


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_even_widths_need_no_plugin(model_type, tmp_path):
    model = tiny_model(model_type)
    for number, block in enumerate(find_blocks(model)):
        keep_neurons_(block.ffn, range(number, number + 17))
    assert update_config_(model)
    model.save_pretrained(tmp_path)
    reloaded = auto_class(model_type).from_pretrained(tmp_path, attn_implementation="eager")
    assert difference(predict(model, tiny_batch(model)), predict(reloaded, tiny_batch(model))) == 0.0


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "t5", "vit"])
def test_even_heads_need_no_plugin_where_the_config_has_a_head_width(model_type, tmp_path):
    model = tiny_model(model_type)
    heads = [3, 0]
    for block in find_blocks(model) if model_type not in STACK_WIDE else []:
        keep_heads_(block.attention, heads)
    for stack, kind in (("encoder", "self"), ("decoder", "self"), ("decoder", "cross")) * (model_type in STACK_WIDE):
        keep_stack_heads_(model, heads, stack, kind)
    assert update_config_(model)
    model.save_pretrained(tmp_path)
    reloaded = auto_class(model_type).from_pretrained(tmp_path, attn_implementation="eager")
    assert difference(predict(model, tiny_batch(model)), predict(reloaded, tiny_batch(model))) == 0.0


@pytest.mark.parametrize("model_type", ["albert", "bart", "bert", "deberta-v2", "distilbert", "gpt2"])
def test_config_says_when_it_cannot_describe_the_heads(model_type):
    model = tiny_model(model_type)
    before = model.config.to_dict()
    for stack in find_stacks(model):
        keep_stack_heads_(model, [0, 2], stack)
    assert not update_config_(model)
    assert model.config.to_dict() == before


def test_config_says_when_widths_are_uneven():
    model = tiny_model("bert")
    keep_neurons_(find_blocks(model)[0].ffn, range(5))
    assert not update_config_(model)
    assert model.config.intermediate_size == FFN
    keep_layers_(model, [1, 2])
    assert update_config_(model)


def test_three_heads_of_llama_do_not_divide_the_hidden_size():
    model = tiny_model("llama", num_key_value_heads=8)
    for block in find_blocks(model):
        keep_heads_(block.attention, [0, 1, 2])
    assert not update_config_(model)
    assert model.config.num_attention_heads == 8


@pytest.mark.parametrize(
    ("heads", "message"),
    [([], "heads is empty"), ([0, 0], r"\[0\] more than once"), ([4], r"\[4\], but there are 4"), ([-1], r"\[-1\]")],
)
def test_wrong_indices(heads, message):
    blocks = find_blocks(tiny_model("bert"))
    with pytest.raises(ValueError, match=message):
        keep_heads_(blocks[0].attention, heads)
    assert blocks[0].attention.num_heads == 4


def test_wrong_calls():
    model = tiny_model("t5")
    with pytest.raises(ValueError, match="keep_stack_heads_"):
        keep_heads_(find_blocks(model)[0].attention, [0])
    with pytest.raises(ValueError, match="no attention of kind='cross'"):
        keep_stack_heads_(model, [0], "encoder", "cross")
    with pytest.raises(ValueError, match="rising order"):
        keep_layers_(tiny_model("bert"), [2, 0])
    with pytest.raises(ValueError, match=r"layers has \[7\], but there are 3 layers in the encoder"):
        keep_layers_(tiny_model("bert"), [0, 7])
    with pytest.raises(ValueError, match="neurons is empty"):
        keep_neurons_(find_blocks(model)[0].ffn, [])
    with pytest.raises(TypeError):
        keep_neurons_(find_blocks(model)[0].ffn, [0.5])


def test_packed_weights_are_refused_before_anything_is_cut():
    model = tiny_model("bert")
    block = find_blocks(model)[0]
    block.ffn.output.weight = nn.Parameter(torch.zeros(32, FFN, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match="prune before quantizing"):
        keep_neurons_(block.ffn, [0])


def test_cut_parameters_train_as_before():
    model = tiny_model("bert")
    block = find_blocks(model)[0]
    block.attention.inputs[0].weight.requires_grad_(False)
    keep_heads_(block.attention, [1])
    assert [p.weight.requires_grad for p in block.attention.inputs] == [False, True, True]
    model(**tiny_batch(model)).logits.sum().backward()
    assert block.attention.inputs[1].weight.grad.shape == (8, 32)
