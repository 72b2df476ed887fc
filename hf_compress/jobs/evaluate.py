"""One saved model measured on labelled rows: what it gets right and what it costs, alone or beside its teacher."""

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import DatasetDict
from transformers import AutoTokenizer

import hf_compress
from hf_compress.checkpoint.config import CompressionConfig
from hf_compress.evaluation.bootstrap import bootstrap_scores, percentile_interval
from hf_compress.evaluation.comparison import decide
from hf_compress.evaluation.cost import measure_cost
from hf_compress.evaluation.latency import compare_latency
from hf_compress.evaluation.retention import retention_from_outputs
from hf_compress.evaluation.sample import sample_batch
from hf_compress.evaluation.scores import LOWER_IS_BETTER, score_of, score_rows
from hf_compress.jobs.data import check_columns, evaluation_split, load_splits
from hf_compress.jobs.fit import check_length, check_tokenizer
from hf_compress.jobs.material import device_of
from hf_compress.jobs.task_data import TEXTS, WORDS, Outputs, TaskData
from hf_compress.jobs.word_labels import check_labelled_words
from hf_compress.modeling.tasks import IGNORED, matching_columns, names_of_labels

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_compress.recipe.steps import DataConfig, MeasureConfig

SCHEMA = 1
CONFIDENCE, N_BOOTSTRAP = 0.95, 10_000
MODEL, TEACHER = "model", "teacher"

Report = dict[str, Any]
Batch = dict[str, torch.Tensor]


def evaluate_model(
    model: str,
    data: "DataConfig",
    measure: "MeasureConfig",
    *,
    teacher: str | None = None,
    seed: int = 0,
    use_cpu: bool = False,
) -> Report:
    """Measures a saved model, and what it kept of another.

    Args:
        model (`str`): A folder, or a name on the Hub; for texts, pairs of texts, or labelled words.
        data (`DataConfig`): The rows; only those of the split to measure on are read.
        measure (`MeasureConfig`): Batches and lengths that times are measured with.
        teacher (`str`, *optional*): The model before it was compressed: a folder or a name, with a tokenizer of its
            own.
        seed (`int`, *optional*, defaults to `0`): Of the resamples, and of the tokens that are timed.
        use_cpu (`bool`, *optional*, defaults to `False`): Leave an accelerator alone.

    Returns:
        `dict`: Plain JSON types. `quality` has the metric's `value` and its bootstrap `interval`; `cost` is that of
        the largest batch; `latency` has an entry for each batch size. With a teacher, `retention` is as
        `Retention.to_dict`, `teacher_cost` is there, and each latency has its `ratio` to the teacher's, their
        forwards taking turns.

    Raises:
        ValueError: if rows, labels, metric, tokenizer or task head do not fit.
    """
    rows = read_rows(data)
    paths = {MODEL: model} if teacher is None else {TEACHER: teacher, MODEL: model}
    device = device_of(use_cpu)
    models = {name: _load(path, rows).to(device) for name, path in paths.items()}
    tokenizers = {name: AutoTokenizer.from_pretrained(path) for name, path in paths.items()}
    compressed = models[MODEL]
    metric = rows.metric(compressed)
    for name, one in models.items():
        check_tokenizer(tokenizers[name], one)
    encoded = {name: rows.encode(rows.test, tokenizers[name], one) for name, one in models.items()}
    ordered = [compressed, *(one for one in models.values() if one is not compressed)]
    length = measure.length or data.max_length
    batches = [sample_batch(ordered, size, length, seed) for size in measure.batch_sizes]
    # Before any rows, since a forward may repack quantized weights, and change what is saved to be weighed.
    costs = {name: _cost(one, paths[name], max(batches, key=_size), measure.n_runs) for name, one in models.items()}
    for name, one in models.items():
        check_length(one, encoded[name])
    latency, conditions = _latency(models, batches, measure.n_runs)
    outputs = {name: rows.outputs(one, tokenizers[name], measure.eval_batch_size) for name, one in models.items()}
    return {
        "schema": SCHEMA,
        "kind": "evaluation",
        "model": model,
        "teacher": teacher,
        "dataset": data.dataset,
        "split": rows.test_split,
        "task": rows.task,
        "metric": metric,
        "rows_measured_on": len(rows.test),
        "quality": score_with_interval(
            outputs[MODEL], rows.kind(compressed), metric, names_of_labels(compressed.config), seed
        ),
        "retention": None if teacher is None else _retention(models, outputs, rows.kind(compressed), metric, seed),
        "needs_hf_compress": isinstance(vars(compressed.config).get("quantization_config"), CompressionConfig),
        "cost": costs[MODEL],
        "teacher_cost": costs.get(TEACHER),
        "latency": latency,
        "latency_conditions": conditions,
        "seed": seed,
        "versions": {"python": platform.python_version(), "hf_compress": hf_compress.__version__},
    }


