"""What the names in a checkpoint are in a model, which may have another head or none."""

from collections.abc import Container
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def find_name(model: "PreTrainedModel", name: str, known: Container[str]) -> str | None:
    """The name in a model of what has another in the checkpoint.

    Args:
        model (`PreTrainedModel`): The skeleton.
        name (`str`): In the checkpoint.
        known (`Container[str]`): Names in the model.

    Returns:
        `str` or `None`: `None` where the model has no such part.
    """
    prefix = f"{model.base_model_prefix}."
    return next((other for other in (name, name.removeprefix(prefix), prefix + name) if other in known), None)


def is_same_class(model: "PreTrainedModel") -> bool:
    """Whether a model is of the class that was saved, and so has every part that the checkpoint names."""
    return type(model).__name__ in (model.config.architectures or [])
