"""Single weights that go in a training: the schedule, zeros that stay, gradients, accumulation, distillation."""

import math
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType

import hf_compress as hc
from hf_compress.pruning import callback
from hf_compress.pruning.schedule import SHARES
from hf_compress.pruning.training_weights import clear_state_
from hf_compress.pruning.weight_layers import find_layers
from tests.modeling.tiny import difference, tiny_batch
from tests.pruning.weight_training import Watch, config, make_trainer, model_of, shares, zeros

SGD = (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1})


@pytest.mark.parametrize(
    ("score", "schedule", "optimizer"),
    [(score, "cubic", "adamw") for score in ("random", "wanda", "sparsegpt")]
    + [(score, schedule, "adamw") for score in ("magnitude", "movement") for schedule in SHARES]
    + [(score, "cubic", "sgd") for score in ("magnitude", "sparsegpt", "movement")],
)
def test_sparsity_follows_the_schedule_and_what_is_gone_does_not_move(score, schedule, optimizer, tmp_path):
    watch = Watch()
    settings = config(score=score, scope="layer")
    callback = hc.PruningCallback(settings, begin=0.1, end=0.7, n_updates=4, n_batches=2, schedule=schedule)
    others = {"optimizer_cls_and_kwargs": SGD} if optimizer == "sgd" else {}
    run = make_trainer(tmp_path, [callback, watch], max_steps=14, **others)
    run.train()
    steps = callback.update_steps(14)
    assert steps == ([1] if schedule == "constant" else [1, 3, 5, 7])
    for step, masks in enumerate(watch.masks):
        done = sum(step >= update for update in steps) / len(steps)
        share = SHARES[schedule](done) if done else 0.0
        for name, mask in masks.items():
            assert mask.sum() == round(0.6 * share * mask.numel()), (step, name)
    assert not watch.moved
    assert not watch.has_memory
    assert not watch.has_gradient
    if score not in ("movement", "sparsegpt"):
        for earlier, later in zip(watch.masks, watch.masks[1:], strict=False):
            assert all((later[name] | ~mask).all() for name, mask in earlier.items())


@pytest.mark.parametrize("score", ["magnitude", "movement"])
def test_weights_that_are_gone_do_not_count_in_clipping(score, tmp_path):
    watch = Watch()
    callback = hc.PruningCallback(config(score=score), n_updates=1)
    make_trainer(tmp_path, [callback, watch], max_steps=5, max_grad_norm=1e-4).train()
    assert watch.norms == pytest.approx([1e-4] * 5, rel=1e-2)


@pytest.mark.parametrize("score", ["magnitude", "wanda", "movement"])
def test_one_batch_of_eight_is_eight_of_one(score, tmp_path):
    models = []
    for size, accumulation in ((8, 1), (1, 8)):
        model = model_of("gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        callback = hc.PruningCallback(config(score=score), [tiny_batch(model)], n_updates=3)
        run = make_trainer(
            tmp_path,
            [callback],
            model=model,
            model_type="gpt2",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=5,
            optimizer_cls_and_kwargs=SGD,
        )
        run.train()
        models.append(run.model)
    for name, mask in zeros(models[0]).items():
        assert torch.equal(mask, zeros(models[1])[name]), name
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert difference(one, other) <= 1e-5


@pytest.mark.parametrize(("score", "is_cast"), [("sparsegpt", False), ("sparsegpt", True), ("movement", True)])
def test_bfloat16(score, is_cast, tmp_path):
    watch = Watch()
    callback = hc.PruningCallback(config(score=score), n_updates=2, n_batches=2)
    model = model_of().bfloat16() if is_cast else model_of()
    run = make_trainer(tmp_path, [callback, watch], model=model, max_steps=5, bf16=True)
    run.train()
    assert run.model.dtype == (torch.bfloat16 if is_cast else torch.float32)
    assert set(shares(run.model).values()) == {round(0.6 * 1024) / 1024, round(0.6 * 768) / 768}
    assert not watch.moved


@pytest.mark.parametrize("max_steps", [2, 3, 10])
@pytest.mark.parametrize("score", ["magnitude", "movement"])
def test_short_trainings_reach_the_sparsity_too(score, max_steps, tmp_path):
    run = make_trainer(tmp_path, [hc.PruningCallback(config(0.75, score))], max_steps=max_steps)
    run.train()
    assert set(shares(run.model).values()) == {0.75}


@pytest.mark.parametrize(("score", "is_staged"), [("magnitude", False), ("wanda", True), ("movement", True)])
def test_pruning_while_distilling(score, is_staged, tmp_path):
    watch = Watch()
    callback = hc.PruningCallback(config(0.75, score), n_updates=3, n_batches=2)
    stages = [
        hc.StageConfig(terms=[hc.TermConfig("hidden_mse")], steps=2, alpha=0.0, task_weight=0.0),
        hc.StageConfig(),
    ]
    others = {"stages": stages} if is_staged else {}
    run = make_trainer(tmp_path, [callback, watch], distilled=True, max_steps=6, **others)
    run.train()
    assert set(shares(run.model).values()) == {0.75}
    assert not watch.moved
    assert not any(mask.any() for mask in zeros(run.teachers[0].model).values())


def test_a_pruned_model_is_fine_tuned_with_its_zeros(tmp_path):
    pruned = hc.prune(model_of(), config(0.5, "wanda"), [tiny_batch(model_of())])
    before = zeros(pruned)
    callback = hc.PruningCallback(config(0.5, "magnitude", scope="row"), schedule="constant")
    run = make_trainer(tmp_path, [callback], model=pruned)
    run.train()
    assert all(torch.equal(mask, before[name]) for name, mask in zeros(run.model).items())


def test_frozen_weights_are_pruned_too_but_not_by_their_movement(tmp_path):
    model = model_of()
    layer = find_layers(model)[2]
    layer.module.weight.requires_grad_(False)
    before = layer.weight.clone()
    run = make_trainer(tmp_path, [hc.PruningCallback(config())], model=model, max_steps=2)
    run.train()
    mask = layer.weight == 0
    assert mask.sum() == round(0.6 * mask.numel())
    assert torch.equal(layer.weight[~mask], before[~mask])
    model = model_of()
    find_layers(model)[2].module.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"is frozen and has none: add '.*' to exclude"):
        make_trainer(tmp_path, [hc.PruningCallback(config(score="movement"))], model=model).train()


