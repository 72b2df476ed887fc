"""Sentence embeddings for `distillation_quality.py`: a shallow MiniLM learns from the whole one, on texts alone.

Nothing is fine-tuned: the teacher is all-MiniLM-L6-v2 as packaged. The students learn for one epoch from the training
sentences of STS-B, TREC and MRPC without their labels, at one learning rate that was not searched for. They are
measured by Spearman's correlation of the cosine with STS-B's test scores, beside the same students as they were cut:
without labels there is nothing else to compare with.
"""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from quality_tasks import letters
from transformers import PreTrainedModel

import hf_compress as hc
from hf_compress.evaluation.inference import batches, inference
from hf_compress.evaluation.scores import score_of, score_rows
from hf_compress.jobs.data import load_splits, tokenize

SOURCES = {"stsb": ("sentence1", "sentence2"), "trec": ("text",), "mrpc": ("sentence1", "sentence2")}
MAX_LENGTH = 64
RATE = 8e-4


def sentences(data: Path, tokenizer: Any) -> Dataset:
    """The training sentences, each once, without those of STS-B's validation and test rows, however printed."""
    scored = load_splits(str(data / "stsb"))
    texts_of = [scored[name][column] for name in ("validation", "test") for column in SOURCES["stsb"]]
    seen = {letters(text) for texts in texts_of for text in texts}
    texts = []
    for name, columns in SOURCES.items():
        train = load_splits(str(data / name))["train"]
        texts += [text for column in columns for text in train[column] if letters(text) not in seen]
    rows = Dataset.from_dict({"text": list(dict.fromkeys(texts))}).shuffle(seed=0)
    return tokenize(rows, tokenizer, ["text"], [0] * len(rows), MAX_LENGTH).remove_columns("labels")


def embeddings(model: PreTrainedModel, texts: list[str], tokenizer: Any) -> torch.Tensor:
    """Mean of the last hidden states, `(texts, width)`."""
    rows = tokenize(Dataset.from_dict({"text": texts}), tokenizer, ["text"], [0] * len(texts), MAX_LENGTH)
    found = []
    with inference(model):
        for batch in batches(rows.remove_columns("labels"), [model], processing_class=tokenizer):
            hidden = model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None].float()
            found.append((hidden.float() * mask).sum(1) / mask.sum(1))
    return torch.cat(found)


def similarity_score(model: PreTrainedModel, data: Path, split: str, tokenizer: Any) -> float:
    """Spearman's correlation between the cosine of two sentences and STS-B's score."""
    rows = load_splits(str(data / "stsb"))[split]
    first, second = (embeddings(model, list(rows[column]), tokenizer) for column in SOURCES["stsb"])
    cosine = torch.nn.functional.cosine_similarity(first, second)
    return score_rows(score_of("spearmanr", rows["label"], cosine.numpy()), len(rows))


def cut_score(base: PreTrainedModel, depth: int, data: Path, tokenizer: Any) -> float:
    """The score of a student before it learns."""
    return similarity_score(hc.make_student(base, hc.StudentConfig(num_layers=depth)), data, "test", tokenizer)


def imitate(
    base: PreTrainedModel, student: hc.StudentConfig, rows: Dataset, tokenizer: Any, work: Path, common: dict[str, Any]
) -> hc.DistillationTrainer:
    """The trainer of a student: cosine to the teacher's embeddings, and its hidden states."""
    model = hc.make_student(base, student)
    model.get_input_embeddings().weight.requires_grad_(False)
    args = hc.DistillationArguments(
        **common,
        output_dir=str(work),
        num_train_epochs=1,
        per_device_train_batch_size=32,
        learning_rate=RATE,
        alpha=1.0,
        terms=[hc.TermConfig("hidden_mse", weight=10.0)],
    )
    return hc.DistillationTrainer(model=model, args=args, teacher=base, train_dataset=rows, processing_class=tokenizer)
