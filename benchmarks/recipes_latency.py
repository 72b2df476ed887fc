"""How much faster the results of `recipes.py` are than the fine-tuned models that they are from.

    python benchmarks/recipes_latency.py

Reads the models that `recipes.py` left in its work folder; wants a machine that does nothing else. For each recipe and
data set with three seeds: forwards of all models taken in turn, medians, by one thread and by two, on batches of 8 and
32 rows of 64 tokens. "result" is the quantized model; "bf16" the one before that step, loaded in bfloat16; "int8-bf16"
that one in int8, all else in bfloat16.
"""

import argparse
import json
import platform
import statistics
from pathlib import Path
from typing import Any

import torch
import transformers
from recipes import RECIPES, TASKS
from transformers import AutoModelForSequenceClassification

import hf_compress as hc
from hf_compress.evaluation.sample import sample_batch

RESULT = Path("benchmarks/results/recipes_latency.json")
SEEDS, THREADS, BATCHES, LENGTH = (0, 1, 2), (1, 2), (8, 32), 64


def measure(folder: Path, n_runs: int) -> dict[str, float]:
    """Dense time in float32 by compressed time, by format, threads and rows."""
    report = json.loads((folder / "report.json").read_text())
    made = [step["folder"] for step in report["steps"] if "quality" in step]
    dense, result = report["reference"], report["result"]
    load = AutoModelForSequenceClassification.from_pretrained
    models = {
        "dense": load(folder / dense),
        "result": load(folder / result),
        "bf16": load(folder / made[made.index(result) - 1], dtype=torch.bfloat16),
        "int8-bf16": hc.quantize(load(folder / made[made.index(result) - 1]), hc.Int8DynamicConfig(dtype="bf16")),
    }
    found = {}
    for threads in THREADS:
        torch.set_num_threads(threads)
        for size in BATCHES:
            batch = sample_batch(list(models.values()), size, LENGTH)
            latency = hc.compare_latency(models, batch, n_runs=n_runs)
            found |= {
                f"{name}, {threads} threads, {size} rows": 1 / latency.ratio[name]
                for name in models
                if name != "dense"
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("benchmarks/work/recipes"))
    parser.add_argument("--runs", type=int, default=12)
    options = parser.parse_args()
    cells: dict[str, dict[str, Any]] = {}
    for name in RECIPES:
        for task in TASKS:
            folders = [options.work / f"{name}-{task}-{seed}" for seed in SEEDS]
            if not all((folder / "report.json").exists() for folder in folders):
                continue
            values = [measure(folder, options.runs) for folder in folders]
            cells[f"{name} {task}"] = {
                setting: {
                    "mean": statistics.mean(value[setting] for value in values),
                    "sd": statistics.stdev(value[setting] for value in values),
                    "values": [value[setting] for value in values],
                }
                for setting in values[0]
            }
            shown = {
                setting: f"{one['mean']:.1f} ± {one['sd']:.1f}" for setting, one in cells[f"{name} {task}"].items()
            }
            print(f"{name} {task}: {shown}", flush=True)
    result = {
        "faster": cells,
        "conditions": {"machine": platform.processor(), "length": LENGTH, "runs": options.runs, "seeds": list(SEEDS)},
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__, "hf_compress": hc.__version__},
    }  # fmt: skip
    RESULT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
