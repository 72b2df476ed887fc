"""A recipe: what to compress, on which data, and the steps in their order; and the YAML that says so."""

import os
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from hf_compress.recipe.fields import build, check_keys, construct, convert, mapping_of, read_fields, shown, suggest
from hf_compress.recipe.format_options import FORMATS
from hf_compress.recipe.order import check_order
from hf_compress.recipe.steps import STEPS, DataConfig, MeasureConfig, PruneStep, QuantizeStep, Step
from hf_compress.recipe.yaml_text import Block, Written, as_written, read_yaml, write_yaml

_KEYS = ("model", "data", "seed", "measure", "steps")
_DATA = [one.name for one in fields(DataConfig)]
# What says most about a step is written even where it is the default.
_ALWAYS = {(PruneStep, "budget")}


@dataclass(eq=False)
class Recipe:
    """What to compress, how, and how the results are measured. Two are equal if they ask for the same."""

    model: str = field(metadata={"help": "The model to compress: a folder, or a name on the Hub."})
    data: DataConfig = field(metadata={"help": "The rows to learn from and to measure on."})
    steps: list[Step] = field(metadata={"help": "What is done, in order."})
    seed: int = field(default=0, metadata={"help": "Of all that is drawn by chance, from 0 to below 2^32."})
    measure: MeasureConfig = field(default_factory=MeasureConfig, metadata={"help": "How models are measured."})

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} is out of range: give a whole number from 0 to below 2^32.")
        unknown = next((step for step in self.steps if not isinstance(step, Step)), None)
        if unknown is not None:
            raise TypeError(f"steps holds {unknown!r}, which is no step: give PruneStep(...), QuantizeStep(...) ...")
        check_order(self.steps)
        # No shell has read what stands in a file.
        self.model = os.path.expanduser(self.model)

    @classmethod
    def from_yaml(cls, source: str | Path, **overrides: Any) -> "Recipe":
        """Reads a recipe.

        Args:
            source (`str` or `Path`): A file, or YAML itself: a string with a line break. Paths in it are relative to
                the working directory.
            **overrides: `model`, `seed`, and fields of `DataConfig`, in the place of what the file says or lacks;
                `None` changes nothing.

        Returns:
            `Recipe`: Checked.

        Raises:
            ValueError: if a key or a value is wrong, something is missing, or the order cannot work; with the line.
        """
        return _read(read_yaml(source), overrides)

    @classmethod
    def from_dict(cls, content: dict[str, Any], **overrides: Any) -> "Recipe":
        """Reads what `to_dict` gave, such as the recipe in a report.

        Args:
            content (`dict`): Plain JSON types.
            **overrides: As for `from_yaml`.

        Returns:
            `Recipe`: Checked.

        Raises:
            ValueError: as for `from_yaml`.
        """
        return _read(as_written(content, "The recipe"), overrides)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain JSON types, without settings that are as by default.

        Returns:
            `dict`: With `model`, `data`, `seed`, `measure` and `steps`; each step is a dict of one key.
        """
        return {
            "model": self.model,
            "data": _settings(self.data),
            "seed": self.seed,
            "measure": _settings(self.measure),
            "steps": [{step.key: _settings(step)} for step in self.steps],
        }

    def to_yaml(self) -> str:
        """The recipe as YAML, from which `from_yaml` makes the same one."""
        content = {name: value for name, value in self.to_dict().items() if value}
        # A step without settings is a word alone.
        steps = [(step.key, _settings(step)) for step in self.steps]
        content["steps"] = Block({key: settings} if settings else key for key, settings in steps)
        return write_yaml(content)

    def __eq__(self, other: object) -> bool:
        # A list and a tuple, or a default that is given, ask for the same.
        return isinstance(other, Recipe) and self.to_dict() == other.to_dict()


def _read(written: Written, overrides: dict[str, Any]) -> Recipe:
    content = dict(mapping_of(written, "a recipe"))
    astray = next((key for key in content if key in _DATA), None)
    if astray is not None:
        raise content[astray].refuse(f"{astray} stands beside data: write it below `data:`, indented.")
    check_keys(content, _KEYS, "a recipe")
    data = dict(mapping_of(content["data"], "data")) if "data" in content else {}
    check_keys(data, _DATA, "data")
    _override(content, data, overrides)
    name = written.place.partition(", line")[0]
    for given, key, line in ((content, "model", "`model: NAME`"), (data, "dataset", "`dataset: NAME` below `data:`")):
        if key not in given or given[key].value in (None, ""):
            raise ValueError(
                f"{name} does not say which {key}: write {line} into it, or give --{key} NAME on the command line, "
                f'{key}="NAME" in Python.'
            )
    empty = Written({}, name)
    steps = _read_steps(content.get("steps", empty._replace(value=None)))
    top = {
        "model": convert(str, content["model"], "model"),
        "data": build(DataConfig, content.get("data", empty)._replace(value=data), "data"),
        "steps": steps,
        "seed": convert(int, content["seed"], "seed") if "seed" in content else 0,
        "measure": build(MeasureConfig, content.get("measure", empty), "measure"),
    }
    return construct(Recipe, top, written._replace(value=content), "a recipe")


def _override(content: dict[str, Written], data: dict[str, Written], overrides: dict[str, Any]) -> None:
    """Puts what was given beside a file into its place."""
    for name, value in overrides.items():
        if name not in ("model", "seed", *_DATA):
            raise TypeError(f"a recipe takes no {name!r}: {suggest(name, ('model', 'seed', *_DATA))}")
        if value is not None:
            value = [value] if name == "text_columns" and isinstance(value, str) else value
            place = data if name in _DATA else content
            place[name] = as_written(str(value) if isinstance(value, Path) else value, f"What was given as {name}")


def _read_steps(written: Written) -> list[Step]:
    if not isinstance(written.value, list) or not written.value:
        raise written.refuse("a recipe needs a list of steps below `steps:`, one at least, such as `- prune:`.")
    steps = [_read_step(one) for one in written.value]
    check_order(steps, [one.place for one in written.value])
    return steps


def _read_step(written: Written) -> Step:
    if isinstance(written.value, str):
        written = written._replace(value={written.value: written._replace(value=None)})
    if not isinstance(written.value, dict) or not written.value:
        raise written.refuse(f"a step is {shown(written)}: write its name with a colon, such as `- prune:`.")
    (key, settings), *others = written.value.items()
    if key not in STEPS:
        raise settings.refuse(f"there is no step {key!r}: {suggest(key, STEPS)}")
    if others:
        name, other = others[0]
        remedy = f"begin its line with `- {name}:`" if name in STEPS else "indent its line by two spaces more"
        raise other.refuse(f"{name} stands beside {key} and not below it: {remedy}.")
    return _read_quantize(settings) if STEPS[key] is QuantizeStep else build(STEPS[key], settings, key)


def _read_quantize(written: Written) -> QuantizeStep:
    """A step whose options stand beside the name of the format."""
    given = mapping_of(written, "quantize")
    if "format" not in given:
        raise written.refuse(f"quantize needs a format: give one of {', '.join(FORMATS)}.")
    name = given["format"].value
    if not isinstance(name, str) or name not in FORMATS:
        raise given["format"].refuse(f"format of quantize is {shown(given['format'])}: {suggest(str(name), FORMATS)}")
    options = {one: [option.name for option in fields(FORMATS[one].options)] for one in FORMATS}
    for key, item in given.items():
        owners = [one for one in FORMATS if key in options[one]]
        if owners and name not in owners:
            own = ", ".join(options[name]) or "no options"
            raise item.refuse(f"{key} is an option of {', '.join(owners)} and not of {name}, which has {own}.")
    values = read_fields([QuantizeStep, FORMATS[name].options], written, "quantize", without=("options",))
    chosen = {key: values.pop(key) for key in options[name] if key in values}
    return construct(QuantizeStep, values | {"options": chosen}, written, "quantize")


def _settings(config: Any) -> dict[str, Any]:
    """The fields that differ from their defaults, and those that are always written, as plain JSON types."""
    settings = {}
    for one in fields(config):
        value = _plain(getattr(config, one.name))
        default = one.default if one.default_factory is MISSING else one.default_factory()
        if value != _plain(default) or (type(config), one.name) in _ALWAYS:
            settings[one.name] = value
    if isinstance(config, QuantizeStep):
        usual = FORMATS[config.format].options()
        options = settings.pop("options", {})
        options = {name: value for name, value in options.items() if value != _plain(getattr(usual, name))}
        settings = {"format": settings.pop("format"), **options, **settings}
    return settings


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return _settings(value) if is_dataclass(value) and not isinstance(value, type) else value
