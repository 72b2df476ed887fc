"""What pruned models recover by distillation from the dense model, beside shallow students of the same training.

    python benchmarks/pruning_recovery.py --data ../shared/data

The dense models are the teachers of `distillation_quality.py`, pruned as in `structured_pruning.py` to shares of the
encoder's multiply-accumulates with 512 unlabelled texts, then trained without labels for two epochs: on the rows of
SST-2, and on TREC's with five noisy copies of each. Students of 3 and 2 layers (50 and 33 % of the
multiply-accumulates) get the same rows, steps, learning rate and recipe: the teacher's outputs at T = 2 and its hidden
states (weight 10) in every layer that is left, frozen token embeddings, no dropout. A seed draws the calibration texts
and the order of the rows. Models are saved, reloaded and measured on the test rows in bf16 autocast; each cell is
stored when it is done, and the same command continues.
"""

import argparse
import json
import platform
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from distillation_quality import COMMON
from quality_cells import read, write
from quality_tasks import TASKS, with_noisy_copies
from structured_pruning import PruningBench
from transformers import PreTrainedModel

import hf_compress as hc
from hf_compress.jobs.stages import train_once

ROWS = {"sst2": 67_349, "trec": 5_452}
COPIES = {"sst2": 0, "trec": 5}
KINDS = {"sst2": ("pruned-0.2", "pruned-0.12", "3-layers", "2-layers"), "trec": ("pruned-0.2", "3-layers", "2-layers")}
EPOCHS, BATCH, RATE = 2, 32, 8e-4
RESULT = Path("benchmarks/results/pruning_recovery.json")


class RecoveryBench(PruningBench):
    """Cells of the benchmark: one trained model per task, kind and seed."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.lessons: dict[str, Any] = {}

    def small(self, task: str, kind: str, seed: int) -> PreTrainedModel:
        """The model before its training."""
        model = self.teacher(task)
        what, size = kind.split("-") if kind.startswith("pruned") else ("student", kind.split("-")[0])
        if what == "student":
            return hc.make_student(model, hc.StudentConfig(num_layers=int(size)))
        data, _ = self.calibration(task, model, self.texts(task, seed), seed)
        return hc.prune(model, hc.StructuredPruningConfig(budget=float(size), seed=seed), data)

    def lesson(self, task: str) -> tuple[Any, hc.TeacherCache]:
        """The rows that every model learns from, and what the dense model says of them."""
        if task not in self.lessons:
            rows = self.teachers.prepared(task)["train"]
            rows = rows.select(range(min(ROWS[task], len(rows))))
            rows = with_noisy_copies(rows, self.teachers.tokenizer, COPIES[task], can_drop=True)
            cache = hc.TeacherCache.build(
                self.folder / f"{task}-cache",
                self.teacher(task),
                rows.sort("length"),
                data_collator=self.teachers.collator(TASKS[task]),
                precision="fp16",
                signals=[f"hidden.encoder.{layer}" for layer in range(1, 7)],
                autocast_dtype=torch.bfloat16,
            )
            self.lessons[task] = rows, cache
        return self.lessons[task]

    def cell(self, task: str, kind: str, seed: int) -> dict[str, float]:
        """One model, made, trained, saved, reloaded and measured; done once."""
        file = self.folder / "cells" / f"recovery-{task}-{kind}-{seed}.json"
        folder = self.folder / f"{task}-{kind}-{seed}"
        if not file.exists():
            start = time.perf_counter()
            train_once(folder, lambda work: self.trainer(task, kind, seed, work))
            model = self.teachers.load(TASKS[task], folder)
            cell = {
                "settings": settings(task),
                "score": self.score(task, model),
                "seconds": round(time.perf_counter() - start, 1),
            }
            write(file, cell)
            shutil.rmtree(folder)
        cell = read(file, settings(task))
        print(f"{time.strftime('%H:%M:%S')} {task} {kind} seed {seed} {100 * cell['score']:.2f}", flush=True)
        return cell

    def trainer(self, task: str, kind: str, seed: int, work: Path) -> hc.DistillationTrainer:
        model = self.small(task, kind, seed)
        model.get_input_embeddings().weight.requires_grad_(False)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        rows, cache = self.lesson(task)
        args = hc.DistillationArguments(
            **COMMON,
            output_dir=str(work),
            num_train_epochs=EPOCHS,
            learning_rate=RATE,
            per_device_train_batch_size=BATCH,
            save_strategy="no",
            seed=seed,
            alpha=1.0,
            temperature=2.0,
            terms=[hc.TermConfig("hidden_mse", weight=10.0)],
        )
        return hc.DistillationTrainer(
            model=model,
            args=args,
            teacher=self.teacher(task),
            teacher_cache=cache,
            train_dataset=rows,
            processing_class=self.teachers.tokenizer,
            data_collator=self.teachers.collator(TASKS[task]),
        )

    def report(self, seeds: int) -> dict[str, Any]:
        """Means, spreads and retention of the cells that there are."""
        found: dict[str, Any] = {}
        for task, kinds in KINDS.items():
            dense = self.teachers.stored(f"{task}-teacher")
            for kind in kinds:
                files = [self.folder / "cells" / f"recovery-{task}-{kind}-{seed}.json" for seed in range(seeds)]
                scores = [json.loads(file.read_text())["score"] for file in files if file.exists()]
                if dense and scores:
                    found.setdefault(task, {"dense": dense["test"]})[kind] = {
                        "mean": statistics.mean(scores),
                        "sd": statistics.stdev(scores) if len(scores) > 1 else None,
                        "seeds": len(scores),
                        "retention": statistics.mean(scores) / dense["test"],
                    }
        return found


def settings(task: str) -> dict[str, Any]:
    """What all models of a task are trained with."""
    return {"rows": ROWS[task], "copies": COPIES[task], "epochs": EPOCHS, "batch": BATCH, "learning_rate": RATE}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with a folder of parquet files per task")
    parser.add_argument("--teachers", default="benchmarks/work/quality", help="folder of the fine-tuned teachers")
    parser.add_argument("--work", default="benchmarks/work/structured", help="folder for finished cells")
    parser.add_argument("--tasks", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS["sst2"], help="only these of a task's models")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    bench = RecoveryBench(options)
    for seed in range(options.seeds):
        for task in options.tasks:
            for kind in KINDS[task]:
                if options.kinds is None or kind in options.kinds:
                    bench.cell(task, kind, seed)
    result = {
        "tasks": bench.report(options.seeds),
        "training": {"rows": ROWS, "copies": COPIES, "epochs": EPOCHS, "batch": BATCH, "learning_rate": RATE},
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__, "hf_compress": hc.__version__},
    }  # fmt: skip
    write(RESULT, result)
    print(json.dumps(result["tasks"], indent=2))


if __name__ == "__main__":
    main()
