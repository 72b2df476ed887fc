"""Metrics as functions of counts equal their library on every resample; the bootstrap is the plain loop's."""

import numpy as np
import pytest
from scipy import stats
from seqeval.metrics import f1_score as seqeval_f1
from sklearn import metrics as sk

from hf_compress.evaluation.bootstrap import percentile_interval, resample_counts, retention_ratio
from hf_compress.evaluation.metrics import load_metric
from hf_compress.evaluation.scores import SCORES, paired_bootstrap, score_of, score_rows

N = 40
rng = np.random.default_rng(1)
LABELS, CLASSES_A, CLASSES_B = rng.integers(4, size=(3, N))
CLASSES_A[:20] = LABELS[:20]
BINARY, BINARY_A, BINARY_B = rng.integers(2, size=(3, N))
INDICATORS, INDICATORS_A, INDICATORS_B = rng.integers(2, size=(3, N, 3))
VALUES = rng.normal(size=N) + 100
VALUES_A, VALUES_B = VALUES + rng.normal(size=(2, N))
TIED, TIED_A, TIED_B = (np.round(x) for x in (VALUES, VALUES_A, VALUES_B))
NAMES = np.array(["O", "B-PER", "I-PER", "B-LOC"], dtype=object)
TAGS, TAGS_A, TAGS_B = ([list(NAMES[row]) for row in rng.integers(4, size=(N, 5))] for _ in range(3))
TOKENS, NLL_A, NLL_B = rng.integers(1, 9, size=N), *rng.uniform(1, 9, size=(2, N))

MULTI = {"zero_division": 0}
CASES = {
    "accuracy": (sk.accuracy_score, LABELS, CLASSES_A, CLASSES_B),
    "accuracy-multilabel": (sk.accuracy_score, INDICATORS, INDICATORS_A, INDICATORS_B),
    "f1": (sk.f1_score, BINARY, BINARY_A, BINARY_B),
    "f1_macro": (lambda r, p: sk.f1_score(r, p, average="macro"), LABELS, CLASSES_A, CLASSES_B),
    "f1_micro": (lambda r, p: sk.f1_score(r, p, average="micro"), LABELS, CLASSES_A, CLASSES_B),
    "f1_weighted": (lambda r, p: sk.f1_score(r, p, average="weighted"), LABELS, CLASSES_A, CLASSES_B),
    "f1_macro-multilabel": (
        lambda r, p: sk.f1_score(r, p, average="macro", **MULTI),
        INDICATORS,
        INDICATORS_A,
        INDICATORS_B,
    ),
    "f1_micro-multilabel": (lambda r, p: sk.f1_score(r, p, average="micro"), INDICATORS, INDICATORS_A, INDICATORS_B),
    "matthews_correlation": (sk.matthews_corrcoef, LABELS, CLASSES_A, CLASSES_B),
    "matthews_correlation-binary": (sk.matthews_corrcoef, BINARY, BINARY_A, BINARY_B),
    "pearsonr": (lambda r, p: stats.pearsonr(r, p).statistic, VALUES, VALUES_A, VALUES_B),
    "spearmanr": (lambda r, p: stats.spearmanr(r, p).statistic, VALUES, VALUES_A, VALUES_B),
    "spearmanr-tied": (lambda r, p: stats.spearmanr(r, p).statistic, TIED, TIED_A, TIED_B),
    "seqeval": (seqeval_f1, TAGS, TAGS_A, TAGS_B),
    "perplexity": (lambda r, p: np.exp(p.sum() / r.sum()), TOKENS, NLL_A, NLL_B),
}


@pytest.mark.parametrize("case", CASES)
def test_every_resample_equals_the_librarys_value(case):
    function, *columns = CASES[case]
    fast = paired_bootstrap(case.split("-")[0], *columns, n_bootstrap=40, seed=3)
    slow = paired_bootstrap(function, *columns, n_bootstrap=40, seed=3)
    np.testing.assert_allclose(fast, slow, atol=1e-9)


