"""Single weights pruned: accuracy by sparsity without training, after training, and the bytes on disk.

    python benchmarks/unstructured_pruning.py --data ../shared/data
    python benchmarks/unstructured_pruning.py --data ../shared/data --kinds trained

Teachers and texts are those of `structured_pruning.py`: MiniLM of 6 layers, fine-tuned by `distillation_quality.py`,
and 512 texts of the training rows without labels, drawn by a seed. Weights of the projections inside the blocks become
0 at random, by magnitude, by Wanda and by SparseGPT, without a repair, as their authors have it. "ours" are the
defaults of `UnstructuredPruningConfig`, "magnitude-repaired" is magnitude with the same repair; "-8" is in 8 rounds,
at 80 %. A seed draws the texts and the random scores; magnitude without a repair depends on neither and is one cell.
Accuracy is of the test rows, for SST-2 of validation and test, in bf16 autocast, after the model was saved and loaded
again; bytes are those of the saved file, in float32. The repair was chosen on held-out training rows.

"trained": the teacher's weights go by a cubic schedule in the first 60 % of two epochs of distillation from the
teacher itself, with rows, recipe and learning rate of `pruning_recovery.py`: by magnitude, re-scored as they change
("magnitude"), or in one shot before by SparseGPT in 8 rounds and stay 0 ("sparsegpt"). A seed draws the order of the
rows, and the texts that SparseGPT sees.

Each cell is stored when it is done, and the same command continues.
"""

import argparse
import json
import platform
import shutil
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from pruning_recovery import BATCH, COPIES, EPOCHS, RATE, ROWS, RecoveryBench
from quality_cells import write
from quality_tasks import TASKS
from structured_pruning import MIN_TOKENS, N_TEXTS, PruningBench, summary
from transformers import PreTrainedModel

import hf_compress as hc
from hf_compress.checkpoint.sparse import BITMASK
from hf_compress.pruning.unstructured_config import UnstructuredPruningConfig
from hf_compress.pruning.weight_layers import find_layers

NAMES = ("sst2", "trec")
LEVELS = ("0.5", "0.6", "0.7", "0.8", "2:4")
ROUNDS_AT = "0.8"
METHODS: dict[str, dict[str, Any]] = {
    "random": {"score": "random", "repair": "none"},
    "magnitude": {"score": "magnitude", "repair": "none"},
    "wanda": {"score": "wanda", "repair": "none"},
    "sparsegpt": {"score": "sparsegpt", "repair": "none"},
    "magnitude-repaired": {"score": "magnitude", "repair": "least_squares"},
    "ours": {},
    "wanda-8": {"score": "wanda", "repair": "none", "steps": 8},
    "sparsegpt-8": {"score": "sparsegpt", "repair": "none", "steps": 8},
    "magnitude-repaired-8": {"score": "magnitude", "repair": "least_squares", "steps": 8},
    "ours-8": {"steps": 8},
}
TRAINED = ("magnitude", "sparsegpt")
TRAINED_SPARSITY = 0.8
N_UPDATES = 32
RESULT = Path("benchmarks/results/unstructured_pruning.json")


def levels_of(method: str) -> tuple[str, ...]:
    """The levels that a method is measured at."""
    return (ROUNDS_AT,) if "steps" in METHODS[method] else LEVELS


def seeds_of(method: str, seeds: int) -> range:
    """The seeds that make a difference to a method."""
    return range(1 if method == "magnitude" else seeds)


def config_of(method: str, level: str, seed: int) -> UnstructuredPruningConfig:
    """How a cell is pruned."""
    share = {"pattern": level} if ":" in level else {"sparsity": float(level)}
    return UnstructuredPruningConfig(**share, seed=seed, **METHODS[method])


