"""What a run is made from, known by its contents: other files at the same place are another model, or other data."""

import hashlib
import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import DatasetDict

# Files that `datasets` writes beside a data set, for a while or for good.
_CACHE = re.compile(r"cache-.*|tmp\w{8}")
# Text about a model or data.
_TEXTS = (".md", ".log")
# What `save_to_disk` writes; the rows are in a folder for each split.
_SAVED = "dataset_dict.json"


def digest(content: Any) -> str:
    """A short name for plain JSON types, the same for the same content.

    Args:
        content: What is to be named.

    Returns:
        `str`: 16 hexadecimal digits.
    """
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def inputs_digest(model: str, dataset: str, output: Path, rows: str | None = None) -> str:
    """A name for the model and the data that a run reads.

    Args:
        model (`str`): A folder, or a name on the Hub.
        dataset (`str`): A file, a folder, or a name on the Hub.
        output (`Path`): The run's folder, of which nothing counts.
        rows (`str`, *optional*): `rows_digest` of data that are in memory.

    Returns:
        `str`: 16 hexadecimal digits.
    """
    files = [stamp(path, output) for path in (model, dataset)]
    return digest({"files": files, "rows": rows})


def stamp(path: str, output: Path) -> list[tuple[str, str]]:
    """Names and contents of the files at a path, without those that decide nothing, and those in folders in it.

    Args:
        path (`str`): A file or a folder.
        output (`Path`): A run's folder, of which nothing counts.

    Returns:
        `list[tuple[str, str]]`: Empty for a name on the Hub.
    """
    place, own = Path(path).expanduser().resolve(), output.resolve()
    below = place.glob("*/*") if (place / _SAVED).is_file() else ()
    files = sorted([*place.glob("*"), *below]) if place.is_dir() else [place]
    # Times of files would change where the same data are copied or mounted again.
    return [
        (file.name, _content(file, file.stat().st_mtime_ns))
        for file in files
        if file.is_file() and own not in file.parents and (file == place or _decides(file.relative_to(place)))
    ]


def _decides(file: Path) -> bool:
    # Downloads and version control keep notes in hidden folders, which change with every call.
    is_hidden = any(part.startswith(".") for part in file.parts)
    return not is_hidden and not _CACHE.fullmatch(file.name) and file.suffix not in _TEXTS


@cache
def _content(file: Path, changed: int) -> str:
    # A run asks several times, and a model may have gigabytes.
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def rows_digest(splits: "DatasetDict", columns: Sequence[str]) -> str:
    """A name for data in memory.

    Args:
        splits (`DatasetDict`): The data.
        columns (sequence of `str`): Which of their columns count; one that a split lacks does not.

    Returns:
        `str`: 64 hexadecimal digits.
    """
    found = hashlib.sha256()
    for name, rows in sorted(splits.items()):
        kept = rows.select_columns([column for column in columns if column in rows.column_names])
        found.update(f"{name} {len(rows)} {kept.features}".encode())
        for batch in kept.iter(1000):
            found.update(json.dumps(batch, default=str, sort_keys=True).encode())
    return found.hexdigest()
