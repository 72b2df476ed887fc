import logging

import pytest
import torch
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback, TrainerState, TrainingArguments

import hf_compress as hc
from hf_compress.checkpoint.widths import read_widths
from hf_compress.modeling.blocks import find_blocks
from hf_compress.pruning.costs import Costs
from hf_compress.pruning.obs import Removal
from hf_compress.pruning.training_units import dead_first
from hf_compress.pruning.units import find_sites
from tests.modeling.tiny import difference, predict, tiny_batch, tiny_model

ROWS = [
    {"input_ids": [0, 5 + i % 30, 3 + i % 17, 2], "attention_mask": [1] * 4, "labels": i % 2} for i in range(64)
]  # fmt: skip


def classifier():
    return tiny_model("bert", "BertForSequenceClassification", intermediate_size=64)


def config(**values):
    return hc.StructuredPruningConfig(**({"budget": 0.5, "multiple_of": 4} | values))


def macs(model, batches) -> float:
    sites = find_sites(find_blocks(model))
    return Costs("macs", sites, batches).total(sites)


def trainer(folder, callback, model=None, distilled=False, **values):
    settings = {
        "max_steps": 12,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "save_strategy": "no",
    } | values
    common = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_strategy": "no"}
    model = classifier() if model is None else model
    if distilled:
        args = hc.DistillationArguments(str(folder), **settings, **common)
        return hc.DistillationTrainer(model, args, teacher=classifier(), train_dataset=ROWS, callbacks=[callback])
    args = TrainingArguments(str(folder), **settings, **common)
    return Trainer(model, args, train_dataset=ROWS, callbacks=[callback])


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("score", ["obs", "l2"])
def test_the_trained_model_is_cut_to_the_budget_and_reloads_exactly(distilled, score, tmp_path):
    callback = hc.PruningCallback(config(score=score), end=0.7, n_updates=3)
    run = trainer(tmp_path, callback, distilled=distilled)
    run.train()
    left = macs(run.model, callback._batches) / macs(classifier(), callback._batches)
    assert left <= 0.5
    run.save_model(tmp_path / "model")
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", attn_implementation="eager")
    batch = tiny_batch(reloaded)
    assert difference(predict(reloaded, batch), predict(run.model.eval(), batch)) == 0


def test_the_trainer_of_a_model_that_was_cut_does_not_train_on(tmp_path):
    run = trainer(tmp_path, hc.PruningCallback(config(score="l2"), n_updates=2))
    run.train()
    run.remove_callback(hc.PruningCallback)
    before = {name: value.clone() for name, value in run.model.named_parameters()}
    with pytest.raises(ValueError, match="make a new Trainer for the pruned model"):
        run.train()
    assert all(torch.equal(value, before[name]) for name, value in run.model.named_parameters())


@pytest.mark.parametrize("max_steps", [1, 3, 10])
def test_short_trainings_reach_the_budget_too(max_steps, tmp_path):
    callback = hc.PruningCallback(config(score="fisher"))
    run = trainer(tmp_path, callback, max_steps=max_steps)
    run.train()
    assert macs(run.model, callback._batches) / macs(classifier(), callback._batches) <= 0.5


def test_the_cut_changes_no_output(tmp_path):
    callback = hc.PruningCallback(config(), n_updates=2)
    run = trainer(tmp_path, callback)
    batch = tiny_batch(run.model)
    before = {}
    cut = callback.on_train_end

    def look(*args, model, **kwargs):
        model.eval()
        before["gated"] = predict(model, batch)
        cut(*args, model=model, **kwargs)

    callback.on_train_end = look
    run.train()
    assert read_widths(run.model) != read_widths(classifier())
    assert difference(predict(run.model.eval(), batch), before["gated"]) <= 1e-5


class Stop(Exception):  # noqa: N818
    pass


