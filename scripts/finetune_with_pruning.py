r"""A usual fine-tuning script that ends with a smaller model: one callback prunes while the model learns.

    python scripts/finetune_with_pruning.py MODEL DATA OUTPUT BUDGET [arguments of TrainingArguments]

MODEL is any encoder, DATA a folder with train and validation that have the columns text and label (ids), BUDGET
the share of the multiply-accumulates that may be left, such as 0.5. Heads and neurons are switched off step by step
during the first 60 % of the training, and cut out in the end; the saved model loads with plain `from_pretrained`.
"""

import sys

from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

import hf_compress as hc
from hf_compress.jobs.data import label_names, load_splits


def main() -> None:
    path, data, output, budget, *words = sys.argv[1:]
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(["--output_dir", output, *words])
    tokenizer = AutoTokenizer.from_pretrained(path)
    splits = load_splits(data)
    rows = splits.map(lambda row: tokenizer(row["text"], truncation=True, max_length=128), batched=True)
    names = label_names(splits["train"], "label")
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=len(names))
    config = hc.StructuredPruningConfig(budget=float(budget), score="fisher")
    trainer = Trainer(
        model,
        args,
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        processing_class=tokenizer,
        callbacks=[hc.PruningCallback(config, n_batches=4)],
    )
    before = model.num_parameters()
    trainer.train()
    print(f"{before} parameters became {trainer.model.num_parameters()}; {trainer.evaluate()}")
    trainer.save_model()


if __name__ == "__main__":
    main()
