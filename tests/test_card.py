"""Model cards: metadata that the Hub takes, figures of the run and nothing else, and code that loads the model."""

import json
import re

import pytest
import torch
from huggingface_hub import ModelCard, constants, metadata_load
from huggingface_hub.utils import close_session
from transformers import AutoModelForSequenceClassification

import hf_compress as hc
from hf_compress import card_methods
from hf_compress.card import make_card, write_card
from hf_compress.card_base import Base, hub_name, is_local, read_base, shown_name, without_paths
from hf_compress.card_methods import references_of, tags_of
from hf_compress.card_page import PLACEHOLDER, TASKS
from hf_compress.distill_run import distill
from hf_compress.distillation.arguments import Divergence, TermKind
from hf_compress.format_options import FORMATS
from hf_compress.job import PruneJob, QuantizeJob, SparsifyJob
from hf_compress.modeling.tasks import _CLASS_NAMES
from hf_compress.prune_run import prune_classifier
from hf_compress.pruning.config import Score
from hf_compress.pruning.unstructured_config import WeightScore
from hf_compress.quantize_run import quantize_classifier
from hf_compress.recipe import Recipe
from hf_compress.recipe_steps import PushStep
from tests.distillation.tiny import make_trainer
from tests.hub_server import Blob, Hub, Repository, metadata_errors
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
    assert "model: model\n" in yaml
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
    assert card.data.base_model_relation is None
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


def test_a_base_without_a_license(report, tmp_path):
    card = make_card(report)
    assert "license" not in card.data.to_dict()
    assert "Not known here: no card of model was found" in card.text


@pytest.mark.parametrize(
    "content", ["---\nlicense: [mit", "no metadata", "---\nlicense: 3\nlanguage: [en, de]\n---\n"]
)
def test_cards_that_say_nothing(tmp_path, content):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "README.md").write_text(content)
    assert read_base(str(tmp_path / "bert")) == Base("bert")


def test_a_license_with_a_name_of_its_own(report, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: ours\nlicense_link: https://a.b\n---\n")
    card = make_card(report, base=read_base(str(tmp_path)))
    check(card)
    assert "ours (https://a.b)" in card.text


def test_a_card_on_the_hub(report, tmp_path, monkeypatch):
    with Hub().running() as hub:
        hub.repositories |= {"org/bert": Repository(), "org/bare": Repository()}
        hub.repositories["org/bert"].commit("main", {"README.md": Blob(BASE_CARD.encode(), False)}, "A card")
        for name, value in (
            ("ENDPOINT", hub.endpoint),
            ("HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"),
            ("HF_HUB_OFFLINE", False),
            ("HF_HUB_CACHE", str(tmp_path / "cache")),
        ):
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hub.endpoint)
        close_session()
        assert read_base("org/bert") == Base("org/bert", "org/bert", "apache-2.0", language="en")
        assert read_base("org/bare") == Base("org/bare", "org/bare")
        assert read_base("org/missing") == Base("org/missing", "org/missing")
    # The copy on this machine is enough afterwards.
    assert read_base("org/bert").license == "apache-2.0"
    assert read_base("org/bare").license is None
    close_session()


@pytest.mark.parametrize(
    ("name", "shown", "on_hub"),
    [
        ("org/bert", "org/bert", True),
        ("bert", "bert", True),
        ("/a/b/bert", "bert", False),
        ("./bert", "bert", False),
        ("../x/bert/", "bert", False),
        ("~/bert", "bert", False),
        ("data/train.csv", "train.csv", False),
        (r"C:\models\bert", "bert", False),
    ],
)
def test_names_and_paths(name, shown, on_hub):
    assert (shown_name(name), is_local(name)) == (shown, not on_hub)
    assert hub_name(name) == (name if on_hub else None)


def test_what_is_no_name():
    assert hub_name("BBC News") is None
    assert not is_local("BBC News")


def test_paths_are_taken_out_and_nothing_else(tmp_path):
    value = {
        "a": [str(tmp_path / "x" / "y"), "org/bert", "a/b of texts", "https://a.b/c", 1, None],
        "b": {"c": "text"},
    }
    assert without_paths(value) == value | {"a": ["y", *value["a"][1:]]}
    assert without_paths(without_paths(value)) == without_paths(value)


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
def test_runs_of_one_step(inputs, name, monkeypatch):
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


# A trainer


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
        trainer = make_trainer("single-label", tmp_path / "out", hub_model_id="me/student")
        trainer.train()
        trainer.push_to_hub()
        arrived = hub.repositories["me/student"].files("main")
        assert arrived["README.md"].content == (tmp_path / "out" / "README.md").read_bytes()
        card = ModelCard(arrived["README.md"].content.decode())
        assert sections(card) == SECTIONS
        check(card, tmp_path)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)
    close_session()


# What is cited


def cited(step, settings):
    return {reference.text for reference in references_of(step, settings)}


PRUNED = {"units": ["heads", "neurons"], "scope": "global", "search": "dynamic", "uniform": False, "repair": "none"}


@pytest.mark.parametrize("kind", TermKind.__args__)
def test_every_term_is_cited(kind):
    with_term = cited("distil", {"alpha": 0.9, "terms": [{"kind": kind}]})
    assert len(with_term) == 2
    assert with_term - cited("distil", {"alpha": 0.9})
    assert cited("distil", {"alpha": 0.0, "stages": [{"terms": [{"kind": kind}]}]}) == with_term - cited(
        "distil", {"alpha": 0.9}
    )


@pytest.mark.parametrize("divergence", Divergence.__args__)
def test_every_divergence_is_cited(divergence):
    assert len(cited("distil", {"alpha": 0.5, "divergence": divergence})) == (divergence != "cosine")
    assert not cited("distil", {"alpha": 0.0, "divergence": divergence})


@pytest.mark.parametrize("score", Score.__args__)
def test_every_score_of_units_is_cited(score):
    ranked = PRUNED | {"search": "ranking", "score": score}
    assert len(cited("prune", ranked)) == (score != "random")
    assert len(cited("prune", PRUNED | {"score": score})) == 1 + (score != "random")
    assert not cited("prune", ranked | {"units": ["layers"]})
    assert len(cited("prune", ranked | {"units": ["layers"], "repair": "bias"})) == 1


@pytest.mark.parametrize("score", WeightScore.__args__)
def test_every_score_of_weights_is_cited(score):
    assert len(cited("sparsify", {"score": score, "allocation": "uniform"})) == (score != "random")
    assert len(cited("sparsify", {"score": score, "allocation": "owl"})) == 1 + (score != "random")


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_cited(name):
    assert bool(cited("quantize", {"format": name})) == (name not in ("bf16", "fp16"))
    assert tags_of("quantize", {"format": name}) == ("quantization", name)


def test_nothing_is_cited_that_was_not_used():
    assert not cited("finetune", {})
    assert not cited("student", {"init": "random"})
    several = {"alpha": 0.9, "n_teachers": 2, "teacher_mixture": "confidence"}
    assert len(cited("distil", several)) == 2


def test_references_are_whole():
    texts = [one.text for one in vars(card_methods).values() if isinstance(one, card_methods.Reference)]
    assert texts
    for text in texts:
        assert re.fullmatch(r"[^*]+\. \*[^*]+\* \((19|20)\d\d\).*", text), text


def test_every_task_has_words():
    assert set(TASKS) == set(_CLASS_NAMES)