class Interrupted(hc.PruningCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 6:
            raise Stop
        super().on_step_begin(args, state, control, **kwargs)


def test_what_is_off_stays_off_and_a_resumed_run_ends_alike(tmp_path):
    batches = [tiny_batch(classifier())]
    steps = {"save_strategy": "steps", "save_steps": 5}
    whole = trainer(tmp_path / "whole", hc.PruningCallback(config(), batches, n_updates=4))
    whole.train()
    with pytest.raises(Stop):
        trainer(tmp_path / "parts", Interrupted(config(), batches, n_updates=4), **steps).train()
    second = trainer(tmp_path / "parts", hc.PruningCallback(config(), batches, n_updates=4), **steps)
    second.train(resume_from_checkpoint=True)
    assert read_widths(second.model) == read_widths(whole.model)
    for (name, one), other in zip(whole.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_what_an_interrupted_training_leaves_is_taken_off(tmp_path):
    batches = [tiny_batch(classifier())]
    run = trainer(tmp_path / "run", Interrupted(config(), batches, n_updates=4))
    with pytest.raises(Stop):
        run.train()
    model = run.model.eval()
    pruned = hc.prune(model, config(score="l2", repair="none", budget=0.4, cost="params")).eval()
    pruned.save_pretrained(tmp_path / "saved")
    saved = type(model).from_pretrained(tmp_path / "saved", attn_implementation="eager")
    assert difference(predict(pruned, batches[0]), predict(saved, batches[0])) == 0
    again = trainer(tmp_path / "again", hc.PruningCallback(config(score="l2", budget=0.4), batches), model=model)
    again.train()
    predict(model.eval(), batches[0])


def test_a_student_of_an_interrupted_training_learns_with_all_of_its_units(tmp_path):
    batches = [tiny_batch(classifier())]
    run = trainer(tmp_path / "run", Interrupted(config(), batches, n_updates=4))
    with pytest.raises(Stop):
        run.train()
    student = hc.make_student(run.model, hc.StudentConfig(num_layers=1))
    weight = find_blocks(student)[0].ffn.output.weight
    assert (weight == 0).all(0).any()
    trainer(tmp_path / "again", TrainerCallback(), model=student, distilled=True).train()
    assert not (weight == 0).all(0).any()


def test_a_training_resumed_with_fewer_steps_reaches_the_budget(tmp_path):
    batches = [tiny_batch(classifier())]
    steps = {"save_strategy": "steps", "save_steps": 5}
    with pytest.raises(Stop):
        trainer(tmp_path, Interrupted(config(), batches, n_updates=4, end=1.0), **steps).train()
    second = trainer(tmp_path, hc.PruningCallback(config(), batches, n_updates=4, end=0.5), **steps, max_steps=7)
    second.train(resume_from_checkpoint=True)
    assert macs(second.model, batches) / macs(classifier(), batches) <= 0.5


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_every_schedule_reaches_the_budget(schedule, tmp_path):
    callback = hc.PruningCallback(config(score="l2"), schedule=schedule)
    run = trainer(tmp_path, callback)
    run.train()
    assert macs(run.model, callback._batches) / macs(classifier(), callback._batches) <= 0.5


def test_a_training_that_ends_early_says_what_is_missing(tmp_path, caplog):
    class StopEarly(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    run = trainer(tmp_path, hc.PruningCallback(config(score="l2")))
    run.add_callback(StopEarly())
    run.train()
    assert "ended after 1 of 12 steps, and the last update would have been before step 7" in caplog.text


def test_a_best_model_from_before_the_end_is_doubtful(tmp_path, caplog):
    model = classifier()
    args = TrainingArguments(
        str(tmp_path), load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps", use_cpu=True
    )
    with caplog.at_level(logging.WARNING, "hf_compress"):
        hc.PruningCallback(config()).on_train_begin(
            args,
            TrainerState(max_steps=10),
            None,
            model=model,
            optimizer=None,
            train_dataloader=[tiny_batch(model)],
        )
    assert "load_best_model_at_end may bring back weights" in caplog.text


@pytest.mark.parametrize(
    ("settings", "values", "message"),
    [
        ({}, {"begin": 0.7, "end": 0.2}, "begin=0.7 and end=0.2"),
        ({}, {"n_updates": 0}, "n_updates=0"),
        ({}, {"schedule": "cosine"}, "schedule='cosine' is unknown: give one of 'constant', 'linear', 'cubic'"),
        ({"steps": 2}, {}, "steps=2"),
        ({"cost": "latency"}, {}, "cost='latency'"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(settings, values, message):
    with pytest.raises(ValueError, match=message):
        hc.PruningCallback(config(**settings), **values)


def test_a_config_of_another_kind_is_refused():
    with pytest.raises(
        TypeError, match="A VocabularyPruningConfig does not say what to prune: give one of Structured"
    ):
        hc.PruningCallback(hc.VocabularyPruningConfig())


def test_a_budget_that_cannot_be_met_is_found_before_the_first_step(tmp_path):
    run = trainer(tmp_path, hc.PruningCallback(config(budget=0.1, multiple_of=16, score="l2")), max_steps=8)
    with pytest.raises(ValueError, match="A budget of 0.100 of the cost cannot be met"):
        run.train()
    assert run.state.global_step == 0


def test_units_that_are_off_go_first():
    removal = Removal(torch.tensor([2, 0, 3, 1]), torch.tensor([0.0, 1.0, 3.0, 6.0, 10.0]))
    found = dead_first(removal, torch.tensor([True, False, True, False]))
    assert found.order.tolist() == [3, 1, 2, 0]
    assert found.error.tolist() == [0.0, 0.0, 0.0, 1.0, 3.0]
    same = dead_first(removal, torch.ones(4, dtype=torch.bool))
    assert torch.equal(same.order, removal.order)
    assert torch.equal(same.error, removal.error)
