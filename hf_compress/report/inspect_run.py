"""What the folder of a run holds, and which run a saved model comes from: read from the files that runs write."""

import json
from pathlib import Path
from typing import Any

import yaml

# As in `hf_compress.jobs.stages`, which takes seconds to import, since it trains.
REPORT_FILE, RUN_FILE = "report.json", "run.json"
RECIPE_FILE = "recipe.yaml"
_MADE_BY = "hf-compress"
# What a report without a kind says of itself -> the command that wrote it.
_COMMANDS = {"training": "distill", "pruning": "prune", "quantization": "quantize"}

Report = dict[str, Any]


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run of `hf-compress`, finished or not.

    Args:
        folder (`Path`): Any folder.
    """
    return _read_run(folder) is not None or _read_report(folder) is not None


def inspect_run(folder: Path) -> Report:
    """What a run did so far.

    Args:
        folder (`Path`): Its folder.

    Returns:
        `dict`: `command`, `is_finished`, `model` and `dataset` that it began with, `metric`, `reference`, `result`
        (the finished model's folder, relative; `None` if there is none), `stopped_by`, and `steps`: each with `name`,
        `folder`, `value` of the metric, `retention`, `bytes`, `macs`, `latency_ratio`, `needs_hf_compress`, `passed`
        and `reason`, `None` where not known.

    Raises:
        ValueError: if a file of the run is damaged.
    """
    report, run = _read_report(folder), _read_run(folder) or {}
    if report is None:
        steps = [_unfinished(folder, name) for name in run["stages"]]
        made = [step for step in steps if step["is_done"] and step["folder"]]
        settings = run["settings"]
        is_recipe = run.get("kind") == "recipe"
        return {
            "command": "run" if is_recipe else None,
            "is_finished": False,
            "model": settings.get("model"),
            "dataset": settings.get("data", {}).get("dataset") if is_recipe else settings.get("dataset"),
            "metric": None,
            "reference": None,
            "result": made[-1]["folder"] if made else None,
            "stopped_by": None,
            "steps": steps,
        }
    is_recipe = report.get("kind") == "recipe"
    return (_recipe_run if is_recipe else _command_run)(report) | {"is_finished": True}


def origin_of(folder: Path) -> Report | None:
    """Which recipe a saved model comes from, where a file in its folder or beside it tells.

    Args:
        folder (`Path`): Of the saved model.

    Returns:
        `dict` or `None`: `file`; `model` that it began with; and `steps` up to this one, each a dict of the step's
        name and its settings.

    Raises:
        ValueError: if such a file is damaged.
    """
    folder = folder.resolve()
    for place in (folder, folder.parent):
        file = place / RECIPE_FILE
        if place == folder and file.is_file():
            return _of_yaml(file)
        found = _of_report(place, folder.name, is_own=place == folder) or _of_run(place, folder.name)
        if found is not None:
            return found
        if file.is_file():
            return _of_yaml(file)
    return None


def _recipe_run(report: Report) -> Report:
    return {
        "command": "run",
        "model": report["recipe"].get("model"),
        "dataset": report["recipe"].get("data", {}).get("dataset"),
        "metric": report["metric"],
        "reference": report["reference"],
        "result": report["result"],
        "stopped_by": report["stopped_by"],
        "steps": [_line(step) | {"is_done": True} for step in report["steps"]],
    }


def _command_run(report: Report) -> Report:
    """Of a run of one step: its models take the place of steps."""
    ratios = report["latency"]["ratio"]
    models = [model | {"ratio": ratios[model["name"]]} for model in report["models"]]
    # The first is what the others are compared with, and may be somewhere else.
    steps = [_line(model, folder=model["name"] if number else None) for number, model in enumerate(models)]
    return {
        "command": next(command for key, command in _COMMANDS.items() if key in report),
        "model": report["job"]["model"],
        "dataset": report["job"]["dataset"],
        "metric": report["metric"],
        "reference": models[0]["name"],
        # Further ones are variants, or what the first is compared with.
        "result": models[1]["name"],
        "stopped_by": None,
        "steps": [step | {"is_done": True} for step in steps],
    }


def _line(step: Report, **given: Any) -> Report:
    quality, cost = step.get("quality") or {}, step.get("cost") or {}
    ratios = [one["ratio"] for one in (step.get("latency") or {}).values()]
    line = {
        "name": step.get("name"),
        "folder": step.get("folder"),
        "value": quality.get("compressed"),
        "retention": quality.get("retention"),
        "bytes": cost.get("bytes_on_disk"),
        "macs": cost.get("macs"),
        "latency_ratio": step.get("ratio", ratios[-1] if ratios else None),
        "needs_hf_compress": step.get("needs_hf_compress"),
        "passed": step.get("passed"),
        "reason": step.get("reason"),
    }
    return line | given


def _unfinished(folder: Path, name: str) -> Report:
    entry = _read(folder / f"{name}.json")
    is_there = (folder / name).is_dir()
    return _line(entry or {}, name=name, folder=name if is_there else None) | {"is_done": is_there}


def _of_yaml(file: Path) -> Report:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(file)!r} is no YAML: {error}. Correct it, or take it away.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(file)!r} is no recipe, which has model, data and steps: correct it, or take it away.")
    steps = [step if isinstance(step, dict) else {step: {}} for step in content.get("steps") or []]
    return {"file": str(file), "model": content.get("model"), "steps": steps}


def _of_report(place: Path, name: str, is_own: bool) -> Report | None:
    report = _read_report(place)
    if report is None:
        return None
    file = str(place / REPORT_FILE)
    if report.get("kind") == "recipe":
        names = [step["name"] for step in report["steps"]]
        name = report["result"] if is_own else name
        if name not in names:
            return None
        return {"file": file, "model": report["recipe"].get("model"), "steps": _steps(report["recipe"], name)}
    models = {model["name"]: model for model in report["models"][1:]}
    if is_own or name not in models:
        return None
    key = next(key for key in _COMMANDS if key in report)
    settings = {"format": name} | report[key][name] if key == "quantization" else report[key]
    shares = {share: models[name][share] for share in ("budget", "sparsity") if share in models[name]}
    student = {"student_layers": report["job"]["student_layers"]} if key == "training" else {}
    return {
        "file": file,
        "model": report["job"]["model"],
        "steps": [{_COMMANDS[key]: student | settings | shares}],
    }


def _of_run(place: Path, name: str) -> Report | None:
    """Of a run that is not finished."""
    run = _read_run(place)
    if run is None or run.get("kind") != "recipe" or name not in run["stages"]:
        return None
    return {
        "file": str(place / RUN_FILE),
        "model": run["settings"].get("model"),
        "steps": _steps(run["settings"], name),
    }


def _steps(recipe: Report, name: str) -> list[Report]:
    """The steps of a recipe up to the one that is called `03-prune`."""
    return recipe["steps"][: int(name.split("-")[0])]


def _read_report(folder: Path) -> Report | None:
    report = _read(folder / REPORT_FILE)
    is_ours = isinstance(report, dict) and (
        report.get("kind") == "recipe" or ("models" in report and any(key in report for key in _COMMANDS))
    )
    return report if is_ours else None


def _read_run(folder: Path) -> Report | None:
    run = _read(folder / RUN_FILE)
    is_ours = isinstance(run, dict) and run.get("made_by") == _MADE_BY and "settings" in run
    return run | {"stages": run.get("stages", [])} if is_ours else None


def _read(file: Path) -> Any:
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(file)!r} is damaged: {error}. Restore it, or repeat the run.") from error
