"""Weights of one bit: what a classifier keeps that was trained for them, with a teacher and without.

    python benchmarks/quantized_training.py --data ../shared/data

The teacher is that of `distillation_quality.py` on SST-2 (packaged MiniLM, 6 layers, fine-tuned). All projections
inside its blocks get weights of one bit, and inputs of 8, 4, 2 and at last 1 bit, each stage from the weights of the
one before, as in Liu et al., "BiT" (2022). Task head and embeddings stay in floating point; the token embeddings are
not trained. "distilled" learns from the teacher's outputs and its hidden states (weight 10) in every layer, without
labels; "labels" has the same stages, steps and learning rate, and labels alone, "labels-slowly" a quarter of that
rate; "untrained" is rounded and no more. A seed draws the order of the rows, and the texts that scales are fitted to.

Measured at 4 bits ("W1A4") and at 1 ("W1A1"), after a model was quantized, saved and loaded again by plain
`from_pretrained`: accuracy of validation and test rows in float32, and bytes. "held_out" are training rows that
nothing learned from; a setting may be chosen on them. Stages are stored, and the same command continues.
"""

import argparse
import json
import platform
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from distillation_quality import COMMON
from quality_cells import write
from quality_tasks import TASKS
from quantization import disk_figures
from safetensors.torch import load_file
from structured_pruning import PruningBench, summary
from transformers import PreTrainedModel

import hf_compress as hc
from hf_compress.evaluation.inference import predict
from hf_compress.jobs.stages import last_checkpoint

TASK = "sst2"
# Bits of the inputs -> steps.
STAGES = {8: 600, 4: 1600, 2: 600, 1: 1600}
MEASURED = (4, 1)
# Kinds of models -> their learning rate.
KINDS = {"untrained": 0.0, "distilled": 8e-4, "labels": 8e-4, "labels-slowly": 2e-4}
BATCH = 64
N_FIT = 8  # batches of texts that scales are fitted to
GOALS = {4: 0.96, 1: 0.92}
RESULT = Path("benchmarks/results/quantized_training.json")


