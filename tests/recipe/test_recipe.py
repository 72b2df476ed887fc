"""Recipes ask for the same after a round trip through YAML, and ready ones come back to the letter."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from hf_compress.distillation.arguments import StageConfig, TermConfig
from hf_compress.recipe.fields import build
from hf_compress.recipe.format_options import FORMATS
from hf_compress.recipe.recipe import Recipe
from hf_compress.recipe.steps import (
    STEPS,
    DataConfig,
    DistilStep,
    EvaluateStep,
    FinetuneStep,
    MeasureConfig,
    PruneStep,
    PushStep,
    QuantizeStep,
    RecoverStep,
    SparsifyStep,
    StudentStep,
    VocabularyStep,
)
from hf_compress.recipe.yaml_text import as_written, plain, read_yaml, write_yaml

FILES = sorted((Path(__file__).parent.parent.parent / "scripts" / "recipes").glob("*.yaml"))
HEAD = "model: m\ndata:\n  dataset: d\n"
ANY = {"model": "m", "dataset": "d"}
# One of each kind, with every kind of setting.
ALL_STEPS = [
    FinetuneStep(num_train_epochs=2, arguments={"lr_scheduler_type": "cosine", "max_grad_norm": 0.5}),
    EvaluateStep(max_mb=100),
    StudentStep(layers=(1, 3), num_heads=2),
    DistilStep(
        learning_rate=1e-5,
        dropout=None,
        stages=[StageConfig(epochs=1, alpha=0, terms=[TermConfig("pkd", layers=[(1, 2), (2, 4)])]), StageConfig()],
    ),
    VocabularyStep(max_size=8000, keep=("yes", "1e-4", "[MASK]", "2:4", "null", "")),
    PruneStep(units=["neurons"], use_labels=True),
    RecoverStep(terms=[], augment_copies=2),
    SparsifyStep(pattern="4x1", allocation={".*layer.0": 0.3}, seed=3),
    RecoverStep(terms=[TermConfig("relations", num_relation_heads=4), TermConfig("embedding", weight=0.5)]),
    QuantizeStep("fixed-point", {"bits": 4, "granularity": "group", "exclude": [".*query"]}, max_drop=0.01),
    EvaluateStep(min_retention=0.98),
    PushStep("me/my-model", private=True),
]
EVERYTHING = Recipe(
    "some/model",
    DataConfig("d", dataset_name="sst2", text_columns=["a", "b"], train_rows=10),
    ALL_STEPS,
    seed=7,
    measure=MeasureConfig(batch_sizes=[1, 4]),
)


def read_steps(*lines: str) -> Recipe:
    """A recipe whose steps begin in line 5."""
    return Recipe.from_yaml(HEAD + "steps:\n" + "\n".join(lines))


def without_comments(file: Path) -> str:
    return "".join(line for line in file.read_text().splitlines(keepends=True) if not line.startswith("#"))


def test_there_are_ready_recipes():
    names = ["distil-bert", "fastest-cpu", "prune-distil-int8", "prune-one-shot", "qlora-ready", "smallest"]
    assert [file.stem for file in FILES] == names


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_ready_recipes_come_back(file):
    recipe = Recipe.from_yaml(file, **ANY)
    # HEAD ends with what names the data, and a file may go on with how much of them.
    assert recipe.to_yaml() == HEAD + without_comments(file).removeprefix("data:\n")
    assert file.read_text().startswith("# ")
    assert f"hf-compress run scripts/recipes/{file.name} --model" in file.read_text()
    with pytest.raises(ValueError, match=rf"{file.name} does not say which model: .* --model NAME"):
        Recipe.from_yaml(file)


def test_everything_comes_back():
    stored = json.dumps(EVERYTHING.to_dict())
    for again in (Recipe.from_yaml(EVERYTHING.to_yaml()), Recipe.from_dict(json.loads(stored))):
        assert again == EVERYTHING
        assert again.to_yaml() == EVERYTHING.to_yaml()
        assert [type(step) for step in again.steps] == [type(step) for step in ALL_STEPS]
        # All but the tuples of the others are equal field by field.
        for number in (0, 1, 3, 5, 6, 8, 10, 11):
            assert again.steps[number] == ALL_STEPS[number]
        assert (again.data, again.seed, again.measure) == (EVERYTHING.data, 7, EVERYTHING.measure)
    assert replace(EVERYTHING, seed=8) != EVERYTHING


def test_what_is_as_by_default_is_not_written():
    recipe = Recipe(
        "m", DataConfig("d", max_length=64), [FinetuneStep(learning_rate=1e-4), PruneStep(), RecoverStep()]
    )
    text = HEAD + "steps:\n  - finetune\n  - prune:\n      budget: 0.5\n  - recover\n"
    assert recipe.to_yaml() == text
    same = text.replace("finetune", "finetune:\n      learning_rate: 1e-4").replace("- recover", "- recover:")
    assert Recipe.from_yaml(same) == recipe
    quantized = read_steps("  - quantize:", "      format: int8", "      embeddings: false", "      n_texts: 512")
    assert quantized.to_dict()["steps"] == [{"quantize": {"format": "int8"}}]


@pytest.mark.parametrize("name", STEPS)
def test_every_default_is_of_the_type_that_is_asked_for(name):
    needed = {"student": {"num_layers": 2}, "quantize": {"format": "int8"}, "push": {"repo_id": "a"}}
    step = STEPS[name](**needed.get(name, {}))
    again = build(type(step), as_written(asdict(step), ""), name)
    assert json.dumps(asdict(again)) == json.dumps(asdict(step))


@pytest.mark.parametrize("name", FORMATS)
def test_every_option_of_a_format_comes_back(name):
    options = asdict(FORMATS[name].options())
    assert build(FORMATS[name].options, as_written(options, ""), name).__dict__.keys() == options.keys()
    recipe = Recipe.from_dict(
        {"model": "m", "data": {"dataset": "d"}, "steps": [{"quantize": {"format": name, **options}}]}
    )
    assert recipe == Recipe("m", DataConfig("d"), [QuantizeStep(name)])


def test_numbers_and_texts_are_what_they_look_like():
    finetune, sparsify, vocabulary = read_steps(
        "  - finetune:\n      learning_rate: 1e-4\n      num_train_epochs: 2\n      max_steps: 08\n      dropout:",
        "  - sparsify:\n      pattern: 2:4",
        "  - vocabulary:\n      keep: [no, on, 1_000, 0x10, 1:30, 2024-01-01, ~x, '3', .inf]",
    ).steps
    assert finetune.learning_rate == 0.0001
    assert type(finetune.num_train_epochs) is float
    assert (finetune.max_steps, finetune.dropout, sparsify.pattern) == (8, None, "2:4")
    assert vocabulary.keep == ["no", "on", "1_000", "0x10", "1:30", "2024-01-01", "~x", "3", ".inf"]


def test_texts_are_written_so_that_they_come_back():
    texts = [
        "yes",
        "null",
        "~",
        "",
        "1e-4",
        "-3",
        ".5",
        "2:4",
        "2024-01-01",
        "a: b",
        "# a",
        "*a",
        "&a",
        "!a",
        "a\nb",
        "ä €",
        " ",
    ]
    content = {"list": texts, **{text: text for text in texts}, "numbers": [1, -0.5, 1e-5, 1e30, 3.0, True, None]}
    content["twice"] = [{"a": texts}, {"a": texts}]
    assert plain(read_yaml(write_yaml(content))) == content


def test_what_is_given_beside_the_file():
    text = "data:\n  text_columns: [a]\n  max_length: 32\nsteps:\n  - prune\n"
    given = {"text_columns": "b", "label_column": "c", "seed": 3, "dataset_name": "n", "eval_split": None}
    recipe = Recipe.from_yaml(text, model="m", dataset=Path("some/folder"), **given)
    assert recipe.data == DataConfig("some/folder", "n", ["b"], "c", max_length=32)
    assert (recipe.model, recipe.seed) == ("m", 3)
    assert Recipe.from_yaml(HEAD + "seed: 4\nsteps: [prune]", model=None, dataset="e", seed=0).to_dict()["seed"] == 0
    with pytest.raises(
        ValueError, match=r"does not say which dataset: .*`dataset: NAME` below `data:`.*--dataset NAME"
    ):
        Recipe.from_yaml(text, model="m")
    with pytest.raises(TypeError, match=r"no 'text_colums': did you mean text_columns"):
        Recipe.from_yaml(text, **ANY, text_colums="a")
    with pytest.raises(ValueError, match=r"given as max_length: max_length of data is 'x': give a whole number"):
        Recipe.from_yaml(text, **ANY, max_length="x")
