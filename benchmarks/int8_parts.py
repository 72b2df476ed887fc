"""Where the time of an int8 projection goes, beside torch.ao's whole: rounding, product, rescaling, by shape.

    OMP_NUM_THREADS=1 python benchmarks/int8_parts.py

Shapes of BERT-base's and MiniLM's projections, one text of 32 tokens and eight of 128. All parts take turns;
microseconds are medians. torch.ao rounds a whole batch by one scale inside its product; ours rounds each token by its
own, before the product, and multiplies each by its own scale afterwards. The sum of the product and of what has to
come before and after it bounds from below what a projection with one scale per token takes.
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

from hf_compress.formats.int8 import Int8Linear, quantize_rows
from hf_compress.formats.int8_kernels import kernel_for, largest_of_rows, rescale_

WIDTHS = {"bert-base": (768, 3072), "minilm": (384, 1536)}
TOKENS = (32, 1024)
RESULT = Path("benchmarks/results/int8_parts.json")


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
def parts(n_tokens: int, inputs: int, outputs: int, n_runs: int) -> dict[str, float]:
    torch.manual_seed(0)
    linear, tokens = nn.Linear(inputs, outputs), torch.randn(n_tokens, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch_ao = torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), {nn.Linear}, dtype=torch.qint8)
    ours, kernel = Int8Linear.from_float(linear.weight, linear.bias), kernel_for("cpu")
    weight, scales = quantize_rows(linear.weight)
    product = kernel.prepare(weight, scales[:, 0].contiguous())
    numbers, factors = kernel.round_tokens(tokens)
    result = product(numbers)
    half, half_tokens = nn.Linear(inputs, outputs, dtype=torch.bfloat16), tokens.bfloat16()
    calls = {
        "float32": lambda: linear(tokens),
        "bfloat16": lambda: half(half_tokens),
        "torch.ao": lambda: torch_ao(tokens),
        # A view is another tensor, which is rounded anew.
        "int8": lambda: ours(tokens.view(n_tokens, inputs)),
        "its product": lambda: product(numbers),
        "its rounding": lambda: kernel.round_tokens(tokens),
        "of that, the largest": lambda: largest_of_rows(tokens),
        "its rescaling": lambda: rescale_(result, factors, linear.bias),
    }
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
                found[key] = parts(n_tokens, inputs, outputs, options.runs)
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
