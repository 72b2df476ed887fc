"""Whether a model trains, switched for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode; on leaving, every submodule has the training flag that it had before.

    Args:
        models (`nn.Module`): The models to switch.
    """
    flags = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, is_training in flags:
            module.training = is_training
