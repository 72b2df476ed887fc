"""Text classifiers for the jobs: loaded with a trained head, and measured side by side."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForSequenceClassification, DataCollatorWithPadding

from hf_compress.checkpoint.config import CompressionConfig
from hf_compress.evaluation.comparison import decide
from hf_compress.evaluation.cost import measure_cost
from hf_compress.evaluation.files import weight_files
from hf_compress.evaluation.inference import predict
from hf_compress.evaluation.latency import compare_latency
from hf_compress.evaluation.retention import METRICS, score_retention
from hf_compress.evaluation.scores import score_of, score_rows
from hf_compress.jobs.data import class_names
from hf_compress.modeling.tasks import problem_type

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

COST_BATCH = 32
# What a model that was not compressed is called in a table.
DENSE = "dense"


class Yardstick(NamedTuple):
    """What models are measured on and by.

    Attributes:
        rows (`Dataset`): Tokenized, with labels.
        tokenizer (`PreTrainedTokenizerBase`): Pads them.
        metric (`str`): What quality is.
        batch_size (`int`): Rows per batch when quality is measured.
        seed (`int`): Of the resamples.
        cost_batch (`int`, *optional*, defaults to `COST_BATCH`): Rows per batch when costs are measured.
    """

    rows: Dataset
    tokenizer: "PreTrainedTokenizerBase"
    metric: str
    batch_size: int
    seed: int
    cost_batch: int = COST_BATCH


def load_classifier(path: str, has_new_head: bool = False, **options: Any) -> "PreTrainedModel":
    """A model for sequence classification.

    Args:
        path (`str`): A folder, or a name on the Hub.
        has_new_head (`bool`, *optional*, defaults to `False`): Whether its head may be untrained.
        **options: Further arguments of `from_pretrained`.

    Returns:
        `PreTrainedModel`: In evaluation mode.

    Raises:
        ValueError: if the head was never trained and must be.
    """
    load = AutoModelForSequenceClassification.from_pretrained
    model, loading = load(path, output_loading_info=True, **options)
    if loading["missing_keys"] and not has_new_head:
        raise ValueError(
            f"{path} holds no trained task head (missing: {', '.join(sorted(loading['missing_keys']))}), so it has "
            "nothing to keep. Give a fine-tuned model; hf-compress distill fine-tunes it on these data first with "
            "--teacher-epochs 3."
        )
    return model


def head_options(path: str, labels: Sequence[str] | None, is_per_text: bool = True) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a head that fits the labels.

    Args:
        path (`str`): A folder, or a name on the Hub. If it has a head for these classes, that stays.
        labels (sequence of `str` or `None`): Classes of the data; `None` for numbers.
        is_per_text (`bool`, *optional*, defaults to `True`): Whether texts are labelled, and not their words.

    Returns:
        `dict`: By name.
    """
    names = ["value"] if labels is None else class_names(labels, AutoConfig.from_pretrained(path))
    options: dict[str, Any] = {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
        # A head for other classes is replaced by a new one, whatever the old one was trained for.
        "ignore_mismatched_sizes": True,
    }
    if is_per_text:
        options["problem_type"] = "regression" if labels is None else "single_label_classification"
    return options


def known_metrics(kind: str, num_labels: int) -> list[str]:
    """The metrics that fit a model's outputs.

    Args:
        kind (`str`): What the outputs are: a key of `METRICS`.
        num_labels (`int`): How many there are.
    """
    return [name for name in METRICS[kind] if name != "f1" or num_labels == 2]


def choose_metric(name: str | None, model: "PreTrainedModel") -> str:
    """What quality is measured by.

    Args:
        name (`str` or `None`): A metric, or none.
        model (`PreTrainedModel`): The model to compress.

    Returns:
        `str`: The metric; by default accuracy, or pearsonr for regression.

    Raises:
        ValueError: if the metric does not fit the model's outputs.
    """
    kind = problem_type(model.config)
    metric = name or ("pearsonr" if kind == "regression" else "accuracy")
    known = known_metrics(kind, model.config.num_labels)
    if metric not in known:
        raise ValueError(
            f"metric={metric!r} does not fit a model with {model.config.num_labels} outputs ({kind}): "
            f"choose one of {', '.join(known)}."
        )
    return metric


