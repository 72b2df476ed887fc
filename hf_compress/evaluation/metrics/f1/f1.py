"""F1 as a module of `evaluate`, computed by scikit-learn."""

import datasets
import evaluate
from sklearn.metrics import f1_score

_DESCRIPTION = "Harmonic mean of precision and recall; higher is better."
_INPUTS = """
Args:
    predictions (`list[int]`): Predicted labels; lists of 0 and 1 per row with `config_name="multilabel"`.
    references (`list[int]`): Labels.
    labels (`list[int]`): Labels to include.
    pos_label (`int`): The positive label of `average="binary"`.
    average (`str`): `"binary"`, `"micro"`, `"macro"`, `"weighted"`, `"samples"`, or `None` for each class alone.
    sample_weight (`list[float]`): Weight of each row.
Returns:
    f1 (`float` or array): 0 to 1.
"""
_CITATION = "Pedregosa et al., Scikit-learn: Machine Learning in Python, JMLR 12 (2011)."


class F1(evaluate.Metric):
    """F1."""

    def _info(self) -> evaluate.MetricInfo:
        label = datasets.Value("int32")
        column = datasets.Sequence(label) if self.config_name == "multilabel" else label
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": column, "references": column}),
        )

    def _compute(self, predictions, references, labels=None, pos_label=1, average="binary", sample_weight=None):
        options = {"labels": labels, "pos_label": pos_label, "average": average, "sample_weight": sample_weight}
        score = f1_score(references, predictions, **options)
        return {"f1": score if average is None else float(score)}
