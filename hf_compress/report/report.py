"""What a run found: one table for the terminal and for report.md, and report.json with every figure."""

import json
import math
from pathlib import Path
from typing import Any

from hf_compress.report.files import write_whole
from hf_compress.report.tables import page_table, show_table
from hf_compress.report.words import is_share, retention_text, rows_text, threads_text, value_text, words_of

HEADINGS = ("model", "{metric}", "retention % [95 %]", "params", "MB", "{work}", "faster")


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Writes `report.md`, and last, because it marks the run as finished, `report.json`.

    Args:
        report (`dict`): As `distill`, `prune_classifier` or `quantize_classifier` returns it.
        folder (`Path`): The run's folder.
    """
    write_whole(folder / "report.md", markdown(report))
    write_whole(folder / "report.json", json.dumps(plain_numbers(report), indent=2, allow_nan=False) + "\n")


def plain_numbers(value: Any) -> Any:
    """The same, with `None` for every number that JSON does not know.

    Args:
        value: Plain JSON types, and numbers that are not finite.
    """
    if isinstance(value, dict):
        return {name: plain_numbers(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_numbers(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table of a report as texts, headings first.

    Args:
        report (`dict`): As `distill`, `prune_classifier` or `quantize_classifier` returns it.

    Returns:
        `list[tuple[str, ...]]`: One row per model; the first is what the others are compared with.
    """
    words = words_of(report)
    rows = [tuple(heading.format(metric=report["metric"], work=words.heading) for heading in HEADINGS)]
    for position, model in enumerate(report["models"]):
        quality, cost, name = model["quality"], model["cost"], model["name"]
        rows.append(
            (
                name,
                value_text(quality["metric"], quality["compressed"]),
                retention_text(quality) if position else "-",
                f"{cost['parameters']['total'] / 1e6:.1f} M",
                f"{cost['bytes_on_disk'] / 1e6:.1f}",
                words.cell(model),
                f"{1 / report['latency']['ratio'][name]:.2f}x",
            )
        )
    return rows


def gain(report: dict[str, Any]) -> str:
    """What the teacher was worth, in one sentence: the student beside the same student trained alone.

    Args:
        report (`dict`): As `distill`, `prune_classifier` or `quantize_classifier` returns it.

    Returns:
        `str`: The difference and its interval; empty where no student was trained alone.
    """
    if report["gain"] is None:
        return ""
    metric, (low, high) = report["metric"], report["gain"]["difference_interval"]
    values = (report["gain"]["difference"], low, high)
    if None in values:
        return f"The difference in {metric} that the teacher made is not defined on these rows."
    scale, digits, unit = (100, 1, " points") if is_share(metric) else (1, 3, "")
    difference, low, high = (f"{scale * value:+.{digits}f}" for value in values)
    return f"Difference in {metric} that the teacher made: {difference}{unit}, 95 % interval [{low}, {high}]."


def conditions(report: dict[str, Any]) -> str:
    """Under which the figures of a report were measured, in one sentence.

    Args:
        report (`dict`): As `distill`, `prune_classifier` or `quantize_classifier` returns it.

    Returns:
        `str`: Rows, device, threads, dtype, batch, sequence length and versions.
    """
    words = words_of(report)
    c = report["latency"]["conditions"]
    first = next(iter(report["latency"]["latency"].values()))
    dtypes = {latency["dtype"] for latency in report["latency"]["latency"].values()}
    return (
        f"Quality on {rows_text(report)}, {words.made(report)}; {words.note}; faster: "
        f"ratio of median latencies, interleaved (the first took {1000 * first['median_s']:.0f} ms), "
        f"of a batch of {c['batch_size']} rows of {c['sequence_length']} tokens, {'/'.join(sorted(dtypes))}, "
        f"{c['device']} ({c['processor']}), {threads_text(c['threads'])}, torch {c['torch_version']}, "
        f"transformers {c['transformers_version']}. "
        "All figures are of the models saved and loaded again."
    )


def title(report: dict[str, Any]) -> str:
    """What a report is about.

    Args:
        report (`dict`): As `distill`, `prune_classifier` or `quantize_classifier` returns it.

    Returns:
        `str`: A heading.
    """
    return words_of(report).title(report)


def markdown(report: dict[str, Any]) -> str:
    """The report as a page.

    Args:
        report (`dict`): As `distill`, `prune_classifier` or `quantize_classifier` returns it.

    Returns:
        `str`: Markdown.
    """
    words = words_of(report)
    data = f", {words.data} `{report['job']['dataset']}`" if words.data else ""
    parts = (
        f"# {title(report)}",
        f"Of `{report['job']['model']}`{data}.",
        page_table(table_rows(report)),
        *(f"![{caption(report)}: {name}]({figure})" for name, figure in figures(report).items()),
        gain(report),
        *words.remarks(report),
        conditions(report),
        *(f"```text\n{block}\n```" for block in words.blocks(report)),
        words.settings(report),
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def figures(report: dict[str, Any]) -> dict[str, str]:
    """Files of the figures that belong to a report, beside it: by model, or by what they show.

    Args:
        report (`dict`): As `distill`, `prune_classifier` or `quantize_classifier` returns it.
    """
    return {model["name"]: model["figure"] for model in report["models"] if "figure" in model} | report.get(
        "figures", {}
    )


def caption(report: dict[str, Any]) -> str:
    """What the figures of a report show.

    Args:
        report (`dict`): As `prune_classifier` or `quantize_classifier` returns it.
    """
    return words_of(report).caption


def show_report(report: dict[str, Any], folder: str | Path) -> None:
    """Shows the table on the terminal, and what to type next.

    Args:
        report (`dict`): As `distill`, `prune_classifier` or `quantize_classifier` returns it.
        folder (`str` or `Path`): The run's folder.
    """
    from rich.console import Console

    # Names and paths may hold brackets, which rich would take for its markup.
    console = Console(markup=False, highlight=False)
    folder = Path(folder)
    headings, *rows = table_rows(report)
    show_table(headings, rows)
    for remark in (gain(report), *words_of(report).remarks(report)):
        if remark:
            console.print(remark)
    console.print(conditions(report), style="dim")
    console.print(f"\nAll figures: {folder / 'report.json'}, {folder / 'report.md'}", soft_wrap=True)
    if figures(report):
        drawn = ", ".join(str(folder / figure) for figure in figures(report).values())
        console.print(f"{caption(report)}: {drawn}", soft_wrap=True)
    made = report["models"][1]
    words = words_of(report)
    needs_plugin = made["needs_hf_compress"]
    loads = "loads after `import hf_compress`" if needs_plugin else "is a stock checkpoint and needs no plug-in"
    console.print(f"What next? The {words.model} {loads}:\n")
    code = f"from transformers import pipeline\nclassify = pipeline('text-classification', '{folder / made['name']}')"
    console.print("import hf_compress\n" * needs_plugin + code, style="bold", soft_wrap=True)
    console.print(f"\n{words.advice}", soft_wrap=True)