class BinaryBench(PruningBench):
    """Cells of the benchmark: a chain of stages per kind and seed, measured at some of them."""

    def chain(self, kind: str, seed: int) -> None:
        """All stages of a kind, measured where that is to be done; each done once."""
        texts = self.texts(TASK, seed)[:N_FIT]
        before, seconds = None, 0.0
        for bits in STAGES:
            if kind != "untrained":
                folder = self.folder / f"{kind}-{seed}-{bits}"
                self.stage(folder, before, texts, bits, kind, seed)
                seconds += json.loads((folder / "seconds.json").read_text())["seconds"]
                before = folder
            if bits in MEASURED:
                self.cell(kind, bits, seed, before, texts, seconds)

    def student(self, texts: list, bits: int) -> PreTrainedModel:
        model = self.teacher(TASK)
        hc.fake_quantize_(model, hc.BinaryConfig(activations=bits), texts)
        return model

    def stage(self, folder: Path, before: Path | None, texts: list, bits: int, kind: str, seed: int) -> None:
        """One training; its tensors, and the seconds that it took, stay."""
        if folder.exists():
            return
        model = self.student(texts, bits)
        if before is not None:
            load_(model, before)
            hc.set_activation_bits_(model, bits, texts)
        model.get_input_embeddings().weight.requires_grad_(False)
        work = folder.with_suffix(".training")
        trainer = self.trainer(model, work, bits, kind, seed)
        start = time.perf_counter()
        checkpoint = last_checkpoint(work)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        partial = folder.with_suffix(".partial")
        trainer.model.save_pretrained(partial)
        write(partial / "seconds.json", {"seconds": round(time.perf_counter() - start, 1)})
        partial.rename(folder)
        shutil.rmtree(work)

    def trainer(self, model: PreTrainedModel, work: Path, bits: int, kind: str, seed: int) -> hc.DistillationTrainer:
        lesson: dict[str, Any] = {
            "alpha": 1.0,
            "temperature": 1.0,
            "terms": [hc.TermConfig("hidden_mse", weight=10.0)],
        }
        args = hc.DistillationArguments(
            **COMMON,
            output_dir=str(work),
            max_steps=STAGES[bits],
            learning_rate=KINDS[kind],
            per_device_train_batch_size=BATCH,
            save_steps=0.25,
            save_total_limit=1,
            # Each stage sees other rows first.
            seed=1000 * seed + bits,
            **(lesson if kind == "distilled" else {"alpha": 0.0}),
        )
        return hc.DistillationTrainer(
            model=model,
            args=args,
            teacher=self.teacher(TASK),
            train_dataset=self.teachers.prepared(TASK)["train"],
            processing_class=self.teachers.tokenizer,
            data_collator=self.teachers.collator(TASKS[TASK]),
        )

    def cell(
        self, kind: str, bits: int, seed: int, folder: Path | None, texts: list, seconds: float
    ) -> dict[str, Any]:
        """One model, quantized, saved, reloaded and measured; done once."""
        file = self.folder / "cells" / f"{kind}-{bits}-{seed}.json"
        if not file.exists():
            model = self.student(texts, bits)
            if folder is not None:
                load_(model, folder)
            saved = self.folder / "saved"
            shutil.rmtree(saved, ignore_errors=True)
            hc.quantize(model.eval(), hc.BinaryConfig(activations=bits)).save_pretrained(saved)
            found = self.teachers.load(TASKS[TASK], saved)
            cell = {split: self.accuracy(found, split) for split in ("held_out", "test")}
            disk = disk_figures(self.teacher_folder(TASK), saved)
            write(file, {"score": cell["test"], "held_out": cell["held_out"], "seconds": seconds, "disk": disk})
        cell = json.loads(file.read_text())
        shown = f"{100 * cell['score']:.2f}, held out {100 * cell['held_out']:.2f}, {cell['seconds']:.0f} s"
        print(f"{time.strftime('%H:%M:%S')} W1A{bits} {kind} seed {seed} {shown}", flush=True)
        return cell

    def accuracy(self, model: PreTrainedModel, split: str) -> float:
        rows = self.teachers.prepared(TASK)[split]
        collator = self.teachers.collator(TASKS[TASK])
        found = predict(model, rows, processing_class=self.teachers.tokenizer, data_collator=collator)
        return TASKS[TASK].score(found, rows)

    def report(self, seeds: int) -> dict[str, Any]:
        """Means and spreads of the cells that there are, and the share of the teacher's accuracy."""
        dense = self.teachers.stored(f"{TASK}-teacher")
        assert dense is not None
        found: dict[str, Any] = {"teacher": dense["test"]}
        for bits in MEASURED:
            for kind in KINDS:
                files = [self.folder / "cells" / f"{kind}-{bits}-{seed}.json" for seed in range(seeds)]
                cells = [json.loads(file.read_text()) for file in files if file.exists()]
                if cells:
                    one = summary(cells) | {"covered_bytes": cells[0]["disk"]["covered"]}
                    one["retention"] = one["mean"] / dense["test"]
                    one["held_out"] = [cell["held_out"] for cell in cells]
                    found.setdefault(f"W1A{bits}", {})[kind] = one
        return found


def load_(model: PreTrainedModel, folder: Path) -> None:
    """Takes the tensors of a stage; `from_pretrained` does not know the learned scales."""
    model.load_state_dict(load_file(folder / "model.safetensors"))


def table(found: dict[str, Any]) -> str:
    lines = ["| | seeds | accuracy % | retention % | covered bytes | minutes |", "|" + "---|" * 6]
    lines.append(f"| teacher | | {100 * found['teacher']:.2f} | | | |")
    for bits in MEASURED:
        for kind, one in found.get(f"W1A{bits}", {}).items():
            spread = "" if one["sd"] is None else f" ± {100 * one['sd']:.2f}"
            cells = (
                f"W1A{bits}, {kind}",
                str(one["seeds"]),
                f"{100 * one['mean']:.2f}{spread}",
                f"{100 * one['retention']:.1f}",
                f"1 / {1 / one['covered_bytes']:.1f}",
                f"{one['median_seconds'] / 60:.0f}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with a folder of parquet files per task")
    parser.add_argument("--teachers", default="benchmarks/work/quality", help="folder of the fine-tuned teachers")
    parser.add_argument("--work", default="benchmarks/work/binary", help="folder for finished stages and cells")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    bench = BinaryBench(options)
    for seed in range(options.seeds):
        for kind in options.kinds:
            bench.chain(kind, seed)
    found = bench.report(options.seeds)
    result = {
        "task": TASK,
        "found": found,
        "goals": {f"W1A{bits}": goal for bits, goal in GOALS.items()},
        "training": {"stages": STAGES, "batch": BATCH, "learning_rates": KINDS},
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__, "hf_compress": hc.__version__},
    }  # fmt: skip
    write(RESULT, result)
    print(table(found))


if __name__ == "__main__":
    main()
