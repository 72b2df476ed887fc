"""The autocast that accelerate leaves on a model that was trained in mixed precision."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

# Where accelerate keeps the forward that it wrapped, and what stops it from wrapping a model again: a copy would be
# trained without mixed precision.
_ORIGINAL, _WRAPPED, _DONE = "_original_forward", "forward", "_is_accelerate_prepared"


def remove_autocast_(modules: Iterable[nn.Module]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Has a model compute in the dtype of its weights, as it will after it was saved and loaded.

    Args:
        modules (iterable of `nn.Module`): All modules of a model.

    Returns:
        `list`: What was removed: attributes of a module, and their names and values.
    """
    removed = []
    for module in modules:
        own = vars(module)
        names = (_ORIGINAL, _WRAPPED, _DONE) if _ORIGINAL in own else (_DONE,)
        found = {name: own.pop(name) for name in names if name in own}
        if found:
            removed.append((own, found))
    return removed


@contextmanager
def without_autocast(modules: Iterable[nn.Module]) -> Iterator[None]:
    """The same for a while.

    Args:
        modules (iterable of `nn.Module`): All modules of one or several models.
    """
    removed = remove_autocast_(modules)
    try:
        yield
    finally:
        for own, values in removed:
            own.update(values)
