"""The files of a teacher cache: blocks of answers, each written whole or not at all, and what they are."""

import errno
import json
import math
import os
import shutil
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from hf_compress.distillation.cache_keys import KEY_BYTES

META_FILE = "meta.json"
SETTINGS_FILE = "settings.json"
FORMAT_VERSION = 1
# How old a file must be that nobody finished, for it to be nobody's work any more.
_STALE_SECONDS = 3600


@dataclass(frozen=True)
class Settings:
    """What a cache was asked for; a build continues only one with the same.

    Attributes:
        fingerprint (`str`): Of the teacher.
        task (`str`): Its task.
        precision (`str`): `"fp32"`, `"fp16"` or `"top-k"`.
        top_k (`int`): How many classes are kept, for `"top-k"`; else 0.
        temperature (`float`): At which their probabilities are, for `"top-k"`.
        signals (`tuple[str, ...]`): What is stored beside the outputs.
        autocast (`str`): The dtype that the teacher ran in, or `"float32"`.
        columns (`tuple[str, ...]`): What the teacher's forward takes, without labels.
        pooling (`str`): How a text's embedding is made of its tokens'.
        rows (`str`): Hash of some rows and the number of all, so that other data are noticed.
        block_rows (`int`): Rows of a block.
        version (`int`): Of the format.
    """

    fingerprint: str
    task: str
    precision: str
    top_k: int
    temperature: float
    signals: tuple[str, ...]
    autocast: str
    columns: tuple[str, ...]
    pooling: str
    rows: str
    block_rows: int
    version: int = FORMAT_VERSION


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that it is there whole or not at all, whoever else writes it at the same time.

    Args:
        path (`Path`): Its name.
        content (`bytes`): What is in it.

    Raises:
        OSError: if the disk is full, with what is needed and free; nothing is left behind.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        if error.errno != errno.ENOSPC:
            raise
        free = shutil.disk_usage(path.parent).free
        raise OSError(
            errno.ENOSPC,
            f"The disk of {path.parent} is full: {path.name} needs {len(content):,} bytes and {free:,} are free. What "
            "was written before is kept: make room and build the cache again, or choose precision='fp16' or fewer "
            "signals",
        ) from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def block_path(folder: Path, number: int) -> Path:
    """The file of a block.

    Args:
        folder (`Path`): Of the cache.
        number (`int`): Of the block, from 0.

    Returns:
        `Path`: A safetensors file.
    """
    return folder / f"block-{number:06d}.safetensors"


def write_block(folder: Path, number: int, arrays: dict[str, np.ndarray]) -> None:
    """Writes one block.

    Args:
        folder (`Path`): Of the cache.
        number (`int`): Of the block.
        arrays (`dict[str, np.ndarray]`): `keys` of shape (rows, 16), and for every signal its values.

    Raises:
        OSError: if the disk is full.
    """
    write_atomically(block_path(folder, number), save({n: np.ascontiguousarray(a) for n, a in arrays.items()}))


def map_block(path: Path, size: int) -> dict[str, np.ndarray]:
    """The arrays of a block, mapped into memory and read when they are touched.

    Args:
        path (`Path`): Of the block.
        size (`int`): Bytes that it has to have.

    Returns:
        `dict[str, np.ndarray]`: Read-only arrays by name.

    Raises:
        ValueError: if the file is missing or has another size, or its header does not fit it.
    """
    found = path.stat().st_size if path.is_file() else -1
    if found != size:
        raise ValueError(
            f"The block {path} has {max(found, 0):,} bytes instead of {size:,}: it was cut off or replaced. Delete "
            "the folder of the cache and build it again."
        )
    data = np.memmap(path, mode="r", dtype=np.uint8)
    try:
        header_size = int(data[:8].view("<u8")[0])
        header = json.loads(bytes(data[8 : 8 + header_size]))
        arrays = {
            name: _checked_array(data[8 + header_size :], item) for name, item in header.items() if name[:2] != "__"
        }
        _check_block(arrays)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise ValueError(
            f"The block {path} is none that a cache wrote ({error}): delete the folder of the cache and build "
            "it again."
        ) from error
    return arrays


def _checked_array(data: np.ndarray, item: dict) -> np.ndarray:
    """An array of a block; nothing in a file's header shapes memory unless the file has the bytes for it."""
    begin, end = item["data_offsets"]
    dtype, shape = np.dtype(_DTYPES[item["dtype"]]), tuple(item["shape"])
    if not 0 <= begin <= end <= len(data) or not all(isinstance(size, int) and size >= 0 for size in shape):
        raise ValueError(f"bytes {begin} to {end} of {len(data)} for the shape {shape}")
    if math.prod(shape) * dtype.itemsize != end - begin or (0 in shape[1:]):
        raise ValueError(f"{end - begin} bytes for the shape {shape}")
    return data[begin:end].view(dtype).reshape(shape)


