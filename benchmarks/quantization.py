"""What number formats cost: score, equal decisions and bytes on disk of quantized classifiers, without training.

    python benchmarks/quantization.py --data ../shared/data
    PYTHONPATH=/tmp/torchao python benchmarks/quantization.py --data ../shared/data   # with torchao there

Teachers are those of `distillation_quality.py` (packaged MiniLM, 6 layers, fine-tuned), trained first where they are
not there. Each of three seeds is another teacher, which its quantized models are compared with. For formats with
ranges from data ("static") and for pruned models it also draws 512 texts of the training rows, without labels, as in
`structured_pruning.py`.

A model is saved, loaded by plain `from_pretrained` and then measured on the test rows (SST-2: validation and test), in
float32 and not in autocast; bf16 computes in bf16. Bytes are those of model.safetensors, beside the float32 model: of
the whole file, and of the weights that changed their size, with scales and zero points; a pruned model too is compared
with the dense one. "Equal decisions" are rows that get the class that the float32 model gives them; "error of logits"
is the norm of the difference over the norm of the logits.

Baselines, in their stock settings, task head included: torch.ao's `quantize_dynamic`, which Transformers cannot save,
measured in memory; `BitsAndBytesConfig` by `from_pretrained`; torchao's int8, where it can be imported. An error of a
baseline is the result of its cell.

Each cell is stored when it is done, and the same command continues. `--tasks` without names reports what there is. No
setting was chosen on these rows.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import logging
import platform
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from quality_cells import write
from quality_tasks import TASKS
from quantization_report import goals, report, summary_table, tables
from structured_pruning import MIN_TOKENS, N_TEXTS, PruningBench
from transformers import BitsAndBytesConfig, PreTrainedModel
from unstructured_pruning import tensor_bytes

import hf_compress as hc
from hf_compress.evaluation.inference import Predictions, predict
from hf_compress.modeling.tasks import IGNORED

NAMES = ("trec", "mrpc", "sst2", "stsb", "wnut_17")
BUDGET = 0.33
RESULT = Path("benchmarks/results/quantization.json")


@dataclass(frozen=True)
class Format:
    """How a model is made smaller: pruned or not, and then cast or rounded or not."""

    config: Any = None
    is_pruned: bool = False

    @property
    def is_calibrated(self) -> bool:
        return isinstance(self.config, hc.FixedPointConfig) and self.config.activations is not None


def fixed_4(**settings: Any) -> hc.FixedPointConfig:
    return hc.FixedPointConfig(bits=4, **settings)


def four_bits(kind: str) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind)


LLM_INT8 = BitsAndBytesConfig(load_in_8bit=True)
GROUPS = fixed_4(granularity="group", group_size=32, ranges="mse")
FORMATS = {
    "float32": Format(),
    "bf16": Format(hc.FloatConfig("bf16")),
    "int8": Format(hc.Int8DynamicConfig()),
    "int8-embeddings": Format(hc.Int8DynamicConfig(embeddings=True)),
    "int8-bf16": Format(hc.Int8DynamicConfig(dtype="bf16")),
    "int8-embeddings-bf16": Format(hc.Int8DynamicConfig(embeddings=True, dtype="bf16")),
    "fixed-16-tensor": Format(hc.FixedPointConfig(bits=16, granularity="per_tensor", power_of_two=True)),
    "fixed-16": Format(hc.FixedPointConfig(bits=16, power_of_two=True)),
    "fixed-8": Format(hc.FixedPointConfig(bits=8)),
    "fixed-8-static": Format(hc.FixedPointConfig(bits=8, activations=8, ranges="mse")),
    "fixed-4-groups-mse": Format(GROUPS),
    "fixed-4-groups-minmax": Format(fixed_4(granularity="group", group_size=32)),
    "fixed-4-rows-mse": Format(fixed_4(ranges="mse")),
    "fixed-4-rows-minmax": Format(fixed_4()),
    "nf4": Format(four_bits("nf4")),
    "fp4": Format(four_bits("fp4")),
    "llm-int8": Format(LLM_INT8),
    "pruned": Format(is_pruned=True),
    "pruned-int8": Format(hc.Int8DynamicConfig(), is_pruned=True),
    "pruned-fixed-4": Format(GROUPS, is_pruned=True),
}


class QuantizationBench(PruningBench):
    """Cells of the benchmark: one model per task, format and seed."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.references: dict[tuple[str, int], Predictions] = {}

    def outputs(self, task: str, model: PreTrainedModel) -> Predictions:
        """What a model says of the test rows, without autocast."""
        return predict(
            model,
            self.teachers.prepared(task)["test"],
            processing_class=self.teachers.tokenizer,
            data_collator=self.teachers.collator(TASKS[task]),
        )

    def reference(self, task: str, seed: int) -> Predictions:
        if (task, seed) not in self.references:
            self.references[task, seed] = self.outputs(task, self.teacher(task, seed))
        return self.references[task, seed]

    def pruned(self, task: str, seed: int) -> PreTrainedModel:
        """The model at a third of its multiply-accumulates, saved and reloaded; made once for all formats."""
        folder = self.folder / "pruned" / f"{task}-{seed}"
        if not folder.exists():
            config = hc.StructuredPruningConfig(budget=BUDGET, seed=seed)
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            hc.prune(self.teacher(task, seed), config, self.texts(task, seed)).save_pretrained(partial)
            partial.rename(folder)
        return self.teachers.load(TASKS[task], folder)

    def made(self, task: str, name: str, seed: int) -> PreTrainedModel:
        """One of our own models, in memory."""
        kind = FORMATS[name]
        model = self.pruned(task, seed) if kind.is_pruned else self.teacher(task, seed)
        if kind.config is None:
            return model
        return hc.quantize(model, kind.config, self.texts(task, seed) if kind.is_calibrated else None)

    def saved(self, model: PreTrainedModel) -> Path:
        folder = self.folder / "saved"
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder)
        return folder

    def reloaded(self, task: str, model: PreTrainedModel, seed: int) -> dict[str, Any]:
        """Figures of a model that was saved and loaded again."""
        folder = self.saved(model)
        disk = disk_figures(self.teacher_folder(task, seed), folder)
        return self.figures(task, self.teachers.load(TASKS[task], folder), seed) | {"disk": disk}

    def figures(self, task: str, model: PreTrainedModel, seed: int) -> dict[str, Any]:
        found, reference = self.outputs(task, model), self.reference(task, seed)
        score = TASKS[task].score(found, self.teachers.prepared(task)["test"])
        return {"score": score, "rows": len(found.logits)} | closeness(reference, found)

    def file(self, task: str, name: str, seed: int) -> Path:
        return self.folder / "cells" / f"{task}-{name}-{seed}.json"

    def cell(self, task: str, name: str, seed: int) -> dict[str, Any]:
        """One model, made, saved, reloaded and measured; done once."""
        file = self.file(task, name, seed)
        if not file.exists():
            # What all cells need has to work, before an error counts as that of a baseline.
            self.reference(task, seed)
            if name in BASELINES:
                try:
                    cell = BASELINES[name](self, task, seed)
                except Exception as error:
                    cell = {"error": f"{type(error).__name__}: {error}"}
            else:
                cell = self.reloaded(task, self.made(task, name, seed), seed)
            write(file, cell)
        cell = json.loads(file.read_text())
        shown = cell.get("error") or f"{100 * cell['score']:.2f}, error of logits {cell['logit_error']:.4f}"
        print(f"{time.strftime('%H:%M:%S')} {task:8} {name:22} seed {seed}  {shown}", flush=True)
        return cell

    def stored(self, task: str, name: str, seeds: int) -> list[dict[str, Any]]:
        """The cells that there are, each with the score of the float32 model of its seed."""
        files = [[self.file(task, one, seed) for one in (name, "float32")] for seed in range(seeds)]
        pairs = [[json.loads(file.read_text()) for file in pair] for pair in files if all(map(Path.exists, pair))]
        return [cell | {"float32": float32["score"]} for cell, float32 in pairs]


