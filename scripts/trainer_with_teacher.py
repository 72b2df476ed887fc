r"""A usual fine-tuning script, and what turns it into a distillation: the three lines marked with +.

    python scripts/trainer_with_teacher.py MODEL DATA OUTPUT [arguments of DistillationArguments]

MODEL is a fine-tuned classifier, DATA a folder with train and validation as csv, json or parquet, with the columns
text and label (numbers). The student has every second layer of the model. On several GPUs:

    accelerate launch --multi_gpu scripts/trainer_with_teacher.py MODEL DATA OUTPUT --bf16
"""

import sys

import numpy as np
from transformers import AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser

import hf_compress as hc
from hf_compress.jobs.data import load_splits


def accuracy(found) -> dict[str, float]:
    return {"accuracy": float((np.argmax(found.predictions, axis=-1) == found.label_ids).mean())}


def main() -> None:
    path, data, output, *words = sys.argv[1:]
    parser = HfArgumentParser(hc.DistillationArguments)
    (args,) = parser.parse_args_into_dataclasses(["--output_dir", output, *words])
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = load_splits(data).map(lambda row: tokenizer(row["text"], truncation=True, max_length=128), batched=True)

    teacher = AutoModelForSequenceClassification.from_pretrained(path)  # +
    n_layers = max(1, teacher.config.num_hidden_layers // 2)
    model = hc.make_student(teacher, hc.StudentConfig(num_layers=n_layers))  # +
    trainer = hc.DistillationTrainer(  # Trainer(
        model=model,
        teacher=teacher,  # +
        args=args,
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        processing_class=tokenizer,
        compute_metrics=accuracy,
    )
    trainer.train()
    print(trainer.evaluate())
    trainer.save_model()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
