"""The metric modules equal the libraries that define them, and load without a network."""

import os
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats
from seqeval.metrics import f1_score as seqeval_f1
from sklearn import metrics as sk

from hf_compress.evaluation.metrics import HIGHER_IS_BETTER, load_metric, metric_path
from hf_compress.evaluation.squad import exact_match, normalize_answer, token_f1

rng = np.random.default_rng(0)
LABELS, PREDICTED = rng.integers(3, size=(2, 60))
BINARY, PREDICTED_BINARY = rng.integers(2, size=(2, 60))
VALUES = rng.normal(size=60)
PREDICTED_VALUES = VALUES + rng.normal(size=60)
TAGS = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-ORG"], ["B-LOC", "I-LOC", "I-LOC"]]
PREDICTED_TAGS = [["B-PER", "I-PER", "O", "O"], ["B-PER", "B-ORG"], ["B-LOC", "I-LOC", "O"]]


@pytest.mark.parametrize(
    ("name", "references", "predictions", "options", "expected"),
    [
        ("accuracy", LABELS, PREDICTED, {}, {"accuracy": sk.accuracy_score(LABELS, PREDICTED)}),
        ("accuracy", LABELS, PREDICTED, {"normalize": False}, {"accuracy": float((LABELS == PREDICTED).sum())}),
        ("f1", BINARY, PREDICTED_BINARY, {}, {"f1": sk.f1_score(BINARY, PREDICTED_BINARY)}),
        ("f1", LABELS, PREDICTED, {"average": "macro"}, {"f1": sk.f1_score(LABELS, PREDICTED, average="macro")}),
        (
            "matthews_correlation",
            LABELS,
            PREDICTED,
            {},
            {"matthews_correlation": sk.matthews_corrcoef(LABELS, PREDICTED)},
        ),
        (
            "pearsonr",
            VALUES,
            PREDICTED_VALUES,
            {"return_pvalue": True},
            dict(zip(("pearsonr", "p-value"), stats.pearsonr(VALUES, PREDICTED_VALUES), strict=True)),
        ),
        (
            "spearmanr",
            VALUES,
            PREDICTED_VALUES,
            {"return_pvalue": True},
            dict(zip(("spearmanr", "spearmanr_pvalue"), stats.spearmanr(VALUES, PREDICTED_VALUES), strict=True)),
        ),
    ],
)
def test_modules_equal_their_library(name, references, predictions, options, expected):
    result = load_metric(name).compute(references=references, predictions=predictions, **options)
    assert result == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", ["accuracy", "f1", "matthews_correlation"])
def test_multilabel_configurations(name):
    import evaluate

    references, predictions = rng.integers(2, size=(2, 20, 3))
    metric = evaluate.load(str(metric_path(name)), "multilabel", keep_in_memory=True)
    options = {} if name == "accuracy" else {"average": "macro"}
    expected = {
        "accuracy": sk.accuracy_score(references, predictions),
        "f1": sk.f1_score(references, predictions, average="macro"),
        "matthews_correlation": np.mean(
            [sk.matthews_corrcoef(r, p) for r, p in zip(references.T, predictions.T, strict=True)]
        ),
    }[name]
    result = metric.compute(references=references.tolist(), predictions=predictions.tolist(), **options)
    assert result[name] == pytest.approx(expected)


