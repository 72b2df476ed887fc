"""The figures of `quantization.py`: means of its cells, what they say of the goals, and tables."""

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

# Shares of the float32 model's score, from and to.
SCORES = {
    "int8": (0.995, None),
    "int8-embeddings": (0.995, None),
    "int8-bf16": (0.995, None),
    "int8-embeddings-bf16": (0.995, None),
    "fixed-16-tensor": (0.999, 1.001),
    "fixed-16": (0.999, 1.001),
    "fixed-8": (0.99, None),
    "nf4": (0.99, None),
}
# Of the bytes in float32 of the weights that a format covers.
SIZES = {"int8": 0.27, "int8-embeddings": 0.27}


def report(cells: Mapping[str, Mapping[str, list[dict[str, Any]]]]) -> dict[str, Any]:
    """Means and spreads of the cells that there are.

    Args:
        cells: Cells of all seeds, by task and format, each with the score of its own float32 model as "float32". A
            task without a float32 cell is left out.

    Returns:
        By task: the mean float32 score, the number of test rows, and the figures of each format.
    """
    tasks = {}
    for task, formats in cells.items():
        if formats["float32"]:
            found = {name: summary(some) for name, some in formats.items() if some}
            dense = found["float32"]["mean"]
            tasks[task] = {"float32": dense, "rows": formats["float32"][0]["rows"], "formats": found}
    return tasks


def summary(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """One format on one task."""
    errors = [cell["error"] for cell in cells if "error" in cell]
    if errors:
        return {"error": errors[0]}

    def mean(name: str) -> float | None:
        values = [cell[name] for cell in cells]
        return None if None in values else statistics.mean(values)

    found: dict[str, Any] = {"mean": mean("score"), "sd": spread([cell["score"] for cell in cells])}
    kept = [cell["score"] / cell["float32"] for cell in cells]
    found |= {"seeds": len(cells), "retention": statistics.mean(kept), "retention_sd": spread(kept)}
    found |= {"agreement": mean("agreement"), "logit_error": mean("logit_error")}
    return found | {"disk": cells[0].get("disk")}


def spread(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def goals(tasks: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What is aimed at, beside what was found on each task and on average.

    Args:
        tasks: From `report`.

    Returns:
        One entry per goal that something was measured for.
    """

    def values(name: str, figure: Any) -> dict[str, float]:
        found = {task: one["formats"].get(name, {}) for task, one in tasks.items()}
        return {task: figure(one) for task, one in found.items() if "mean" in one}

    def entry(text: str, found: dict[str, float], low: float, high: float | None) -> dict[str, Any]:
        def holds(value: float) -> bool:
            return low <= value and (high is None or value <= high)

        average = statistics.mean(found.values())
        missed = [task for task, value in found.items() if not holds(value)]
        return {"goal": text, "found": found, "mean": average, "mean_holds": holds(average), "missed_on": missed}

    entries = []
    for name, (low, high) in SCORES.items():
        aim = f"at least {100 * low:g} %" if high is None else f"{100 * low:g} to {100 * high:g} %"
        found = values(name, lambda one: one["retention"])
        if found:
            entries.append(entry(f"{name} keeps {aim} of the score", found, low, high))
    for name, most in SIZES.items():
        found = values(name, lambda one: one["disk"]["covered"])
        if found:
            entries.append(entry(f"{name} takes at most {most:g} of the covered bytes", found, 0.0, most))
    return entries


def tables(tasks: Mapping[str, Any]) -> str:
    """All figures, as one Markdown table per task, and the goals."""
    lines = []
    for task, found in tasks.items():
        rows = found["rows"]
        lines += ["", f"{task}, {found['metric']}, {rows} rows: one of them is {100 / rows:.2f} points", ""]
        lines += ["| | score | retention % | equal decisions % | error of logits | MB | file | covered |"]
        lines += ["|---" * 8 + "|"]
        for name, one in found["formats"].items():
            if "error" in one:
                lines.append(f"| {name} | {error_of(one)} | | | | | | |")
                continue
            disk = one["disk"] or {}
            entries = [
                percent(one["mean"], one["sd"], 2),
                percent(one["retention"], one["retention_sd"], 2),
                "" if one["agreement"] is None else f"{100 * one['agreement']:.2f}",
                f"{one['logit_error']:.4f}",
                f"{disk['bytes'] / 1e6:.1f}" if disk else "not saved",
                f"{disk['file']:.3f}" if disk else "",
                f"{disk['covered']:.3f}" if disk.get("covered") else "",
            ]
            lines.append(f"| {name} | {' | '.join(entries)} |")
    lines += ["", "Goals", ""]
    for goal in goals(tasks):
        found = ", ".join(f"{task} {value:.4f}" for task, value in goal["found"].items())
        missed = f"; missed on {', '.join(goal['missed_on'])}" if goal["missed_on"] else ""
        verdict = "holds" if goal["mean_holds"] else "does not hold"
        lines.append(f"- {goal['goal']}: {found}; mean {goal['mean']:.4f}, which {verdict}{missed}")
    return "\n".join(lines)


def summary_table(tasks: Mapping[str, Any], names: Iterable[str]) -> str:
    """Retention by format and task beside the size of the file, as Markdown.

    Args:
        tasks: From `report`.
        names: The formats, in the order of the rows.
    """
    lines = ["", f"| retention % | {' | '.join(tasks)} | size of the file |", "|---" * (len(tasks) + 2) + "|"]
    for name in names:
        found = [one["formats"].get(name) for one in tasks.values()]
        if not any(found):
            continue
        disks = [one["disk"]["file"] for one in found if one and one.get("disk")]
        entries = [retention_of(one) for one in found]
        lines.append(f"| {name} | {' | '.join(entries)} | {f'{disks[0]:.2f}' if disks else ''} |")
    return "\n".join(lines)


def percent(mean: float, sd: float | None, digits: int) -> str:
    return f"{100 * mean:.{digits}f}" + (f" ± {100 * sd:.{digits}f}" if sd is not None else "")


def retention_of(one: Mapping[str, Any] | None) -> str:
    if one is None or "error" in one:
        return "" if one is None else "error"
    return percent(one["retention"], one["retention_sd"], 1)


def error_of(one: Mapping[str, Any]) -> str:
    """The first line of an error, short enough for a table."""
    line = one["error"].splitlines()[0]
    return line if len(line) <= 80 else f"{line[:77]}..."
