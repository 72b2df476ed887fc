"""Names of modules chosen by a pattern."""

import re
from collections.abc import Collection


def matching_names(names: Collection[str], pattern: str, origin: str, what: str) -> list[str]:
    """The names that a pattern stands for: those that it matches whole, and all inside them.

    Args:
        names (`Collection[str]`): Dotted names, at least one.
        pattern (`str`): One of them, the name of a module around some, or a regular expression for either.
        origin (`str`): Where the pattern was given, for the message.
        what (`str`): What has these names, for the message: `"projections inside the blocks"`.

    Returns:
        `list[str]`: At least one.

    Raises:
        ValueError: if the pattern is no regular expression, or matches none.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{origin} has {pattern!r}, which is no regular expression: {error}.") from error

    def is_meant(name: str) -> bool:
        parts = name.split(".")
        return any(compiled.fullmatch(".".join(parts[:stop])) for stop in range(1, len(parts) + 1))

    found = [name for name in names if is_meant(name)]
    if not found:
        raise ValueError(
            f"{origin} has {pattern!r}, which matches none of the {len(names)} {what}: give the dotted name of one, "
            f"such as {next(iter(names))!r}, or a regular expression for whole names."
        )
    return found
