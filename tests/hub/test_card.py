"""Model cards: metadata that the Hub takes, figures of the run and nothing else, and code that loads the model."""

import json
import re

import pytest
import torch
from huggingface_hub import ModelCard, metadata_load
from transformers import AutoModelForSequenceClassification

import hf_compress as hc
from hf_compress.hub.card import make_card, write_card
from hf_compress.hub.card_base import Base, read_base
from hf_compress.hub.card_page import PLACEHOLDER
from hf_compress.jobs.distill import distill
from hf_compress.jobs.job import PruneJob, QuantizeJob, SparsifyJob
from hf_compress.jobs.prune import prune_classifier
from hf_compress.jobs.quantize import quantize_classifier
from hf_compress.recipe.recipe import Recipe
from hf_compress.recipe.steps import PushStep
from tests.hub.hub_server import metadata_errors
from tests.tiny_job import files_of, make_inputs, tiny_arguments, tiny_job, tiny_tokenizer
from tests.tiny_recipe import tiny_recipe

pytestmark = pytest.mark.usefixtures("quiet_surroundings")

MODEL = {"hidden_size": 64, "intermediate_size": 64, "layers": 2}
BASE_CARD = """---
license: apache-2.0
language: en
base_model: google-bert/bert-base-uncased
---

# small-bert

A small one.
"""
CONDITIONS = {"device": "cpu", "processor": "x86_64 AVX512", "threads": 2, "batch_size": 4, "sequence_length": 16}


# A recipe's report, whose figures are unlike each other


def entry(number, step, settings):
    quality = {
        "metric": "accuracy",
        "teacher": 0.9,
        "compressed": 0.9 - number / 100,
        "retention": (0.9 - number / 100) / 0.9,
        "retention_interval": [0.8 + number / 100, 1.01],
        "agreement": 1 - number / 50,
        "confidence": 0.95,
        "n_bootstrap": 10_000,
    }
    cost = {
        "parameters": {"total": 22_000_000 - number * 1_000_000},
        "bytes_on_disk": 90_000_000 // (number + 1),
        "macs": 4 * (70_000_000 - number * 5_000_000),
        "conditions": CONDITIONS,
    }
    return {
        "name": f"{number:02}-{step}",
        "step": step,
        "settings": settings or {},
        "folder": f"{number:02}-{step}",
        "needs_hf_compress": number > 2,
        "quality": quality,
        "cost": cost,
        "latency": {size: {"ratio": 1 / (number + int(size) / 100), "dtype": "float32"} for size in ("8", "32")},
        "latency_conditions": CONDITIONS,
    }


