"""The sentences and tables of a model card, each from figures of a report."""

from collections.abc import Mapping, Sequence
from typing import Any

from hf_compress.hub.card_page import TASKS, Data, shared_limits
from hf_compress.report.words import is_trained, retention_text, rows_text, threads_text, value_text

Report = dict[str, Any]

_DONE = {
    "finetune": "fine-tuned",
    "student": "cut to a student",
    "distil": "distilled",
    "recover": "trained with its unpruned self",
    "prune": "pruned",
    "sparsify": "made sparse",
    "vocabulary": "cut to a smaller vocabulary",
    "quantize": "quantized to {format}",
}
_HEADINGS = ("model", "{metric}", "retention % [95 %]", "params", "MB", "MACs")


def done(steps: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """What was done to a model, in one phrase.

    Args:
        steps (`Sequence[tuple[str, Mapping]]`): The steps and their settings.
    """
    *others, last = dict.fromkeys(_DONE[step].format(format=settings.get("format")) for step, settings in steps)
    return f"{', '.join(others)} and {last}" if others else last


def whose(reference: str) -> str:
    """What follows the name of a measure whose value is that of the model before compression.

    Args:
        reference (`str`): That model's name in the report.
    """
    return f" of the model before compression ({reference})"


def keeps(entry: Report, reference: Report, rows: int, base: str) -> str:
    """The first paragraph: how large a model is, and what it kept.

    Args:
        entry (`dict`): The model's entry of a report.
        reference (`dict`): That of the model before compression.
        rows (`int`): Rows that both were measured on.
        base (`str`): What the model was made of.
    """
    quality, cost = entry["quality"], entry["cost"]
    metric = quality["metric"]
    size = f"{cost['parameters']['total'] / 1e6:.1f} M parameters in {cost['bytes_on_disk'] / 1e6:.1f} MB"
    value = value_text(metric, quality["compressed"])
    first = f"{size}, made of {base} by `hf_compress`. On {rows} rows, its {metric} is {value}"
    if entry["name"] == reference["name"]:
        return f"{first}."
    smaller = reference["cost"]["bytes_on_disk"] / cost["bytes_on_disk"]
    batch, one = next(reversed(entry["latency"].items()))
    retention = "" if quality["retention"] is None else f": {100 * quality['retention']:.1f} % is kept"
    return (
        f"{first}, that of the model before compression {value_text(metric, quality['teacher'])}{retention}. It takes "
        f"{smaller:.1f} times fewer bytes, and batches of {batch} are {1 / one['ratio']:.2f} times as fast."
    )


def run_table(models: Sequence[Report], name: str, metric: str) -> list[tuple[str, ...]]:
    """The models of a recipe's run, up to one.

    Args:
        models (`Sequence[dict]`): Their entries of the report.
        name (`str`): The one that the card is about, which is set in bold.
        metric (`str`): The measure.

    Returns:
        `list[tuple[str, ...]]`: Rows, headings first.
    """
    sizes = list(models[-1]["latency"])
    headings = [heading.format(metric=metric) for heading in _HEADINGS]
    rows = [(*headings, *(f"faster, batch {size}" for size in sizes))]
    for model in models:
        quality, cost = model["quality"], model["cost"]
        cells = (
            model["name"],
            value_text(metric, quality["compressed"]),
            retention_text(quality),
            f"{cost['parameters']['total'] / 1e6:.2f} M",
            f"{cost['bytes_on_disk'] / 1e6:.2f}",
            f"{cost['macs'] / cost['conditions']['batch_size'] / 1e6:.1f} M",
            *(f"{1 / model['latency'][size]['ratio']:.2f}x" for size in sizes),
        )
        rows.append(tuple(f"**{cell}**" for cell in cells) if model["name"] == name else cells)
    return rows


def run_conditions(report: Report, models: Sequence[Report]) -> str:
    """How the models of a recipe's run were measured.

    Args:
        report (`dict`): The report.
        models (`Sequence[dict]`): The entries that are in the table.
    """
    machine, versions, last = report["machine"], report["versions"], models[-1]
    dtypes = sorted({one["dtype"] for model in models for one in model["latency"].values()})
    sizes = " and ".join(last["latency"])
    length = last["latency_conditions"]["sequence_length"]
    names = ", ".join(f"{name} {number}" for name, number in versions.items())
    trained = f"Trained on {report['rows_trained_on']} rows, measured" if is_trained(models) else "Measured"
    return (
        f"{trained} on {rows_text(report)} of the split `{report['split']}`, with one seed "
        f"({report['recipe']['seed']}). MACs are per row of {length} tokens. Faster: ratio of the median latency of "
        f"{report['reference']} to that of the model, run in turn, in batches of {sizes} rows of {length} tokens, "
        f"{'/'.join(dtypes)}, on {machine['device']} ({machine['processor']}), {threads_text(machine['threads'])}. "
        f"Versions: {names}. All figures are of the models saved and loaded again."
    )


def uses(task: str, data: Data, max_length: int, n_texts: int) -> str:
    """What a model is for.

    Args:
        task (`str`): A key of `TASKS`.
        data (`Data`): What it was measured on.
        max_length (`int`): Tokens per row.
        n_texts (`int`): Texts per row.
    """
    rows = "texts" if n_texts == 1 else "pairs of texts"
    return (
        f"{TASKS[task].kind.capitalize().replace('-', ' ')} with {rows} like those of {data.shown}, of at most "
        f"{max_length} tokens, where the model before compression would be used and is too large or too slow. Measure "
        "it on rows of your own before you rely on it."
    )


def limits(
    quality: Mapping[str, Any], data: Data, rows: int, max_length: int, base: str, is_per_row: bool
) -> list[str]:
    """What is not known of a model, and what its figures mean.

    Args:
        quality (`Mapping`): As `Retention.to_dict` gives it.
        data (`Data`): What it was measured on.
        rows (`int`): How many rows of it.
        max_length (`int`): Tokens per row.
        base (`str`): What the model was made of.
        is_per_row (`bool`): Whether it decides once per row.
    """
    decisions = "rows" if is_per_row else "words"
    split = f"the split `{data.split}`" if data.split else "one split"
    found = [
        f"Quality is known for {rows} rows of {split} of {data.shown} alone: not for other data, other languages, or "
        f"texts of more than {max_length} tokens, which were cut.",
        f"Retention is the model's {quality['metric']} divided by that of the model before compression. Its "
        f"{100 * quality['confidence']:.0f} % interval says how far the choice of the rows could have moved it "
        f"({quality['n_bootstrap']} resamples of them). It does not say how far another seed of the training would.",
    ]
    if quality["agreement"] is not None and quality["agreement"] < 1:
        found.append(
            f"On {100 * (1 - quality['agreement']):.1f} % of the {decisions} it decides otherwise than the model "
            "before compression, which the difference of the scores does not show."
        )
    return [*found, *shared_limits(base)]