def read_rows(data: "DataConfig") -> TaskData:
    """The rows to measure on, checked; no others are needed, so `train` may be missing.

    Args:
        data (`DataConfig`): Which.

    Returns:
        `TaskData`: With those rows alone.

    Raises:
        ValueError: if there is no such split, or a column or a value does not fit.
    """
    splits = load_splits(data.dataset, data.dataset_name)
    file = Path(data.dataset).expanduser()
    if file.is_file():
        # A single file is called `train`, which nothing is measured on, but here it was named for that.
        splits = DatasetDict({data.eval_split or file.name: splits["train"]})
        split = next(iter(splits))
    else:
        split = evaluation_split(splits, data.eval_split)
    rows = splits[split]
    has_words = (
        data.label_column in rows.column_names and len(rows) > 0 and isinstance(rows[0][data.label_column], list)
    )
    if has_words:
        check_labelled_words(rows, split, data)
    else:
        check_columns(rows, split, data.text_columns, data.label_column)
    return TaskData(data, WORDS if has_words else TEXTS, rows, rows, split, None)


def score_with_interval(outputs: Outputs, kind: str, metric: str, label_names: list[str], seed: int) -> dict[str, Any]:
    """The metric of one model, and the interval that chance alone would spread it over.

    Args:
        outputs (`Outputs`): Logits and labels, by row or by row and word.
        kind (`str`): A key of `METRICS`.
        metric (`str`): One of its metrics.
        label_names (`list[str]`): Names of the classes in their order.
        seed (`int`): Of the resamples of rows.

    Returns:
        `dict`: `value`, `interval` (`None` where it is undefined), `confidence`, `n_bootstrap`, `seed`.
    """
    decisions, labels = decide(torch.from_numpy(outputs.logits), kind).numpy(), outputs.labels
    if kind == WORDS:
        counts = labels != IGNORED
        names = np.array(label_names, dtype=object) if metric == "seqeval" else np.arange(len(label_names))
        labels, decisions = (
            [names[row[of_row]] for row, of_row in zip(values, counts, strict=True)] for values in (labels, decisions)
        )
    score = score_of(metric, labels, decisions)
    (draws,) = bootstrap_scores([score], len(labels), n_resamples=N_BOOTSTRAP, seed=seed)
    value, interval = score_rows(score, len(labels)), percentile_interval(draws, CONFIDENCE)
    return {
        "metric": metric,
        "higher_is_better": metric not in LOWER_IS_BETTER,
        "value": value if np.isfinite(value) else None,
        "interval": list(interval) if np.isfinite(interval).all() else None,
        "confidence": CONFIDENCE,
        "n_bootstrap": N_BOOTSTRAP,
        "seed": seed,
    }


def _load(path: str, rows: TaskData) -> "PreTrainedModel":
    model, loading = rows.model_class.from_pretrained(path, output_loading_info=True)
    if loading["missing_keys"]:
        raise ValueError(
            f"{path} holds no trained head for {rows.task} (missing: {', '.join(sorted(loading['missing_keys']))}), "
            "so it would be measured with a random one: give a model that was fine-tuned on such rows."
        )
    return model.eval()


def _retention(
    models: Mapping[str, "PreTrainedModel"], outputs: Mapping[str, Outputs], kind: str, metric: str, seed: int
) -> Report:
    """What the model kept of its teacher, whose labels may come in another order."""
    order = matching_columns(models[TEACHER], models[MODEL])
    logits = outputs[TEACHER].logits
    return retention_from_outputs(
        logits if order is None else logits[..., order],
        outputs[MODEL].logits,
        outputs[MODEL].labels,
        metric=metric,
        kind=kind,
        label_names=names_of_labels(models[MODEL].config),
        n_bootstrap=N_BOOTSTRAP,
        confidence=CONFIDENCE,
        seed=seed,
    ).to_dict()


def _cost(model: "PreTrainedModel", path: str, batch: Batch, n_runs: int) -> Report:
    try:
        return measure_cost(model, batch, path=path if Path(path).is_dir() else None, n_runs=n_runs).to_dict()
    except (IndexError, RuntimeError) as error:
        raise ValueError(
            f"{path} cannot read {_size(batch)} texts of length={batch['input_ids'].shape[1]} tokens: {error}. Give "
            "--length at most the number of positions that the model has, 512 for most, or smaller --batch-sizes "
            "where memory is short."
        ) from error


def _latency(models: Mapping[str, "PreTrainedModel"], batches: Sequence[Batch], n_runs: int) -> tuple[Report, Report]:
    """Times by batch size, and the conditions of the last."""
    latency, conditions = {}, {}
    for batch in batches:
        times = compare_latency(models, batch, n_runs=n_runs).to_dict()
        of_teacher = {"ratio": times["ratio"][MODEL], "teacher": times["latency"].get(TEACHER)}
        latency[str(_size(batch))] = times["latency"][MODEL] | (of_teacher if TEACHER in models else {})
        conditions = times["conditions"]
    return latency, conditions


def _size(batch: Batch) -> int:
    return len(batch["input_ids"])
