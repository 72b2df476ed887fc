"""Model cards from reports: every figure, setting and reference in them is of the run that made the model."""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

from hf_compress.hub.card_base import Base, hub_name, name_base, portable_name, read_base, shown_name, without_paths
from hf_compress.hub.card_methods import BOOTSTRAP
from hf_compress.hub.card_page import CardFacts, Data, eval_result, render
from hf_compress.hub.card_words import done, keeps, limits, run_conditions, run_table, uses, whose
from hf_compress.recipe.recipe import Recipe
from hf_compress.recipe.steps import PushStep
from hf_compress.report.files import write_whole
from hf_compress.report.report import conditions, plain_numbers, table_rows

logger = logging.getLogger(__name__)

CARD_FILE, RECIPE_FILE, REPORT_FILE = "README.md", "recipe.yaml", "report.json"
NEW_CARD_FILE = "README.new.md"
# Of the card beside it, in a report: one that reads otherwise was changed since.
_DIGEST = "card_sha256"
Report = dict[str, Any]
Steps = list[tuple[str, Mapping[str, Any]]]

# Measures of numbers: their outputs are compared by squared differences, whatever the divergence is said to be.
_OF_NUMBERS = ("pearsonr", "spearmanr")


def make_card(
    report: Report, *, model: str | None = None, repo_id: str | None = None, base: Base | None = None
) -> ModelCard:
    """The card of a model that a run made. Nothing is read but the report, and no network is needed.

    Args:
        report (`dict`): As `compress`, `distill`, `prune_classifier` or `quantize_classifier` returns it.
        model (`str`, *optional*): Which of its models: the name of its folder. By default, the result of a recipe, or
            the first model that another run made.
        repo_id (`str`, *optional*): Where it is going to be. By default, where a `push` step of the recipe puts it.
        base (`Base`, *optional*): What the model was made of, as `read_base` gives it. By default, its name alone,
            without a license.

    Returns:
        `ModelCard`: `str(card)` is the text of README.md. Paths of this machine are in none of it.

    Raises:
        ValueError: if the report has no such model.
    """
    base = base or name_base(_model_of(report))
    make = _facts_of_recipe if report.get("kind") == "recipe" else _facts_of_run
    return render(make(report, model, repo_id, base))


def write_card(report: Report, folder: str | Path, *, repo_id: str | None = None, base: Base | None = None) -> Path:
    """Writes the card of a saved model into its folder, with the report and, of a recipe, the recipe that it is from.

    Args:
        report (`dict`): As for `make_card`.
        folder (`str` or `Path`): The model's folder, whose name is the model's in the report. It gets `README.md`,
            `report.json` and `recipe.yaml`, all without paths of this machine. A `README.md` that was changed since
            it was written stays: the new one is then `README.new.md`.
        repo_id (`str`, *optional*): As for `make_card`.
        base (`Base`, *optional*): What the model was made of. By default, what the base's own card says, from its
            folder or from the Hub if that can be reached.

    Returns:
        `Path`: The new card.

    Raises:
        ValueError: if the report has no model of that name.
    """
    folder = Path(folder)
    base = base or read_base(_model_of(report))
    card = str(make_card(report, model=folder.name, repo_id=repo_id, base=base))
    file = _card_file(folder, card)
    texts = {file: card}
    if report.get("kind") == "recipe":
        texts[RECIPE_FILE] = _recipe(report)
    content = plain_numbers(_portable(report)) | {_DIGEST: _digest(card)}
    texts[REPORT_FILE] = json.dumps(content, indent=2, allow_nan=False) + "\n"
    for name, text in texts.items():
        write_whole(folder / name, text)
    return folder / file


def _card_file(folder: Path, card: str) -> str:
    """Where a new card goes: what its readers have written into the one that is there is not lost."""
    old, report = folder / CARD_FILE, folder / REPORT_FILE
    if not old.exists():
        return CARD_FILE
    text = old.read_text(encoding="utf-8")
    known = json.loads(report.read_text(encoding="utf-8")).get(_DIGEST) if report.exists() else None
    if text == card or _digest(text) == known:
        return CARD_FILE
    logger.warning(
        "%s was changed by somebody, so it stays, and the card with the new figures is %s beside it: take over from "
        "one into the other what is missing.",
        old,
        NEW_CARD_FILE,
    )
    return NEW_CARD_FILE


def _digest(card: str) -> str:
    return hashlib.sha256(card.encode()).hexdigest()


def _model_of(report: Report) -> str:
    return report["recipe" if report.get("kind") == "recipe" else "job"]["model"]


def _portable(report: Report) -> Report:
    """The report for other machines. Of the model and the data it is known that they are paths, even of one word."""
    found = without_paths(report)
    if report.get("kind") == "recipe":
        given, place = report["recipe"], found["recipe"]
        place["data"]["dataset"] = portable_name(given["data"]["dataset"])
    else:
        given, place = report["job"], found["job"]
        place["dataset"] = portable_name(given["dataset"])
    place["model"] = portable_name(given["model"])
    return found


def _choose(models: list[Report], name: str | None) -> Report:
    known = [one["name"] for one in models]
    if name not in known:
        raise ValueError(
            f"The report has no model {name!r} that a card could be about: give one of {', '.join(known) or 'none'}."
            if name is not None
            else "The report has no finished model, because a gate of the recipe was not passed: name one of "
            f"{', '.join(known)}."
        )
    return models[known.index(name)]


# Of a recipe


