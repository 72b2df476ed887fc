"""Pearson's correlation as a module of `evaluate`, computed by SciPy."""

import datasets
import evaluate
from scipy.stats import pearsonr

_DESCRIPTION = "Linear correlation of predicted and true values, -1 to 1; higher is better."
_INPUTS = """
Args:
    predictions (`list[float]`): Predicted values.
    references (`list[float]`): Values.
    return_pvalue (`bool`): Whether the p-value is returned too.
Returns:
    pearsonr (`float`): -1 to 1.
    p-value (`float`): If asked for.
"""
_CITATION = "Virtanen et al., SciPy 1.0, Nature Methods 17 (2020)."


class Pearsonr(evaluate.Metric):
    """Pearson's correlation."""

    def _info(self) -> evaluate.MetricInfo:
        value = datasets.Value("float64")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": value, "references": value}),
        )

    def _compute(self, predictions, references, return_pvalue=False):
        correlation, p_value = pearsonr(references, predictions)
        result = {"pearsonr": float(correlation)}
        return {**result, "p-value": float(p_value)} if return_pvalue else result