def _check_block(arrays: dict[str, np.ndarray]) -> None:
    keys = arrays["keys"]
    if keys.dtype != np.uint8 or keys.ndim != 2 or keys.shape[1] != KEY_BYTES:
        raise ValueError(f"keys of shape {keys.shape}")
    for name, array in arrays.items():
        offsets = arrays.get(f"{name}.offsets")
        if name.endswith(".offsets") or offsets is None:
            n_rows = len(array) - name.endswith(".offsets")
        else:
            n_rows = len(offsets) - 1
            if (np.diff(offsets) < 0).any() or offsets[0] != 0 or offsets[-1] != len(array):
                raise ValueError(f"offsets of {name} that do not rise from 0 to {len(array)}")
        if n_rows != len(keys):
            raise ValueError(f"{n_rows} rows of {name} for {len(keys)} keys")


_DTYPES = {"F32": "<f4", "F16": "<f2", "U8": "u1", "U16": "<u2", "I32": "<i4", "I64": "<i8"}


def begin(folder: Path, settings: Settings) -> None:
    """Takes a folder for a cache, or continues the same one in it.

    Args:
        folder (`Path`): Made if missing.
        settings (`Settings`): What is asked for.

    Raises:
        ValueError: if the folder holds files that are no cache's, or a cache with other settings.
    """
    if folder.is_file():
        raise ValueError(f"{folder} is a file: give a folder for the cache.")
    found = [path.name for path in folder.iterdir()] if folder.exists() else []
    stored = read_json(folder / SETTINGS_FILE)
    is_ours = (name.startswith((".", "block-")) or name in (META_FILE, SETTINGS_FILE) for name in found)
    if stored is None and not all(is_ours):
        raise ValueError(
            f"The folder {folder} holds files that are not of a cache, so nothing is written there: give a new or an "
            "empty folder."
        )
    wanted = json.loads(json.dumps(asdict(settings)))
    if stored is not None and stored != wanted:
        changed = sorted(name for name in wanted if stored.get(name) != wanted[name])
        changes = ", ".join(f"{name} was {stored.get(name)!r} and is {wanted[name]!r}" for name in changed)
        raise ValueError(
            f"The folder {folder} holds a cache with other settings ({changes}): give another folder, or delete it to "
            "build anew."
        )
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob(".*.partial"):
        # Another process may be about to give it its name.
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                path.unlink()
    if stored is None:
        write_atomically(folder / SETTINGS_FILE, json.dumps(wanted, indent=2).encode())


def finish(folder: Path, n_blocks: int) -> None:
    """Writes down that all blocks are there; without it, a cache counts as unfinished.

    Args:
        folder (`Path`): Of the cache.
        n_blocks (`int`): How many it has.
    """
    sizes = [block_path(folder, number).stat().st_size for number in range(n_blocks)]
    meta = {"version": FORMAT_VERSION, "block_bytes": sizes}
    write_atomically(folder / META_FILE, json.dumps(meta, indent=2).encode())


def read_json(path: Path) -> dict | None:
    """The content of a JSON file, or `None` if there is none.

    Args:
        path (`Path`): Of the file.

    Returns:
        `dict` or `None`: Its content.

    Raises:
        ValueError: if it cannot be read as JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (NotADirectoryError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): delete the folder of the cache and build anew.") from error


def read_settings(folder: Path) -> Settings:
    """The settings of a finished cache.

    Args:
        folder (`Path`): Of the cache.

    Returns:
        `Settings`: What it was asked for.

    Raises:
        ValueError: if there is no cache, it is unfinished, or of another version of the format.
    """
    stored = read_json(folder / SETTINGS_FILE)
    if stored is None:
        raise ValueError(
            f"There is no cache in {folder}: build one with TeacherCache.build(folder, teacher, dataset)."
        )
    if stored.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"The cache in {folder} has version {stored.get('version')!r} of the format, and this is version "
            f"{FORMAT_VERSION}: build it again, in another folder."
        )
    if read_json(folder / META_FILE) is None:
        raise ValueError(
            f"The cache in {folder} is unfinished: call TeacherCache.build with the same arguments to continue it."
        )
    return Settings(**{name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()})
