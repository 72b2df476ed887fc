"""A layer that is tried out is passed by exactly as after `keep_layers_`; the least missed go first."""

import copy

import pytest
import torch

from hf_compress.modeling.blocks import count_layers, find_blocks, find_stacks
from hf_compress.modeling.capture import gate_outputs
from hf_compress.modeling.surgery import first_layer_stays, keep_layers_
from hf_compress.pruning.layers import (
    bernoulli_divergence,
    categorical_divergence,
    choose_layers,
    mean_divergence,
    run_without,
    squared_error,
)
from hf_compress.pruning.sensitivity import task_outputs
from tests.modeling.tiny import MODEL_TYPES, difference, supports, tiny_batch, tiny_model

TOLERANCE = 1e-5
OWN_WEIGHTS = [model_type for model_type in MODEL_TYPES if model_type != "albert"]
CASES = [
    (model_type, attention)
    for model_type in OWN_WEIGHTS
    for attention in ("eager", "sdpa")
    if supports(model_type, attention)
]


@torch.no_grad()
def outputs_of(model, batch) -> torch.Tensor:
    return task_outputs(model, model(**batch))[0]


def outputs_without(model, removed, stack: str, batch) -> torch.Tensor:
    small = copy.deepcopy(model)
    keep_layers_(small, sorted(set(range(count_layers(model, stack))) - set(removed)), stack)
    return outputs_of(small, batch)


@pytest.mark.parametrize(("model_type", "attention"), CASES)
def test_a_layer_passed_by_equals_one_that_was_removed(model_type, attention):
    model = tiny_model(model_type, attention=attention)
    batch = tiny_batch(model)
    dense = outputs_of(model, batch)
    for stack in find_stacks(model):
        layers = range(int(first_layer_stays(model, stack)), count_layers(model, stack))
        for removed in ([], layers[:1], layers[-1:]):
            trials = [layer for layer in layers if layer not in removed]
            results = run_without(model, batch, removed, trials, stack)
            outputs = [task_outputs(model, result)[0] for result in results]
            for gone, found in zip([[], *([layer] for layer in trials)], outputs, strict=True):
                assert difference(found, outputs_without(model, [*removed, *gone], stack, batch)) <= TOLERANCE
                assert (difference(found, dense) > 1e-3) == bool([*removed, *gone])
    assert difference(outputs_of(model, batch), dense) == 0
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("model_type", "name", "settings"),
    [
        ("bert", "BertForSequenceClassification", {"num_labels": 3}),
        ("bert", "BertForSequenceClassification", {"num_labels": 1}),
        ("bert", "BertForSequenceClassification", {"num_labels": 3, "problem_type": "multi_label_classification"}),
        ("bert", "BertForTokenClassification", {"num_labels": 3}),
        ("bert", "BertForQuestionAnswering", {}),
        ("bert", "BertModel", {}),
        ("vit", "ViTForImageClassification", {}),
        ("gpt2", "GPT2LMHeadModel", {}),
        ("t5", "T5ForConditionalGeneration", {}),
    ],
)
def test_a_layer_that_changes_nothing_goes_first(model_type, name, settings):
    model = tiny_model(model_type, name, num_hidden_layers=4, **settings)
    for stack in find_stacks(model):
        neutralise_(find_blocks(model, stack)[2])
        kept = choose_layers(model, [tiny_batch(model)], 1, stack)
        assert kept == [layer for layer in range(count_layers(model, stack)) if layer != 2]


def neutralise_(block) -> None:
    """Makes a block hand on its input."""
    if not block.is_pre_norm:
        block.module.forward = lambda hidden_states, *args, **kwargs: hidden_states
    for part in (*block.attentions, block.ffn):
        for parameter in part.output.parameters():
            torch.nn.init.zeros_(parameter)


def test_greedy_rounds_compare_with_the_whole_model():
    model = tiny_model("bert", "BertForSequenceClassification", num_hidden_layers=4)
    batches = [tiny_batch(model), {name: tensor[:1] for name, tensor in tiny_batch(model, (5, 7, 11)).items()}]
    dense = [outputs_of(model, batch) for batch in batches]

    def loss(removed: set[int]) -> float:
        small = [outputs_without(model, removed, "encoder", batch) for batch in batches]
        return torch.cat([categorical_divergence(d, s) for d, s in zip(dense, small, strict=True)]).mean().item()

    kept = [0, 1, 2, 3]
    for n_removed in range(4):
        assert choose_layers(model, batches, n_removed) == kept
        if n_removed < 3:
            losses = {layer: loss({0, 1, 2, 3} - set(kept) | {layer}) for layer in kept}
            kept = [layer for layer in kept if layer != min(losses, key=losses.get)]


