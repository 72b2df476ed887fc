"""Reports of recipes' runs as they might be, with every kind of step."""

from typing import Any

PARTS = ("embeddings", "attention", "feed-forward", "head", "other")


def conditions(batch_size: int = 32) -> dict[str, Any]:
    return {
        "device": "cpu",
        "processor": "x86_64 AVX512",
        "threads": 2,
        "batch_size": batch_size,
        "sequence_length": 64,
        "n_warmup": 3,
        "n_runs": 20,
        "torch_version": "2.13.0",
        "transformers_version": "5.23.0",
    }


def quality(value: float, teacher: float, metric: str = "accuracy") -> dict[str, Any]:
    kept = value / teacher
    return {
        "metric": metric,
        "higher_is_better": True,
        "n_examples": 872,
        "teacher": teacher,
        "compressed": value,
        "retention": kept,
        "retention_interval": [kept - 0.01, kept + 0.01],
        "difference": value - teacher,
        "difference_interval": [value - teacher - 0.01, value - teacher + 0.01],
        "agreement": 0.97,
        "kl": 0.01,
        "mse": None,
        "confidence": 0.95,
        "n_bootstrap": 10_000,
        "seed": 0,
    }


def entry(name: str, value: float, megabytes: float, ratio: float, **more: Any) -> dict[str, Any]:
    times = {
        "median_s": 0.4 * ratio,
        "p95_s": 0.5 * ratio,
        "reference_median_s": 0.4,
        "ratio": ratio,
        "dtype": "float32",
    }
    return {
        "name": name,
        "step": name[3:],
        "settings": {},
        "folder": None if name.startswith("00") else name,
        "seconds": 120.0,
        "seconds_of_reference": 1.0,
        "peak_rss_bytes": 10**9,
        "needs_hf_compress": name[3:] in ("prune", "quantize"),
        "quality": quality(value, 0.92),
        "cost": {
            "parameters": {"total": int(megabytes * 250_000), "embeddings": 1, "encoder": 1, "other": 1},
            "bytes_on_disk": int(megabytes * 1e6),
            "macs": int(22e9 * ratio),
            "latency": {"median_s": 0.4, "p95_s": 0.5, "examples_per_s": 80.0, "dtype": "float32"},
            "peak_memory_bytes": 10**8,
            "conditions": conditions(),
        },
        "latency": {"8": times, "32": times},
        "latency_conditions": conditions(),
        "parts": {
            "bytes": {part: int(megabytes * 2e5) for part in PARTS},
            "seconds": dict.fromkeys(PARTS, 0.08 * ratio),
        },
        "details": {},
    } | more


def example_report(**changes: Any) -> dict[str, Any]:
    """A run with every kind of step."""
    losses = [
        {"step": float(10 * i), "epoch": i / 10, "loss": 1 / (i + 1), "kd_loss": 0.5 / (i + 1)} for i in range(30)
    ]
    dense = {f"encoder.{i}": {"self": 12, "ffn": 1536} for i in range(6)}
    pruned = {f"encoder.{i}": {"self": 6 - i, "ffn": 320 - 50 * i} for i in range(6)}
    modules = {f"bert.encoder.layer.{i}.output.dense": {"weights": 40.0 + i, "outputs": 38.0 - i} for i in range(6)}
    zeros = {f"bert.encoder.layer.{i}.output.dense": {"sparsity": 0.5, "output_error": 0.01} for i in range(6)}
    steps = [
        entry("01-finetune", 0.92, 90.87, 1.0, details={"losses": losses}),
        entry("02-vocabulary", 0.918, 54.7, 1.0, details={"tokens": {"before": 30522, "after": 7000}}),
        entry("03-prune", 0.89, 20.6, 0.24, details={"widths": {"dense": dense, "pruned": pruned}}),
        entry("04-recover", 0.915, 20.6, 0.24, details={"losses": losses}),
        entry("05-sparsify", 0.912, 12.6, 0.24, details={"zeros": 0.5, "sparsity": zeros}),
        entry("06-quantize", 0.914, 5.3, 0.15, details={"noise": modules, "kept_in_float": ["bert.pooler.dense"]}),
        {"name": "07-evaluate", "step": "evaluate", "settings": {}, "folder": None, "passed": True, "reason": None},
    ]
    return {
        "schema": 1,
        "kind": "recipe",
        "recipe": {
            "model": "me/my-model",
            "data": {"dataset": "me/my-data", "dataset_name": None, "text_columns": ["text"]},
            "seed": 0,
            "measure": {},
            "steps": [{one["step"]: {}} for one in steps],
        },
        "task": "sequence-classification",
        "metric": "accuracy",
        "split": "validation",
        "rows_measured_on": 872,
        "rows_trained_on": 20_000,
        "rows_in_both": 0,
        "machine": {"device": "cpu", "processor": "x86_64 AVX512", "threads": 2},
        "versions": {"python": "3.11", "torch": "2.13.0", "transformers": "5.23.0", "hf_compress": "0.1.0"},
        "reference": "01-finetune",
        "result": "06-quantize",
        "stopped_by": None,
        "steps": steps,
    } | changes
