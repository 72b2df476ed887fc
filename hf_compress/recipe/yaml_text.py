"""YAML as recipes use it: read without tags, anchors and aliases, each value with its line; and written."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

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

    yaml_implicit_resolvers: ClassVar[dict] = {}
    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> yaml.Node:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise _unread("anchors (&) and aliases (*) are not read: write the value out, or quote the text", event)
        if event.tag is not None:
            raise _unread("tags (!) are not read: leave it out, or quote the text", event)
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

    def ignore_aliases(self, data: Any) -> bool:
        return True


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
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        # Some problems are the second half of a sentence.
        half = f"{error.context}, " if error.problem.startswith("but ") else ""
        raise ValueError(f"{name}{line}: {half}{error.problem}.") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is no YAML: {' '.join(str(error).split())}.") from None
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
        return Written({str(name): as_written(item, f"{place}, {name}") for name, item in value.items()}, place)
    if isinstance(value, list | tuple):
        items = enumerate(value, start=1)
        return Written([as_written(item, f"{place}, item {number}") for number, item in items], place)
    return Written(value, place)


def write_yaml(content: Mapping[str, Any]) -> str:
    """A mapping as YAML, which `read_yaml` reads back.

    Args:
        content (`Mapping[str, Any]`): Of plain JSON types and `Block`.
    """
    return yaml.dump(dict(content), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)


def plain(written: Written) -> Any:
    """Values without their places.

    Args:
        written (`Written`): As read.

    Returns:
        `Any`: Of plain JSON types.
    """
    value = written.value
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def _text_of(source: str | Path) -> tuple[str, str]:
    """The name of a recipe in messages, and its text."""
    if isinstance(source, str) and "\n" in source:
        name, content = "The recipe", source.encode()
    else:
        path = Path(source)
        if not path.is_file():
            raise ValueError(f"There is no file {path}: give the path of a recipe, such as recipe.yaml.")
        with path.open("rb") as file:
            name, content = str(source), file.read(_LARGEST + 1)
    if len(content) > _LARGEST:
        raise ValueError(f"{name} has more than {_LARGEST / 1e6:g} MB, which no recipe needs: is it another file?")
    try:
        return name, content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is no text in UTF-8 ({error.reason} at byte {error.start}).") from None


def _written(node: yaml.Node, at: yaml.Node, name: str) -> Written:
    """What a node holds, with the line of another node, where it begins."""
    place = f"{name}, line {at.start_mark.line + 1}"
    if isinstance(node, yaml.SequenceNode):
        return Written([_written(item, item, name) for item in node.value], place)
    if isinstance(node, yaml.ScalarNode):
        return Written(_scalar(node, place), place)
    items: dict[str, Written] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError(f"{name}, line {key.start_mark.line + 1}: a key is a list or a mapping: give a name.")
        item = _written(value, key, name)
        if key.value in items:
            before = items[key.value].place.rpartition("line ")[2]
            raise item.refuse(f"{key.value} was given in line {before} already: leave one of them out.")
        items[key.value] = item
    return Written(items, place)


def _scalar(node: yaml.ScalarNode, place: str) -> Any:
    kind = node.tag.removeprefix(_TAG)
    if kind not in _SCALARS:
        return node.value
    try:
        return _SCALARS[kind][2](node.value)
    except ValueError:
        raise ValueError(f"{place}: {node.value[:20]}... is too long for a number.") from None


def _unread(reason: str, event: yaml.Event) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=reason, problem_mark=event.start_mark)


def _represent_list(dumper: _Dumper, value: list) -> yaml.Node:
    is_flat = not any(isinstance(item, dict) for item in value)
    return dumper.represent_sequence(_TAG + "seq", value, flow_style=is_flat)


def _represent_block(dumper: _Dumper, value: Block) -> yaml.Node:
    return dumper.represent_sequence(_TAG + "seq", value, flow_style=False)


def _represent_mapping(dumper: _Dumper, value: dict) -> yaml.Node:
    return dumper.represent_mapping(_TAG + "map", value.items(), flow_style=False)


def _represent_float(dumper: _Dumper, value: float) -> yaml.Node:
    if value.is_integer() and abs(value) < 1e15:
        return dumper.represent_scalar(_TAG + "int", str(int(value)))
    return dumper.represent_float(value)


for _kind, (_pattern, _first, _) in _SCALARS.items():
    # A text that either set of rules would take for something else is written in quotes.
    _Loader.add_implicit_resolver(_TAG + _kind, re.compile(_pattern), _first)
    _Dumper.add_implicit_resolver(_TAG + _kind, re.compile(_pattern), _first)
_Dumper.add_representer(list, _represent_list)
_Dumper.add_representer(Block, _represent_block)
_Dumper.add_representer(dict, _represent_mapping)
_Dumper.add_representer(float, _represent_float)
