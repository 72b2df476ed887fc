"""The figures of `distillation_quality.py`: means and spreads of its cells, the share of the gap closed, a table.

A cell is a task and a depth of the student. Its gap is what a student without distillation lacks of its teacher, and
the share closed is `(distilled - without) / (teacher - without)`, over means of seeds.
"""

import statistics
from collections.abc import Mapping
from typing import Any

SMALLEST_GAP = 0.015


def spread(values: list[float]) -> dict[str, Any]:
    """Mean and standard deviation of the seeds."""
    return {
        "mean": statistics.mean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else None,
        "seeds": len(values),
    }


def compare(teacher: float, kinds: Mapping[str, list[float]]) -> dict[str, Any]:
    """One cell: every kind of student beside the teacher.

    Args:
        teacher: The teacher's metric.
        kinds: The metric of each seed, by the kind of student.

    Returns:
        Mean and spread of each kind, its retention, and for the distilled kinds the share of the gap closed.
    """
    cell: dict[str, Any] = {"teacher": teacher}
    for kind, values in kinds.items():
        cell[kind] = spread(values) | {"retention": statistics.mean(values) / teacher}
    if "plain" not in kinds:
        return cell
    plain = cell["plain"]
    cell["gap"] = teacher - plain["mean"]
    for kind in kinds:
        if kind != "plain":
            gain = cell[kind]["mean"] - plain["mean"]
            # A share of a gap within the noise would mean nothing.
            cell[kind]["gap_closed"] = gain / cell["gap"] if cell["gap"] >= SMALLEST_GAP else None
            cell[kind]["is_worse"] = -gain > (cell[kind]["sd"] or 0.0)
    return cell


def summarise(cells: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the benchmark is to show.

    Args:
        cells: The cells by their names, `task-depth`.

    Returns:
        For each kind that learns from the teacher: the median share of the gap closed, the cells where it is worse
        than no distillation by more than its standard deviation, and the median retention of three layers.
    """
    summary = {}
    for kind in ("distilled", "textbrewer"):
        found = {name: cell[kind] for name, cell in cells.items() if kind in cell}
        closed = [one["gap_closed"] for one in found.values() if one.get("gap_closed") is not None]
        retention = [one["retention"] for name, one in found.items() if name.endswith("-3")]
        summary[kind] = {
            "median_gap_closed": statistics.median(closed) if closed else None,
            "cells_with_gap": len(closed),
            "worse_than_plain": [name for name, one in found.items() if one.get("is_worse")],
            "median_retention_3_layers": statistics.median(retention) if retention else None,
        }
    return summary


def table(cells: Mapping[str, Mapping[str, Any]]) -> str:
    """The cells as a Markdown table, in percent."""

    def entry(cell: Mapping[str, Any], kind: str) -> str:
        if kind not in cell:
            return ""
        sd = cell[kind]["sd"]
        return f"{100 * cell[kind]['mean']:.1f}" + ("" if sd is None else f" ± {100 * sd:.1f}")

    def share(cell: Mapping[str, Any], kind: str, name: str) -> str:
        value = cell.get(kind, {}).get(name)
        return "" if value is None else f"{100 * value:.0f}" if name == "gap_closed" else f"{100 * value:.1f}"

    lines = [
        "| task | metric | layers | teacher | without | without, noisy | general, without | TextBrewer | distilled "
        "| gap closed % | retention % |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells.values():
        kinds = [entry(cell, kind) for kind in ("plain", "noisy", "on_general", "textbrewer", "distilled")]
        shares = [share(cell, "distilled", name) for name in ("gap_closed", "retention")]
        row = [cell["task"], cell["metric"], str(cell["layers"]), f"{100 * cell['teacher']:.1f}", *kinds, *shares]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)
