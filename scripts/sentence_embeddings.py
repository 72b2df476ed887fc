r"""A sentence-embedding model made smaller with texts that have no labels at all.

    python scripts/sentence_embeddings.py MODEL TEXTS OUTPUT LAYERS [arguments of DistillationArguments]

MODEL is an encoder whose mean of hidden states is a text's embedding, such as
sentence-transformers/all-MiniLM-L6-v2, TEXTS a file with one text per line, LAYERS the layers of the student. The
student learns to give the same embeddings; in the end, both are compared on the last tenth of the texts.
"""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from torch.nn.functional import cosine_similarity
from transformers import AutoModel, AutoTokenizer, HfArgumentParser

import hf_compress as hc


def embed(model, tokenizer, texts: list[str]) -> torch.Tensor:
    found = []
    for start in range(0, len(texts), 64):
        part = texts[start : start + 64]
        inputs = tokenizer(part, truncation=True, max_length=128, padding=True, return_tensors="pt")
        mask = inputs["attention_mask"][..., None]
        with torch.inference_mode():
            found.append((model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1))
    return torch.cat(found)


def main() -> None:
    path, file, output, n_layers, *words = sys.argv[1:]
    (args,) = HfArgumentParser(hc.DistillationArguments).parse_args_into_dataclasses(["--output_dir", output, *words])
    args.alpha = 1.0
    tokenizer = AutoTokenizer.from_pretrained(path)
    texts = [line for line in Path(file).read_text().splitlines() if line.strip()]
    n_train = len(texts) * 9 // 10
    rows = Dataset.from_dict({"text": texts[:n_train]})
    rows = rows.map(lambda row: tokenizer(row["text"], truncation=True, max_length=128), batched=True)
    teacher = AutoModel.from_pretrained(path)
    student = hc.make_student(teacher, hc.StudentConfig(num_layers=int(n_layers)))
    trainer = hc.DistillationTrainer(student, args, teacher=teacher, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()

    student = AutoModel.from_pretrained(output)
    new = [embed(model.cpu().eval(), tokenizer, texts[n_train:]) for model in (teacher, student)]
    similarity = cosine_similarity(*new).mean()
    print(f"mean cosine similarity of the embeddings of {len(texts) - n_train} new texts: {similarity:.4f}")


if __name__ == "__main__":
    main()
