"""The autocast that accelerate leaves on a model that was trained in mixed precision."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

# Where accelerate keeps the forward that it wrapped, and what stops it from wrapping a model again: a copy would be
# trained without mixed precision.
_ORIGINAL, _WRAPPED, _DONE = "_original_forward", "forward", "_is_accelerate_prepared"


def remove_autocast_(model: nn.Module) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Has a model compute in the dtype of its weights, as it will after it was saved and loaded.

    Args:
        model (`nn.Module`): Any model.

    Returns:
        `list`: What was removed: attributes of a module, and their names and values.
    """
    removed = []
    for module in model.modules():
        own = vars(module)
        names = (_ORIGINAL, _WRAPPED, _DONE) if _ORIGINAL in own else (_DONE,)
        found = {name: own.pop(name) for name in names if name in own}
        if found:
            removed.append((own, found))
    return removed


@contextmanager
def without_autocast(*models: nn.Module) -> Iterator[None]:
    """The same for a while.

    Args:
        models (`nn.Module`): Any models.
    """
    removed = [entry for model in models for entry in remove_autocast_(model)]
    try:
        yield
    finally:
        for own, values in removed:
            own.update(values)
