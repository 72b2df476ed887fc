"""Matthews correlation as a module of `evaluate`, computed by scikit-learn."""

import datasets
import evaluate
import numpy as np
from sklearn.metrics import matthews_corrcoef

_DESCRIPTION = "Correlation of predicted and true classes, -1 to 1, 0 for chance; higher is better."
_INPUTS = """
Args:
    predictions (`list[int]`): Predicted labels; lists of 0 and 1 per row with `config_name="multilabel"`.
    references (`list[int]`): Labels.
    sample_weight (`list[float]`): Weight of each row.
    average (`str`): For multilabel: `"macro"` for the mean over labels, `None` for each label alone.
Returns:
    matthews_correlation (`float`, or a list of them): -1 to 1.
"""
_CITATION = "Matthews, Comparison of the predicted and observed secondary structure of T4 phage lysozyme (1975)."


class MatthewsCorrelation(evaluate.Metric):
    """Matthews correlation."""

    def _info(self) -> evaluate.MetricInfo:
        label = datasets.Value("int32")
        column = datasets.Sequence(label) if self.config_name == "multilabel" else label
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": column, "references": column}),
        )

    def _compute(self, predictions, references, sample_weight=None, average=None):
        if self.config_name != "multilabel":
            score = matthews_corrcoef(references, predictions, sample_weight=sample_weight)
            return {"matthews_correlation": float(score)}
        if average not in ("macro", None):
            raise ValueError(f"average={average!r} is no way to join labels here. Choose 'macro' or None.")
        columns = zip(np.transpose(references), np.transpose(predictions), strict=True)
        scores = [float(matthews_corrcoef(*column, sample_weight=sample_weight)) for column in columns]
        return {"matthews_correlation": float(np.mean(scores)) if average == "macro" else scores}
