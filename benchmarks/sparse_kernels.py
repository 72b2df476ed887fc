"""How fast sparse weights multiply: shape x tokens x pattern x sparsity x format, beside the dense product.

    OMP_NUM_THREADS=1 python benchmarks/sparse_kernels.py [--device cuda]

A few minutes on an idle core. Formats take turns with the dense product; ratios are of medians, below 1 is faster.
Times are CPU time of this process, which has one thread: what else runs on the machine then makes little difference.
On a GPU they are wall time, of larger products, in half precision and with the pattern 2:4 that its tensor cores know.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn import functional
from transformers import BertConfig, BertForSequenceClassification

from hf_compress.pruning.masks import Selection, blind_scores
from hf_compress.pruning.prune import prune
from hf_compress.pruning.sparse_compute import use_sparse_kernels_
from hf_compress.pruning.sparse_formats import PACKERS, why_not
from hf_compress.pruning.unstructured_config import UnstructuredPruningConfig

MINILM = ((384, 384), (1536, 384), (384, 1536))
BERT = ((768, 768), (3072, 768), (768, 3072))
LARGE = ((4096, 4096),)
# Shapes, tokens, dtype. What is left out would take too long, and does not look different.
PLANS = {
    "cpu": (
        (MINILM, (64, 512), torch.float32),
        (MINILM[1:2], (2048,), torch.float32),
        (BERT, (64,), torch.float32),
        (BERT[1:2], (512,), torch.float32),
        (LARGE, (64,), torch.float32),
        ((MINILM[1], BERT[1]), (64, 512), torch.bfloat16),
    ),
    "cuda": (
        (BERT[1:], (512, 8192), torch.float16),
        (LARGE, (64, 8192), torch.float16),
        (BERT[1:2], (8192,), torch.float32),
    ),
}
# Blocks; "columns" is a whole column of the weight.
PATTERNS = {
    "cpu": (None, (4, 1), (16, 16), (32, 1), "columns"),
    "cuda": (None, "2:4", (32, 32), "columns"),
}
SPARSITIES = {"cpu": (0.5, 0.7, 0.8, 0.9, 0.95), "cuda": (0.5, 0.8, 0.95)}
# A format this much slower than the dense product is timed once and no further.
HOPELESS = 1.8
Pattern = tuple[int, int] | str | None
RESULT = Path("benchmarks/results/sparse_kernels.json")


def clock(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize(device)
    return time.perf_counter()


def time_calls(calls: Sequence[Callable[[], Any]], device: torch.device, n_warmup: int, n_runs: int) -> np.ndarray:
    """As `time_in_turn` of the library, by `clock`."""
    times = np.empty((n_warmup + n_runs, len(calls)))
    for run in times:
        for index, call in enumerate(calls):
            start = clock(device)
            call()
            run[index] = 1000 * (clock(device) - start)
    return times[n_warmup:]


def make_weight(shape: tuple[int, int], pattern: Pattern, sparsity: float) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=draw) * 0.05
    if pattern == "2:4":
        selection = Selection(sparsity, group=(2, 4))
    else:
        selection = Selection(sparsity, block=(shape[0], 1) if pattern == "columns" else pattern or (1, 1))
    mask = selection.mask(blind_scores(weight, "l1", draw))
    return weight.masked_fill(mask, 0)


def name_of(pattern: Pattern) -> str:
    return "x".join(map(str, pattern)) if isinstance(pattern, tuple) else pattern or "none"


def measure_cell(weight: torch.Tensor, n_tokens: int, n_runs: int) -> dict[str, float]:
    """Median milliseconds by format."""
    outputs, inputs = weight.shape
    x = torch.randn(n_tokens, inputs).to(weight)
    bias = torch.randn(outputs).to(weight)
    has_empty = not (weight != 0).any(0).all()
    formats = [name for name in PACKERS if why_not(name, weight) is None and (name != "sliced" or has_empty)]
    calls = {"dense": partial(functional.linear, x, weight, bias)}
    calls |= {name: partial(PACKERS[name](weight), x, bias) for name in formats}
    first = dict(zip(calls, time_calls(list(calls.values()), weight.device, 1, 1)[0].tolist(), strict=True))
    hopeful = [name for name in calls if name == "dense" or first[name] < HOPELESS * first["dense"]]
    times = np.median(time_calls([calls[name] for name in hopeful], weight.device, 1, n_runs), axis=0)
    # One run has noise, but none that would make such a format the faster one.
    return first | dict(zip(hopeful, times.tolist(), strict=True))


def measure_kernels(device: torch.device, n_runs: int) -> list[dict[str, Any]]:
    rows = []
    for shapes, tokens, dtype in PLANS[device.type]:
        for shape, n_tokens in ((shape, n_tokens) for shape in shapes for n_tokens in tokens):
            for pattern in PATTERNS[device.type]:
                first = len(rows)
                for sparsity in (0.5,) if pattern == "2:4" else SPARSITIES[device.type]:
                    weight = make_weight(shape, pattern, sparsity).to(device, dtype)
                    rows.append(
                        {
                            "shape": list(shape),
                            "tokens": n_tokens,
                            "dtype": str(dtype).removeprefix("torch."),
                            "pattern": name_of(pattern),
                            "sparsity": sparsity,
                            "ms": measure_cell(weight, n_tokens, n_runs),
                        }
                    )
                print_rows(rows[first:])
    return rows


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    row = rows[0]
    print(
        f"\n{row['shape'][0]} x {row['shape'][1]}, {row['tokens']} tokens, {row['dtype']}, blocks {row['pattern']}: "
        f"dense {np.median([each['ms']['dense'] for each in rows]):.3f} ms; time beside dense at "
        + ", ".join(f"{each['sparsity']:.0%}" for each in rows)
    )
    for name in row["ms"]:
        if name != "dense":
            ratios = "  ".join(f"{each['ms'][name] / each['ms']['dense']:5.2f}" for each in rows if name in each["ms"])
            print(f"  {name:16} {ratios}", flush=True)


def measure_models(device: torch.device, n_runs: int) -> list[dict[str, Any]]:
    """A model of MiniLM's shape with random weights, 32 x 1 blocks pruned: dense beside `use_sparse_kernels_`."""
    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    torch.manual_seed(0)
    model = BertForSequenceClassification(config).eval()
    ids = torch.randint(1000, 30_000, (8, 64), device=device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    rows = []
    for pattern, sparsity in ((pattern, sparsity) for pattern in (None, (32, 1)) for sparsity in SPARSITIES["cpu"]):
        pruned = prune(model, UnstructuredPruningConfig(sparsity, score="magnitude", pattern=pattern)).to(device)
        report = use_sparse_kernels_(pruned, batch, n_runs=n_runs, timer=time_calls)
        formats = sorted({layer.chosen for layer in report.layers})
        rows.append(
            {
                "pattern": name_of(pattern),
                "sparsity": sparsity,
                "formats": formats,
                "ms": report.times,
            }
        )
        ms = report.times
        figures = f"{ms['dense']:.1f} ms -> {ms['sparse']:.1f} ms, x {ms['sparse'] / ms['dense']:.2f}" if ms else "-"
        print(f"model, blocks {rows[-1]['pattern']}, {sparsity:.0%}: {figures}, {', '.join(formats)}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=int, default=5, help="rounds on the clock, after two of warm-up")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cpu":
        # CPU time adds up over threads: with several of them, it would say nothing about speed.
        torch.set_num_threads(1)
    conditions = {
        "device": str(device) if device.type == "cpu" else torch.cuda.get_device_name(device),
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "clock": "CPU time of the process" if device.type == "cpu" else "wall time",
        "n_runs": args.runs,
        "torch_version": str(torch.__version__),
        "transformers_version": transformers.__version__,
    }
    print(conditions)
    with torch.inference_mode():
        kernels = measure_kernels(device, args.runs)
    results = {"conditions": conditions, "kernels": kernels}
    if device.type == "cpu":
        results["model"] = {"batch": [8, 64], "rows": measure_models(device, 3 * args.runs)}
    path = RESULT if device.type == "cpu" else RESULT.with_stem(f"{RESULT.stem}_{device.type}")
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
