"""Accuracy as a module of `evaluate`, computed by scikit-learn."""

import datasets
import evaluate
from sklearn.metrics import accuracy_score

_DESCRIPTION = "Share of predictions that equal their reference; higher is better."
_INPUTS = """
Args:
    predictions (`list[int]`): Predicted labels; lists of 0 and 1 per row with `config_name="multilabel"`.
    references (`list[int]`): Labels.
    normalize (`bool`): `False` counts instead of dividing.
    sample_weight (`list[float]`): Weight of each row.
Returns:
    accuracy (`float`): 0 to 1.
"""
_CITATION = "Pedregosa et al., Scikit-learn: Machine Learning in Python, JMLR 12 (2011)."


class Accuracy(evaluate.Metric):
    """Accuracy."""

    def _info(self) -> evaluate.MetricInfo:
        label = datasets.Value("int32")
        column = datasets.Sequence(label) if self.config_name == "multilabel" else label
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": column, "references": column}),
        )

    def _compute(self, predictions, references, normalize=True, sample_weight=None):
        score = accuracy_score(references, predictions, normalize=normalize, sample_weight=sample_weight)
        return {"accuracy": float(score)}
