"""How much `import hf_compress` costs on top of the part of transformers it cannot do without.

    python benchmarks/import_time.py

The plug-in registers a checkpoint loader, so it needs `transformers.quantizers`; anything beyond that is our own
weight. Required: a ratio of at most 1.15. Each import runs in a fresh interpreter, the two in turn, so that a busy
moment of the machine hits both.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

MODULES = ("transformers.quantizers", "hf_compress")
LIMIT = 1.15
RESULT = Path(__file__).parent / "results" / "import_time.json"


def import_seconds(module: str) -> float:
    """Seconds a fresh interpreter takes to import `module`, without its own start."""
    code = f"import time; start = time.perf_counter(); import {module}; print(time.perf_counter() - start)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> int:
    """Measure, print, store; the exit status is 1 when the limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="imports per module (default: 15)")
    repeats = parser.parse_args().repeats

    seconds = {module: [] for module in MODULES}
    for module in MODULES:
        import_seconds(module)  # writes the bytecode and warms the file cache
    for _ in range(repeats):
        for module in MODULES:
            seconds[module].append(import_seconds(module))

    medians = {module: statistics.median(values) for module, values in seconds.items()}
    ratio = medians["hf_compress"] / medians["transformers.quantizers"]
    result = {
        "ratio": round(ratio, 3),
        "limit": LIMIT,
        "median_seconds": {module: round(value, 3) for module, value in medians.items()},
        "seconds": {module: [round(value, 3) for value in values] for module, values in seconds.items()},
        "repeats": repeats,
        "cpu_threads": os.cpu_count(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    for module, value in medians.items():
        print(f"{module:24} {value:.3f} s (median of {repeats})")
    print(f"ratio {ratio:.3f}, required at most {LIMIT}")
    return int(ratio > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
