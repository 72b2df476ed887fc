"""Precision, recall and F1 of named entities as a module of `evaluate`, computed by seqeval."""

import importlib

import datasets
import evaluate
from seqeval.metrics import accuracy_score, classification_report

_DESCRIPTION = "Precision, recall and F1 of whole entities by the rules of conlleval; higher is better."
_INPUTS = """
Args:
    predictions (`list[list[str]]`): Predicted tags of each word of each sentence, such as "B-PER".
    references (`list[list[str]]`): Tags.
    suffix (`bool`): Whether the position stands behind the type ("PER-B").
    scheme (`str`): "IOB1", "IOB2", "IOE1", "IOE2", "IOBES" or "BILOU", for `mode="strict"`.
    mode (`str`): "strict" to count only entities that are well-formed in the scheme.
    sample_weight (`list[float]`): Weight of each sentence.
    zero_division (`str` or `int`): What 0 / 0 is: 0, 1, or "warn".
Returns:
    overall_precision, overall_recall, overall_f1, overall_accuracy (`float`): Over all types.
    For each type a dict of precision, recall, f1 and number.
"""
_CITATION = "Nakayama, seqeval: A Python framework for sequence labeling evaluation (2018)."


class Seqeval(evaluate.Metric):
    """Entities by seqeval."""

    def _info(self) -> evaluate.MetricInfo:
        tags = datasets.Sequence(datasets.Value("string"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": tags, "references": tags}),
        )

    def _compute(
        self,
        predictions,
        references,
        suffix=False,
        scheme=None,
        mode=None,
        sample_weight=None,
        zero_division="warn",
    ):
        report = classification_report(
            references,
            predictions,
            suffix=suffix,
            output_dict=True,
            scheme=None if scheme is None else _scheme(scheme),
            mode=mode,
            sample_weight=sample_weight,
            zero_division=zero_division,
        )
        overall = report.pop("micro avg")
        by_type = {
            name: {
                "precision": float(row["precision"]),
                "recall": float(row["recall"]),
                "f1": float(row["f1-score"]),
                "number": int(row["support"]),
            }
            for name, row in report.items()
            if name not in ("macro avg", "weighted avg")
        }
        return {
            **by_type,
            "overall_precision": float(overall["precision"]),
            "overall_recall": float(overall["recall"]),
            "overall_f1": float(overall["f1-score"]),
            "overall_accuracy": float(accuracy_score(references, predictions)),
        }


def _scheme(name):
    schemes = importlib.import_module("seqeval.scheme")
    known = ("IOB1", "IOB2", "IOE1", "IOE2", "IOBES", "BILOU")
    if name not in known:
        raise ValueError(f"scheme={name!r} is not known to seqeval. Choose one of {', '.join(known)}.")
    return getattr(schemes, name)
