"""A tiny recipe with every kind of step, and what its run leaves behind."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from transformers import BertForTokenClassification, BertModel

from hf_compress.recipe.recipe import Recipe
from hf_compress.recipe.steps import (
    DataConfig,
    EvaluateStep,
    FinetuneStep,
    MeasureConfig,
    PruneStep,
    QuantizeStep,
    RecoverStep,
    VocabularyStep,
)
from tests.tiny_job import BAD, GOOD, save_tiny_bert, tiny_texts, write_rows

CPU = {"use_cpu": True, "disable_tqdm": True, "save_steps": 2}
FAST = MeasureConfig(batch_sizes=[2, 3], n_runs=1)
# What a repeated measurement changes.
TIMES = {"latency", "seconds", "seconds_of_reference", "peak_rss_bytes", "parts", "latency_conditions"}
# Of what a model costs, that which its weights decide.
COSTS = ("parameters", "bytes_on_disk", "macs")


def tiny_data(folder: Path, n_train: int = 48) -> DataConfig:
    write_rows(folder / "train.csv", tiny_texts(n_train))
    write_rows(folder / "validation.csv", tiny_texts(20, seed=1))
    return DataConfig(str(folder), max_length=12)


def tiny_words(folder: Path) -> DataConfig:
    """Sentences in which good words are labelled B-GOOD and bad ones B-BAD."""
    for name, n, seed in (("train", 48, 0), ("validation", 20, 1)):
        rows = []
        for row in tiny_texts(n, seed):
            words = row["text"].split()
            tags = ["B-GOOD" if word in GOOD else "B-BAD" if word in BAD else "O" for word in words]
            rows.append({"words": words, "tags": tags})
        write_rows(folder / f"{name}.json", rows)
    return DataConfig(str(folder), text_columns=["words"], label_column="tags", max_length=12)


def tiny_recipe(folder: Path, data: DataConfig | None = None, steps: list | None = None, **changes: Any) -> Recipe:
    """Fine-tunes a model without a head, and takes every kind of way to make it small."""
    model = folder / "model"
    if not model.exists():
        save_tiny_bert(model, BertModel)
    data = data or tiny_data(folder / "data")
    default = [
        FinetuneStep(num_train_epochs=2, per_device_train_batch_size=16, learning_rate=1e-2, arguments=CPU),
        VocabularyStep(max_size=36, characters="corpus"),
        PruneStep(budget=0.5, n_texts=32, multiple_of=4),
        RecoverStep(num_train_epochs=2, per_device_train_batch_size=16, augment_copies=1, arguments=CPU),
        EvaluateStep(min_retention=0.1),
        QuantizeStep("int8", {"embeddings": True}),
    ]
    return Recipe(str(model), data, steps or default, measure=FAST, **changes)


def left_behind(output: Path) -> dict[str, Any]:
    """What a run left that does not depend on the clock: weights, and the report without its times."""
    report = json.loads((output / "report.json").read_text())
    steps = [{name: value for name, value in step.items() if name not in TIMES} for step in report["steps"]]
    for step in steps:
        if "cost" in step:
            step["cost"] = {name: step["cost"][name] for name in COSTS}
        for logged in step.get("details", {}).get("losses", []):
            for name in [name for name in logged if "second" in name or "runtime" in name]:
                del logged[name]
    weights = {
        f"{file.parent.name}/{name}": tensor.tolist()
        for file in sorted(output.glob("*/*.safetensors"))
        for name, tensor in load_file(file).items()
    }
    files = sorted(str(path.relative_to(output)) for path in output.rglob("*") if path.is_file())
    return {"steps": steps, "result": report["result"], "weights": weights, "files": files}


__all__ = ["BertForTokenClassification", "left_behind", "tiny_data", "tiny_recipe", "tiny_words"]
