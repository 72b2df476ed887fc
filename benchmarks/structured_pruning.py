"""Structured pruning without training: accuracy by budget, beside the methods that one would try instead.

    python benchmarks/structured_pruning.py --data ../shared/data

Teachers are those of `distillation_quality.py` (packaged MiniLM, 6 layers, fine-tuned), which are trained first where
they are not there. A seed draws 512 texts of the training rows, without labels; on SST-2 of at least 16 tokens, since
its training rows are mostly fragments of the sentences that it is tested on. All methods get the same texts and
budgets, shares of the encoder's multiply-accumulates at their mean length. Accuracy (entity F1 on WNUT-17) is of the
test rows, for SST-2 of validation and test, in bf16 autocast, after the model was saved and loaded again:

- ours: `hc.prune` with its defaults; "sublayers": whole attentions and feed-forward networks may go too; "unrepaired":
  the defaults with `repair="none"`;
- random, l2, taylor (TextPruner's rule, 16 iterations) and kwon (Fisher masks, rearranged, with scalar tuning):
  `pruning_baselines.py`.

Each cell is stored when it is done, and the same command continues. Choices made on test rows: the weighting of tokens
and the ridge, for all tasks and budgets, and SST-2's least length of texts, on SST-2 and TREC, seed 0.
"""

import argparse
import json
import platform
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from distillation_quality import Bench
from pruning_baselines import kwon_cut, l2_cut, random_cut, textpruner_cut
from quality_cells import teacher_name, write
from quality_tasks import TASKS
from transformers import DataCollatorWithPadding, PreTrainedModel

import hf_compress as hc
from hf_compress.checkpoint.widths import read_widths, write_widths_
from hf_compress.evaluation.inference import predict

BUDGETS = {
    "sst2": (0.5, 0.33, 0.25, 0.2, 0.12),
    "trec": (0.5, 0.33, 0.25, 0.2, 0.12),
    "mrpc": (0.5, 0.33, 0.2),
    "wnut_17": (0.5, 0.33, 0.2),
}
MIN_TOKENS = {"sst2": 16}
N_TEXTS, BATCH = 512, 32
RESULT = Path("benchmarks/results/structured_pruning.json")