@pytest.mark.parametrize(
    ("settings", "values", "message"),
    [
        ({"score": "sparsegpt", "steps": 2}, {}, "steps=2 does not fit a schedule: leave steps=1, and give n_updates"),
        ({"score": "movement"}, {"schedule": "constant"}, "they would go before that shows: give a later begin"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(settings, values, message):
    with pytest.raises(ValueError, match=message):
        hc.PruningCallback(config(**settings), **values)


@pytest.mark.parametrize("what", [config(), hc.StructuredPruningConfig(budget=0.8, score="l2")], ids=type)
def test_weights_that_are_spread_over_processes_are_refused(monkeypatch, tmp_path, what):
    state = SimpleNamespace(distributed_type=DistributedType.FSDP)
    monkeypatch.setattr(callback, "AcceleratorState", lambda: state)
    with pytest.raises(ValueError, match="FSDP spreads weights over processes"):
        make_trainer(tmp_path, [hc.PruningCallback(what)]).train()


def test_rounded_states_of_optimizers_are_refused():
    weight = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([weight])
    optimizer.state[weight]["state1"] = torch.zeros(4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="SGD keeps its state in torch.uint8.*adamw_torch"):
        clear_state_(optimizer, weight, torch.ones(4, dtype=torch.bool))


def test_the_best_model_is_as_sparse_as_was_asked_for(tmp_path, caplog):
    saves = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 3}
    values = {"load_best_model_at_end": True, "metric_for_best_model": "first", "greater_is_better": True}
    run = make_trainer(tmp_path, [hc.PruningCallback(config(0.75), n_updates=2)], **saves, **values)
    # The first one, from before the last update.
    run.compute_metrics = lambda _: {"first": -run.state.global_step}
    run.train()
    assert run.state.best_global_step == 1
    assert set(shares(run.model).values()) == {0.75}
    assert "may bring back weights from before the last of them went" in caplog.text


def test_movement_has_no_best_model(tmp_path):
    values = {"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps", "eval_steps": 1}
    with pytest.raises(ValueError, match="load_best_model_at_end does not fit score='movement'"):
        make_trainer(tmp_path, [hc.PruningCallback(config(score="movement"))], save_steps=1, **values).train()


def test_one_step_is_too_short_for_movement(tmp_path):
    with pytest.raises(ValueError, match="A training of 1 steps has none before which score='movement' can be told"):
        make_trainer(tmp_path, [hc.PruningCallback(config(score="movement"))], max_steps=1).train()


def test_default_updates_depend_on_what_they_cost():
    counts = {score: hc.PruningCallback(config(score=score)).n_updates for score in ("movement", "l1", "wanda")}
    assert counts == {"movement": 32, "l1": 32, "wanda": 8}
    assert math.isclose(hc.PruningCallback(config(score="l1")).update_steps(1000)[1], 600 / 32, abs_tol=1)