def closeness(reference: Predictions, found: Predictions) -> dict[str, float | None]:
    """How near the outputs of a model are to those of the float32 one, where there are labels."""
    counts = reference.labels != IGNORED
    exact, other = reference.logits[counts], found.logits[counts]
    is_regression = exact.shape[-1] == 1
    return {
        "agreement": None if is_regression else float((exact.argmax(-1) == other.argmax(-1)).mean()),
        "logit_error": float(np.linalg.norm(other - exact) / np.linalg.norm(exact)),
    }


def disk_figures(float32: Path, folder: Path) -> dict[str, float | int | None]:
    """Bytes of a saved model: in all, over those of the float32 one, and of the weights of other sizes alone."""
    files = [one / "model.safetensors" for one in (float32, folder)]
    before, after = (tensor_bytes(file) for file in files)
    changed = [name for name in before if name.endswith(".weight") and after.get(name) != before[name]]

    def held(module: str) -> int:
        # All that a module has besides its bias: integers, scales, zero points.
        return sum(size for name, size in after.items() if name.startswith(module) and name != f"{module}bias")

    covered = sum(held(name.removesuffix("weight")) for name in changed)
    sizes = [file.stat().st_size for file in files]
    return {
        "bytes": sizes[1],
        "file": sizes[1] / sizes[0],
        "covered": covered / sum(before[name] for name in changed) if changed else None,
    }


