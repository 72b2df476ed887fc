"""Movement pruning beside a slow reference: every mask a leaf of the graph, whose gradient is the score's."""

import pytest
import torch
from torch.func import functional_call

import hf_compress as hc
from hf_compress.modeling.projections import oriented
from hf_compress.pruning.movement import MovementScores, movement
from hf_compress.pruning.weight_layers import find_layers
from tests.pruning.weight_training import Watch, config, make_trainer, model_of, rows_of, zeros

LR = 0.05
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def slow_movement(model, rows, updates: dict[int, float], n_steps: int) -> tuple[dict, list]:
    """Plain descent: the weights with their masks at the end, and what is masked after each update."""
    names = [f"{layer.name}.weight" for layer in find_layers(model)]
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    masks = {name: torch.ones_like(weights[name]) for name in names}
    scores = {name: torch.zeros_like(weights[name]) for name in names}
    history = []
    for step in range(n_steps):
        if step in updates:
            for name in names:
                count = round(updates[step] * scores[name].numel())
                order = scores[name].flatten().argsort()
                masks[name] = torch.ones_like(masks[name])
                masks[name].view(-1)[order[:count]] = 0
            history.append({name: mask == 0 for name, mask in masks.items()})
        leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
        gates = {name: mask.clone().requires_grad_() for name, mask in masks.items()}
        inside = {name: value * gates[name] if name in gates else value for name, value in leaves.items()}
        batch = {key: torch.tensor([row[key] for row in rows[8 * step : 8 * step + 8]]) for key in rows[0]}
        loss = functional_call(model, inside, kwargs=batch).loss
        loss.backward()
        for name in names:
            scores[name] -= gates[name].grad
        for name, leaf in leaves.items():
            weights[name] -= LR * leaf.grad
    return {name: value * masks.get(name, 1) for name, value in weights.items()}, history


@pytest.mark.parametrize("accumulation", [1, 4])
def test_scores_masks_and_weights_are_those_of_the_reference(accumulation, tmp_path):
    model, rows = model_of("gpt2", **NO_DROPOUT), rows_of("gpt2")
    callback, watch = hc.PruningCallback(config(0.5, "movement"), begin=0.25, end=0.75, n_updates=2), Watch()
    run = make_trainer(
        tmp_path,
        [callback, watch],
        model=model,
        rows=rows,
        max_steps=8,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
        max_grad_norm=0.0,
        weight_decay=0.0,
        optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": LR}),
    )
    updates = {2: 0.5 * (1 - 0.5**3), 4: 0.5}
    assert callback.update_steps(8) == list(updates)
    reference = model_of("gpt2", **NO_DROPOUT).train()
    weights, history = slow_movement(reference, rows, updates, 8)
    run.train()
    for expected, step in zip(history, updates, strict=True):
        for layer in find_layers(run.model):
            mask = oriented(layer.module, expected[f"{layer.name}.weight"])
            assert torch.equal(watch.masks[step][layer.name], mask), layer.name
    for name, value in run.model.named_parameters():
        assert (value - weights[name]).abs().max() <= 1e-5, name
    # What the first update took away came back in part, which is what movement is for.
    first, last = history
    assert any((mask & ~last[name]).any() for name, mask in first.items())


def test_a_weight_that_comes_back_has_its_value():
    model = model_of()
    layers = find_layers(model)
    scores = MovementScores(layers)
    before = {layer.name: layer.weight.clone() for layer in layers}
    draw = torch.Generator().manual_seed(0)
    for _ in range(3):
        for layer in layers:
            mask = torch.rand(layer.weight.shape, generator=draw) < 0.5
            scores.mask_(layer, mask)
            assert torch.equal(layer.weight, before[layer.name].masked_fill(mask, 0))
    for layer in layers:
        scores.mask_(layer, torch.zeros_like(layer.weight, dtype=torch.bool))
        assert torch.equal(layer.weight, before[layer.name])


def test_what_moves_away_from_0_gains():
    gradient, weight = torch.tensor([[-1.0, 1.0, -1.0, 1.0]]), torch.tensor([[2.0, 2.0, -2.0, -2.0]])
    assert movement(gradient, weight).tolist() == [[2.0, -2.0, -2.0, 2.0]]


def test_a_scaled_loss_scores_alike_and_what_overflows_counts_nothing():
    model = model_of("gpt2")
    layer, *_ = find_layers(model)
    gradient = torch.randn(layer.module.weight.shape, generator=torch.Generator().manual_seed(0))
    plain, scaled = MovementScores([layer]), MovementScores([layer])
    plain.add_(layer, gradient, None)
    scaled.add_(layer, gradient * 1024, 1024.0)
    scaled.add_(layer, torch.full_like(gradient, torch.inf), 1024.0)
    assert torch.equal(plain.scores[layer.name], scaled.scores[layer.name])


def test_who_only_looks_at_gradients_does_not_score(tmp_path):
    ends = []
    for looks in (False, True):
        callback = hc.PruningCallback(config(0.5, "movement"), n_updates=2)
        values = {"log_gradient_shares": looks, "logging_strategy": "steps", "logging_steps": 1}
        run = make_trainer(tmp_path, [callback], distilled=True, max_steps=4, **values)
        run.train()
        ends.append(zeros(run.model))
    assert all(torch.equal(mask, ends[1][name]) for name, mask in ends[0].items())