def test_stops_when_told_to_and_reports_progress():
    model = tiny_model("distilbert")
    batches, calls = [tiny_batch(model)] * 2, []
    assert choose_layers(model, batches, lambda kept: True) == [0, 1, 2]
    kept = choose_layers(model, batches, lambda kept: len(kept) <= 1, progress=lambda: calls.append(1))
    assert len(kept) == 1
    assert len(calls) == 2 * 2
    with pytest.raises(ValueError, match="One layer is left in the encoder"):
        choose_layers(model, batches, lambda kept: False)


def test_modes_and_hooks_are_as_before():
    model = tiny_model("bert").train()
    model.bert.encoder.layer[0].eval()
    modes = [module.training for module in model.modules()]
    gates = {find_blocks(model)[0].ffn: torch.ones(24)}
    with gate_outputs(gates):
        choose_layers(model, [tiny_batch(model)], 1)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_shared_layers_are_only_counted():
    assert choose_layers(tiny_model("albert"), [], 1) == [0, 1]
    assert choose_layers(tiny_model("albert"), [], lambda kept: len(kept) == 1) == [0]


def test_a_first_layer_that_has_to_stay_is_not_tried():
    model = tiny_model("modernbert")
    neutralise_(find_blocks(model)[0])
    assert first_layer_stays(model)
    assert choose_layers(model, [tiny_batch(model)], 3) == [0]


def test_of_equal_layers_the_first_goes():
    model = tiny_model("gpt2", num_hidden_layers=3)
    for block in find_blocks(model)[1:]:
        neutralise_(block)
    assert choose_layers(model, [tiny_batch(model)], 1) == [0, 2]


def test_padding_does_not_count():
    for name in ("BertForTokenClassification", "BertForQuestionAnswering", "BertForMaskedLM"):
        model = tiny_model("bert", name, num_hidden_layers=4)
        batch = tiny_batch(model)
        padded = {key: torch.nn.functional.pad(value, (0, 3), value=0) for key, value in batch.items()}
        assert choose_layers(model, [batch], 2) == choose_layers(model, [padded], 2)


@pytest.mark.parametrize("n_removed", [-1, 3, 5])
def test_refuses_to_remove_what_is_not_there(n_removed):
    model = tiny_model("bert")
    with pytest.raises(ValueError, match=f"{n_removed} layers cannot go from the 3 of the encoder"):
        choose_layers(model, [tiny_batch(model)], n_removed)


def test_refuses_what_cannot_be_measured():
    model = tiny_model("bert")
    with pytest.raises(ValueError, match="There is no batch"):
        choose_layers(model, [], 1)
    with pytest.raises(ValueError, match="does not name a stack"):
        choose_layers(tiny_model("t5"), [tiny_batch(model)], 1)
    with torch.no_grad():
        model.cls.predictions.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        choose_layers(model, [tiny_batch(model)], 1)


def test_divergences_are_those_of_torch():
    p, q = torch.randn(2, 5, 7).unbind()
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
    )
    torch.testing.assert_close(categorical_divergence(p, q), expected)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Bernoulli(logits=p), torch.distributions.Bernoulli(logits=q)
    )
    torch.testing.assert_close(bernoulli_divergence(p, q), expected.sum(-1))
    torch.testing.assert_close(squared_error(p, q), (p - q).square().mean(-1))


@pytest.mark.parametrize("kind", ["categorical", "bernoulli", "gaussian"])
def test_divergence_is_zero_where_nothing_changes(kind):
    p, q = torch.randn(2, 4, 3, 5).unbind()
    mask = torch.rand(4, 3) > 0.5
    assert mean_divergence(p, p, kind) == 0
    assert mean_divergence(p, q, kind, mask) > 0
    assert mean_divergence(p, torch.where(mask[..., None], p, q), kind, mask) == 0