def torch_ao(bench: QuantizationBench, task: str, seed: int) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(bench.teacher(task, seed), {torch.nn.Linear}, dtype=torch.qint8)
    return bench.figures(task, model, seed)


def stock(bench: QuantizationBench, task: str, seed: int, config: Any) -> dict[str, Any]:
    """What Transformers does with a config, saved and reloaded by it."""
    folder = bench.teacher_folder(task, seed)
    return bench.reloaded(task, bench.teachers.load(TASKS[task], folder, quantization_config=config), seed)


def torchao(bench: QuantizationBench, task: str, seed: int) -> dict[str, Any]:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return stock(bench, task, seed, transformers.TorchAoConfig(Int8DynamicActivationInt8WeightConfig()))


BASELINES: dict[str, Callable[[QuantizationBench, str, int], dict[str, Any]]] = {
    "torch.ao-int8": torch_ao,
    "torchao-int8": torchao,
    "stock-llm-int8": lambda bench, task, seed: stock(bench, task, seed, LLM_INT8),
    "stock-nf4": lambda bench, task, seed: stock(bench, task, seed, four_bits("nf4")),
    "stock-fp4": lambda bench, task, seed: stock(bench, task, seed, four_bits("fp4")),
}
METHODS = (*FORMATS, *BASELINES)


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with a folder of parquet files per task")
    parser.add_argument("--teachers", default="benchmarks/work/quality", help="folder of the fine-tuned teachers")
    parser.add_argument("--work", default="benchmarks/work/quantization", help="folder for finished cells")
    parser.add_argument("--tasks", nargs="*", choices=NAMES, default=list(NAMES[:4]))
    parser.add_argument("--formats", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    # One line for each layer and forward.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    formats = list(options.formats)
    if "torchao-int8" in formats and importlib.util.find_spec("torchao") is None:
        print("torchao is not installed: its cells are left out.")
        formats.remove("torchao-int8")
    bench = QuantizationBench(options)
    for seed in range(options.seeds):
        for task in options.tasks:
            # What all others are compared with.
            for name in dict.fromkeys(["float32", *formats]):
                bench.cell(task, name, seed)
    tasks = report({task: {name: bench.stored(task, name, options.seeds) for name in METHODS} for task in NAMES})
    for task, found in tasks.items():
        found["metric"] = TASKS[task].metric
    packages = ("torch", "transformers", "bitsandbytes", "torchao")
    result = {
        "tasks": tasks,
        "goals": goals(tasks),
        "formats": {name: repr(kind.config) for name, kind in FORMATS.items()},
        "pruned_to_macs": BUDGET,
        "texts": {"number": N_TEXTS, "least_tokens": MIN_TOKENS},
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
                    "instructions": sorted(name for name, has in torch.cpu.get_capabilities().items() if has is True)},
        "versions": {"python": platform.python_version(), "hf_compress": hc.__version__}
        | {package: version(package) for package in packages},
    }  # fmt: skip
    write(options.result, result)
    print(tables(tasks))
    print(summary_table(tasks, METHODS))


if __name__ == "__main__":
    main()
