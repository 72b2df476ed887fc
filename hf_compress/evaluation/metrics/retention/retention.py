"""What a compressed model kept of its teacher, as a module of `evaluate`."""

import datasets
import evaluate
import numpy as np

from hf_compress.evaluation.retention import retention_from_predictions

_DESCRIPTION = """Metric of a compressed model divided by its teacher's (inverted where lower is better), with a paired
bootstrap interval; 1 is all kept, higher is better."""
_INPUTS = """
Args:
    predictions: The compressed model's predictions: numbers, lists of 0 and 1, or lists of tags.
    references: What is right, of the same kind.
    teacher_predictions: The teacher's predictions, of the same kind.
    metric (`str`): "accuracy", "f1", "f1_macro", "f1_micro", "f1_weighted", "matthews_correlation", "pearsonr",
        "spearmanr", "seqeval", or "perplexity" (summed negative log-likelihoods as predictions, token counts as
        references).
    n_bootstrap (`int`), confidence (`float`), seed (`int`): Of the bootstrap.
Returns:
    retention, retention_interval, difference, difference_interval, agreement and the other fields of `Retention`.
"""
_CITATION = "Koehn, Statistical Significance Tests for Machine Translation Evaluation (2004)."
_REAL = ("pearsonr", "perplexity", "spearmanr")


class Retention(evaluate.Metric):
    """Retention."""

    def _info(self) -> evaluate.MetricInfo:
        number, tag = datasets.Value("float64"), datasets.Value("string")
        kinds = (number, datasets.Sequence(tag), datasets.Sequence(number))
        names = ("predictions", "references", "teacher_predictions")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=[datasets.Features(dict.fromkeys(names, kind)) for kind in kinds],
        )

    def _compute(self, predictions, references, teacher_predictions, metric="accuracy", **bootstrap):
        columns = (references, teacher_predictions, predictions)
        if metric != "seqeval":
            dtype = np.float64 if metric in _REAL else np.int64
            columns = (np.asarray(column).astype(dtype) for column in columns)
        return retention_from_predictions(*columns, metric=metric, **bootstrap).to_dict()