def tensor_bytes(file: Path) -> dict[str, int]:
    """Bytes of each tensor of a safetensors file, from its header."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    header.pop("__metadata__", None)
    return {name: tensor["data_offsets"][1] - tensor["data_offsets"][0] for name, tensor in header.items()}


def disk_ratios(model: PreTrainedModel, dense: Path, pruned: Path) -> dict[str, float]:
    """Bytes of a saved model beside those of the dense one: of the weights that may be 0, and of the whole file."""
    names = [f"{layer.name}.weight" for layer in find_layers(model)]
    before, after = (tensor_bytes(folder / "model.safetensors") for folder in (dense, pruned))
    weights = sum(after[name] + after.get(name + BITMASK, 0) for name in names) / sum(before[name] for name in names)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (dense, pruned)]
    return {"weights": weights, "file": sizes[1] / sizes[0]}


class OneShotBench(PruningBench):
    """Cells without training: one model per task, method, level and seed."""

    def file(self, task: str, method: str, level: str, seed: int) -> Path:
        return self.folder / "cells" / f"{task}-{method}-{level.replace(':', 'of')}-{seed}.json"

    def cell(self, task: str, method: str, level: str, seed: int) -> dict[str, Any]:
        """One model, made, saved, reloaded and measured; done once."""
        file = self.file(task, method, level, seed)
        if not file.exists():
            config = config_of(method, level, seed)
            model, texts = self.teacher(task), self.texts(task, seed)
            start = time.perf_counter()
            pruned = hc.prune(model, config, texts)
            seconds = round(time.perf_counter() - start, 1)
            write(file, {"seconds": seconds, "sparsity": sparsity(pruned)} | self.measured(task, pruned))
        cell = json.loads(file.read_text())
        print(f"{time.strftime('%H:%M:%S')} {task:5} {method:20} {level:4} seed {seed} {100 * cell['score']:.2f}  "
              f"{cell['seconds']} s, {cell['disk']['weights']:.3f} of the bytes", flush=True)  # fmt: skip
        return cell

    def measured(self, task: str, model: PreTrainedModel) -> dict[str, Any]:
        """Score and bytes of a model after it was saved and loaded again."""
        folder = self.folder / "saved"
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder)
        disk = disk_ratios(model, self.teacher_folder(task), folder)
        return {"score": self.score(task, self.teachers.load(TASKS[task], folder)), "disk": disk}

    def stored(self, task: str, method: str, level: str, seeds: int) -> list[dict[str, Any]]:
        files = [self.file(task, method, level, seed) for seed in seeds_of(method, seeds)]
        return [json.loads(file.read_text()) for file in files if file.exists()]

    def report(self, seeds: int) -> dict[str, Any]:
        """Means and spreads of the cells that there are, beside the dense model, and what they say of the goals."""
        tasks = {}
        for task in NAMES:
            dense = self.teachers.stored(f"{task}-teacher")
            methods: dict[str, Any] = {}
            for method in METHODS:
                for level in levels_of(method):
                    cells = self.stored(task, method, level, seeds)
                    if cells:
                        scores = [cell["score"] for cell in cells]
                        found = summary(cells) | {"scores": scores, "disk": cells[0]["disk"]}
                        methods.setdefault(method, {})[level] = found
            if dense is None or not methods:
                continue
            tasks[task] = {"metric": TASKS[task].metric, "dense": dense["test"], "methods": methods}
            tasks[task]["goals"] = goals(dense["test"], methods)
        return tasks


def sparsity(model: PreTrainedModel) -> float:
    """Share of the weights inside the blocks that are 0."""
    weights = [layer.weight for layer in find_layers(model)]
    return sum((weight == 0).sum().item() for weight in weights) / sum(weight.numel() for weight in weights)


def goals(dense: float, methods: dict[str, Any]) -> dict[str, Any]:
    """Points that were aimed at: the order of the methods, what rounds bring, and the loss at half of the weights."""

    def scores(method: str, level: str) -> list[float]:
        return methods.get(method, {}).get(level, {}).get("scores", [])

    def mean(method: str, level: str) -> float | None:
        found = scores(method, level)
        return 100 * statistics.mean(found) if found else None

    order = [mean(method, "0.7") for method in ("random", "magnitude", "wanda", "sparsegpt")]
    gains = {}
    for method in METHODS:
        if f"{method}-8" in METHODS:
            # Over the seeds that both have.
            pairs = list(zip(scores(f"{method}-8", ROUNDS_AT), scores(method, ROUNDS_AT), strict=False))
            gains[method] = 100 * statistics.mean(often - once for often, once in pairs) if pairs else None
    halves = {method: mean(method, "0.5") for method in ("sparsegpt", "ours")}
    is_ordered = None if None in order else order[0] < order[1] < order[2] <= order[3]
    return {
        "random < magnitude < wanda <= sparsegpt at 70 %": is_ordered,
        "8 rounds over 1 at 80 %, points": gains,
        "below dense at 50 %, points": {
            method: None if half is None else 100 * dense - half for method, half in halves.items()
        },
    }


class TrainedBench(RecoveryBench):
    """Cells with training: the whole model, pruned while it learns from itself as it was."""

    def small(self, task: str, kind: str, seed: int) -> PreTrainedModel:
        """The model before its training."""
        model = self.teacher(task)
        if kind == "magnitude":
            return model
        config = UnstructuredPruningConfig(sparsity=TRAINED_SPARSITY, repair="none", steps=8, seed=seed)
        return hc.prune(model, config, self.texts(task, seed))

    def score(self, task: str, model: PreTrainedModel) -> float:
        if abs(sparsity(model) - TRAINED_SPARSITY) > 1e-3:
            raise RuntimeError(
                f"{sparsity(model):.4f} of the weights are 0 after the training, not what was asked for."
            )
        return super().score(task, model)

    def trainer(self, task: str, kind: str, seed: int, work: Path) -> hc.DistillationTrainer:
        trainer = super().trainer(task, kind, seed, work)
        config = UnstructuredPruningConfig(sparsity=TRAINED_SPARSITY, score="magnitude", seed=seed)
        # What SparseGPT made 0 has the lowest magnitude of all, and stays so.
        schedule = "cubic" if kind == "magnitude" else "constant"
        trainer.add_callback(hc.PruningCallback(config, n_updates=N_UPDATES, schedule=schedule))
        return trainer

    def report(self, seeds: int) -> dict[str, Any]:
        """Means, spreads and retention of the cells that there are."""
        found: dict[str, Any] = {}
        for task in NAMES:
            dense = self.teachers.stored(f"{task}-teacher")
            for kind in TRAINED:
                files = [self.folder / "cells" / f"recovery-{task}-{kind}-{seed}.json" for seed in range(seeds)]
                cells = [json.loads(file.read_text()) for file in files if file.exists()]
                if dense and cells:
                    one = summary(cells)
                    found.setdefault(task, {"dense": dense["test"]})[kind] = one | {
                        "retention": one["mean"] / dense["test"]
                    }
        return found


def table(tasks: dict[str, Any], trained: dict[str, Any]) -> str:
    """What is reported, as Markdown, in percent."""

    def entry(found: dict[str, Any] | None) -> str:
        if found is None:
            return ""
        return f"{100 * found['mean']:.1f}" + (f" ± {100 * found['sd']:.1f}" if found["sd"] is not None else "")

    lines = []
    for task, found in tasks.items():
        lines += ["", f"{task}, {found['metric']}, dense {100 * found['dense']:.1f}", ""]
        lines += [f"| | {' | '.join(LEVELS)} |", "|---" * (len(LEVELS) + 1) + "|"]
        lines += [
            f"| {method} | {' | '.join(entry(rows.get(level)) for level in LEVELS)} |"
            for method, rows in found["methods"].items()
        ]
        disk = {level: row["disk"] for rows in found["methods"].values() for level, row in rows.items()}
        for what in ("weights", "file"):
            shares = [f"{100 * disk[level][what]:.1f}" if level in disk else "" for level in LEVELS]
            lines.append(f"| bytes of the {what} | {' | '.join(shares)} |")
        lines += ["", *(f"- {goal}: {value}" for goal, value in found["goals"].items())]
    for task, found in trained.items():
        kinds = {kind: value for kind, value in found.items() if kind != "dense"}
        lines += ["", f"{task}, trained at {100 * TRAINED_SPARSITY:g} %, dense {100 * found['dense']:.1f}", ""]
        lines += [f"- {kind}: {entry(one)}, retention {100 * one['retention']:.2f} %" for kind, one in kinds.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with a folder of parquet files per task")
    parser.add_argument("--teachers", default="benchmarks/work/quality", help="folder of the fine-tuned teachers")
    parser.add_argument("--work", default="benchmarks/work/unstructured", help="folder for finished cells")
    parser.add_argument("--tasks", nargs="*", choices=NAMES, default=list(NAMES))
    parser.add_argument("--kinds", nargs="*", choices=("one-shot", "trained"), default=["one-shot"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="of one-shot")
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=list(LEVELS), help="of one-shot")
    parser.add_argument("--starts", nargs="+", choices=TRAINED, default=["magnitude"], help="of trained")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    one_shot, trained = OneShotBench(options), TrainedBench(options)
    for seed in range(options.seeds):
        for task in options.tasks:
            for method in options.methods if "one-shot" in options.kinds else ():
                for level in levels_of(method):
                    if seed in seeds_of(method, options.seeds) and level in options.levels:
                        one_shot.cell(task, method, level, seed)
            for kind in options.starts if "trained" in options.kinds else ():
                trained.cell(task, kind, seed)
    tasks, recovered = one_shot.report(options.seeds), trained.report(options.seeds)
    result = {
        "tasks": tasks,
        "trained": recovered,
        "config": asdict(UnstructuredPruningConfig()),
        "texts": {"number": N_TEXTS, "least_tokens": MIN_TOKENS},
        "training": {"sparsity": TRAINED_SPARSITY, "updates": N_UPDATES, "rows": ROWS, "copies": COPIES,
                     "epochs": EPOCHS, "batch": BATCH, "learning_rate": RATE},
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__, "hf_compress": hc.__version__},
    }  # fmt: skip
    write(RESULT, result)
    print(table(tasks, recovered))


if __name__ == "__main__":
    main()
