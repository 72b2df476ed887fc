"""SQuAD's exact match and F1 as a module of `evaluate`."""

import datasets
import evaluate
import numpy as np

from hf_compress.evaluation.squad import exact_match, token_f1

_DESCRIPTION = "Exact match and word F1 of answers after normalisation, in percent; higher is better."
_INPUTS = """
Args:
    predictions (`list[dict]`): `{"id": str, "prediction_text": str}` per question.
    references (`list[dict]`): `{"id": str, "answers": {"text": [str], "answer_start": [int]}}` per question.
Returns:
    exact_match, f1 (`float`): 0 to 100; a question without a prediction scores 0.
"""
_CITATION = "Rajpurkar et al., SQuAD: 100,000+ Questions for Machine Comprehension of Text (2016)."


class Squad(evaluate.Metric):
    """SQuAD v1.1."""

    def _info(self) -> evaluate.MetricInfo:
        text, start = datasets.Value("string"), datasets.Value("int32")
        answers = datasets.Sequence({"text": text, "answer_start": start})
        features = {
            "predictions": {"id": text, "prediction_text": text},
            "references": {"id": text, "answers": answers},
        }
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(features),
        )

    def _compute(self, predictions, references):
        given = {prediction["id"]: prediction["prediction_text"] for prediction in predictions}
        scores = [
            (exact_match(given[row["id"]], row["answers"]["text"]), token_f1(given[row["id"]], row["answers"]["text"]))
            if row["id"] in given
            else (0.0, 0.0)
            for row in references
        ]
        matches, f1 = 100 * np.mean(scores, axis=0)
        return {"exact_match": float(matches), "f1": float(f1)}
