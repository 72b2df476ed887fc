"""What a report says in its own way for each kind of run."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Report = dict[str, Any]

# Metrics that are shares of something; correlations, for instance, are not.
_SHARES = ("accuracy", "exact_match", "f1", "f1_macro", "f1_micro", "f1_weighted", "seqeval", "token_accuracy")
_COSTS = {
    "macs": "the blocks' MACs",
    "params": "the blocks' parameters",
    "bytes": "the blocks' bytes",
    "latency": "the time of a forward pass",
}
# Steps of a recipe that train.
_TRAINING = ("finetune", "distil", "recover")
# Names of modules in one sentence at most; the report has all.
_NAMES_SHOWN = 8


class Words(NamedTuple):
    """The words of one kind of run.

    Attributes:
        heading (`str`): Of the column between the bytes and the times.
        cell (`Callable`): From a model's entry to what is in that column.
        note (`str`): What that is.
        title (`Callable`): From a report to what it is about.
        made (`Callable`): From a report to what the models were made with.
        settings (`Callable`): From a report to how they were made, one sentence.
        model (`str`): What a model that was made is called.
        advice (`str`): What could be done next.
        data (`str`): How the data set is spoken of below the title; empty where the title names it.
        caption (`str`): What the figures show.
        remarks (`Callable`): From a report to sentences below the table.
        blocks (`Callable`): From a report to tables that are printed as they are.
    """

    heading: str
    cell: Callable[[Report], str]
    note: str
    title: Callable[[Report], str]
    made: Callable[[Report], str]
    settings: Callable[[Report], str]
    model: str
    advice: str
    data: str = ""
    caption: str = ""
    remarks: Callable[[Report], list[str]] = lambda report: []
    blocks: Callable[[Report], list[str]] = lambda report: []


def words_of(report: Report) -> Words:
    """The words for a report.

    Args:
        report (`dict`): As `distill`, `prune_classifier` or `quantize_classifier` returns it.
    """
    if "quantization" in report:
        return _QUANTIZED
    if "pruning" not in report:
        return _DISTILLED
    # Of models in which single weights are 0, which differ in bytes and not in MACs.
    return _SPARSE if "zeros" in report["models"][-1] else _PRUNED


def is_share(metric: str) -> bool:
    """Whether a metric is a share of something, which is shown in percent."""
    return metric in _SHARES


def value_text(metric: str, value: float | None) -> str:
    """A measured value: in percent where it is a share.

    Args:
        metric (`str`): The measure.
        value (`float` or `None`): The value; `None` where it is not defined.
    """
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if is_share(metric) else f"{value:.3f}"


def retention_text(quality: Mapping[str, Any]) -> str:
    """What was kept, in percent, and its interval.

    Args:
        quality (`Mapping`): As `Retention.to_dict` gives it.
    """
    if quality["retention"] is None:
        return "-"
    low, high = quality["retention_interval"]
    # Undefined if the teacher's metric was on any of the resamples.
    interval = "-" if low is None or high is None else f"{100 * low:.1f}, {100 * high:.1f}"
    return f"{100 * quality['retention']:.1f} [{interval}]"


def is_trained(models: Sequence[Report]) -> bool:
    """Whether one of the models of a recipe's run was trained by its step.

    Args:
        models (`Sequence[dict]`): Entries of the report.
    """
    return any(model["step"] in _TRAINING for model in models)


def threads_text(number: int) -> str:
    """So many threads, in words."""
    return f"{number} thread{'s' if number != 1 else ''}"


def rows_text(report: Report) -> str:
    """How many rows a report's models were measured on, and how many of them they may have been trained on."""
    # A run of one step without a training does not count the latter.
    n_in_both = report.get("rows_in_both")
    return f"{report['rows_measured_on']} rows" + (f" ({n_in_both} of them also in train)" if n_in_both else "")


def _macs(model: Report) -> str:
    cost = model["cost"]
    return f"{cost['macs'] / cost['conditions']['batch_size'] / 1e6:.0f} M"


def _zeros(model: Report) -> str:
    return f"{100 * model['zeros']:.1f} %" if "zeros" in model else "-"