def recipe_report(recipe):
    steps = [next(iter(step.items())) for step in recipe.to_dict()["steps"]]
    entries = [entry(number, step, settings) for number, (step, settings) in enumerate(steps, 1)]
    for one in entries:
        if one["step"] in ("evaluate", "push"):
            one["folder"] = None
            del one["quality"]
    models = [one["name"] for one in entries if one["folder"]]
    return {
        "schema": 1,
        "kind": "recipe",
        "recipe": recipe.to_dict(),
        "task": "sequence-classification",
        "metric": "accuracy",
        "split": "validation",
        "rows_measured_on": 872,
        "rows_trained_on": 67_349,
        "rows_in_both": 0,
        "machine": {name: CONDITIONS[name] for name in ("device", "processor", "threads")},
        "versions": {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0", "hf_compress": "0.1.0"},
        "reference": models[0],
        "result": models[-1],
        "stopped_by": None,
        "steps": entries,
    }


@pytest.fixture
def recipe(tmp_path):
    return tiny_recipe(tmp_path / "somewhere")


@pytest.fixture
def report(recipe):
    return recipe_report(recipe)


def check(card, *private):
    """What holds for every card: the Hub takes its metadata, it reads back as it was, and tells no path."""
    text = str(card)
    assert metadata_errors(text) == []
    assert ModelCard(text).data.to_dict() == card.data.to_dict()
    assert card.data.library_name == "transformers"
    assert "hf_compress" in card.data.tags
    for place in private:
        assert str(place) not in text
    assert "None" not in text
    assert not re.search(r"\n{4}|\{\{|\{%", text)


def sections(card):
    return re.findall(r"^## (.+)$", card.text, re.MULTILINE)


def test_metadata_of_a_recipe(report, tmp_path):
    card = make_card(
        report, repo_id="me/tiny", base=Base("bert", "google-bert/bert-base-uncased", "mit", language="en")
    )
    check(card, tmp_path)
    data = card.data.to_dict()
    assert data["base_model"] == "google-bert/bert-base-uncased"
    assert data["base_model_relation"] == "quantized"
    assert (data["license"], data["language"], data["pipeline_tag"]) == ("mit", "en", "text-classification")
    assert {"quantization", "int8", "structured-pruning", "vocabulary-pruning", "knowledge-distillation"} <= {
        *data["tags"]
    }
    assert "unstructured-pruning" not in data["tags"]
    compressed, before = card.data.eval_results
    last = report["steps"][-1]["quality"]
    assert (compressed.metric_value, before.metric_value) == (last["compressed"], last["teacher"])
    assert (compressed.metric_name, before.metric_name) == (
        "accuracy",
        "accuracy of the model before compression (01-finetune)",
    )
    assert (compressed.dataset_type, compressed.dataset_split) == ("local", "validation")
    assert card.data.model_name == "tiny"
    assert "datasets" not in data


def test_a_data_set_of_the_hub(report):
    report["recipe"]["data"] |= {"dataset": "nyu-mll/glue", "dataset_name": "sst2"}
    card = make_card(report)
    assert card.data.datasets == ["nyu-mll/glue"]
    result = card.data.eval_results[0]
    assert (result.dataset_type, result.dataset_config) == ("nyu-mll/glue", "sst2")
    check(card)


def test_figures_of_the_table(report):
    headings, _, *rows = re.findall(r"^\| (.+) \|$", make_card(report).text, re.MULTILINE)
    assert headings.split(" | ")[-2:] == ["faster, batch 8", "faster, batch 32"]
    assert len(rows) == 5
    cells = rows[1].split(" | ")
    assert cells == ["02-vocabulary", "88.0 %", "97.8 [82.0, 101.0]", "20.00 M", "30.00", "60.0 M", "2.08x", "2.32x"]
    assert rows[-1].startswith("**06-quantize** | **84.0 %**")


def test_words_say_what_is_known(report):
    text = make_card(report).text
    assert "On 872 rows, its accuracy is 84.0 %, that of the model before compression 90.0 %: 93.3 % is kept" in text
    for known in ("67349 rows", "2 threads", "AVX512", "batches of 8 and 32 rows of 16 tokens", "torch 2.13.0"):
        assert known in text
    assert "On 12.0 % of the rows it decides otherwise" in text
    assert "No groups were evaluated apart" in text


def test_the_recipe_is_the_one_that_was_run(report, recipe, tmp_path):
    yaml = re.search(r"```yaml\n(.+?)```", make_card(report).text, re.DOTALL)[1]
    assert "model: ./model\n" in yaml
    again = Recipe.from_yaml(yaml, model=recipe.model, dataset=recipe.data.dataset)
    assert again == recipe


def test_where_it_is_pushed_to(recipe):
    recipe.steps.append(PushStep("me/pushed"))
    card = make_card(recipe_report(recipe))
    assert card.data.model_name == "pushed"
    assert 'from_pretrained("me/pushed")' in card.text
    assert PLACEHOLDER not in card.text


def test_a_model_in_the_middle(report):
    card = make_card(report, model="02-vocabulary")
    assert make_card(report, model="02-vocabulary", base=Base("a", "a/b")).data.base_model_relation == "finetune"
    assert "quantization" not in card.data.tags
    assert "import hf_compress" not in card.text
    assert "Transformers alone loads it" in card.text
    assert "SparseGPT" not in card.text
    assert "03-prune" not in card.text.split("## Recipe")[0]


def test_the_model_before_compression(report):
    card = make_card(report, model="01-finetune")
    assert len(card.data.eval_results) == 1
    assert "is kept" not in card.text
    check(card)


def test_a_run_that_a_gate_stopped(report):
    report |= {"result": "03-prune", "stopped_by": {"step": "05-evaluate", "reason": "it kept too little"}}
    assert "stopped at 05-evaluate: it kept too little" in make_card(report).text
    report["result"] = None
    with pytest.raises(ValueError, match="no finished model.*01-finetune"):
        make_card(report)


def test_no_such_model(report):
    with pytest.raises(ValueError, match="no model '09-nothing'.*01-finetune, 02-vocabulary"):
        make_card(report, model="09-nothing")


def test_values_that_are_not_defined(report):
    quality = report["steps"][-1]["quality"]
    quality |= {"compressed": None, "retention": None, "retention_interval": [None, None], "agreement": None}
    card = make_card(report)
    check(card)
    assert len(card.data.eval_results) == 1


# Files, and what they keep for themselves


def test_files_beside_the_model(report, recipe, tmp_path):
    folder = tmp_path / report["result"]
    folder.mkdir()
    (tmp_path / "somewhere" / "model" / "README.md").write_text(BASE_CARD)
    card = write_card(report, folder)
    assert set(files_of(folder)) == {"README.md", "recipe.yaml", "report.json"}
    for content in files_of(folder).values():
        assert str(tmp_path).encode() not in content
    data = metadata_load(card)
    assert (data["license"], data["language"]) == ("apache-2.0", "en")
    assert data["base_model"] == "google-bert/bert-base-uncased"
    assert "# small-bert: fine-tuned" in card.read_text()
    again = Recipe.from_yaml(folder / "recipe.yaml", model=recipe.model, dataset=recipe.data.dataset)
    assert again == recipe
    stored = json.loads((folder / "report.json").read_text())
    assert stored["steps"] == report["steps"]
    # Of what is stored, the same card can be made.
    base = read_base(recipe.model)
    assert str(make_card(stored, base=base)) == card.read_text()


def test_a_card_that_was_written_on_stays(report, tmp_path, caplog):
    folder = tmp_path / report["result"]
    folder.mkdir()
    first = write_card(report, folder)
    assert write_card(report, folder) == first
    edited = first.read_text() + "\nIts license is mine.\n"
    first.write_text(edited)
    report["split"] = "other"
    for _ in range(2):
        second = write_card(report, folder)
        assert second.name == "README.new.md"
        assert "`other`" in second.read_text()
        assert first.read_text() == edited
    assert "was changed by somebody, so it stays" in caplog.text
    first.unlink()
    assert write_card(report, folder) == first


def test_training_is_spoken_of_where_there_was_some(report):
    trained = [step["name"] for step in report["steps"] if step["step"] in ("finetune", "distil", "recover")]
    assert trained
    assert "Trained on" in str(make_card(report))
    for step in report["steps"]:
        step["step"] = "student" if step["name"] in trained else step["step"]
    assert "Trained on" not in str(make_card(report))


def test_a_base_without_a_license(report):
    card = make_card(report)
    assert "license" not in card.data.to_dict()
    assert "Not known here: no card of model could be read" in card.text


def test_a_license_with_a_name_of_its_own(report, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: ours\nlicense_link: https://a.b\n---\n")
    card = make_card(report, base=read_base(str(tmp_path)))
    check(card)
    assert "ours (https://a.b)" in card.text


# Runs of one step


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"), model=MODEL)


def job(inputs, name):
    return {
        "model": str(inputs / "model"),
        "dataset": str(inputs / "data"),
        "max_length": 16,
        "use_cpu": True,
        "output_dir": str(inputs / name),
    }


RUNS = {
    "prune": lambda inputs, out: prune_classifier(PruneJob(**job(inputs, out)), hc.StructuredPruningConfig()),
    "sparsify": lambda inputs, out: prune_classifier(
        SparsifyJob(**job(inputs, out)), hc.UnstructuredPruningConfig(score="wanda")
    ),
    "quantize": lambda inputs, out: quantize_classifier(
        QuantizeJob(**job(inputs, out)), {"int8": hc.Int8DynamicConfig(smooth=0.5)}
    ),
    "distill": lambda inputs, out: distill(tiny_job(inputs), tiny_arguments(inputs / out)),
}
EXPECTED = {
    "prune": ("finetune", "structured-pruning", {"ZipLM", "SPDY", "Retraining-free"}),
    "sparsify": ("finetune", "unstructured-pruning", {"A Simple and Effective Pruning"}),
    "quantize": ("quantized", "int8", {"Integer-Arithmetic", "SmoothQuant"}),
    "distill": ("finetune", "knowledge-distillation", {"Distilling the Knowledge", "DistilBERT"}),
}


@pytest.mark.parametrize("name", RUNS)
def test_runs_of_one_step(inputs, name):
    report = RUNS[name](inputs, name)
    made = report["models"][1]
    folder = inputs / name / made["name"]
    base = Base("bert", "org/bert", "mit")
    card = ModelCard.load(write_card(report, folder, base=base))
    check(card, inputs)
    relation, tag, cited = EXPECTED[name]
    assert card.data.base_model_relation == relation
    assert tag in card.data.tags
    references = card.text.split("## References")[1]
    assert all(title in references for title in cited)
    assert references.count("- ") == len(cited) + 1  # the intervals
    assert card.data.eval_results[0].metric_value == made["quality"]["compressed"]
    assert sections(card) == SECTIONS
    # The code of the card loads the model.
    code = re.search(r"```python\n(.+?)```", card.text, re.DOTALL)[1]
    assert ("import hf_compress" in code) == made["needs_hf_compress"]
    found = {}
    exec(code.replace(PLACEHOLDER, str(folder)), found)
    expected = AutoModelForSequenceClassification.from_pretrained(folder)
    batch = tiny_tokenizer()("a good film", return_tensors="pt")
    with torch.inference_mode():
        assert torch.equal(found["model"](**batch).logits, expected(**batch).logits)
    assert found["run"]("a good film")[0]["label"] in ("good", "bad")


SECTIONS = ["How to load it", "What was measured", "Intended use", "Limits", "License", "Recipe", "References"]
