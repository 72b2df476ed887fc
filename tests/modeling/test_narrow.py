"""The strongest heads, neurons and hidden channels stay; what is cut is read off shapes, not off numbers."""

import copy

import pytest
import torch
from transformers import PreTrainedModel

from hf_compress.modeling.blocks import find_blocks, find_stacks
from hf_compress.modeling.narrow import (
    channel_importance,
    head_importance,
    hidden_width,
    keep_strongest_heads_,
    keep_strongest_neurons_,
    narrow_hidden,
    neuron_importance,
    plan_heads,
    strongest,
    unit_importance,
)
from hf_compress.modeling.removal import remove_attention_
from hf_compress.modeling.surgery import keep_heads_, keep_neurons_
from tests.modeling.tiny import FFN, MODEL_TYPES, class_names, predict, tiny_batch, tiny_model

HIDDEN, NARROW = 32, 24


def narrowed(model: PreTrainedModel, hidden_size: int = NARROW) -> PreTrainedModel:
    """A copy with fewer hidden channels, and the heads that go with them."""
    small = copy.deepcopy(model)
    for stack, heads in plan_heads(small, hidden_size).items():
        keep_strongest_heads_(small, heads, stack)
    return narrow_hidden(small, hidden_size)


def test_a_unit_is_worth_the_product_of_its_norms():
    torch.manual_seed(0)
    first, second = torch.randn(5, 3), torch.randn(5, 2, 2)
    found = unit_importance([first, second])
    expected = first.norm(dim=1) / first.norm() * second.flatten(1).norm(dim=1) / second.norm()
    assert torch.allclose(found, expected)
    assert torch.allclose(unit_importance([first * 7, second / 3]), found)
    second[3] = 0
    assert unit_importance([first, second]).argmin() == 3
    assert torch.equal(unit_importance([first, second * 0]), torch.zeros(5))


def test_a_channel_is_worth_what_norms_and_matrices_give_it():
    torch.manual_seed(0)
    matrices, norms = [torch.randn(6, 4), torch.randn(6, 9)], [torch.rand(6, 2), torch.rand(6, 1)]
    found = channel_importance(matrices, norms)
    squares = [(m.norm(dim=1) / m.norm()) ** 2 for m in matrices]
    scales = [(n.norm(dim=1) / n.norm()) ** 2 for n in norms]
    assert torch.allclose(found, sum(scales) * sum(squares).sqrt())
    assert torch.allclose(channel_importance([matrices[0] * 5, matrices[1]], norms), found)


