"""How fast quantized encoders are on this machine: medians of whole forwards, all models in turn.

    OMP_NUM_THREADS=1 python benchmarks/quantization_speed.py [--clock cpu] [--runs 9] [--shapes bert-base:8x128 ...]
    python benchmarks/quantization_speed.py --device cuda

Shapes of BERT-base and of MiniLM (6 layers, hidden size 384) with random weights, which make no difference to the
time. Beside float32: bfloat16; int8 on top of each; torch.ao's `quantize_dynamic`; torchao's da8w8 where it is
installed; stock bitsandbytes in 8 and 4 bits. On a GPU float16 too, and no torch.ao, which has no kernels there; stock
bitsandbytes on float16, with products in bfloat16 for its 4 bits. `--clock cpu` counts the seconds that the process
computed, which other programs on the machine disturb less; run it with one thread, since waiting threads compute too.
Prints milliseconds and how many times faster than float32, and stores them with the conditions as JSON.
"""

import argparse
import copy
import gc
import importlib.metadata
import json
import logging
import re
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
BATCHES = {
    "cpu": ((1, 32), (1, 128), (8, 128), (32, 64)),
    "cuda": ((1, 32), (1, 128), (8, 128), (32, 128), (128, 128), (256, 128)),
}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
N_WARMUP = 2
RESULT = Path("benchmarks/results/quantization_speed.json")


def torch_ao(model: BertModel) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


def half(model: BertModel, dtype: torch.dtype) -> BertModel:
    return copy.deepcopy(model).to(dtype)


def torchao_da8w8(model: BertModel) -> torch.nn.Module:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = copy.deepcopy(model)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def bitsandbytes(model: BertModel, **settings: Any) -> torch.nn.Module:
    return BertModel.from_pretrained(
        None,
        config=copy.deepcopy(model.config),
        state_dict=model.state_dict(),
        quantization_config=BitsAndBytesConfig(**settings),
        device_map={"": model.device},
        dtype=model.dtype,
    )


Makers = dict[str, Callable[[BertModel], torch.nn.Module]]
ANYWHERE: Makers = {
    "float32": lambda model: model,
    "bfloat16": lambda model: half(model, torch.bfloat16),
    "int8": lambda model: quantize(model, Int8DynamicConfig()),
    "int8 on bfloat16": lambda model: quantize(half(model, torch.bfloat16), Int8DynamicConfig()),
}
MAKERS: dict[str, Makers] = {
    "cpu": ANYWHERE
    | {
        "torch.ao dynamic": torch_ao,
        "torchao da8w8": torchao_da8w8,
        "bitsandbytes 8-bit": lambda model: bitsandbytes(model, load_in_8bit=True),
        "bitsandbytes 4-bit": lambda model: bitsandbytes(model, load_in_4bit=True),
    },
    "cuda": ANYWHERE
    | {
        "float16": lambda model: half(model, torch.float16),
        "torchao da8w8 on bfloat16": lambda model: torchao_da8w8(half(model, torch.bfloat16)),
        "bitsandbytes 8-bit": lambda model: bitsandbytes(half(model, torch.float16), load_in_8bit=True),
        "bitsandbytes 4-bit": lambda model: bitsandbytes(
            half(model, torch.float16), load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16
        ),
    },
}


def make_models(name: str, makers: Makers, device: str) -> tuple[dict[str, torch.nn.Module], dict[str, str]]:
    """All models of a shape, and why some are missing."""
    torch.manual_seed(0)
    base = BertModel(BertConfig(**CONFIGS[name])).eval().to(device)
    models, missing = {}, {}
    for kind, make in makers.items():
        try:
            models[kind] = make(base).eval()
        except (ImportError, RuntimeError, AssertionError) as error:
            missing[kind] = f"{type(error).__name__}: {error}"
    return models, missing


# As pipelines and `Trainer` predict.
@torch.no_grad()
def measure(
    models: dict[str, torch.nn.Module], batch: dict[str, torch.Tensor], n_runs: int, clock: str
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of each forward by model, one of each in turn, and why some failed."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    failed: dict[str, str] = {}

    def tick() -> float:
        if batch["input_ids"].is_cuda:
            torch.cuda.synchronize()
        return CLOCKS[clock]()

    for run in range(-N_WARMUP, n_runs):
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
    is_cuda = arguments.device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if is_cuda else name,
        "processor": name,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "instructions": sorted(flag for flag in flags if "vnni" in flag or "amx" in flag or "bf16" in flag),
        "threads": torch.get_num_threads(),
        "clock": arguments.clock,
        "runs": arguments.runs,
        "int8 kernel": kernel_for(arguments.device).name,
        "attention": "sdpa",
        "versions": versions,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=BATCHES, default="cpu")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--shapes", nargs="+", help="model:BATCHxLENGTH, for example bert-base:8x128 (default: many)")
    parser.add_argument("--models", nargs="+", help="only these beside float32, for example int8 (default: all)")
    parser.add_argument("--result", type=Path)
    arguments = parser.parse_args()
    device = arguments.device
    for shape in arguments.shapes or ():
        if not re.fullmatch(rf"({'|'.join(CONFIGS)}):\d+x\d+", shape):
            parser.error(f"--shapes {shape} is none of {', '.join(CONFIGS)} with a size, such as minilm:8x128")
    for kind in arguments.models or ():
        if kind not in MAKERS[device]:
            parser.error(f"--models {kind!r} is unknown on {device}: give some of {', '.join(MAKERS[device])}")
    chosen = {"float32", *(arguments.models or MAKERS[device])}
    # bitsandbytes logs a line for each layer of each forward.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    found: dict[str, Any] = {"conditions": conditions(arguments), "missing": {}, "shapes": {}}
    print(json.dumps(found["conditions"], indent=1))
    makers = {kind: make for kind, make in MAKERS[device].items() if kind in chosen}
    wanted = arguments.shapes or [f"{model}:{size}x{length}" for model in CONFIGS for size, length in BATCHES[device]]
    for name in CONFIGS:
        shapes = [shape for shape in wanted if shape.startswith(f"{name}:")]
        if not shapes:
            continue
        models, missing = make_models(name, makers, device)
        found["missing"] |= missing
        for shape in shapes:
            size, length = (int(number) for number in shape.partition(":")[2].split("x"))
            ids = torch.randint(1000, 30_000, (size, length), generator=torch.Generator().manual_seed(size)).to(device)
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
    result = arguments.result or (RESULT if device == "cpu" else RESULT.with_stem(f"{RESULT.stem}_{device}"))
    result.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
