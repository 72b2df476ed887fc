"""The ready recipes run, with a tiny model, few rows and few steps, to a result that loads and to a card."""

from dataclasses import fields
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification, BertModel

from hf_compress.pipeline.compress import compress
from hf_compress.recipe.recipe import Recipe
from hf_compress.recipe.steps import FinetuneStep, PruneStep
from tests.tiny_job import save_tiny_bert
from tests.tiny_recipe import FAST, tiny_data

FILES = sorted((Path(__file__).parent.parent.parent / "scripts" / "recipes").glob("*.yaml"))
# What makes a step small; the rest is as in the file.
TINY = {
    "max_steps": 2,
    "n_texts": 16,
    "multiple_of": 4,
    "max_size": 40,
    "augment_to": 60,
    "augment_copies": 1,
    "num_layers": 1,
    "arguments": {"use_cpu": True, "disable_tqdm": True},
}


def make_tiny(step) -> None:
    """Replaces what a recipe's step asks for in numbers, where it asks for it."""
    for one in fields(step):
        wanted = TINY.get(one.name)
        if wanted is not None and (getattr(step, one.name) not in (None, 0) or one.name == "arguments"):
            setattr(step, one.name, wanted)
    if isinstance(step, PruneStep):
        # A model of three layers and two heads cannot be cut as far.
        step.budget = max(step.budget, 0.6)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_ready_recipe_runs(file, tmp_path):
    recipe = Recipe.from_yaml(file, model=str(tmp_path / "model"), dataset="?")
    has_head = not isinstance(recipe.steps[0], FinetuneStep)
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    save_tiny_bert(tmp_path / "model", BertForSequenceClassification if has_head else BertModel, **sizes)
    recipe.data, recipe.measure = tiny_data(tmp_path / "data"), FAST
    for step in recipe.steps:
        make_tiny(step)
    report = compress(recipe, tmp_path / "out")
    made = [step["step"] for step in report["steps"] if step["step"] != "model"]
    assert made == [step.key for step in recipe.steps]
    result = tmp_path / "out" / report["result"]
    assert AutoModelForSequenceClassification.from_pretrained(result).config.num_labels == 2
    assert (result / "README.md").read_text().startswith("---\n")
    sizes = [step["cost"]["bytes_on_disk"] for step in report["steps"] if step["folder"] or step["name"] == "00-model"]
    assert sizes[-1] < sizes[0]
