"""MEASURE: what a compressed model costs and what it kept of its teacher."""

import importlib
from typing import Any

# Served on demand: timing a model must not import datasets or scikit-learn.
_MODULES = {
    "Cost": "hf_compress.evaluation.cost",
    "HIGHER_IS_BETTER": "hf_compress.evaluation.metrics",
    "LatencyComparison": "hf_compress.evaluation.latency",
    "Predictions": "hf_compress.evaluation.inference",
    "Retention": "hf_compress.evaluation.retention",
    "compare_latency": "hf_compress.evaluation.latency",
    "count_macs": "hf_compress.evaluation.cost",
    "count_parameters": "hf_compress.evaluation.cost",
    "load_metric": "hf_compress.evaluation.metrics",
    "measure_cost": "hf_compress.evaluation.cost",
    "metric_path": "hf_compress.evaluation.metrics",
    "paired_bootstrap": "hf_compress.evaluation.scores",
    "peak_memory": "hf_compress.evaluation.cost",
    "predict": "hf_compress.evaluation.inference",
    "retention_from_outputs": "hf_compress.evaluation.retention",
    "retention_from_predictions": "hf_compress.evaluation.retention",
    "saved_bytes": "hf_compress.evaluation.cost",
    "score_retention": "hf_compress.evaluation.retention",
}

__all__ = sorted(_MODULES)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