def test_vectorised_bootstrap_equals_a_loop_over_the_seeds_indices():
    fast, _ = paired_bootstrap("accuracy", LABELS, CLASSES_A, CLASSES_B, n_bootstrap=30, seed=5)
    drawn = np.random.default_rng(5).integers(N, size=(30, N))
    np.testing.assert_allclose(fast, [np.mean(LABELS[rows] == CLASSES_A[rows]) for rows in drawn])


def test_resamples_do_not_depend_on_how_they_are_chunked(monkeypatch):
    from hf_compress.evaluation import bootstrap

    whole = np.concatenate(list(resample_counts(N, 30, seed=2)))
    monkeypatch.setattr(bootstrap, "_CELLS_PER_CHUNK", 7 * N)
    assert (np.concatenate(list(resample_counts(N, 30, seed=2))) == whole).all()
    assert (whole.sum(1) == N).all()


def test_words_of_a_sentence_are_drawn_together():
    references, predictions = [np.array([0, 1, 2]), np.array([1])], [np.array([0, 1, 0]), np.array([0])]
    scores, _ = paired_bootstrap("token_accuracy", references, predictions, predictions, n_bootstrap=200)
    assert set(np.round(scores, 6)) == {0.5, 0.0, round(2 / 3, 6)}


def test_interval_is_that_of_the_normal_distribution_for_a_mean():
    hits = np.arange(2000) < 1600
    scores, _ = paired_bootstrap("accuracy", np.ones(2000, dtype=int), hits.astype(int), hits.astype(int))
    margin = 1.96 * np.sqrt(0.8 * 0.2 / 2000)
    assert percentile_interval(scores) == pytest.approx((0.8 - margin, 0.8 + margin), abs=0.001)


def test_scores_equal_the_metric_modules():
    references = [{"id": "1", "answers": {"text": ["a cat", "dog"], "answer_start": [0, 0]}}]
    predictions = [{"id": "1", "prediction_text": "cat dog"}]
    module = load_metric("squad").compute(references=references, predictions=predictions)
    assert score_rows(score_of("squad_f1", references, predictions), 1) == pytest.approx(module["f1"])
    exact = score_rows(score_of("squad_exact_match", references, predictions), 1)
    assert exact == pytest.approx(module["exact_match"])


@pytest.mark.filterwarnings("ignore:A single label")
def test_degenerate_data():
    same = np.zeros(10, dtype=int)
    assert score_rows(score_of("matthews_correlation", same, same), 10) == 0 == sk.matthews_corrcoef(same, same)
    assert score_rows(score_of("f1", same, same), 10) == 0
    assert np.isnan(score_rows(score_of("pearsonr", same, VALUES[:10]), 10))
    assert score_rows(score_of("seqeval", [["O"]], [["O"]]), 1) == 0


def test_retention_ratio_turns_round_where_lower_is_better():
    assert retention_ratio(0.8, 0.4) == pytest.approx(0.5)
    assert retention_ratio(10.0, 20.0, higher_is_better=False) == pytest.approx(0.5)
    assert np.isnan(retention_ratio(np.array([0.0, -0.2]), np.array([0.5, 0.5]))).all()


@pytest.mark.parametrize(
    ("metric", "references", "predictions", "message"),
    [
        ("bleu", LABELS, CLASSES_A, "Choose one of"),
        ("accuracy", LABELS, CLASSES_A[:-1], "40 references and 39"),
        ("f1", LABELS, CLASSES_A, "f1_macro"),
        ("f1_macro", LABELS - 1, CLASSES_A, "below 0"),
        ("matthews_correlation", INDICATORS, INDICATORS_A, "one number per row"),
        ("squad_f1", [{"id": "1"}], [{"id": "2"}], "Sort the predictions"),
    ],
)
def test_errors_say_what_to_do(metric, references, predictions, message):
    with pytest.raises(ValueError, match=message):
        score_of(metric, references, predictions)


def test_confidence_must_be_a_share():
    with pytest.raises(ValueError, match=r"0\.95"):
        percentile_interval(VALUES, confidence=95)


def test_every_score_has_a_case():
    tested = {case.split("-")[0] for case in CASES} | {
        "exact_match",
        "squad_exact_match",
        "squad_f1",
        "token_accuracy",
    }
    assert tested == set(SCORES)
