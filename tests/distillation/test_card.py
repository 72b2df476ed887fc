"""The card of a DistillationTrainer: of the kind that recipes have, with what the trainer was told and measured."""

import pytest
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import close_session

from hf_compress.hub.card_page import TASKS
from hf_compress.modeling.tasks import _CLASS_NAMES
from tests.distillation.tiny import make_trainer
from tests.hub.hub_server import Hub
from tests.hub.test_card import SECTIONS, check, sections


def measure(predictions):
    return {"accuracy": 0.75, "undefined": float("nan")}


@pytest.mark.parametrize("task", ["single-label", "regression", "token-classification", "causal-lm", "seq2seq"])
def test_card_of_a_trainer(task, tmp_path):
    trainer = make_trainer(task, tmp_path / "out", hub_token="hf_secret", hub_model_id="me/student")
    trainer.train()
    trainer.evaluate()
    trainer.create_model_card(tags="mine", dataset_tags="nyu-mll/glue", dataset_args="sst2", license="mit")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    check(card, tmp_path, "hf_secret")
    assert sections(card) == SECTIONS
    data = card.data.to_dict()
    assert data["tags"] == ["hf_compress", "knowledge-distillation", "mine", "generated_from_trainer"]
    assert (data["license"], data["datasets"]) == ("mit", ["nyu-mll/glue"])
    assert data.get("pipeline_tag") == TASKS[trainer.task].pipeline
    assert 'from_pretrained("me/student")' in card.text
    assert f"| {trainer.state.log_history[-1]['eval_loss']:.4f} |" in card.text
    assert ("Hinton" in card.text) == (task != "regression")
    assert "alpha: 0.9" in card.text


def test_measures_of_a_trainer(tmp_path):
    trainer = make_trainer("single-label", tmp_path / "out")
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "not measured" in card.text
    assert card.data.eval_results is None
    trainer.compute_metrics = measure
    trainer.evaluate()
    trainer.create_model_card(language="de", tasks="zero-shot-classification", finetuned_from="org/bert")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    check(card, tmp_path)
    assert [(one.metric_type, one.metric_value) for one in card.data.eval_results] == [("accuracy", 0.75)]
    assert (card.data.language, card.data.pipeline_tag) == ("de", "zero-shot-classification")
    assert (card.data.base_model, card.data.base_model_relation) == ("org/bert", "finetune")


def test_a_trainer_pushes_its_card(tmp_path, monkeypatch):
    with Hub().running() as hub:
        for name, value in (("ENDPOINT", hub.endpoint), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)
        monkeypatch.setenv("HF_TOKEN", hub.token)
        close_session()
        trainer = make_trainer("single-label", tmp_path / "student")
        trainer.train()
        trainer.push_to_hub()
        arrived = hub.repositories["me/student"].files("main")
        assert arrived["README.md"].content == (tmp_path / "student" / "README.md").read_bytes()
        assert b'from_pretrained("me/student")' in arrived["README.md"].content
        card = ModelCard(arrived["README.md"].content.decode())
        assert sections(card) == SECTIONS
        check(card, tmp_path)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)
    close_session()


def test_every_task_has_words():
    assert set(TASKS) == set(_CLASS_NAMES)


class Falling:
    """A metric that every evaluation finds lower."""

    def __init__(self):
        self.value = 2.0

    def __call__(self, predictions):
        self.value /= 2
        return {"accuracy": self.value}


def test_measures_are_of_the_checkpoint_that_was_loaded_in_the_end(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "accuracy", "greater_is_better": True}
    trainer = make_trainer("single-label", tmp_path / "out", **settings)
    trainer.compute_metrics = Falling()
    trainer.train()
    assert trainer.state.best_metric == 1.0
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert [(one.metric_type, one.metric_value) for one in card.data.eval_results] == [("accuracy", 1.0)]
    trainer.evaluate()
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert [one.metric_value for one in card.data.eval_results] == [0.125]


def test_measures_of_several_sets(tmp_path):
    trainer = make_trainer("single-label", tmp_path / "out", eval_strategy="steps", eval_steps=1, max_steps=1)
    trainer.compute_metrics = measure
    trainer.eval_dataset = {"a": trainer.eval_dataset, "b": trainer.eval_dataset}
    trainer.train()
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert [one.metric_type for one in card.data.eval_results] == ["a_accuracy", "b_accuracy"]
    assert "runtime" not in str(card)