def test_the_strongest_are_in_rising_order_and_the_first_among_equals():
    assert strongest(torch.tensor([1.0, 3.0, 2.0, 3.0]), 2) == [1, 3]
    assert strongest(torch.tensor([1.0, 0.0, 1.0, 1.0]), 2) == [0, 2]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_unit_that_is_larger_is_worth_more(model_type):
    for block in find_blocks(tiny_model(model_type)):
        parts = [(part, head_importance, part.num_groups, (part.output, *part.inputs)) for part in block.attentions]
        for part, importance, units, projections in [
            *parts,
            (block.ffn, neuron_importance, block.ffn.width, (block.ffn.output, *block.ffn.inputs)),
        ]:
            before = importance(part)
            assert before.shape == (units,)
            # The units lie side by side in the rows of a transposed output: the last one is the end of the columns.
            weight = projections[0].weight.data
            rows = weight.T if type(projections[0]).__name__ == "Linear" else weight
            rows[-rows.shape[0] // units :] *= 100
            after = importance(part)
            assert after.argmax() == units - 1
            assert (after[-1] / after[:-1] > 2 * before[-1] / before[:-1]).all()


def cut_axes(old: torch.Tensor, new: torch.Tensor) -> list[int]:
    return [axis for axis, (before, after) in enumerate(zip(old.shape, new.shape, strict=True)) if before != after]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_class_of_every_architecture_runs_narrower(model_type):
    for name in class_names(model_type):
        model = tiny_model(model_type, name)
        inputs = tiny_batch(model)
        small = narrowed(model)
        assert type(small) is type(model)
        assert hidden_width(small) == NARROW
        assert not any(tensor.is_meta for tensor in (*small.parameters(), *small.buffers()))
        assert torch.isfinite(predict(small, inputs)).all(), name


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_all_tensors_keep_the_same_channels_of_the_model(model_type):
    model = tiny_model(model_type)
    for stack, number in plan_heads(model, NARROW).items():
        keep_strongest_heads_(model, number, stack)
    small = narrow_hidden(model, NARROW)
    old, new = model.state_dict(), small.state_dict()
    assert old.keys() == new.keys()
    norm = next(name for name in new if name.endswith(".weight") and new[name].shape == (NARROW,))
    kept = [old[norm].tolist().index(value) for value in new[norm].tolist()]
    assert kept == sorted(set(kept))
    n_cut = 0
    for name, tensor in new.items():
        expected = old[name]
        for axis in cut_axes(expected, tensor):
            expected = expected.index_select(axis, torch.tensor(kept))
            n_cut += 1
        assert torch.equal(tensor, expected), name
    assert n_cut > 10


def test_ties_modes_dtypes_and_the_random_state_are_kept():
    model = tiny_model("bert").to(torch.bfloat16)
    model.bert.embeddings.LayerNorm.float()
    state = torch.get_rng_state()
    small = narrowed(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert small.cls.predictions.decoder.weight is small.bert.embeddings.word_embeddings.weight
    assert small.dtype == torch.bfloat16
    assert small.bert.embeddings.LayerNorm.weight.dtype == torch.float32
    assert not small.training
    assert narrowed(model.train()).training
    untied = narrowed(tiny_model("bert", tie_word_embeddings=False))
    assert untied.cls.predictions.decoder.weight is not untied.bert.embeddings.word_embeddings.weight
    small.cls.predictions.bias.data.zero_()
    assert model.cls.predictions.bias.abs().max() > 0


def test_a_width_that_equals_the_hidden_size_by_accident_is_not_cut():
    model = tiny_model("bert", vocab_size=HIDDEN, intermediate_size=HIDDEN, max_position_embeddings=HIDDEN)
    small = narrowed(model)
    assert small.bert.embeddings.word_embeddings.weight.shape == (HIDDEN, NARROW)
    assert small.bert.embeddings.position_embeddings.weight.shape == (HIDDEN, NARROW)
    assert small.bert.encoder.layer[0].output.dense.weight.shape == (NARROW, HIDDEN)
    assert small.cls.predictions.bias.shape == (HIDDEN,)
    # T5 and MPNet have 32 buckets of relative positions.
    for model_type in ("t5", "mpnet"):
        tables = [v for n, v in narrowed(tiny_model(model_type)).named_parameters() if "relative_attention_bias" in n]
        assert tables
        assert all(table.shape[0] == HIDDEN for table in tables)


def test_the_width_of_embeddings_stays_unless_it_is_the_hidden_size_itself():
    small = narrowed(tiny_model("electra"))
    assert small.config.embedding_size == 16
    assert small.electra.embeddings_project.weight.shape == (NARROW, 16)
    # Without a projection between them, the embeddings write into the hidden channels.
    small = narrowed(tiny_model("electra", embedding_size=HIDDEN))
    assert small.config.embedding_size == NARROW
    assert small.electra.embeddings.word_embeddings.weight.shape == (40, NARROW)
    # ALBERT always has a projection, so this width is another one by role, whatever its size.
    small = narrowed(tiny_model("albert", embedding_size=HIDDEN))
    assert small.config.embedding_size == HIDDEN
    assert small.albert.encoder.embedding_hidden_mapping_in.weight.shape == (NARROW, HIDDEN)
    with pytest.raises(ValueError, match=r"do not have the same tensors: electra\.embeddings_project\.bias"):
        narrowed(tiny_model("electra"), 16)


def test_poolers_follow_the_hidden_size():
    small = narrowed(tiny_model("deberta-v2", "DebertaV2ForSequenceClassification"))
    assert small.config.pooler_hidden_size == NARROW
    assert small.pooler.dense.weight.shape == (NARROW, NARROW)
    assert narrowed(tiny_model("vit", "ViTModel")).pooler.dense.weight.shape == (NARROW, NARROW)
    apart = narrowed(tiny_model("vit", "ViTModel", pooler_output_size=20))
    assert apart.pooler.dense.weight.shape == (20, NARROW)


def test_convolutions_are_cut_unless_they_group_the_channels():
    small = narrowed(tiny_model("deberta-v2", conv_kernel_size=3))
    assert small.deberta.encoder.conv.conv.weight.shape == (NARROW, NARROW, 3)
    with pytest.raises(ValueError, match=r"conv\.weight has the shape \(32, 8, 3\) and would need \(24, 6, 3\)"):
        narrowed(tiny_model("deberta-v2", conv_kernel_size=3, conv_groups=4))


def test_blocks_that_differ_must_be_made_alike():
    model = tiny_model("llama")
    keep_neurons_(find_blocks(model)[1].ffn, range(20))
    with pytest.raises(ValueError, match=r"intermediate_size would be each of \[20, 24\]. Give intermediate_size"):
        narrow_hidden(model, 16)
    with pytest.raises(ValueError, match="intermediate_size=21 cannot be cut from feed-forward networks of 20"):
        keep_strongest_neurons_(model, 21)
    keep_strongest_neurons_(model, 20)
    assert narrow_hidden(model, 16).config.intermediate_size == 20
    keep_heads_(find_blocks(model)[0].attention, [1, 2])
    with pytest.raises(ValueError, match=r"num_attention_heads would be each of \[4, 8\]. Give num_heads"):
        narrow_hidden(model, 16)


def test_without_a_key_for_their_width_the_hidden_size_decides_the_heads():
    assert plan_heads(tiny_model("bert")) == {}
    assert plan_heads(tiny_model("bert"), 24) == {"encoder": 3}
    assert plan_heads(tiny_model("bart"), 8) == {"encoder": 1, "decoder": 1}
    assert plan_heads(tiny_model("bert"), num_heads=3) == {"encoder": 3}
    assert plan_heads(tiny_model("llama"), 24) == {}
    assert plan_heads(tiny_model("llama"), 24, 6) == {"decoder": 6}


@pytest.mark.parametrize(
    ("model_type", "sizes", "message"),
    [
        ("bert", (40, None), "hidden_size=40 cannot be cut from a hidden size of 32"),
        (
            "bert",
            (20, None),
            "hidden_size=20 is not a multiple of 8, the width of a head .* give hidden_size=16 or 24",
        ),
        ("bert", (4, None), "give hidden_size=8\\."),
        ("bert", (24, 2), "num_heads=2 and hidden_size=24 contradict .* hidden_size=16, or num_heads=3"),
        ("bert", (None, 5), "num_heads=5 cannot be cut from the encoder, where an attention has 4 heads"),
        ("llama", (None, 3), "each 2 heads share one key-value head and go together. Give num_heads=2 or 4"),
        ("llama", (None, 1), "Give num_heads=2\\."),
        ("llama", (28, None), "multiple of its 8 heads, .* hidden_size=24 or 32, or num_heads out of 2, 4\\."),
        ("t5", (30, 9), "num_heads=9 cannot be cut from the encoder"),
    ],
)
def test_sizes_that_no_stock_config_can_express(model_type, sizes, message):
    with pytest.raises(ValueError, match=message):
        plan_heads(tiny_model(model_type), *sizes)


def test_a_model_with_fewer_heads_than_the_hidden_size_asks_for():
    model = tiny_model("bert")
    keep_heads_(find_blocks(model)[1].attention, [0])
    with pytest.raises(ValueError, match="hidden_size=16, thus 2 heads, cannot be cut .* has 1 heads: give at most 8"):
        plan_heads(model, 16)
    remove_attention_(find_blocks(model)[1].attention)
    with pytest.raises(
        ValueError, match="encoder cannot be cut to one number, because an attention of it was removed"
    ):
        plan_heads(model, None, 1)
    assert [block.ffn.width for block in find_blocks(model)] == [FFN] * 3
    assert list(find_stacks(model)) == ["encoder"]