def _bits(model: Report) -> str:
    cost = model["cost"]
    return f"{8 * cost['bytes_on_disk'] / cost['parameters']['total']:.1f}"


def _shares(report: Report, what: str) -> str:
    return _series([f"{100 * model[what]:.4g} %" for model in report["models"][1:]])


def _series(words: list[str]) -> str:
    *others, last = words
    return f"{', '.join(others)} and {last}" if others else last


def _settings(what: str) -> Callable[[Report], str]:
    def write(report: Report) -> str:
        return f"{what.capitalize()}: {_values(report[what])}."

    return write


def _values(settings: Report) -> str:
    values = {
        name: " ".join(map(str, value)) if isinstance(value, list) else value for name, value in settings.items()
    }
    return ", ".join(f"{name} {value}" for name, value in values.items() if value not in (None, ""))


def _quantization_settings(report: Report) -> str:
    formats = (f"{name} ({_values(settings)})" for name, settings in report["quantization"].items())
    return f"Quantization: {'; '.join(formats)}; seed {report['job']['seed']}."


def _calibrated(report: Report) -> str:
    return f"calibrated on {report['texts_calibrated_on']} texts"


def _quantized_made(report: Report) -> str:
    return _calibrated(report) if report["texts_calibrated_on"] else "without calibration"


def _kept_in_float(report: Report) -> list[str]:
    """Which modules stayed in floating point, and how that was decided."""
    remarks = []
    for model in report["models"][1:]:
        names = model["kept_in_float"]
        if names:
            rest = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
            shown = ", ".join(names[:_NAMES_SHOWN])
            remarks.append(f"In floating point besides the task head, in {model['name']}: {shown}{rest}.")
    if report["rows_held_out"] is not None:
        known = ", which the model may know by heart" if report["held_out_of"] == "train" else ""
        remarks.append(
            f"Of {report['metric']}, at most {report['job']['max_drop']:g} is lost on {report['rows_held_out']} rows "
            f"of {report['held_out_of']}{known}; none of them is measured here."
        )
    return remarks


_DISTILLED = Words(
    heading="MACs",
    cell=_macs,
    note="MACs per row",
    title=lambda r: f"A {r['job']['student_layers']}-layer student, trained on {r['job']['dataset']}",
    made=lambda report: f"trained on {report['rows_trained_on']}",
    settings=_settings("training"),
    model="student",
    advice="Your own model and data: hf-compress distill --help",
)
_PRUNED = Words(
    heading="MACs",
    cell=_macs,
    note="MACs per row",
    title=lambda report: f"Pruned to {_shares(report, 'budget')} of {_COSTS[report['pruning']['cost']]}",
    made=_calibrated,
    settings=_settings("pruning"),
    model="pruned model",
    advice="To win back what it lost, train it with the dense model as its teacher: DistillationTrainer.",
    data="with texts of",
    caption="Heads and neurons per layer",
)
_SPARSE = _PRUNED._replace(
    heading="zeros",
    cell=_zeros,
    note="zeros: of the weights inside the blocks, stored in fewer bytes",
    title=lambda report: f"{_shares(report, 'zeros')} of the blocks' weights made 0",
    advice="To win back what it lost, train it with the dense model as its teacher: DistillationTrainer, with a "
    "PruningCallback that keeps its zeros.",
    caption="Zeros and output errors per layer",
)
_QUANTIZED = Words(
    heading="bits/weight",
    cell=_bits,
    note="bits/weight: of all files, by parameter",
    title=lambda report: f"Quantized to {_series(list(report['quantization']))}",
    made=_quantized_made,
    settings=_quantization_settings,
    model="quantized model",
    advice="If it lost too much: --max-drop keeps in floating point what costs most; fake_quantize_ and "
    "DistillationTrainer train a model for int8, fixed-point or binary with the dense one as its teacher.",
    data="measured with texts of",
    caption="Quantization",
    remarks=_kept_in_float,
    blocks=lambda report: [report["recommendation"]["table"]] if "recommendation" in report else [],
)
