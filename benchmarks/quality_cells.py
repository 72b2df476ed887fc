"""The cells of `distillation_quality.py`: what each kind of student chooses from, and where its figures are stored."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from quality_tasks import Plan


class Trial(NamedTuple):
    """What students choose on held-out rows: a learning rate, and how often they read their rows."""

    rate: float
    epochs: int


Score = Callable[[int, Trial], float | None]
"""The held-out figure of seed 0 with a depth and a trial; none where it was not run."""


def choose(plan: Plan, kind: str, depth: int, score: Score) -> Trial | None:
    """The best of a kind's trials on held-out rows; none where one is missing.

    Who reads the same rows again and again overfits them sooner than who reads noisy copies, and may read them less
    often where a plan has `fewer_epochs`: there each depth is searched, and elsewhere two layers take over what three
    chose. From the general start students read them less often without a search, as those without it chose.
    """
    rates = getattr(plan, kind, plan.plain)
    trials = [Trial(rate, epochs) for epochs in _epochs(plan, kind) for rate in rates]
    scores = {trial: score(depth if plan.fewer_epochs else 3, trial) for trial in trials}
    return None if None in scores.values() else max(scores, key=scores.get)


def _epochs(plan: Plan, kind: str) -> list[int]:
    if plan.fewer_epochs is None or kind in ("distilled", "noisy"):
        return [plan.epochs]
    return [plan.fewer_epochs] if kind == "on_general" else [plan.epochs, plan.fewer_epochs]


def teacher_name(seed: int) -> str:
    return f"teacher-{seed}" if seed else "teacher"


def student_name(plan: Plan, kind: str, depth: int, trial: Trial, seed: int) -> str:
    name = f"{kind}-{depth}-{trial.rate:g}-{seed}"
    return name if trial.epochs == plan.epochs else f"{name}-{trial.epochs}-epochs"


def read(file: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """A finished cell.

    Args:
        file (`Path`): Where it is stored.
        settings (`dict`): What it would be made with now.

    Raises:
        SystemExit: if it was made with others.
    """
    cell = json.loads(file.read_text())
    if cell.get("settings") != json.loads(json.dumps(settings)):
        raise SystemExit(
            f"{file} was made with {cell.get('settings')}, and the script now has {settings}: move it away, and it is "
            "made anew."
        )
    return cell


def write(file: Path, content: dict[str, Any]) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.rename(file)
