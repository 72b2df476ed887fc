"""The folder of a recipe's run: what is there, what of it is still wanted, and what a step starts from."""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import hf_compress
from hf_compress.jobs.inputs import digest, inputs_digest
from hf_compress.jobs.lock import is_taken
from hf_compress.jobs.stages import REPORT_FILE, RUN_FILE, WORK, read_json, remove_folder, warn_of_another_version
from hf_compress.recipe.steps import (
    EvaluateStep,
    FinetuneStep,
    PushStep,
    SparsifyStep,
    Step,
    VocabularyStep,
)
from hf_compress.report.files import PARTIAL, write_whole

if TYPE_CHECKING:
    from hf_compress.recipe.recipe import Recipe

logger = logging.getLogger(__name__)

MODEL = "00-model"
_MADE_BY, _KIND = "hf-compress", "recipe"
# What a run writes beside the folders of its steps.
_PAGES = (REPORT_FILE, "report.md", "report.html")
# Of the folders of a step: its model, its training, what is half saved, its teacher's answers.
CACHE = ".cache"
_SUFFIXES = ("", WORK, PARTIAL, CACHE)


class Place(NamedTuple):
    """A step in its run.

    Attributes:
        name (`str`): Such as `02-prune`.
        step (`Step` or `None`): Its settings; `None` for the model that the recipe names.
        folder (`Path`): Where its model is saved; for a step without one, where it would be.
        model (`str`): The model that it starts from: a folder, or what the recipe names.
        teacher (`str`): What all are compared with: the fine-tuned model, or what the recipe names.
        before (`tuple[Step, ...]`): The steps before it.
        fingerprint (`str`): Of all that decides its model.
    """

    name: str
    step: Step | None
    folder: Path
    model: str
    teacher: str
    before: tuple[Step, ...]
    fingerprint: str

    @property
    def makes_model(self) -> bool:
        """Whether the step saves a model."""
        return self.step is not None and not isinstance(self.step, EvaluateStep | PushStep)

    @property
    def path(self) -> str:
        """Where the model is after the step."""
        return str(self.folder) if self.makes_model else self.model

    @property
    def entry_file(self) -> Path:
        """Where the step's entry of the report is kept."""
        return self.folder.with_name(self.name + ".json")

    @property
    def work(self) -> Path:
        """Where a training keeps its checkpoints."""
        return self.folder.with_name(self.name + WORK)

    @property
    def cache(self) -> Path:
        """Where a training keeps what its teacher says."""
        return self.folder.with_name(self.name + CACHE)

    def cut_vocabulary(self) -> VocabularyStep | None:
        """The step before this one that changed the tokens, if there is one."""
        return next((step for step in self.before if isinstance(step, VocabularyStep)), None)

    def zeros(self) -> SparsifyStep | None:
        """The step before this one whose zeros must stay, if there is one."""
        return next((step for step in self.before if isinstance(step, SparsifyStep)), None)

    def read_entry(self) -> dict[str, Any]:
        """What is known of the step so far; empty for another step's."""
        entry = read_json(self.entry_file)
        return entry if entry.get("fingerprint") == self.fingerprint else {}

    def write_entry(self, entry: dict[str, Any]) -> None:
        """Keeps what is known of the step, as a whole or not at all."""
        write_json(self.entry_file, {"fingerprint": self.fingerprint, **entry})

    def clear(self) -> None:
        """Removes what another recipe left in the place of the step."""
        if self.folder.exists():
            logger.warning("%s is made anew: its settings, a step before it, model or data changed.", self.name)
        remove_step(self.folder.parent, self.name)


def places_of(recipe: "Recipe", output: Path, rows: str | None = None) -> list[Place]:
    """The steps of a recipe, each with what it starts from.

    Args:
        recipe (`Recipe`): What is to be done.
        output (`Path`): The run's folder.
        rows (`str`, *optional*): What the rows are known by, where they are in no file; see `TaskData.digest`.

    Returns:
        `list[Place]`: In order.
    """
    plan = recipe.to_dict()
    chain: dict[str, Any] = {name: plan[name] for name in ("model", "data", "seed")}
    # Other files at the same place are another model, or other data.
    chain["inputs"] = inputs_digest(recipe.model, recipe.data.dataset, output, rows)
    model = teacher = recipe.model
    places: list[Place] = []
    for number, (step, settings) in enumerate(zip(recipe.steps, plan["steps"], strict=True), start=1):
        before, chain = chain, {"before": digest(chain), "step": settings}
        name = f"{number:02d}-{step.key}"
        place = Place(name, step, output / name, model, teacher, tuple(recipe.steps[: number - 1]), digest(chain))
        places.append(place)
        if place.makes_model:
            model = str(place.folder)
        else:
            # What is checked or pushed changes no model after it.
            chain = before
        if isinstance(step, FinetuneStep):
            teacher = str(place.folder)
    return places


