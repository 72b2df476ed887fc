"""YAML that knows where everything stands: read without tags and aliases, checked by dataclasses, and written."""

import difflib
import math
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import yaml

_LARGEST = 1_000_000
_DEEPEST = 20
_TAG = "tag:yaml.org,2002:"
# As in YAML 1.2: by the rules of 1.1, 1e-4 is a text, 2:4 is 124, and no is false.
_NUMBER_START = list("+-.0123456789")
_SCALARS: dict[str, tuple[str, list[str], Callable[[str], Any]]] = {
    "null": (r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""], lambda text: None),
    "bool": (r"^(?:[Tt]rue|TRUE|[Ff]alse|FALSE)$", list("tTfF"), lambda text: text.lower() == "true"),
    "int": (r"^[-+]?[0-9]+$", _NUMBER_START, int),
    "float": (r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", _NUMBER_START, float),
}
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "null"}


class Written(NamedTuple):
    """A value and where it stands.

    Attributes:
        value (`Any`): A number, a text, true, false, `None`, a `dict[str, Written]` or a `list[Written]`.
        place (`str`): The file and the line, with which messages begin.
    """

    value: Any
    place: str

    def refuse(self, reason: str) -> ValueError:
        """The error to raise.

        Args:
            reason (`str`): What is wrong, and what to write instead.
        """
        return ValueError(f"{self.place}: {reason}")


class Block(list):
    """A list that is written with one item a line."""


class _Loader(yaml.SafeLoader):
    """Composes nodes; nothing is constructed of them."""

    yaml_implicit_resolvers: typing.ClassVar[dict] = {}
    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> yaml.Node:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise _unread(
                "anchors (&) and aliases (*) are not read: write the value out, or the text in quotes", event
            )
        if event.tag is not None:
            raise _unread("tags (!) are not read: leave it out, or write the text in quotes", event)
        if self._depth == _DEEPEST:
            raise _unread(f"lists and mappings are nested more than {_DEEPEST} deep", event)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Indents the items of lists."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def read_yaml(source: str | Path) -> Written:
    """Reads a mapping.

    Args:
        source (`str` or `Path`): The file, or the text itself: a string of more than one line.

    Returns:
        `Written`: Of a `dict`.

    Raises:
        ValueError: if there is no such file, or it is too large, no YAML, no mapping, or holds what is not read: a
            key twice in a mapping, tags, anchors and aliases.
    """
    name, text = _text_of(source)
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{name}{line}: {error.problem or error.context}.") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is no YAML: {error}.") from None
    finally:
        loader.dispose()
    if not isinstance(node, yaml.MappingNode):
        raise ValueError(f"{name} is no mapping: write `key: value` lines, of which `steps:` is one.")
    return _written(node, node, name)


def as_written(value: Any, place: str) -> Written:
    """Plain values as if they were read.

    Args:
        value (`Any`): Of plain JSON types.
        place (`str`): What messages begin with.
    """
    if isinstance(value, dict):
        return Written({str(name): as_written(item, place) for name, item in value.items()}, place)
    if isinstance(value, list | tuple):
        return Written([as_written(item, place) for item in value], place)
    return Written(value, place)


def write_yaml(content: Mapping[str, Any]) -> str:
    """A mapping as YAML, which `read_yaml` reads back.

    Args:
        content (`Mapping[str, Any]`): Of plain JSON types and `Block`.
    """
    return yaml.dump(dict(content), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)


def build(kind: type, written: Written, name: str) -> Any:
    """A dataclass of a mapping with its fields, all of which are checked.

    Args:
        kind (`type`): The dataclass.
        written (`Written`): The mapping; `None` stands for an empty one.
        name (`str`): What it is in messages, such as `prune`.

    Raises:
        ValueError: if a key is unknown, a field lacks, or a value is of the wrong type or refused by the dataclass.
    """
    return construct(kind, read_fields(fields(kind), typing.get_type_hints(kind), written, name), written, name)


