"""Rows to measure on that are also learned from."""

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

# A few are usual: 2 % of TREC's, 0.1 % of SST-2's.
_MANY = 0.01


def rows_in_both(train: "Dataset", test: "Dataset", text_columns: Sequence[str]) -> int:
    """How many rows to measure on also stand among the rows to learn from, without regard to case and blanks.

    Args:
        train (`Dataset`): Rows to learn from.
        test (`Dataset`): Rows to measure on.
        text_columns (`Sequence[str]`): The columns that are compared: of texts, or of lists of words. Labels are not.

    Returns:
        `int`: Rows of `test`, each of which counts once.
    """
    known = set(_texts(train, text_columns))
    return sum(row in known for row in _texts(test, text_columns))


def warn_of_rows_in_both(train: "Dataset", test: "Dataset", text_columns: Sequence[str]) -> int:
    """Warns where more than one in a hundred rows to measure on is also learned from.

    Args:
        train (`Dataset`): Rows to learn from.
        test (`Dataset`): Rows to measure on.
        text_columns (`Sequence[str]`): The columns that are compared.

    Returns:
        `int`: Rows of `test` that stand in both.
    """
    n_rows = rows_in_both(train, test, text_columns)
    if n_rows > _MANY * len(test):
        logger.warning(
            "%d of the %d rows to measure on also stand among those to learn from, so that what is measured may be "
            "better than on new texts: leave them out of train, or measure on other rows.",
            n_rows,
            len(test),
        )
    return n_rows


def _texts(rows: "Dataset", columns: Sequence[str]) -> Iterator[tuple[str, ...]]:
    return zip(*(map(_plain, rows[column]) for column in columns), strict=True)


def _plain(text: str | Sequence[str]) -> str:
    joined = text if isinstance(text, str) else " ".join(text)
    return " ".join(joined.casefold().split())
