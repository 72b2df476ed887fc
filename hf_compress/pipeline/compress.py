"""The one place where the steps meet: a recipe applied in order, each step saved, loaded again and measured."""

import json
import logging
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import DatasetDict

from hf_compress.hub.card import write_card
from hf_compress.hub.push import push_compressed
from hf_compress.jobs.lock import alone_in
from hf_compress.jobs.overlap import rows_in_both
from hf_compress.jobs.stages import REPORT_FILE
from hf_compress.jobs.task_data import TaskData, read_task
from hf_compress.modeling.launch import process_state
from hf_compress.pipeline.checks import check_before, check_room
from hf_compress.pipeline.measure import Measurer, surroundings
from hf_compress.pipeline.memory import peak_memory, reset_peak_memory
from hf_compress.pipeline.state import MODEL, Place, open_output, places_of
from hf_compress.pipeline.steps import make
from hf_compress.recipe.recipe import Recipe
from hf_compress.recipe.steps import EvaluateStep, FinetuneStep, PushStep
from hf_compress.report.run_page import write_run_report

logger = logging.getLogger(__name__)

SCHEMA = 1
# Shares of rows that are equal may differ in their last digit.
_ROUNDING = 1e-9
Report = dict[str, Any]
Entry = dict[str, Any]


def compress(
    recipe: Recipe,
    output_dir: str | Path,
    *,
    splits: DatasetDict | None = None,
    overwrite: bool = False,
    model_options: dict[str, Any] | None = None,
) -> Report:
    """Applies a recipe: each step is saved to a folder of its own, loaded again and measured.

    A run that was stopped continues when called again. If the recipe changed, the steps before the change are kept,
    and those from there on are done anew.

    Args:
        recipe (`Recipe`): What is to be done.
        output_dir (`str` or `Path`): Gets `01-finetune/`, `02-prune/` ..., a JSON file beside each, `report.json`,
            `report.md`, `report.html`, and the model card in the finished model's folder.
        splits (`DatasetDict`, *optional*): The data, where they are no file and have no name on the Hub.
        overwrite (`bool`, *optional*, defaults to `False`): Delete the results of an earlier run there first.
        model_options (`dict`, *optional*): Further arguments of `from_pretrained` for the models that are trained.

    Returns:
        `dict`: The report, as in `report.json`. Where an `evaluate` step was not passed, `stopped_by` says so, and
        nothing after it was done.

    Raises:
        ValueError: if the data do not fit the model, a step cannot be done, or the folder holds something else.
        OSError: if the disk has no room for a step, which is checked before it; what was there stays.
    """
    state, output, options = process_state(), Path(output_dir), model_options or {}
    with state.main_process_first():
        data = read_task(recipe.data, recipe.seed, splits)
        if state.is_main_process:
            check_before(recipe, data, output)
    with alone_in(output, state.is_main_process):
        _apply(recipe, output, data, overwrite, options)
    state.wait_for_everyone()
    return json.loads((output / REPORT_FILE).read_text())


def _apply(recipe: Recipe, output: Path, data: TaskData, overwrite: bool, options: dict[str, Any]) -> None:
    state = PartialState()
    with state.main_process_first():
        if state.is_main_process:
            open_output(recipe, output, overwrite, data.digest)
    places = places_of(recipe, output, data.digest)
    reference = _reference(recipe, places, output)
    measurer = Measurer(reference.path, data, recipe.measure, recipe.seed)
    entries = [_measured(reference, measurer, recipe, [])] if reference is not places[0] else []
    for place in places:
        if isinstance(place.step, PushStep):
            continue
        if isinstance(place.step, EvaluateStep):
            entries.append(_gate(place, entries))
            if not entries[-1]["passed"]:
                break
            continue
        reset_peak_memory()
        if state.is_main_process:
            check_room(place)
        make(place, data, recipe.seed, options)
        entries.append(_measured(place, measurer, recipe, entries))
    if state.is_main_process:
        _finish(recipe, data, output, entries, reference.name)
        if isinstance(places[-1].step, PushStep) and entries[-1].get("passed", True):
            _push(places[-1], output, entries)
            _finish(recipe, data, output, entries, reference.name)


def _reference(recipe: Recipe, places: list[Place], output: Path) -> Place:
    """The model that all others are compared with: the fine-tuned one, or the one that the recipe names."""
    if isinstance(places[0].step, FinetuneStep):
        return places[0]
    return Place(MODEL, None, output / MODEL, recipe.model, recipe.model, (), places[0].fingerprint)


