"""One run in a folder at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

LOCK_FILE = ".hf-compress.lock"


@contextmanager
def alone_in(folder: Path, is_main: bool = True) -> Iterator[None]:
    """Keeps other runs out of a folder, until the block or the process ends, however it ends.

    Args:
        folder (`Path`): The output folder; made if missing, and removed again if nothing was written there.
        is_main (`bool`, *optional*, defaults to `True`): Whether this is the main process of its run, which holds the
            folder for all of them.

    Raises:
        ValueError: if another run is at work there, or the folder is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"The output folder {folder} is a file: give a new or an empty folder.")
    if not is_main:
        yield
        return
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"Another run is at work in the output folder {folder}: wait until it ends, or give another folder."
        ) from None
    try:
        yield
    finally:
        (folder / LOCK_FILE).unlink(missing_ok=True)
        lock.release()
        if is_new and not any(folder.iterdir()):
            folder.rmdir()


def is_taken(folder: Path, *but: Path) -> bool:
    """Whether a folder holds files.

    Args:
        folder (`Path`): Any folder.
        but (`Path`): Files that do not count, besides the one that `alone_in` makes.

    Returns:
        `bool`: `False` for a folder that is not there.
    """
    return folder.exists() and any(path not in but and path.name != LOCK_FILE for path in folder.iterdir())
