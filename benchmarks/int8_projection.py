"""How long one projection takes here: every way to compute it in int8, beside torch.ao and floating point.

    OMP_NUM_THREADS=1 python benchmarks/int8_projection.py

Shapes of BERT-base's and MiniLM's projections, one text of 32 tokens and eight of 128. All ways take turns;
microseconds are medians. torch.ao rounds a whole batch by one scale inside its product, ours each token by its own.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from hf_compress.formats.int8 import quantize_rows
from hf_compress.formats.int8_kernels import CANDIDATES, is_exact, kernel_for

WIDTHS = {"bert-base": (768, 3072), "minilm": (384, 1536)}
TOKENS = (32, 1024)
RESULT = Path("benchmarks/results/int8_projection.json")


def medians(calls: dict[str, Callable], n_runs: int) -> dict[str, float]:
    """Microseconds of each, one call of each in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for run in range(-5, n_runs):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if run >= 0:
                times[name].append(time.perf_counter() - start)
    return {name: round(1e6 * statistics.median(values), 1) for name, values in times.items()}


@torch.no_grad()
def ways(n_tokens: int, inputs: int, outputs: int, n_runs: int) -> dict[str, float]:
    torch.manual_seed(0)
    linear, tokens = nn.Linear(inputs, outputs), torch.randn(n_tokens, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch_ao = torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), {nn.Linear}, dtype=torch.qint8)
    weight, scales = quantize_rows(linear.weight)
    half, half_tokens = nn.Linear(inputs, outputs, dtype=torch.bfloat16), tokens.bfloat16()
    calls = {
        "float32": lambda: linear(tokens),
        "bfloat16": lambda: half(half_tokens),
        "torch.ao": lambda: torch_ao(tokens),
    }
    for kernel in CANDIDATES["cpu"]:
        if is_exact(kernel, "cpu"):
            project = kernel.prepare(weight, scales[:, 0])
            # A view is another tensor, which is rounded anew.
            calls[kernel.name] = lambda project=project: project(tokens.view(n_tokens, inputs), linear.bias)
    return medians(calls, n_runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    options = parser.parse_args()
    found = {}
    for name, (hidden, ffn) in WIDTHS.items():
        for n_tokens in TOKENS:
            for inputs, outputs in ((hidden, hidden), (hidden, ffn), (ffn, hidden)):
                key = f"{name}, {n_tokens} x {inputs} -> {outputs}"
                found[key] = ways(n_tokens, inputs, outputs, options.runs)
                print(key, found[key], flush=True)
    conditions = {
        "capability": torch.backends.cpu.get_cpu_capability(),
        "kernel": kernel_for("cpu").name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "runs": options.runs,
    }
    RESULT.write_text(json.dumps({"conditions": conditions, "microseconds": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