def _facts_of_recipe(report: Report, name: str | None, repo_id: str | None, base: Base) -> CardFacts:
    measured = [entry for entry in report["steps"] if "quality" in entry]
    entry = _choose([one for one in measured if one["folder"]], name or report["result"])
    reference = _choose(measured, report["reference"])
    made = measured[: measured.index(entry) + 1]
    recipe = Recipe.from_dict(report["recipe"])
    steps = [_step(recipe, one, report["metric"]) for one in made if one["folder"]]
    given = recipe.data
    data = Data(shown_name(given.dataset), hub_name(given.dataset), given.dataset_name, report["split"])
    repo_id = repo_id or next((step.repo_id for step in recipe.steps if isinstance(step, PushStep)), None)
    rows, is_per_row = report["rows_measured_on"], report["task"] == "sequence-classification"
    return CardFacts(
        name=_name(repo_id, base, steps),
        title=f"{base.shown}: {done(steps)}",
        summary=keeps(entry, reference, rows, base.shown),
        base=base,
        relation=_relation(steps),
        task=report["task"],
        needs_hf_compress=entry["needs_hf_compress"],
        steps=steps,
        results=_results(report["task"], data, entry, reference),
        datasets=[data.hub_name] if data.hub_name else [],
        table=run_table(made, entry["name"], report["metric"]),
        conditions=run_conditions(report, made),
        recipe=_recipe(report),
        uses=uses(report["task"], data, given.max_length, len(given.text_columns)),
        limits=[*_stopped(report), *limits(entry["quality"], data, rows, given.max_length, base.shown, is_per_row)],
        repo_id=repo_id,
        references=() if entry is reference else (BOOTSTRAP,),
    )


def _stopped(report: Report) -> list[str]:
    stopped = report["stopped_by"]
    if stopped is None:
        return []
    return [f"The recipe was stopped at {stopped['step']}: {stopped['reason']}. This is a model from before that."]


def _recipe(report: Report) -> str:
    return Recipe.from_dict(_portable(report)["recipe"]).to_yaml()


def _step(recipe: Recipe, entry: Report, metric: str) -> tuple[str, Mapping[str, Any]]:
    """A step and all its settings, those too that are as by default and in no report."""
    step = recipe.steps[int(entry["name"].split("-")[0]) - 1]
    settings = asdict(step)
    settings |= settings.pop("options", {})
    return step.key, settings | ({"divergence": "mse"} if metric in _OF_NUMBERS else {})


# Of a run of one step


def _facts_of_run(report: Report, name: str | None, repo_id: str | None, base: Base) -> CardFacts:
    reference, *made = report["models"]
    entry = _choose(made, name or made[0]["name"])
    job, steps = report["job"], _steps_of_run(report, entry)
    data = Data(shown_name(job["dataset"]), hub_name(job["dataset"]), job["dataset_name"], job["eval_split"])
    rows = report["rows_measured_on"]
    task = "sequence-classification"
    return CardFacts(
        name=_name(repo_id, base, steps),
        title=f"{base.shown}: {done(steps)}",
        summary=keeps(entry | _faster(report, entry), reference, rows, base.shown),
        base=base,
        relation=_relation(steps),
        task=task,
        needs_hf_compress=entry["needs_hf_compress"],
        steps=steps,
        results=_results(task, data, entry, reference),
        datasets=[data.hub_name] if data.hub_name else [],
        table=_table_of_run(report, entry["name"]),
        conditions=conditions(report),
        recipe=_yaml(report),
        uses=uses(task, data, job["max_length"], len(job["text_columns"])),
        limits=limits(entry["quality"], data, rows, job["max_length"], base.shown, is_per_row=True),
        repo_id=repo_id,
        references=(BOOTSTRAP,),
    )


def _steps_of_run(report: Report, entry: Report) -> Steps:
    if "quantization" in report:
        return [("quantize", {"format": entry["name"]} | report["quantization"][entry["name"]])]
    if "pruning" in report:
        return [("sparsify" if "zeros" in entry else "prune", report["pruning"])]
    job, how = report["job"], report["training"]
    taught = {"divergence": "mse"} if report["metric"] in _OF_NUMBERS else {}
    if entry["name"] != report["models"][1]["name"]:
        # The student that was trained alone, to see what its teacher was worth.
        taught = {"alpha": 0.0, "terms": [], "stages": []}
    first = [("finetune", {})] if job["teacher_epochs"] > 0 else []
    return [*first, ("student", {"num_layers": job["student_layers"]}), ("distil", how | taught)]


def _faster(report: Report, entry: Report) -> Report:
    one = report["latency"]["conditions"]["batch_size"]
    return {"latency": {str(one): {"ratio": report["latency"]["ratio"][entry["name"]]}}}


def _table_of_run(report: Report, name: str) -> list[tuple[str, ...]]:
    headings, *rows = table_rows(report)
    return [headings, *(tuple(f"**{cell}**" for cell in row) if row[0] == name else row for row in rows)]


def _yaml(report: Report) -> str:
    given = _portable(report)
    names = [name for name in ("job", "training", "pruning", "quantization") if name in given]
    parts = {name: {key: v for key, v in given[name].items() if v not in (None, [], "")} for name in names}
    return yaml.safe_dump(parts, sort_keys=False, allow_unicode=True)


# Of both


def _name(repo_id: str | None, base: Base, steps: Steps) -> str:
    if repo_id is not None:
        return repo_id.split("/")[-1]
    last, settings = steps[-1]
    return f"{base.shown.split('/')[-1]}-{settings['format'] if last == 'quantize' else last}"


def _relation(steps: Steps) -> str:
    return "quantized" if any(step == "quantize" for step, _ in steps) else "finetune"


def _results(task: str, data: Data, entry: Report, reference: Report) -> list:
    metric = entry["quality"]["metric"]
    values = [(entry["quality"]["compressed"], "")]
    if entry["name"] != reference["name"]:
        values.append((entry["quality"]["teacher"], whose(reference["name"])))
    return [eval_result(task, data, metric, value, suffix) for value, suffix in values if value is not None]