def _measured(place: Place, measurer: Measurer, recipe: Recipe, entries: list[Entry]) -> Entry:
    """The step's entry of the report, from its file or by measuring its saved model. The main process measures."""
    state = PartialState()
    if state.is_main_process:
        entry = place.read_entry()
        asked = recipe.to_dict()
        how = {name: asked.get(name) for name in ("measure", "data", "seed")}
        if entry.get("measured") != how:
            logger.info("Measuring %s.", place.name)
            entry |= {"peak_rss_bytes": entry.get("peak_rss_bytes") or peak_memory()}
            entry |= measurer.measure(place.path) | {"measured": how}
            place.write_entry(entry)
    else:
        entry = {}
    entry = _from_main(entry)
    teacher = entries[0] if entries else entry
    seconds, of_teacher = entry.get("seconds"), teacher.get("seconds")
    is_step = place.step is not None
    return {
        "name": place.name,
        "step": place.step.key if is_step else "model",
        "settings": _settings(recipe, place),
        "folder": place.name if is_step else None,
        "seconds": seconds,
        "seconds_of_reference": seconds / of_teacher if seconds is not None and of_teacher else None,
        **{name: value for name, value in entry.items() if name not in ("fingerprint", "measured", "seconds")},
    }


def _settings(recipe: Recipe, place: Place) -> dict[str, Any]:
    if place.step is None:
        return {}
    return next(iter(recipe.to_dict()["steps"][len(place.before)].values())) or {}


def _gate(place: Place, entries: list[Entry]) -> Entry:
    """Whether the last model passes."""
    step, last = place.step, next(entry for entry in reversed(entries) if "quality" in entry)
    kept, megabytes = last["quality"]["retention"], last["cost"]["bytes_on_disk"] / 1e6
    failed = []
    if step.min_retention is not None and not (kept is not None and kept >= step.min_retention - _ROUNDING):
        failed.append(
            f"{last['name']} kept {'an undefined share' if kept is None else f'{kept:.4f}'} of "
            f"{last['quality']['metric']}, and min_retention is {step.min_retention:g}"
        )
    if step.max_mb is not None and megabytes > step.max_mb:
        failed.append(f"{last['name']} has {megabytes:.2f} MB, and max_mb is {step.max_mb:g}")
    reason = "; ".join(failed)
    if failed:
        logger.warning("Stopped at %s: %s. The models before it stay.", place.name, reason)
    return _without_model(place) | {"passed": not failed, "reason": reason or None}


def _without_model(place: Place) -> Entry:
    settings = {name: value for name, value in vars(place.step).items() if value is not None}
    return {"name": place.name, "step": place.step.key, "settings": settings, "folder": None}


def _push(place: Place, output: Path, entries: list[Entry]) -> None:
    step, last = place.step, next(entry for entry in reversed(entries) if entry.get("folder"))
    pushed = push_compressed(output / last["folder"], step.repo_id, private=step.private, revision=step.revision)
    entries.append(_without_model(place) | {"passed": True, "url": str(pushed)})


def _finish(recipe: Recipe, data: TaskData, output: Path, entries: list[Entry], reference: str) -> None:
    """Writes the report, and the card into the finished model's folder."""
    models = [entry for entry in entries if "quality" in entry]
    failed = next((entry for entry in entries if entry.get("passed") is False), None)
    report = {
        "schema": SCHEMA,
        "kind": "recipe",
        "recipe": recipe.to_dict(),
        "task": data.task,
        "metric": models[0]["quality"]["metric"],
        "split": data.test_split,
        "rows_measured_on": len(data.test),
        "rows_trained_on": len(data.train),
        "rows_in_both": rows_in_both(data.train, data.test, data.config.text_columns),
        **surroundings(models[0]["latency_conditions"]),
        "reference": reference,
        "result": _result(models, failed),
        "stopped_by": {"step": failed["name"], "reason": failed["reason"]} if failed else None,
        "steps": entries,
    }
    if report["result"] is not None:
        write_card(report, output / report["result"])
    write_run_report(report, output)


def _result(models: list[Entry], failed: Entry | None) -> str | None:
    """The last model that is good: where a gate was not passed, the last before it that would have passed."""
    made = [entry for entry in models if entry["folder"]]
    if failed:
        least, most = failed["settings"].get("min_retention"), failed["settings"].get("max_mb")
        made = [
            entry
            for entry in made
            if (least is None or (entry["quality"]["retention"] or 0) >= least - _ROUNDING)
            and (most is None or entry["cost"]["bytes_on_disk"] / 1e6 <= most)
        ]
    return made[-1]["folder"] if made else None


def _from_main(entry: Entry) -> Entry:
    if PartialState().num_processes == 1:
        return entry
    return broadcast_object_list([entry])[0]
