"""Facts and tables for a terminal, as plain lines for a pipe, which other programs read, and for a page."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

_GAP = "  "
_NUMERIC = "+-0123456789"
_EMPTY = (None, "", False, [], {})


def show_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Shows names and values, one pair a line.

    Args:
        facts (sequence of `tuple[str, str]`): Pairs; a value may be of any length.
    """
    width = max(len(name) for name, _ in facts)
    console = _console()
    for name, value in facts:
        if console.is_terminal:
            console.print(Text.assemble((name.ljust(width), "bold"), _GAP, value), soft_wrap=True)
        else:
            typer.echo(f"{name.ljust(width)}{_GAP}{value}".rstrip())


def show_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Shows a table: with rules on a terminal, as aligned words in a pipe.

    Args:
        headings (sequence of `str`): Of the columns. Those of numbers, but for the first, are aligned to the right.
        rows (sequence of sequences of `str`): Cells, at least one row. Columns without any word are left out.
    """
    columns = [cells for cells in zip(headings, *rows, strict=True) if any(cells[1:])]
    headings, *rows = zip(*columns, strict=True)
    is_right = [number > 0 and all(cell[:1] in _NUMERIC for cell in cells[1:]) for number, cells in enumerate(columns)]
    console = _console()
    if console.is_terminal:
        table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
        for heading, right in zip(headings, is_right, strict=True):
            table.add_column(Text(heading), justify="right" if right else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)
        return
    typer.echo()
    widths = [max(map(len, cells)) for cells in columns]
    for row in (headings, *rows):
        cells = zip(row, widths, is_right, strict=True)
        line = _GAP.join(cell.rjust(width) if right else cell.ljust(width) for cell, width, right in cells)
        typer.echo(line.rstrip())


def page_table(rows: Sequence[Sequence[str]]) -> str:
    """A table for a page of Markdown.

    Args:
        rows (sequence of sequences of `str`): Cells, headings first.
    """
    headings, *others = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (headings, ["---"] * len(headings), *others))


def show_text(text: str = "") -> None:
    """Shows a sentence.

    Args:
        text (`str`, *optional*): By default an empty line.
    """
    console = _console()
    if console.is_terminal:
        console.print(Text(text), soft_wrap=True)
    else:
        typer.echo(text)


def print_json(content: Any) -> None:
    """Prints one JSON document, without colours.

    Args:
        content (`Any`): Plain JSON types.
    """
    typer.echo(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False))


def megabytes(n_bytes: int) -> str:
    """Bytes in units of 10^6, of few bytes with more digits.

    Args:
        n_bytes (`int`): Bytes.
    """
    digits = 1 if n_bytes >= 1e7 else 2 if n_bytes >= 1e5 else 4
    return f"{n_bytes / 1e6:.{digits}f}"


def in_words(settings: Mapping[str, Any]) -> str:
    """Settings in a few words; those that are empty or off are left out.

    Args:
        settings (`Mapping[str, Any]`): Plain JSON types by name.
    """
    return ", ".join(f"{name} {_word(value)}" for name, value in settings.items() if value not in _EMPTY)


def _word(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"({in_words(value)})"
    return " ".join(map(_word, value)) if isinstance(value, list) else str(value)


def _console() -> Console:
    # Names and paths may hold brackets, which rich would take for its markup.
    return Console(markup=False, highlight=False)
