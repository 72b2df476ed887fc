"""What is found in a live model is what is there."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from hf_compress.modeling.blocks import (
    count_layers,
    embedding_names,
    find_blocks,
    find_layout,
    find_stacks,
    task_head_names,
    token_embeddings,
)
from hf_compress.modeling.layouts import LAYOUTS
from hf_compress.modeling.surgery import keep_heads_, keep_neurons_
from tests.modeling.tiny import FFN, HEADS, LAYERS, MODEL_TYPES, class_names, tiny_config, tiny_model


def test_every_layout_is_tested():
    assert sorted(LAYOUTS) == MODEL_TYPES


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_class_reads_like_its_config(model_type):
    for name in class_names(model_type):
        model = tiny_model(model_type, name)
        config = model.base_model.config
        for stack, layout in find_stacks(model).items():
            assert count_layers(model, stack) == getattr(config, layout.num_layers), name
        modules = dict(model.named_modules())
        for block in find_blocks(model):
            attention, ffn = block.attention, block.ffn
            assert (attention.num_groups, ffn.width) == (HEADS, FFN)
            assert attention.num_heads * attention.head_dim == attention.output.weight.numel() // config.hidden_size
            assert modules[block.name] is block.module
            assert modules[attention.output_name] is attention.output
            assert modules[ffn.output_name] is ffn.output


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_weights_outside_of_the_base_model_are_task_heads(model_type):
    for name in class_names(model_type):
        model = tiny_model(model_type, name)
        headless = (
            set() if model.base_model is not model else set(dict(AutoModel.from_config(model.config).named_children()))
        )
        base = {model.base_model_prefix} | headless
        beside = {child for child, module in model.named_children() if list(module.parameters())} - base
        assert {path.split(".")[0] for path in task_head_names(model)} == beside, name


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_embeddings(model_type):
    model = tiny_model(model_type)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = embedding_names(model)
    tables = [parameters[name] if name in parameters else model.get_submodule(name).weight for name in names]
    assert len(names) == len(set(names))
    assert all(isinstance(table, nn.Parameter) for table in tables)
    if token_embeddings(model):
        assert any(embedding is model.get_input_embeddings() for embedding in token_embeddings(model))


def test_an_uneven_model_reads_right():
    model = tiny_model("llama")
    first, second, _ = find_blocks(model)
    keep_heads_(first.attention, [1])
    keep_neurons_(second.ffn, [0, 5])
    assert [(b.attention.num_heads, b.attention.num_groups, b.ffn.width) for b in find_blocks(model)] == [
        (2, 1, FFN),
        (8, 4, 2),
        (8, 4, FFN),
    ]
    assert first.attention.group_size == 2


def test_shared_layers_are_one_block():
    (block,) = find_blocks(tiny_model("albert"))
    assert block.repeats == LAYERS


def test_wrapped_model():
    model = tiny_model("bert")
    wrapped = nn.DataParallel(model)
    assert [block.name for block in find_blocks(wrapped)] == [block.name for block in find_blocks(model)]


def test_meta_model():
    with torch.device("meta"):
        model = AutoModel.from_config(tiny_config("bert"))
    keep_heads_(find_blocks(model)[0].attention, [0, 2])
    assert find_blocks(model)[0].attention.output.weight.shape == (32, 16)


def test_unknown_architecture():
    config = AutoConfig.for_model("xlnet")
    with pytest.raises(ValueError, match="(?s)'xlnet'.*albert, bart.*\"Adding an architecture\" of CONTRIBUTING.md"):
        find_layout(config)


@pytest.mark.parametrize(
    ("model_type", "settings", "message"),
    [
        ("albert", {"num_hidden_groups": 3}, "num_hidden_groups=3"),
        ("albert", {"inner_group_num": 2}, "inner_group_num=2"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True"),
    ],
)
def test_unsupported_variants(model_type, settings, message):
    with pytest.raises(ValueError, match=message):
        find_blocks(tiny_model(model_type, **settings))


def test_stack_must_be_named():
    with pytest.raises(ValueError, match="give stack='encoder' or stack='decoder'"):
        count_layers(tiny_model("bart"))