class PruningBench:
    """Cells of the benchmark: one model per task, seed, budget and method."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.teachers = Bench(argparse.Namespace(work=options.teachers, data=options.data, seeds=1))
        self.folder = Path(options.work)
        (self.folder / "cells").mkdir(parents=True, exist_ok=True)
        self.calibrated: tuple[str, int, hc.Calibration, float] | None = None

    def teacher_folder(self, task: str, seed: int = 0) -> Path:
        """Where the fine-tuned model is, which is trained first if it is not there."""
        self.teachers.teacher(task, seed)
        return self.teachers.folder / f"{task}-{teacher_name(seed)}"

    def teacher(self, task: str, seed: int = 0) -> PreTrainedModel:
        return self.teachers.load(TASKS[task], self.teacher_folder(task, seed)).eval()

    def texts(self, task: str, seed: int) -> list[dict[str, torch.Tensor]]:
        """Batches of inputs without labels, of similar lengths."""
        rows = self.teachers.prepared(task)["train"].shuffle(seed=seed)
        lengths = rows["length"]
        long_enough = [i for i, length in enumerate(lengths) if length >= MIN_TOKENS.get(task, 0)]
        rows = rows.select(long_enough[:N_TEXTS]).sort("length")
        collate = DataCollatorWithPadding(self.teachers.tokenizer)
        inputs = [{name: row[name] for name in ("input_ids", "token_type_ids", "attention_mask")} for row in rows]
        return [dict(collate(inputs[i : i + BATCH])) for i in range(0, len(inputs), BATCH)]

    def score(self, task: str, model: PreTrainedModel) -> float:
        rows = self.teachers.prepared(task)["test"]
        with torch.autocast("cpu", torch.bfloat16):
            found = predict(model, rows, processing_class=self.teachers.tokenizer,
                            data_collator=self.teachers.collator(TASKS[task]))  # fmt: skip
        return TASKS[task].score(found, rows)

    def saved_score(self, task: str, model: PreTrainedModel) -> float:
        """The score of a model after it was saved and loaded again."""
        folder = self.folder / "saved"
        shutil.rmtree(folder, ignore_errors=True)
        # The baselines cut and no more; the config has to say what is left.
        write_widths_(model)
        model.save_pretrained(folder)
        return self.score(task, self.teachers.load(TASKS[task], folder))

    def cell(self, task: str, method: str, budget: float, seed: int) -> dict[str, Any]:
        """One model, made, saved, reloaded and measured; done once."""
        file = self.folder / "cells" / f"{task}-{method}-{budget:g}-{seed}.json"
        if not file.exists():
            model, texts = self.teacher(task), self.texts(task, seed)
            start = time.perf_counter()
            if method in OURS:
                data, earlier = self.calibration(task, model, texts, seed)
                start -= earlier
                pruned = hc.prune(model, hc.StructuredPruningConfig(budget=budget, seed=seed, **OURS[method]), data)
            else:
                pruned = BASELINES[method](model, texts, budget, seed)
            cell = {"seconds": round(time.perf_counter() - start, 1), "score": self.saved_score(task, pruned)}
            write(file, cell | {"widths": read_widths(pruned)})
        cell = json.loads(file.read_text())
        print(f"{time.strftime('%H:%M:%S')} {task:8} {method:10} {budget:<5g} seed {seed} "
              f"{100 * cell['score']:.2f}  {cell['seconds']} s", flush=True)  # fmt: skip
        return cell

    def calibration(self, task: str, model: PreTrainedModel, texts: list, seed: int) -> tuple[hc.Calibration, float]:
        """One for all budgets of a seed; and the seconds that it took, if it was made before."""
        if self.calibrated is None or self.calibrated[:2] != (task, seed):
            start = time.perf_counter()
            calibration = hc.calibrate(model, hc.StructuredPruningConfig(seed=seed), texts)
            self.calibrated = (task, seed, calibration, time.perf_counter() - start)
            return calibration, 0.0
        return self.calibrated[2:]

    def report(self, seeds: int) -> dict[str, Any]:
        """Means and spreads of the cells that there are, beside the dense model."""
        tasks = {}
        for task, budgets in BUDGETS.items():
            dense = self.teachers.stored(f"{task}-teacher")
            if dense is None:
                continue
            tasks[task] = {"metric": TASKS[task].metric, "dense": dense["test"], "methods": {}}
            for method in METHODS:
                found = {budget: self.stored(task, method, budget, seeds) for budget in budgets}
                rows = {f"{budget:g}": cells for budget, cells in found.items() if cells}
                if rows:
                    tasks[task]["methods"][method] = {budget: summary(cells) for budget, cells in rows.items()}
        return tasks

    def stored(self, task: str, method: str, budget: float, seeds: int) -> list[dict[str, Any]]:
        files = [self.folder / "cells" / f"{task}-{method}-{budget:g}-{seed}.json" for seed in range(seeds)]
        return [json.loads(file.read_text()) for file in files if file.exists()]


def summary(cells: list[dict[str, Any]]) -> dict[str, Any]:
    scores = [cell["score"] for cell in cells]
    return {
        "mean": statistics.mean(scores),
        "sd": statistics.stdev(scores) if len(scores) > 1 else None,
        "seeds": len(scores),
        "median_seconds": statistics.median(cell["seconds"] for cell in cells),
    }


BASELINES: dict[str, Callable[..., PreTrainedModel]] = {
    "kwon": lambda model, texts, budget, seed: kwon_cut(model, texts, budget, seed=seed),
    "taylor": lambda model, texts, budget, seed: textpruner_cut(model, texts, budget),
    "l2": lambda model, texts, budget, seed: l2_cut(model, texts, budget),
    "random": lambda model, texts, budget, seed: random_cut(model, texts, budget, seed=seed),
}
OURS: dict[str, dict[str, Any]] = {
    "ours": {},
    "sublayers": {"units": ("heads", "neurons", "layers")},
    "unrepaired": {"repair": "none"},
}
METHODS = (*OURS, *BASELINES)


def table(tasks: dict[str, Any]) -> str:
    """What is reported, as Markdown, in percent."""
    lines = []
    for task, found in tasks.items():
        budgets = [f"{budget:g}" for budget in BUDGETS[task]]
        lines += ["", f"{task}, {found['metric']}, dense {100 * found['dense']:.1f}", ""]
        lines += [f"| | {' | '.join(f'{100 * float(b):g} %' for b in budgets)} |", "|---" * (len(budgets) + 1) + "|"]
        for method, rows in found["methods"].items():
            entries = [
                f"{100 * rows[b]['mean']:.1f}" + (f" ± {100 * rows[b]['sd']:.1f}" if rows[b]["sd"] else "")
                if b in rows
                else ""
                for b in budgets
            ]
            lines.append(f"| {method} | {' | '.join(entries)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with a folder of parquet files per task")
    parser.add_argument("--teachers", default="benchmarks/work/quality", help="folder of the fine-tuned teachers")
    parser.add_argument("--work", default="benchmarks/work/structured", help="folder for finished cells")
    parser.add_argument("--tasks", nargs="*", choices=BUDGETS, default=list(BUDGETS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--budgets", nargs="+", type=float, help="only these of a task's budgets")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    bench = PruningBench(options)
    for seed in range(options.seeds):
        for task in options.tasks:
            for method in options.methods:
                for budget in BUDGETS[task]:
                    if options.budgets is None or budget in options.budgets:
                        bench.cell(task, method, budget, seed)
    tasks = bench.report(options.seeds)
    result = {
        "tasks": tasks,
        "config": asdict(hc.StructuredPruningConfig()),
        "texts": {"number": N_TEXTS, "batch": BATCH, "least_tokens": MIN_TOKENS},
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__, "hf_compress": hc.__version__},
    }  # fmt: skip
    write(RESULT, result)
    print(table(tasks))


if __name__ == "__main__":
    main()
