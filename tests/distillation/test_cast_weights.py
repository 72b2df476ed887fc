"""Weights of a teacher that are cast once: the same answers, and the teacher as it was."""

import contextlib

import pytest
import torch
from transformers import TrainerCallback

from hf_compress.distillation.cast_weights import CastWeights
from tests.distillation.tiny import TASKS, make_trainer, tiny_model


def losses_of(task, folder) -> list[float]:
    trainer = make_trainer(task, folder, bf16=True)
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("task", TASKS)
def test_a_training_is_the_same_bit_by_bit(task, tmp_path, monkeypatch):
    found = losses_of(task, tmp_path / "cast")
    monkeypatch.setattr(CastWeights, "in_place", lambda self, device_type: contextlib.nullcontext())
    assert found
    assert losses_of(task, tmp_path / "plain") == found


def ask(model, inputs) -> torch.Tensor:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return model(**inputs).logits


def test_the_model_holds_its_own_weights_before_and_after():
    model = tiny_model("single-label", 2, seed=0).eval()
    before = {name: (weight, weight.clone()) for name, weight in model.named_parameters()}
    weights = CastWeights(model)
    with torch.autocast("cpu", torch.bfloat16), weights.in_place("cpu"):
        cast = {name for name, weight in model.named_parameters() if weight.dtype is torch.bfloat16}
    assert {"classifier.weight", "bert.encoder.layer.1.attention.self.query.bias"} <= cast
    assert not any("norm" in name.lower() or "embeddings" in name for name in cast)
    with pytest.raises(IndexError), torch.autocast("cpu", torch.bfloat16), weights.in_place("cpu"):
        ask(model, {"input_ids": torch.tensor([[10**6]])})
    for name, weight in model.named_parameters():
        assert weight is before[name][0]
        assert torch.equal(weight, before[name][1])
    with weights.in_place("cpu"):
        assert model.classifier.weight.dtype is torch.float32


@pytest.mark.parametrize("way", ["in place", "data", "replaced", "loaded"])
def test_weights_that_change_are_cast_again(way):
    model, other = (tiny_model("single-label", 2, seed=seed).eval() for seed in (0, 1))
    inputs = {"input_ids": torch.randint(5, 20, (2, 7))}
    weights = CastWeights(model)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16), weights.in_place("cpu"):
            found = ask(model, inputs)
        assert torch.equal(found, ask(model, inputs))
        with torch.no_grad():
            if way == "in place":
                model.classifier.weight.mul_(2)
            elif way == "data":
                model.classifier.weight.data = other.classifier.weight.clone()
            elif way == "replaced":
                model.classifier.weight = torch.nn.Parameter(other.classifier.weight.clone())
            else:
                model.load_state_dict(other.state_dict())
    with torch.autocast("cpu", torch.bfloat16), weights.in_place("cpu"):
        assert torch.equal(ask(model, inputs), ask(model, inputs))
    with torch.autocast("cpu", torch.float16), weights.in_place("cpu"):
        assert model.classifier.weight.dtype is torch.float16


def test_weights_that_are_shared_stay():
    model = tiny_model("masked-lm", 2, seed=0)
    table = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is table
    with torch.autocast("cpu", torch.bfloat16), CastWeights(model).in_place("cpu"):
        assert model.get_output_embeddings().weight is table
        assert model.bert.encoder.layer[0].output.dense.weight.dtype is torch.bfloat16


def test_a_teacher_that_learns_beside_its_student_is_asked_as_it_is_now(tmp_path, monkeypatch):
    class Follow(TrainerCallback):
        """The teacher's weights move towards the student's, as in a mean teacher."""

        def on_step_end(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                trainer.teachers[0].model.classifier.weight.lerp_(model.classifier.weight, 0.5)

    found = []
    for is_cast in (True, False):
        if not is_cast:
            monkeypatch.setattr(CastWeights, "in_place", lambda self, device_type: contextlib.nullcontext())
        trainer = make_trainer("single-label", tmp_path / str(is_cast), bf16=True)
        trainer.add_callback(Follow())
        trainer.train()
        found.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert found[0] == found[1]
