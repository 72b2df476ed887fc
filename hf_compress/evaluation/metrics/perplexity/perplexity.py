"""Perplexity as a module of `evaluate`, from likelihoods or from logits; it runs no model."""

import datasets
import evaluate
import numpy as np
from scipy.special import log_softmax

_DESCRIPTION = "Exponential of the mean negative log-likelihood per token, from 1 upwards; lower is better."
_INPUTS = """
Unlike the Hub's metric of that name, which downloads and runs a model, this one takes what a model gave.
Args:
    predictions: Negative log-likelihoods in nats, summed over each row (`list[float]`), or logits of each position of
        each row (`list[list[list[float]]]`).
    references: Tokens of each row (`list[int]`), or the label of each position (`list[list[int]]`); -100 does not
        count. Logits stand at the position whose label they predict: shift those of a causal model first.
Returns:
    perplexity (`float`): Over all tokens.
    mean_nll (`float`): Its logarithm, in nats per token.
"""
_CITATION = "Jelinek et al., Perplexity - a measure of the difficulty of speech recognition tasks (1977)."
_IGNORED = -100


class Perplexity(evaluate.Metric):
    """Perplexity."""

    def _info(self) -> evaluate.MetricInfo:
        number, count = datasets.Value("float64"), datasets.Value("int64")
        sums = {"predictions": number, "references": count}
        logits = {"predictions": datasets.Sequence(datasets.Sequence(number)), "references": datasets.Sequence(count)}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=[datasets.Features(sums), datasets.Features(logits)],
        )

    def _compute(self, predictions, references):
        if np.ndim(references[0]) > 0:
            rows = [_nll(np.array(row), np.array(labels)) for row, labels in zip(predictions, references, strict=True)]
            predictions, references = zip(*rows, strict=True)
        mean_nll = float(np.sum(predictions) / np.sum(references))
        return {"perplexity": float(np.exp(mean_nll)), "mean_nll": mean_nll}


def _nll(logits, labels):
    counts = labels != _IGNORED
    chosen = np.take_along_axis(log_softmax(logits[counts], axis=-1), labels[counts][:, None], axis=-1)
    return -chosen.sum(), counts.sum()
