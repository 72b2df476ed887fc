"""Dataclasses made of what was written: unknown keys, wrong types and refused values are told with their lines."""

import difflib
import re
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hf_compress.recipe.yaml_text import Written, plain

# No setting is as large; YAML has whole numbers that no float can hold.
_INFINITE = 1e300
_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    type(None): "null",
    Any: "a value",
}


def build(kind: type, written: Written, name: str) -> Any:
    """A dataclass of a mapping of its fields.

    Args:
        kind (`type`): The dataclass.
        written (`Written`): The mapping; `None` stands for an empty one.
        name (`str`): What it is in messages, such as `prune`.

    Raises:
        ValueError: if a key is unknown, a field is missing, or a value is of the wrong type or out of range.
    """
    return construct(kind, read_fields([kind], written, name), written, name)


def read_fields(kinds: Sequence[type], written: Written, name: str, without: Collection[str] = ()) -> dict[str, Any]:
    """The values of a mapping, for the fields of dataclasses that share it.

    Args:
        kinds (`Sequence[type]`): The dataclasses.
        written (`Written`): The mapping; `None` stands for an empty one.
        name (`str`): What it is in messages.
        without (`Collection[str]`, *optional*): Fields that are not written.

    Returns:
        `dict[str, Any]`: Of those that are there.

    Raises:
        ValueError: if a key is unknown, a field is missing, or a value is of the wrong type.
    """
    known = {one.name: one for kind in kinds for one in fields(kind) if one.name not in without}
    wanted = {field: kind_of for kind in kinds for field, kind_of in get_type_hints(kind).items()}
    given = mapping_of(written, name)
    check_keys(given, known, name)
    for one in known.values():
        if one.name not in given and _is_required(one):
            raise written.refuse(f"{name} needs `{one.name}:`. {one.metadata.get('help', '')}".strip())
    return {key: convert(wanted[key], item, f"{key} of {name}") for key, item in given.items()}


def construct(make: Callable[..., Any], values: Mapping[str, Any], written: Written, name: str) -> Any:
    """Calls a dataclass; its errors get the line of what they speak of.

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
        raise written.refuse(f"{name} is {shown(written)}: write `name: value` lines below it.")
    return written.value


def check_keys(given: Mapping[str, Written], known: Iterable[str], name: str) -> None:
    """Refuses keys that there are not.

    Args:
        given (`Mapping[str, Written]`): What is written.
        known (`Iterable[str]`): What there is.
        name (`str`): What it is in messages.

    Raises:
        ValueError: with the nearest names.
    """
    known = list(known)
    for key, item in given.items():
        if key not in known:
            raise item.refuse(f"{name} has no {key!r}: {suggest(key, known)}")


def suggest(name: str, known: Iterable[str]) -> str:
    """What may have been meant.

    Args:
        name (`str`): What was written.
        known (`Iterable[str]`): What there is.

    Returns:
        `str`: A question with the nearest names, or all names where none is near.
    """
    alike = {one.replace("-", "_"): one for one in known}
    near = [alike[one] for one in difflib.get_close_matches(name.lower().replace("-", "_"), alike)]
    return f"did you mean {' or '.join(near)}?" if near else f"give one of {', '.join(alike.values())}."


def shown(written: Written) -> str:
    """A value as messages quote it.

    Args:
        written (`Written`): The value.
    """
    value = written.value
    if value is None or isinstance(value, bool):
        return {None: "empty", True: "true", False: "false"}[value]
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    return repr(value) if len(repr(value)) <= 60 else repr(value)[:60] + "..."


def convert(wanted: Any, written: Written, name: str) -> Any:
    """A value as a type wants it.

    Args:
        wanted (`Any`): The type, made of numbers, texts, choices, lists, mappings and dataclasses.
        written (`Written`): The value.
        name (`str`): What it is in messages.

    Raises:
        ValueError: if it is no value of the type.
    """
    value, kinds = written.value, _alternatives(wanted)
    if Any in kinds:
        return plain(written)
    for kind in kinds:
        if isinstance(value, dict) and _is_mapping(kind):
            return _convert_mapping(kind, written, name)
        if isinstance(value, list) and _items_of(kind, len(value)) is not None:
            pairs = zip(_items_of(kind, len(value)), value, strict=True)
            return [convert(inner, item, f"an item of {name}") for inner, item in pairs]
        if get_origin(kind) is Literal and any(value == one and type(value) is type(one) for one in get_args(kind)):
            return value
        if kind is float and type(value) in (int, float) and abs(value) < _INFINITE:
            return float(value)
        if kind in (bool, int, str, type(None)) and type(value) is kind:
            return value
    raise written.refuse(f"{name} is {shown(written)}: {_remedy(wanted, written)}")


def _convert_mapping(kind: Any, written: Written, name: str) -> Any:
    if is_dataclass(kind):
        return build(kind, written, name)
    inner = get_args(kind)[1] if get_args(kind) else Any
    return {key: convert(inner, item, f"{key!r} in {name}") for key, item in written.value.items()}


def _alternatives(wanted: Any) -> list[Any]:
    """The types of a union, those inside it too; of another type, itself."""
    if get_origin(wanted) in (Union, types.UnionType):
        return [one for kind in get_args(wanted) for one in _alternatives(kind)]
    return [wanted]


def _is_mapping(kind: Any) -> bool:
    return is_dataclass(kind) or (get_origin(kind) or kind) in (dict, Mapping)


def _items_of(kind: Any, n_items: int) -> list[Any] | None:
    """The types of so many items of a list; `None` if it is no list, or one of another length."""
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin is tuple and inner and inner[-1] is not Ellipsis:
        return list(inner) if len(inner) == n_items else None
    return [inner[0] if inner else Any] * n_items if origin in (list, tuple, Sequence) else None


def _worded(wanted: Any) -> str:
    """A type in words."""
    return " or ".join(dict.fromkeys(word for kind in _alternatives(wanted) for word in _words_of(kind)))


def _words_of(kind: Any) -> list[str]:
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin is Literal:
        return [str(one) for one in inner]
    if _is_mapping(kind):
        return ["a mapping of its fields" if is_dataclass(kind) else "a mapping"]
    if origin is tuple and inner and inner[-1] is not Ellipsis:
        return [f"a list of {len(inner)} values"]
    if origin in (list, tuple, Sequence):
        return [f"a list, each item {_worded(inner[0])}" if inner else "a list"]
    return [_WORDS[kind]]


def _remedy(wanted: Any, written: Written) -> str:
    """What to write in the place of a value that a type does not take."""
    value, kinds = written.value, _alternatives(wanted)
    choices = [one for kind in kinds if get_origin(kind) is Literal for one in get_args(kind)]
    if isinstance(value, str) and choices and all(get_origin(kind) is Literal or kind is type(None) for kind in kinds):
        return suggest(value, map(str, choices))
    example = ""
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        is_list = any(_items_of(kind, 1) for kind in kinds)
        example = f", such as '{value}' in quotes" if str in kinds else f", such as [{value}]" if is_list else ""
    return f"give {_worded(wanted)}{example}."


def _is_required(one: Field) -> bool:
    return one.default is MISSING and one.default_factory is MISSING


def _spoken_of(message: str, written: Written) -> Written:
    """The innermost value whose name comes first in a message; the mapping itself if it names none."""
    for word in re.findall(r"\w+", message):
        if isinstance(written.value, dict) and word in written.value:
            written = written.value[word]
    return written
