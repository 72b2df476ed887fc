"""How fast quantized encoders are on this machine: medians of whole forwards, all models in turn.

    OMP_NUM_THREADS=1 python benchmarks/quantization_speed.py [--clock cpu] [--runs 9] [--shapes bert-base:8x128 ...]

Shapes of BERT-base and of MiniLM (6 layers, hidden size 384) with random weights, which make no difference to the
time. Beside float32: bfloat16; int8 on top of each; torch.ao's `quantize_dynamic`; torchao's da8w8 where it is
installed; stock bitsandbytes in 8 and 4 bits. `--clock cpu` counts the seconds that the process computed, which other
programs on the machine disturb less; run it with one thread, since waiting threads compute too. Prints milliseconds
and how many times faster than float32, and stores them with the conditions as JSON.
"""

import argparse
import copy
import gc
import importlib.metadata
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import BertConfig, BertModel, BitsAndBytesConfig

from hf_compress.formats.int8_kernels import kernel_for
from hf_compress.quantization.config import Int8DynamicConfig
from hf_compress.quantization.quantize import quantize

CONFIGS = {
    "bert-base": {},
    "minilm": {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6},
}
BATCHES = ((1, 32), (1, 128), (8, 128), (32, 64))
SHAPES = [f"{model}:{size}x{length}" for model in CONFIGS for size, length in BATCHES]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
RESULT = Path("benchmarks/results/quantization_speed.json")


def torch_ao(model: BertModel) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


def torchao_da8w8(model: BertModel) -> torch.nn.Module:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = copy.deepcopy(model)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def bitsandbytes(model: BertModel, **settings: Any) -> torch.nn.Module:
    config = BitsAndBytesConfig(**settings)
    return BertModel.from_pretrained(
        None, config=copy.deepcopy(model.config), state_dict=model.state_dict(), quantization_config=config
    )


MAKERS: dict[str, Callable[[BertModel], torch.nn.Module]] = {
    "float32": lambda model: model,
    "bfloat16": lambda model: copy.deepcopy(model).to(torch.bfloat16),
    "int8": lambda model: quantize(model, Int8DynamicConfig()),
    "int8 on bfloat16": lambda model: quantize(copy.deepcopy(model).to(torch.bfloat16), Int8DynamicConfig()),
    "torch.ao dynamic": torch_ao,
    "torchao da8w8": torchao_da8w8,
    "bitsandbytes 8-bit": lambda model: bitsandbytes(model, load_in_8bit=True),
    "bitsandbytes 4-bit": lambda model: bitsandbytes(model, load_in_4bit=True),
}


def make_models(name: str) -> tuple[dict[str, torch.nn.Module], dict[str, str]]:
    """All models of a shape, and why some are missing."""
    torch.manual_seed(0)
    base = BertModel(BertConfig(**CONFIGS[name])).eval()
    models, missing = {}, {}
    for kind, make in MAKERS.items():
        try:
            models[kind] = make(base).eval()
        except (ImportError, RuntimeError, AssertionError) as error:
            missing[kind] = f"{type(error).__name__}: {error}"
    return models, missing


@torch.inference_mode()
def measure(
    models: dict[str, torch.nn.Module], batch: dict[str, torch.Tensor], n_runs: int, clock: str
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of each forward by model, one of each in turn, and why some failed."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    failed: dict[str, str] = {}
    tick = CLOCKS[clock]
    for run in range(-1, n_runs):
        for name, model in models.items():
            if name in failed:
                continue
            gc.disable()
            try:
                start = tick()
                model(**batch)
                elapsed = tick() - start
            except (RuntimeError, AssertionError) as error:
                failed[name] = f"{type(error).__name__}: {error}"
                continue
            finally:
                gc.enable()
            if run >= 0:
                seconds[name].append(elapsed)
    return {name: times for name, times in seconds.items() if name not in failed}, failed


def conditions(arguments: argparse.Namespace) -> dict[str, Any]:
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    for package in ("bitsandbytes", "torchao"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "device": name,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "instructions": sorted(flag for flag in flags if "vnni" in flag or "amx" in flag or "bf16" in flag),
        "threads": torch.get_num_threads(),
        "clock": arguments.clock,
        "runs": arguments.runs,
        "int8 kernel": kernel_for("cpu").name,
        "attention": "sdpa",
        "versions": versions,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=SHAPES)
    parser.add_argument("--models", nargs="+", choices=list(MAKERS), default=list(MAKERS))
    parser.add_argument("--result", type=Path, default=RESULT)
    arguments = parser.parse_args()
    # bitsandbytes logs a line for each layer of each forward.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    found: dict[str, Any] = {"conditions": conditions(arguments), "missing": {}, "shapes": {}}
    print(json.dumps(found["conditions"], indent=1))
    for kind in list(MAKERS):
        if kind not in arguments.models:
            del MAKERS[kind]
    for name in CONFIGS:
        shapes = [shape for shape in arguments.shapes if shape.startswith(f"{name}:")]
        if not shapes:
            continue
        models, missing = make_models(name)
        found["missing"] |= missing
        for shape in shapes:
            size, length = (int(number) for number in shape.partition(":")[2].split("x"))
            ids = torch.randint(1000, 30_000, (size, length), generator=torch.Generator().manual_seed(size))
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            seconds, failed = measure(models, batch, arguments.runs, arguments.clock)
            found["missing"] |= {f"{kind} at {shape}": error for kind, error in failed.items()}
            medians = {kind: statistics.median(times) for kind, times in seconds.items()}
            # Of each round, so that what slows a round slows both of its forwards.
            faster = {
                kind: statistics.median(a / b for a, b in zip(seconds["float32"], times, strict=True))
                for kind, times in seconds.items()
            }
            found["shapes"][shape] = {
                "median_ms": {kind: round(1000 * value, 2) for kind, value in medians.items()},
                "least_ms": {kind: round(1000 * min(times), 2) for kind, times in seconds.items()},
                "faster_than_float32": {kind: round(value, 2) for kind, value in faster.items()},
            }
            columns = (f"{kind} {1000 * medians[kind]:.1f} ({faster[kind]:.2f}x)" for kind in medians)
            print(f"{shape}: {', '.join(columns)}", flush=True)
    for kind, reason in found["missing"].items():
        print(f"{kind}: {reason}")
    arguments.result.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
