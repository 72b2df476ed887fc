"""What a model was made of: the base's name on the Hub and its license, and names without paths of a machine."""

import logging
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import yaml
from huggingface_hub import ModelCard, file_exists, hf_hub_download, try_to_load_from_cache
from huggingface_hub.utils import HFValidationError, validate_repo_id

logger = logging.getLogger(__name__)

_CARD = "README.md"
_DATA_FILES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")


class Base(NamedTuple):
    """The model that another one was made of.

    Attributes:
        shown (`str`): What a text calls it: a name on the Hub, or the last part of a folder.
        hub_name (`str` or `None`): Its name on the Hub, where it has one.
        license (`str` or `None`): As its card says: an identifier of the Hub, such as `"apache-2.0"`.
        license_name (`str` or `None`): Of a license that the Hub has no identifier of.
        license_link (`str` or `None`): Where to read such a license.
        language (`str` or `None`): The language that its card names, where that is one alone.
    """

    shown: str
    hub_name: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: str | None = None


def name_base(model: str) -> Base:
    """What can be said of a base by its name alone.

    Args:
        model (`str`): A folder, or a name on the Hub.
    """
    return Base(shown_name(model), hub_name(model))


def read_base(model: str) -> Base:
    """What the card of a base says: `README.md` in its folder, or the one on the Hub if that can be reached.

    Args:
        model (`str`): A folder, or a name on the Hub.

    Returns:
        `Base`: Without a license where there is no card, or none can be had. Of a folder, `hub_name` is the base that
        its own card names.
    """
    known = name_base(model)
    try:
        file = Path(model).expanduser() / _CARD if is_local(model) else _find_card(model)
        if file is None or not file.is_file():
            return known
        card = ModelCard.load(file, ignore_metadata_errors=True)
    except (OSError, ValueError, yaml.YAMLError, httpx2.HTTPError) as error:
        logger.info("The card of %s cannot be read: %s", model, error)
        return known
    data = card.data.to_dict()
    texts = {name: data[name] for name in ("license", "license_name", "license_link") if _is_text(data.get(name))}
    languages = data.get("language")
    languages = [languages] if isinstance(languages, str) else languages or []
    heading = re.search(r"^# +([\w.-]+) *$", card.text, re.MULTILINE)
    if is_local(model):
        base = data.get("base_model")
        above = hub_name(base) if isinstance(base, str) else None
        # Folders are often called "model" or "output", which says nothing.
        known = known._replace(hub_name=above, shown=heading[1] if heading else known.shown)
    return known._replace(language=languages[0] if len(languages) == 1 else None, **texts)


def _find_card(model: str) -> Path | None:
    """The card of a model on the Hub: a copy on this machine if there is one, else downloaded."""
    file = try_to_load_from_cache(model, _CARD)
    if isinstance(file, str):
        return Path(file)
    # Asked first, because a download would try for half a minute where there is no network.
    return Path(hf_hub_download(model, _CARD)) if file_exists(model, _CARD) else None


def is_local(name: str) -> bool:
    """Whether a name is a path on this machine rather than a name on the Hub.

    Args:
        name (`str`): Of a model or a data set.
    """
    return (
        name.startswith((".", "~"))
        or os.path.isabs(name)
        or "\\" in name
        or Path(name).suffix in _DATA_FILES
        or os.path.exists(name)
    )


def shown_name(name: str) -> str:
    """A name without the path to it.

    Args:
        name (`str`): A path or a name on the Hub.

    Returns:
        `str`: The last part of a path; a name on the Hub as it is.
    """
    return Path(name.replace("\\", "/")).expanduser().resolve().name if is_local(name) else name


def hub_name(name: str) -> str | None:
    """A name if it is one of the Hub.

    Args:
        name (`str`): A path, a name on the Hub, or what a text calls a model or a data set.
    """
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if is_local(name) else name


def portable_name(name: str) -> str:
    """A name without the path to it that is still seen to be one of a file or folder: `./bert` for `/models/bert`.

    Args:
        name (`str`): A path or a name on the Hub, which stays as it is.
    """
    return f"./{shown_name(name)}" if is_local(name) else name


def without_paths(value: Any) -> Any:
    """Settings or a report with `portable_name` of every path in them.

    Args:
        value (`Any`): Plain JSON types.
    """
    if isinstance(value, dict):
        return {name: without_paths(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item) for item in value]
    # A backslash alone is none of a path: patterns of names have them too.
    is_path = isinstance(value, str) and re.search(r"/|^[A-Za-z]:\\|^\\\\", value) and is_local(value)
    return portable_name(value) if is_path else value


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)
