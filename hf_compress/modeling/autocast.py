"""The autocast that accelerate leaves on a model that was trained in mixed precision."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

# Where accelerate keeps the forward that it wrapped.
_ORIGINAL, _WRAPPED = "_original_forward", "forward"


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
        if _ORIGINAL in own:
            removed.append((own, {name: own.pop(name) for name in (_ORIGINAL, _WRAPPED) if name in own}))
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
