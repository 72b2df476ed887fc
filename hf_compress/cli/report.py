"""`hf-compress report`: the page of a recipe's run, or of several beside each other."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_compress.report.tables import print_json, show_text


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs of `hf-compress run`, or their report.json.")],
    output: Annotated[
        Path | None, typer.Option(help="File for the page. By default report.html, or runs.html.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the reports as one JSON document instead.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace the file, if it is there.")] = False,
) -> None:
    """Draw the page of a run anew, or compare several runs on one page.

    \b
    Examples:
      hf-compress report ./small
      hf-compress report ./small ./smaller ./smallest --output compared.html
      hf-compress report ./small --json | jq .small.result
    """
    from hf_compress.report.run_page import PAGE_FILE, run_page

    reports = read_reports(runs)
    if as_json:
        print_json(reports)
        return
    is_own = output is None and len(runs) == 1
    file = output or (_folder(runs[0]) / PAGE_FILE if is_own else Path("runs.html"))
    if file.exists() and not (overwrite or is_own):
        raise ValueError(
            f"There is a file {file} already: give another one by --output, or --overwrite to replace it."
        )
    file.write_text(run_page(reports), encoding="utf-8")
    show_text(f"Wrote {file}.")


def read_reports(runs: list[Path]) -> dict[str, dict[str, Any]]:
    """The reports of runs, by the names of their folders.

    Args:
        runs (`list[Path]`): Folders, or their report.json.

    Returns:
        `dict[str, dict]`: In the given order.

    Raises:
        ValueError: if there is no report of a recipe in one, or two folders have one name.
    """
    reports: dict[str, dict[str, Any]] = {}
    for run in runs:
        file = _folder(run) / "report.json"
        if not file.is_file():
            raise ValueError(f"{run} holds no report.json: give the folder of a finished run of `hf-compress run`.")
        content = json.loads(file.read_text(encoding="utf-8"))
        if content.get("kind") != "recipe":
            raise ValueError(
                f"{file} is the report of another command, whose page is report.md: give a run of `hf-compress run`."
            )
        name = _folder(run).resolve().name
        name = str(run) if name in reports else name
        reports[name] = content
    return reports


def _folder(run: Path) -> Path:
    return run.parent if run.name == "report.json" else run
