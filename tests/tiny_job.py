"""A tiny fine-tuned BERT with its tokenizer, texts it can learn, and a job on both, all written to a folder."""

import json
from pathlib import Path

import pandas
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_compress import DistillationArguments
from hf_compress.jobs.distill import DistillJob

GOOD = ("good", "great", "fine", "lovely", "best")
BAD = ("bad", "poor", "awful", "dull", "worst")
OTHER = tuple("the a film plot was is very quite of in it story cast this that one two with and but".split())
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# Some that no text has, so that a vocabulary can be cut, and others change their numbers.
UNSEEN = ("never", "seen", "anywhere")
VOCABULARY = (*SPECIAL, *UNSEEN, *GOOD, *BAD, *OTHER)
NAMES = ("bad", "good")


def tiny_tokenizer() -> PreTrainedTokenizerBase:
    return BertTokenizer(vocab={word: index for index, word in enumerate(VOCABULARY)})


def save_tiny_bert(folder: Path, model_class=BertForSequenceClassification, layers: int = 3, **config) -> Path:
    """Saves a model with its tokenizer; weights are so large that rows differ, and dropout is on."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 32,
        "initializer_range": 0.3,
    }
    if model_class is not BertModel and "num_labels" not in config:
        config = {"id2label": dict(enumerate(NAMES)), "label2id": {n: i for i, n in enumerate(NAMES)}, **config}
    model: PreTrainedModel = model_class(BertConfig(**{**sizes, **config}))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_texts(n: int, seed: int = 0) -> list[dict]:
    """Rows of a text of 3 to 8 words and its label, 1 where the one telling word is a good one."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    rows = []
    for i in range(n):
        words = [OTHER[draw(len(OTHER))] for _ in range(2 + draw(6))]
        words.insert(draw(len(words) + 1), (BAD, GOOD)[i % 2][draw(len(GOOD))])
        rows.append({"text": " ".join(words), "label": i % 2})
    return rows


def write_rows(path: Path, rows: list[dict]) -> Path:
    """Writes rows in the format of the file's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pandas.DataFrame(rows).to_parquet(path)
    else:
        pandas.DataFrame(rows).to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    return path


def write_data(folder: Path, suffix: str = ".csv", label=lambda row: row["label"]) -> Path:
    """A folder with 24 rows to train on and 16 to test on."""
    for split, n, seed in (("train", 24, 1), ("test", 16, 2)):
        write_rows(folder / f"{split}{suffix}", [{**row, "label": label(row)} for row in tiny_texts(n, seed)])
    return folder


def make_inputs(folder: Path, model: dict | None = None, label=lambda row: row["label"]) -> Path:
    """What `tiny_job` takes: `model` and `data` in a folder."""
    save_tiny_bert(folder / "model", **(model or {}))
    write_data(folder / "data", label=label)
    return folder


def tiny_job(folder: Path, **job) -> DistillJob:
    """A job on what `make_inputs` made."""
    defaults = {
        "model": str(folder / "model"),
        "dataset": str(folder / "data"),
        "student_layers": 1,
        "max_length": 16,
    }
    return DistillJob(**{**defaults, **job})


def tiny_arguments(output: Path, **arguments) -> DistillationArguments:
    """Arguments of a training of six steps with a checkpoint after every second one."""
    defaults = {
        "output_dir": str(output),
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "save_steps": 2,
        "save_total_limit": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return DistillationArguments(**{**defaults, **arguments})


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def model_files(folder: Path) -> dict[str, bytes]:
    """Every file of a saved model, but for its card, which tells times."""
    return {name: content for name, content in files_of(folder).items() if name not in ("README.md", "report.json")}


def students(run: Path) -> dict[str, dict[str, bytes]]:
    """The files of the students in a run's folder."""
    return {name: model_files(run / name) for name in ("student", "student-alone") if (run / name).exists()}


def quality(report: dict) -> list[dict]:
    """The figures of a report that do not depend on the machine."""
    return [model["quality"] for model in report["models"]]
