"""What counts as the same run: the contents of model and data, and nothing that the run itself writes."""

from dataclasses import replace

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
    with pytest.raises(ValueError, match="nothing could be kept .the files of the model or the rows of the data"):
        compress(recipe, output, splits=splits(16, flip=True))
    assert time_of(output) == made
    second = compress(recipe, output, splits=splits(16, flip=True), overwrite=True)
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


def test_downloads_and_notes_are_no_inputs_and_weights_are(tmp_path):
    splits().save_to_disk(tmp_path / "rows")
    recipe, output = recipe_on(tmp_path, str(tmp_path / "rows")), tmp_path / "out"
    compress(recipe, output)
    made = time_of(output)
    (tmp_path / "model" / ".cache").mkdir()
    (tmp_path / "model" / ".cache" / "downloaded").write_text("now")
    (tmp_path / "model" / "README.md").write_text("A model.")
    (tmp_path / "model" / "train.log").write_text("A line.")
    (tmp_path / "model" / "another-run").mkdir()
    (tmp_path / "model" / "another-run" / "model.safetensors").write_text("of it")
    # What `map` leaves when it is killed.
    (tmp_path / "rows" / "train" / "tmp1q04exf3").write_text("rows")
    compress(recipe, output)
    assert time_of(output) == made
    save_tiny_bert(tmp_path / "model", layers=2)
    with pytest.raises(ValueError, match="the files of the model or the rows of the data are others"):
        compress(recipe, output)
    assert time_of(output) == made
    compress(recipe, output, overwrite=True)
    assert time_of(output) != made


def test_another_version_keeps_what_is_done(tmp_path, monkeypatch, caplog):
    recipe, output = recipe_on(tmp_path, "mine"), tmp_path / "out"
    compress(recipe, output, splits=splits())
    made = time_of(output)
    monkeypatch.setattr("hf_compress.__version__", "9.9")
    compress(recipe, output, splits=splits())
    assert time_of(output) == made
    assert "and this is 9.9: what is done stays as it is" in caplog.text


def test_a_run_of_another_seed_is_not_deleted_unasked(tmp_path):
    recipe, output = recipe_on(tmp_path, "mine"), tmp_path / "out"
    compress(recipe, output, splits=splits())
    made = time_of(output)
    with pytest.raises(ValueError, match=r"nothing could be kept \(seed was 0 and is 1\): give another folder"):
        compress(replace(recipe, seed=1), output, splits=splits())
    assert time_of(output) == made
    compress(replace(recipe, seed=1), output, splits=splits(), overwrite=True)
    assert time_of(output) != made


def test_a_link_to_an_earlier_result_is_no_result(tmp_path):
    recipe, output = recipe_on(tmp_path, "mine"), tmp_path / "out"
    compress(recipe, output, splits=splits())
    (output / "01-vocabulary").rename(tmp_path / "elsewhere")
    (output / "01-vocabulary").symlink_to(tmp_path / "elsewhere")
    changed = replace(recipe, steps=[VocabularyStep(max_size=35)])
    report = compress(changed, output, splits=splits())
    assert not (output / "01-vocabulary").is_symlink()
    assert report["steps"][-1]["details"]["tokens"]["after"] == 35
    assert (tmp_path / "elsewhere" / "model.safetensors").exists()