def open_output(recipe: "Recipe", output: Path, overwrite: bool, rows: str | None = None) -> None:
    """Takes a folder for a run, or continues the run in it; what a changed recipe no longer makes is removed.

    Args:
        recipe (`Recipe`): What is to be done.
        output (`Path`): The run's folder; made if missing.
        overwrite (`bool`): Whether all results of an earlier run there may be deleted.
        rows (`str`, *optional*): As for `places_of`.

    Raises:
        ValueError: if the folder is a file, holds files of others, another command's run, or one of another model, of
            other data or of another seed.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"The output folder {output} is a file: give a new or an empty folder.")
    stored = _read_run(output / RUN_FILE)
    places = places_of(recipe, output, rows)
    names = [MODEL, *(place.name for place in places)]
    if stored is None and is_taken(output, output / (RUN_FILE + PARTIAL)):
        raise ValueError(
            f"The output folder {output} holds files that are not of a run of a recipe, so nothing is written there "
            "and nothing deleted: give a new or an empty folder."
        )
    inputs = inputs_digest(recipe.model, recipe.data.dataset, output, rows)
    if stored is not None:
        _check_same_run(output, stored, recipe, inputs, overwrite)
        made = [name for name in stored.get("stages", []) if _is_name(name)]
        if not overwrite:
            _renumber(places, made)
        for name in made if overwrite else [name for name in made if name not in names]:
            logger.info("%s is no longer wanted, and removed.", name)
            remove_step(output, name)
        if not overwrite:
            logger.info("Continuing the run in %s.", output)
            warn_of_another_version(output, stored.get("version"))
    output.mkdir(parents=True, exist_ok=True)
    # A page of what was found before would not be of this recipe.
    content = {"made_by": _MADE_BY, "kind": _KIND, "settings": recipe.to_dict(), "stages": names, "inputs": inputs}
    content["version"] = hf_compress.__version__
    if stored != content or overwrite:
        for page in _PAGES:
            (output / page).unlink(missing_ok=True)
    write_json(output / RUN_FILE, content)


def _check_same_run(output: Path, stored: dict[str, Any], recipe: "Recipe", inputs: str, overwrite: bool) -> None:
    """Raises if nothing of a run could be kept, since all its models would be deleted."""
    before, asked = stored.get("settings", {}), recipe.to_dict()
    changed = [name for name in ("model", "data", "seed") if before.get(name) != asked[name]]
    changes = [f"{name} was {before.get(name)!r} and is {asked[name]!r}" for name in changed]
    if not changes and stored.get("inputs") != inputs:
        changes = ["the files of the model or the rows of the data are others than they were"]
    if changes and not overwrite:
        raise ValueError(
            f"The output folder {output} holds a run of which nothing could be kept ({' and '.join(changes)}): give "
            "another folder, or --overwrite to delete it and start anew."
        )


def _renumber(places: list[Place], made: list[str]) -> None:
    """Moves results whose step is the same and has another number, as where an `evaluate` was put in before it."""
    moves = {}
    for place in places:
        for name in made if place.makes_model else ():
            before = place._replace(name=name, folder=place.folder.with_name(name))
            if name != place.name and name.partition("-")[2] == place.step.key and before.read_entry():
                moves[name] = place
    while moves:
        # Of steps of one kind, each has to wait until the one in its place has moved.
        name = next(name for name, place in moves.items() if place.name not in moves)
        place = moves.pop(name)
        place.clear()
        for suffix in _SUFFIXES:
            old = place.folder.with_name(name + suffix)
            if old.exists():
                old.rename(place.folder.with_name(place.name + suffix))
        # The mark that it is finished last, so that half a move is never taken for a whole one.
        place.entry_file.with_name(f"{name}.json").rename(place.entry_file)
        logger.info("%s is now called %s.", name, place.name)


def remove_step(output: Path, name: str) -> None:
    """Removes the results of a step, finished or not.

    Args:
        output (`Path`): The run's folder.
        name (`str`): The step's.
    """
    # The mark that it is finished first, so that a half removed model is never taken for a whole one.
    (output / f"{name}.json").unlink(missing_ok=True)
    for suffix in _SUFFIXES:
        remove_folder(output / f"{name}{suffix}")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a file as a whole or not at all.

    Args:
        path (`Path`): Where to.
        content (`dict`): Plain JSON types.
    """
    write_whole(path, json.dumps(content, indent=2) + "\n")


def _read_run(file: Path) -> dict[str, Any] | None:
    """What a recipe's run said of itself; `None` if there is none."""
    content = read_json(file)
    return content if (content.get("made_by"), content.get("kind")) == (_MADE_BY, _KIND) else None


def _is_name(name: Any) -> bool:
    # No name in the file may lead out of the folder.
    return isinstance(name, str) and bool(name) and Path(name).name == name and name not in (".", "..")