def read_fields(known: Iterable[Field], types_: Mapping[str, Any], written: Written, name: str) -> dict[str, Any]:
    """The values of a mapping for fields of dataclasses.

    Args:
        known (`Iterable[Field]`): All fields that there are.
        types_ (`Mapping[str, Any]`): Their types, by name.
        written (`Written`): The mapping.
        name (`str`): What it is in messages.

    Raises:
        ValueError: if a key is unknown, a field lacks, or a value is of the wrong type.
    """
    known = {one.name: one for one in known if one.init}
    given = mapping_of(written, name)
    for key, item in given.items():
        if key not in known:
            raise item.refuse(f"{name} has no {key!r}{suggest(key, known)}.")
    for one in known.values():
        if one.name not in given and one.default is MISSING and one.default_factory is MISSING:
            raise written.refuse(f"{name} needs `{one.name}:`. {one.metadata.get('help', '')}".strip())
    return {key: convert(types_[key], item, f"{key} of {name}") for key, item in given.items()}


def construct(make: Callable[..., Any], values: Mapping[str, Any], written: Written, name: str) -> Any:
    """Calls a dataclass, whose errors get the line of what they speak of.

    Args:
        make (`Callable`): The dataclass.
        values (`Mapping[str, Any]`): Its fields.
        written (`Written`): The mapping that they are from.
        name (`str`): What it is in messages.

    Raises:
        ValueError: if the dataclass refuses the values.
    """
    try:
        return make(**values)
    except (ValueError, TypeError) as error:
        raise _spoken_of(str(error), written).refuse(f"{name}: {error}") from error


def mapping_of(written: Written, name: str) -> dict[str, Written]:
    """The items of a mapping; none where nothing is written.

    Args:
        written (`Written`): The mapping.
        name (`str`): What it is in messages.

    Raises:
        ValueError: if it is something else.
    """
    if written.value is None:
        return {}
    if not isinstance(written.value, dict):
        raise written.refuse(f"{name} is {_shown(written)}: write its settings below it, as `key: value` lines.")
    return written.value


def suggest(name: str, known: Iterable[str]) -> str:
    """What may have been meant, as the end of a sentence.

    Args:
        name (`str`): What was written.
        known (`Iterable[str]`): What there is.
    """
    known = list(known)
    near = difflib.get_close_matches(name.lower().replace("-", "_"), known, n=3) or difflib.get_close_matches(
        name, known, n=3
    )
    return f": did you mean {' or '.join(near)}?" if near else f": give one of {', '.join(known)}"


def convert(wanted: Any, written: Written, name: str) -> Any:
    """A value as a type wants it.

    Args:
        wanted (`Any`): The type: of numbers, texts, choices, lists, mappings and dataclasses.
        written (`Written`): The value.
        name (`str`): What it is in messages.

    Raises:
        ValueError: if it is no value of the type.
    """
    value = written.value
    for one in _choices(wanted):
        origin, inner = get_origin(one) or one, get_args(one)
        if one is Any:
            return plain(written)
        if origin is Literal and any(value == choice and type(value) is type(choice) for choice in inner):
            return value
        if is_dataclass(one) and isinstance(value, dict):
            return build(one, written, name)
        if origin in (dict, Mapping) and isinstance(value, dict):
            item_type = inner[1] if inner else Any
            return {key: convert(item_type, item, f"{key} in {name}") for key, item in value.items()}
        if origin is tuple and inner[-1] is not Ellipsis and isinstance(value, list) and len(value) == len(inner):
            return tuple(convert(*pair, f"an item of {name}") for pair in zip(inner, value, strict=True))
        if (
            origin in (list, Sequence, tuple)
            and isinstance(value, list)
            and (origin is not tuple or len(inner) != 2 or inner[-1] is Ellipsis)
        ):
            return [convert(inner[0] if inner else Any, item, f"an item of {name}") for item in value]
        if one is float and type(value) in (int, float) and math.isfinite(value):
            return float(value)
        if one in (bool, int, str, type(None)) and type(value) is one:
            return value
    raise written.refuse(f"{name} is {_shown(written)}: give {' or '.join(map(_worded, _choices(wanted)))}.")
