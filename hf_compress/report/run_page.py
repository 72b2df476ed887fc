"""The report of a recipe's run: report.json, report.md, and report.html, a page that needs nothing but itself."""

import json
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import jinja2

from hf_compress.report.files import write_whole
from hf_compress.report.report import plain_numbers
from hf_compress.report.run_figures import draw_run
from hf_compress.report.tables import page_table, show_table, show_text
from hf_compress.report.tradeoff import draw_tradeoffs, models_of
from hf_compress.report.words import is_trained, retention_text, rows_text, threads_text, value_text

Report = dict[str, Any]
Entry = dict[str, Any]

REPORT_FILE, PAGE_FILE, TEXT_FILE = "report.json", "report.html", "report.md"


def write_run_report(report: Report, folder: Path) -> None:
    """Writes `report.md`, `report.html`, and last, because it marks the run as finished, `report.json`.

    Args:
        report (`dict`): As `compress` returns it.
        folder (`Path`): The run's folder.
    """
    texts = {TEXT_FILE: run_markdown(report), PAGE_FILE: run_page({title_of(report): report})}
    texts[REPORT_FILE] = json.dumps(plain_numbers(report), indent=2, allow_nan=False) + "\n"
    for name, text in texts.items():
        write_whole(folder / name, text)


def run_page(reports: Mapping[str, Report]) -> str:
    """One page for one run or several: tables, figures, and what the figures mean in words.

    Args:
        reports (`Mapping[str, dict]`): Reports of recipes' runs, by what each is called.

    Returns:
        `str`: HTML with its styles and figures inside.
    """
    template = (Path(__file__).parent / "report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["code"] = _with_code
    runs = [
        {
            "name": name,
            "summary": summary(report),
            "rows": run_table_rows(report),
            "notes": notes(report),
            "conditions": conditions(report),
            "result": report["result"],
            "figures": draw_run(report),
        }
        for name, report in reports.items()
    ]
    heading = next(iter(reports)) if len(reports) == 1 else f"{len(reports)} runs compared"
    return environment.from_string(template).render(
        heading=heading,
        runs=runs,
        compared=compared_rows(reports) if len(reports) > 1 else [],
        figures=draw_tradeoffs(reports),
    )


def _with_code(text: str) -> str:
    """The text as HTML, with what stands between backticks as code."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))


def compared_rows(reports: Mapping[str, Report]) -> list[tuple[str, ...]]:
    """The finished models of several runs as texts, headings first.

    Args:
        reports (`Mapping[str, dict]`): Reports of recipes' runs, by what each is called.

    Returns:
        `list[tuple[str, ...]]`: A row for each run: what its table says of its result, or "-" where it has none, and
        the seconds of all of its steps.
    """
    found: dict[str, dict[str, str]] = {}
    for name, report in reports.items():
        (_, metric, *headings), *rows = run_table_rows(report)
        row = next((cells for cells in rows if cells[0] == report["result"]), None)
        found[name] = {}
        if row is not None:
            step, value, *cells = row[:-2]
            found[name] |= {"result": step, "quality": f"{value} {metric}"}
            found[name] |= zip(headings[:-2], cells, strict=True)
        found[name]["seconds in all"] = f"{sum(entry['seconds'] or 0 for entry in models_of(report)):.0f}"
    columns = list(dict.fromkeys(column for row in found.values() for column in row))
    columns.sort(key=lambda column: column == "seconds in all")
    return [("run", *columns), *((name, *(row.get(column, "-") for column in columns)) for name, row in found.items())]


def run_table_rows(report: Report) -> list[tuple[str, ...]]:
    """The table of a run as texts, headings first: a row for each model.

    Args:
        report (`dict`): Of a recipe's run.

    Returns:
        `list[tuple[str, ...]]`: Step, metric, retention with its interval, parameters, megabytes, multiply-accumulates
        per row, speed at each batch size, seconds, and their ratio to the teacher's training.
    """
    models = models_of(report)
    sizes = sorted(models[0]["latency"], key=int)
    headings = ["step", report["metric"], "retention % [95 %]", "params", "MB", "MACs"]
    headings += [f"faster, {size} rows" for size in sizes] + ["seconds", "of teacher"]
    rows = [tuple(headings)]
    for entry in models:
        quality, cost = entry["quality"], entry["cost"]
        rows.append(
            (
                entry["name"],
                value_text(report["metric"], quality["compressed"]),
                "-" if entry["name"] == report["reference"] else retention_text(quality),
                f"{cost['parameters']['total'] / 1e6:.2f} M",
                f"{cost['bytes_on_disk'] / 1e6:.2f}",
                f"{cost['macs'] / cost['conditions']['batch_size'] / 1e6:.0f} M",
                *(f"{1 / entry['latency'][size]['ratio']:.2f}x" for size in sizes),
                "-" if entry["seconds"] is None else f"{entry['seconds']:.0f}",
                "-" if entry["seconds_of_reference"] is None else f"{entry['seconds_of_reference']:.2f}",
            )
        )
    return rows


def title_of(report: Report) -> str:
    """What a run is called: its model, its data and its steps.

    Args:
        report (`dict`): Of a recipe's run.
    """
    steps = " > ".join(entry["step"] for entry in report["steps"] if entry["step"] != "model")
    data = Path(report["recipe"]["data"]["dataset"]).name
    return f"{Path(report['recipe']['model']).name} on {data}: {steps}"


def summary(report: Report) -> str:
    """What was gained and lost, in one sentence.

    Args:
        report (`dict`): Of a recipe's run.
    """
    models = {entry["name"]: entry for entry in models_of(report)}
    first = models[report["reference"]]
    if report["result"] is None:
        return "No model passed the gates of the recipe."
    last = models[report["result"]]
    kept = last["quality"]["retention"]
    size = _times(first["cost"]["bytes_on_disk"] / last["cost"]["bytes_on_disk"], "smaller", "larger")
    macs = _times(first["cost"]["macs"] / last["cost"]["macs"], "fewer", "more")
    times = ", ".join(
        f"{_times(1 / one['ratio'], 'faster', 'slower')} at {rows} rows" for rows, one in last["latency"].items()
    )
    share = "an undefined share" if kept is None else f"{100 * kept:.1f} %"
    before, after = (value_text(report["metric"], one["quality"]["compressed"]) for one in (first, last))
    return (
        f"{last['name']} kept {share} of {report['metric']} ({before} became {after}), is {size} on disk, "
        f"has {macs} multiply-accumulates, and is {times}."
    )


def _times(ratio: float, better: str, worse: str) -> str:
    return f"{ratio:.1f}x {better}" if ratio >= 1 else f"{1 / ratio:.1f}x {worse}"


def notes(report: Report) -> list[str]:
    """What else there is to know of a run, in sentences.

    Args:
        report (`dict`): Of a recipe's run.
    """
    found = []
    if report["stopped_by"]:
        found.append(f"Stopped at {report['stopped_by']['step']}: {report['stopped_by']['reason']}.")
    for entry in models_of(report):
        if names := entry.get("details", {}).get("kept_in_float"):
            found.append(f"{entry['name']} left in floating point, besides the task head: {', '.join(names)}.")
    last = next((entry for entry in models_of(report) if entry["folder"] == report["result"]), None)
    if report["result"] and last is not None:
        needs = "loads after `import hf_compress`" if last["needs_hf_compress"] else "is a stock checkpoint"
        found.append(f"The result is in {report['result']}, and {needs}.")
    return found


def conditions(report: Report) -> str:
    """Under which the figures were measured, in a sentence or two.

    Args:
        report (`dict`): Of a recipe's run.
    """
    one = models_of(report)[0]["latency_conditions"]
    machine, versions = report["machine"], report["versions"]
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    trained = f", trained on {report['rows_trained_on']}" if is_trained(models_of(report)) else ""
    return (
        f"Quality on {rows_text(report)} of {report['split']}{trained}; 95 % intervals by a paired "
        "bootstrap over these rows. Times are medians, in turn with the first model, of batches of "
        f"{one['sequence_length']} tokens, {machine['device']} ({machine['processor']}), "
        f"{threads_text(machine['threads'])}; {named}. MACs per row. All figures are of the models saved and loaded "
        "again."
    )


def run_markdown(report: Report) -> str:
    """The report as a page of Markdown.

    Args:
        report (`dict`): Of a recipe's run.
    """
    table = page_table(run_table_rows(report))
    parts = (f"# {title_of(report)}", summary(report), table, *notes(report), conditions(report))
    return "\n\n".join(parts) + "\n"


def show_run(report: Report, folder: Path) -> None:
    """Shows a run's table on the terminal, and where its pages are.

    Args:
        report (`dict`): Of a recipe's run.
        folder (`Path`): The run's folder.
    """
    headings, *rows = run_table_rows(report)
    show_table(headings, rows)
    for text in (summary(report), *notes(report), conditions(report)):
        show_text(text)
    show_text(f"All figures: {folder / PAGE_FILE}, {folder / TEXT_FILE}, {folder / REPORT_FILE}")
