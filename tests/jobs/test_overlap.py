"""Rows that are measured on and learned from are counted, said where they are many, and named in every report."""

import logging

import pytest
from datasets import Dataset, DatasetDict

from hf_compress.hub.card_words import run_conditions
from hf_compress.jobs.distill import distill
from hf_compress.jobs.overlap import rows_in_both, warn_of_rows_in_both
from hf_compress.pipeline.compress import compress
from hf_compress.recipe.recipe import Recipe
from hf_compress.recipe.steps import DataConfig, PruneStep
from hf_compress.report.run_page import conditions
from hf_compress.report.tradeoff import models_of
from tests.run_reports import example_report
from tests.tiny_job import save_tiny_bert, tiny_arguments, tiny_job, tiny_texts
from tests.tiny_recipe import FAST

TRAIN = {"first": ["One  thing", "two", "three", "three"], "second": ["a", "B", "c", "c"]}


@pytest.mark.parametrize(
    ("test", "expected"),
    [
        ({"first": ["one thing", "four"], "second": ["A", "d"]}, 1),
        ({"first": ["two"], "second": ["c"]}, 0),
        ({"first": ["three", "Three", "thre e"], "second": ["c", "c", "c"]}, 2),
    ],
    ids=["case and blanks", "another pair", "each row of test"],
)
def test_pairs_are_compared_as_wholes(test, expected):
    assert rows_in_both(Dataset.from_dict(TRAIN), Dataset.from_dict(test), ["first", "second"]) == expected


def test_sentences_are_compared_by_their_words():
    train = Dataset.from_dict({"words": [["New", "York"], ["Paris"]]})
    test = Dataset.from_dict({"words": [["new", "york"], ["NewYork"], ["Rome"]]})
    assert rows_in_both(train, test, ["words"]) == 1


@pytest.mark.parametrize(("n_shared", "warns"), [(0, False), (1, False), (2, True)])
def test_more_than_one_in_a_hundred_is_a_warning(n_shared, warns, caplog):
    test = Dataset.from_dict({"text": [str(i) for i in range(100)]})
    train = Dataset.from_dict({"text": ["other", *(str(i) for i in range(n_shared))]})
    with caplog.at_level(logging.WARNING, logger="hf_compress"):
        assert warn_of_rows_in_both(train, test, ["text"]) == n_shared
    assert ("2 of the 100 rows" in caplog.text) == warns


def test_page_and_card_name_them():
    report = example_report()
    for shared, words in ((0, "872 rows of"), (11, "872 rows (11 of them also in train) of")):
        report["rows_in_both"] = shared
        assert words in conditions(report)
        assert words in run_conditions(report, models_of(report))


@pytest.fixture
def splits():
    train, test = tiny_texts(24, seed=1), tiny_texts(14, seed=2)
    return DatasetDict(train=Dataset.from_list(train), test=Dataset.from_list([*test, *train[:2]]))


def test_a_distillation_counts_them(tmp_path, splits, caplog):
    save_tiny_bert(tmp_path / "model")
    with caplog.at_level(logging.WARNING, logger="hf_compress"):
        report = distill(tiny_job(tmp_path), tiny_arguments(tmp_path / "run", max_steps=1), splits)
    assert report["rows_in_both"] == 2
    assert "2 of the 16 rows" in caplog.text
    assert "16 rows (2 of them also in train)" in (tmp_path / "run" / "student" / "README.md").read_text()


def test_a_recipe_counts_them_and_warns_before_it_begins(tmp_path, splits, caplog):
    save_tiny_bert(tmp_path / "model")
    data = DataConfig("tiny", max_length=12)
    recipe = Recipe(str(tmp_path / "model"), data, [PruneStep(budget=0.5, n_texts=8, multiple_of=4)], measure=FAST)
    with caplog.at_level(logging.WARNING, logger="hf_compress"):
        report = compress(recipe, tmp_path / "run", splits=splits)
    assert report["rows_in_both"] == 2
    assert caplog.text.count("2 of the 16 rows") == 1
    assert "(2 of them also in train)" in (tmp_path / "run" / "report.md").read_text()
