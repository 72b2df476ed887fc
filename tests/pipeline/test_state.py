"""What counts as the same run: the contents of model and data, and nothing that the run itself writes."""

import pytest
from datasets import Dataset, DatasetDict

from hf_compress.jobs.task_data import read_task
from hf_compress.pipeline.compress import compress
from hf_compress.recipe.steps import DataConfig, VocabularyStep
from tests.tiny_job import save_tiny_bert, tiny_texts
from tests.tiny_recipe import tiny_recipe


def splits(n_test: int = 12, flip: bool = False) -> DatasetDict:
    test = [{"text": row["text"], "label": row["label"] ^ flip} for row in tiny_texts(n_test, seed=1)]
    return DatasetDict(train=Dataset.from_list(tiny_texts(24)), validation=Dataset.from_list(test))


def recipe_on(tmp_path, dataset: str):
    save_tiny_bert(tmp_path / "model")
    return tiny_recipe(tmp_path, DataConfig(dataset, max_length=12), [VocabularyStep(max_size=36)])


def time_of(output):
    return (output / "01-vocabulary" / "model.safetensors").stat().st_mtime_ns


def test_rows_in_memory_are_known_by_what_they_hold(tmp_path):
    recipe, output = recipe_on(tmp_path, "mine"), tmp_path / "out"
    first = compress(recipe, output, splits=splits())
    made = time_of(output)
    assert compress(recipe, output, splits=splits()) == first
    assert time_of(output) == made
    second = compress(recipe, output, splits=splits(16, flip=True))
    assert time_of(output) != made
    assert [step["quality"]["n_examples"] for step in second["steps"]] == [16, 16]
    accuracies = [report["steps"][0]["quality"]["compressed"] for report in (first, second)]
    assert accuracies[1] == pytest.approx(
        compress(recipe, tmp_path / "b", splits=splits(16, flip=True))["steps"][0]["quality"]["compressed"]
    )
    assert read_task(recipe.data, 0, splits()).digest == read_task(recipe.data, 0, splits()).digest


def test_what_a_run_writes_is_not_its_input(tmp_path):
    splits().save_to_disk(tmp_path / "rows")
    recipe, output = recipe_on(tmp_path, str(tmp_path / "rows")), tmp_path / "model" / "small"
    compress(recipe, output)
    made = time_of(output)
    assert list((tmp_path / "rows").rglob("cache-*"))
    compress(recipe, output)
    assert time_of(output) == made