def load_all(paths: Mapping[str, str], device: torch.device) -> dict[str, "PreTrainedModel"]:
    """Saved models, as others will load them.

    Args:
        paths (`Mapping[str, str]`): Folders or names on the Hub, by what the models are called.
        device (`torch.device`): Where to.

    Returns:
        `dict[str, PreTrainedModel]`: By the same names.
    """
    load = AutoModelForSequenceClassification.from_pretrained
    return {name: load(path).to(device) for name, path in paths.items()}


def measure_all(
    models: Mapping[str, "PreTrainedModel"], paths: Mapping[str, str], yardstick: Yardstick
) -> dict[str, Any]:
    """Measures models side by side; the first is what the others are compared with.

    Args:
        models (`Mapping[str, PreTrainedModel]`): As `load_all` returns them.
        paths (`Mapping[str, str]`): Where they were loaded from.
        yardstick (`Yardstick`): What to measure on.

    Returns:
        `dict`: What every report holds: `rows_measured_on`, `metric`, `latency` and `models`.
    """
    batch = cost_batch(yardstick)
    latency = compare_latency(models, batch)
    first = next(iter(models))
    rows = []
    for name, model in models.items():
        cost = measure_cost(model, batch, path=paths[name] if weight_files(paths[name]) else None)
        quality = score(models[first], model, yardstick)
        needs_plugin = isinstance(vars(model.config).get("quantization_config"), CompressionConfig)
        rows.append({"name": name, "quality": quality, "cost": cost.to_dict(), "needs_hf_compress": needs_plugin})
    return {
        "rows_measured_on": len(yardstick.rows),
        "metric": yardstick.metric,
        "latency": latency.to_dict(),
        "models": rows,
    }


def cost_batch(yardstick: Yardstick) -> dict[str, torch.Tensor]:
    """The batch that costs are measured on: the first rows, padded to the longest of them.

    Args:
        yardstick (`Yardstick`): The rows.

    Returns:
        `dict[str, torch.Tensor]`: Inputs, without labels.
    """
    n_rows = min(yardstick.cost_batch, len(yardstick.rows))
    sample = yardstick.rows.select(range(n_rows)).remove_columns(["labels", "length"])
    return dict(DataCollatorWithPadding(yardstick.tokenizer)(list(sample)))


def score_alone(model: "PreTrainedModel", yardstick: Yardstick) -> float:
    """The metric of one model.

    Args:
        model (`PreTrainedModel`): The model.
        yardstick (`Yardstick`): What to measure on.

    Returns:
        `float`: Higher is better.
    """
    found = predict(model, yardstick.rows, processing_class=yardstick.tokenizer, batch_size=yardstick.batch_size)
    decisions = decide(torch.from_numpy(found.logits), problem_type(model.config)).numpy()
    return score_rows(score_of(yardstick.metric, found.labels, decisions), len(decisions))


def score(first: "PreTrainedModel", second: "PreTrainedModel", yardstick: Yardstick) -> dict[str, Any]:
    """What a model kept of another.

    Args:
        first (`PreTrainedModel`): What it is compared with.
        second (`PreTrainedModel`): The model.
        yardstick (`Yardstick`): What to measure on.

    Returns:
        `dict`: As `Retention.to_dict` gives it.
    """
    kept = score_retention(
        first,
        second,
        yardstick.rows,
        yardstick.metric,
        processing_class=yardstick.tokenizer,
        batch_size=yardstick.batch_size,
        seed=yardstick.seed,
    )
    return kept.to_dict()
