r"""QLoRA on a model that was pruned first: the pruned weights in 4 bits stay as they are, low-rank adapters learn.

    python scripts/adapters_on_pruned_4bit.py MODEL DATA OUTPUT BUDGET [arguments of TrainingArguments]

MODEL is a fine-tuned classifier, DATA a folder with train and validation that have the columns text and label (ids).
OUTPUT gets `base/`, the pruned model in NF4, and `adapters/`, some hundred kilobytes for each task.
"""

import sys
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

import hf_compress as hc
from hf_compress.jobs.data import load_splits


def main() -> None:
    path, data, output, budget, *words = sys.argv[1:]
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(["--output_dir", output, *words])
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = load_splits(data).map(lambda row: tokenizer(row["text"], truncation=True, max_length=128), batched=True)
    model = AutoModelForSequenceClassification.from_pretrained(path)
    texts = rows["train"].select(range(min(256, len(rows["train"]))))["text"][:]
    batches = [
        tokenizer(texts[i : i + 32], truncation=True, max_length=128, padding=True, return_tensors="pt")
        for i in range(0, len(texts), 32)
    ]
    pruned = hc.prune(model, hc.StructuredPruningConfig(budget=float(budget), multiple_of=64), batches)
    base = hc.quantize(pruned, BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"))
    base.save_pretrained(Path(output) / "base")
    tokenizer.save_pretrained(Path(output) / "base")

    base = AutoModelForSequenceClassification.from_pretrained(Path(output) / "base")
    adapted = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=8, target_modules="all-linear"))
    adapted.print_trainable_parameters()
    trainer = Trainer(
        adapted,
        args,
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        processing_class=tokenizer,
    )
    trainer.train()
    adapted.save_pretrained(Path(output) / "adapters")

    base = AutoModelForSequenceClassification.from_pretrained(Path(output) / "base")
    trainer.model = PeftModel.from_pretrained(base, Path(output) / "adapters")
    print(trainer.evaluate())


if __name__ == "__main__":
    main()
