"""A recipe: what to compress, on which data, and the steps in their order; and the YAML that says so."""

import difflib
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from hf_compress.recipe_order import check_order
from hf_compress.recipe_steps import STEPS, DataConfig, MeasureConfig, QuantizeStep, Step
from hf_compress.recipe_yaml import KeyPath, Located, read_yaml, write_yaml

_KEYS = ("model", "data", "seed", "measure", "steps")


@dataclass
class Recipe:
    """What to compress, how, and how the results are measured.

    Args:
        model (`str`): The model: a folder, or a name on the Hub.
        data (`DataConfig`): The rows to learn from and to measure on.
        steps (`list[Step]`): In order.
        seed (`int`, *optional*, defaults to 0): Of all that is drawn by chance.
        measure (`MeasureConfig`, *optional*): How models are measured.

    Raises:
        ValueError: if the order of the steps cannot work.
    """

    model: str = field(metadata={"help": "The model to compress: a folder, or a name on the Hub."})
    data: DataConfig = field(metadata={"help": "The rows to learn from and to measure on."})
    steps: list[Step] = field(metadata={"help": "What is done, in order."})
    seed: int = field(default=0, metadata={"help": "Of all that is drawn by chance."})
    measure: MeasureConfig = field(default_factory=MeasureConfig, metadata={"help": "How models are measured."})

    def __post_init__(self) -> None:
        check_order(self.steps)

    @classmethod
    def from_yaml(cls, source: str | Path, **overrides: Any) -> "Recipe":
        """Reads a recipe.

        Args:
            source (`str` or `Path`): A file, or YAML itself if the text has a line break.
            **overrides: `model`, `seed`, and fields of `DataConfig`, in the place of what the file says or lacks;
                `None` changes nothing.

        Returns:
            `Recipe`: Checked.

        Raises:
            ValueError: if a key or a value is wrong, something is missing, or the order cannot work; with the line.
        """
        is_text = isinstance(source, str) and "\n" in source
        if not is_text and not Path(source).is_file():
            raise ValueError(f"There is no file {source}: check the path (the working folder is {Path.cwd()}).")
        text = source if is_text else Path(source).read_text(encoding="utf-8")
        located = read_yaml(str(text))
        if not isinstance(located.value, dict):
            raise ValueError("A recipe is a mapping with model, data and steps: see scripts/recipes for examples.")
        return _read(cls, located, {name: value for name, value in overrides.items() if value is not None})

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain JSON types, without what is as by default."""
        plain: dict[str, Any] = {"model": self.model, "data": _plain(self.data)}
        if self.seed:
            plain["seed"] = self.seed
        if measure := _plain(self.measure):
            plain["measure"] = measure
        return plain | {"steps": [{step.key: _plain(step)} for step in self.steps]}

    def to_yaml(self) -> str:
        """The recipe as YAML, from which `from_yaml` makes the same one."""
        plain = self.to_dict()
        # A step without settings is a word alone.
        plain["steps"] = [one if next(iter(one.values())) else next(iter(one)) for one in plain["steps"]]
        return write_yaml(plain)


def _read(cls: type[Recipe], located: Located, overrides: dict[str, Any]) -> Recipe:
    content = located.value
    _check_keys(content, _KEYS, (), located, "a recipe")
    data = dict(content.get("data") or {})
    for name, value in overrides.items():
        if name in ("model", "seed"):
            content[name] = value
        elif name in {one.name for one in fields(DataConfig)}:
            data[name] = value
        else:
            raise ValueError(f"{name}={value!r} is nothing that a recipe's data have: check its name.")
    for value, what, option in (
        (content.get("model"), "model", "--model"),
        (data.get("dataset"), "data", "--dataset"),
    ):
        if not value:
            example = "model: NAME" if what == "model" else "data: {dataset: NAME}"
            raise ValueError(f"The recipe does not say which {what}: add `{example}` to it, or give {option}.")
    steps = content.get("steps")
    if not isinstance(steps, list) or not steps:
        raise ValueError(_at(located, ("steps",)) + "a recipe has a list of steps, such as `- prune:`.")
    _check_type(content["model"], str, ("model",), located)
    _check_type(content.get("seed", 0), int, ("seed",), located)
    made = [_read_step(step, ("steps", number), located) for number, step in enumerate(steps)]
    check_order(made, [located.lines.get(("steps", number)) for number in range(len(steps))])
    measure = _build(MeasureConfig, content.get("measure") or {}, ("measure",), located, "measure")
    config = _build(DataConfig, data, ("data",), located, "data")
    return cls(content["model"], config, made, content.get("seed", 0), measure)


def _read_step(content: Any, path: KeyPath, located: Located) -> Step:
    content = {content: None} if isinstance(content, str) else content
    if not isinstance(content, dict) or len(content) != 1:
        raise ValueError(_at(located, path) + "a step is one key with its settings below it, such as `- prune:`.")
    key, settings = next(iter(content.items()))
    path = (*path, key)
    _check_keys(content, STEPS, path[:-1], located, "a step")
    settings = {} if settings is None else settings
    if not isinstance(settings, dict):
        raise ValueError(_at(located, path) + f"{key}: {settings!r} is no mapping: write its settings below it.")
    kind = STEPS[key]
    if kind is QuantizeStep:
        own = {one.name for one in fields(kind)} - {"options"}
        options = {name: value for name, value in settings.items() if name not in own}
        settings = {name: value for name, value in settings.items() if name in own} | {"options": options}
    return _build(kind, settings, path, located, key)


def _build(kind: type, content: Any, path: KeyPath, located: Located, what: str) -> Any:
    """A dataclass of a mapping, each value of which is checked."""
    if not isinstance(content, dict):
        raise ValueError(_at(located, path) + f"{what} is {content!r}, and a mapping is needed.")
    known = {one.name: one for one in fields(kind) if one.init}
    _check_keys(content, known, path, located, what)
    for name, one in known.items():
        if name not in content and one.default is MISSING and one.default_factory is MISSING:
            raise ValueError(_at(located, path) + f"{what} needs {name}: {one.metadata.get('help', '')}")
    hints = typing.get_type_hints(kind)
    values = {name: _convert(value, hints[name], (*path, name), located) for name, value in content.items()}
    try:
        return kind(**values)
    except (ValueError, TypeError) as error:
        raise ValueError(_at(located, path) + f"{what}: {error}") from error


def _convert(value: Any, hint: Any, path: KeyPath, located: Located) -> Any:
    """A value as a field wants it: mappings become dataclasses where the field holds some."""
    inner = next((arg for arg in typing.get_args(hint) if is_dataclass(arg)), None)
    if inner is not None and isinstance(value, list):
        return [_build(inner, one, (*path, number), located, str(path[-1])) for number, one in enumerate(value)]
    if is_dataclass(hint):
        return _build(hint, value, path, located, str(path[-1]))
    return _check_type(value, hint, path, located)


def _check_type(value: Any, hint: Any, path: KeyPath, located: Located) -> Any:
    if not _fits(value, hint):
        raise ValueError(_at(located, path) + f"{path[-1]} is {value!r}, and {_said(hint)} is needed.")
    return value


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if hint is None or hint is type(None):
        return value is None
    if origin is Literal:
        return any(value == one and type(value) is type(one) for one in inner)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin in (list, Sequence):
        return isinstance(value, list) and all(_fits(one, inner[0]) for one in value)
    if origin is tuple:
        kinds = [inner[0]] * len(value) if isinstance(value, list) and inner[-1] is ... else inner
        return isinstance(value, list) and len(value) == len(kinds) and all(map(_fits, value, kinds))
    if origin is dict or hint is dict:
        return isinstance(value, dict)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _said(hint: Any) -> str:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    names = {float: "a number", int: "a whole number", str: "a text", bool: "true or false", type(None): "null"}
    if hint in names:
        return names[hint]
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_said(one) for one in inner)
    return "a mapping" if origin is dict or hint is dict else "a list"


def _check_keys(content: dict, known: Any, path: KeyPath, located: Located, what: str) -> None:
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            meant = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(
                _at(located, (*path, key)) + f"{key} is none of the keys of {what}{meant}: {', '.join(known)}."
            )


def _at(located: Located, path: KeyPath) -> str:
    """The line of a value, or of what it is in, as the beginning of a sentence."""
    while path and path not in located.lines:
        path = path[:-1]
    return f"Line {located.lines[path]}: " if path in located.lines and path else ""


def _plain(config: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults, as plain JSON types."""
    plain = {}
    for one in fields(config):
        value = getattr(config, one.name)
        default = one.default if one.default_factory is MISSING else one.default_factory()
        if value != default and _listed(value) != _listed(default):
            plain[one.name] = _listed(value)
    if isinstance(config, QuantizeStep):
        options = plain.pop("options", {})
        plain = {"format": plain.pop("format"), **options, **plain}
    return plain


def _listed(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(one) if is_dataclass(one) else _listed(one) for one in value]
    return value