def test_seqeval_by_hand():
    result = load_metric("seqeval").compute(references=TAGS, predictions=PREDICTED_TAGS)
    # Of 4 true entities 2 are found exactly (PER, ORG), among 4 predicted.
    assert (result["overall_precision"], result["overall_recall"], result["overall_f1"]) == (0.5, 0.5, 0.5)
    assert result["overall_f1"] == pytest.approx(seqeval_f1(TAGS, PREDICTED_TAGS))
    assert result["overall_accuracy"] == pytest.approx(6 / 9)
    assert result["LOC"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "number": 2}
    strict = load_metric("seqeval").compute(references=TAGS, predictions=PREDICTED_TAGS, mode="strict", scheme="IOB2")
    assert strict["PER"] == {"precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3), "number": 1}
    with pytest.raises(ValueError, match="IOB2"):
        load_metric("seqeval").compute(references=TAGS, predictions=PREDICTED_TAGS, mode="strict", scheme="IOB9")


@pytest.mark.parametrize(
    ("text", "normalized"),
    [("The  Cat's\tHat!", "cats hat"), ("An apple a day", "apple day"), ("anathema", "anathema"), ("U.S.A.", "usa")],
)
def test_squad_normalisation_by_hand(text, normalized):
    assert normalize_answer(text) == normalized


def test_squad_by_hand():
    assert exact_match("the Eiffel Tower.", ["Eiffel tower", "tower"]) == 1
    # 2 words in common of 3 predicted and 2 expected: precision 2/3, recall 1.
    assert token_f1("old Eiffel Tower", ["Louvre", "the Eiffel Tower"]) == pytest.approx(0.8)
    assert token_f1("cat cat", ["cat dog"]) == pytest.approx(0.5)
    references = [
        {"id": "1", "answers": {"text": ["Eiffel tower"], "answer_start": [0]}},
        {"id": "2", "answers": {"text": ["Louvre", "the Eiffel Tower"], "answer_start": [0, 9]}},
    ]
    predictions = [{"id": "2", "prediction_text": "old Eiffel Tower"}, {"id": "1", "prediction_text": "Eiffel Tower"}]
    result = load_metric("squad").compute(references=references, predictions=predictions)
    assert result == pytest.approx({"exact_match": 50.0, "f1": 90.0})


def test_perplexity_of_likelihoods_equals_that_of_logits():
    logits = rng.normal(size=(3, 5, 7))
    labels = rng.integers(7, size=(3, 5))
    labels[0, 3:] = -100
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = -np.take_along_axis(log_probabilities, np.maximum(labels, 0)[..., None], -1)[..., 0] * (labels != -100)
    sums, counts = nll.sum(1), (labels != -100).sum(1)
    metric = load_metric("perplexity")
    expected = np.exp(sums.sum() / 13)
    assert metric.compute(predictions=sums, references=counts)["perplexity"] == pytest.approx(expected)
    result = metric.compute(predictions=logits.tolist(), references=labels.tolist())
    assert result["perplexity"] == pytest.approx(expected)


def test_uniform_predictions_have_the_perplexity_of_the_vocabulary():
    result = load_metric("perplexity").compute(predictions=[[[0.0] * 11] * 2], references=[[3, 4]])
    assert result["perplexity"] == pytest.approx(11)


@pytest.mark.filterwarnings("ignore:Retention of")
def test_retention_module_divides_the_metrics():
    result = load_metric("retention").compute(
        references=BINARY, predictions=PREDICTED_BINARY, teacher_predictions=BINARY, metric="f1", n_bootstrap=50
    )
    assert result["retention"] == pytest.approx(sk.f1_score(BINARY, PREDICTED_BINARY))
    assert result["agreement"] == pytest.approx(np.mean(BINARY == PREDICTED_BINARY))
    tags = {"references": TAGS, "predictions": TAGS, "teacher_predictions": PREDICTED_TAGS}
    assert load_metric("retention").compute(**tags, metric="seqeval", n_bootstrap=50)["retention"] == 2.0
    sums = {"references": [4, 4], "predictions": [4.0, 4.0], "teacher_predictions": [2.0, 2.0]}
    result = load_metric("retention").compute(**sums, metric="perplexity", n_bootstrap=50)
    assert result["retention"] == pytest.approx(np.exp(0.5) / np.exp(1))


def test_every_shipped_metric_says_its_direction_and_describes_itself():
    assert {path.parent.name for path in metric_path("f1").parent.glob("*/[!_]*.py")} == set(HIGHER_IS_BETTER)
    for name, higher_is_better in HIGHER_IS_BETTER.items():
        metric = load_metric(name)
        assert metric.inputs_description.strip()
        assert ("lower is better" if not higher_is_better else "higher is better") in metric.description


def test_modules_load_offline_in_two_processes_at_once(tmp_path):
    code = (
        "import sys, evaluate\n"
        "for path in sys.argv[1:]:\n"
        "    metric = evaluate.load(path)\n"
        "assert metric.compute(predictions=[1.0, 2.0, 4.0], references=[1.0, 2.0, 3.0])['spearmanr'] > 0.99\n"
    )
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    every_name = sorted(HIGHER_IS_BETTER, key="spearmanr".__eq__)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, *(str(metric_path(name)) for name in names)],
            env={**os.environ, **offline},
            stderr=subprocess.PIPE,
            text=True,
        )
        for names in (every_name, ["accuracy", "spearmanr"])
    ]
    for process in processes:
        errors = process.communicate(timeout=120)[1]
        assert process.returncode == 0, errors


def test_unknown_name_without_network_lists_what_ships(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="cannot be reached.*accuracy.*squad"):
        load_metric("no_such_metric")


def test_names_that_do_not_ship_come_from_the_hub_where_it_answers(monkeypatch):
    import evaluate

    from hf_compress.evaluation import metrics

    monkeypatch.setattr(metrics, "_hub_answers", lambda timeout: True)
    monkeypatch.setattr(evaluate, "load", lambda name, **options: ("loaded", name, options))
    assert load_metric("bleu") == ("loaded", "bleu", {})
    assert load_metric("accuracy")[1] == str(metric_path("accuracy"))


def test_a_silent_hub_costs_no_more_than_the_timeout(monkeypatch):
    import threading
    import urllib.request

    from huggingface_hub import constants

    from hf_compress.evaluation import metrics

    forever = threading.Event()

    def never_answer(*args, **kwargs):
        forever.wait()
        raise OSError

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(urllib.request, "urlopen", never_answer)
    assert not metrics._hub_answers(timeout=0.05)
    forever.set()


def test_metric_path_names_the_shipped():
    with pytest.raises(ValueError, match="seqeval"):
        metric_path("bleu")
