"""Text files that appear with all of their content or not at all."""

from pathlib import Path

# What a file is called while it is written.
PARTIAL = ".partial"


def write_whole(path: Path, text: str) -> None:
    """Writes a text as a whole or not at all, in UTF-8 whatever the locale is.

    Args:
        path (`Path`): Where to; a file that is there is replaced.
        text (`str`): What to write.
    """
    partial = path.with_name(path.name + PARTIAL)
    partial.write_text(text, encoding="utf-8")
    # Not rename, which fails on Windows where there is a file already.
    partial.replace(path)
