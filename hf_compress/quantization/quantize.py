"""`quantize` and `quantize_`: the type of the config chooses the number format."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from hf_compress.modeling.tasks import unwrap
from hf_compress.quantization.config import Int8DynamicConfig
from hf_compress.quantization.int8 import quantize_int8_

_STEPS = {Int8DynamicConfig: quantize_int8_}

Data = Iterable[Mapping[str, Any]]


def quantize(model: nn.Module, config: Any, data: Data | None = None) -> nn.Module:
    """A copy of a model with numbers of fewer bits; the model itself is left as it is.

    Args:
        model (`nn.Module`): A Transformers model of a known architecture, in floating point; pruned ones included.
        config (`Int8DynamicConfig`): The number format, and what stays in floating point besides the task head.
        data (`Iterable[Mapping[str, torch.Tensor]]`, *optional*): Batches of inputs without labels, for formats with
            ranges that are measured before.

    Returns:
        `nn.Module`: Of the same class, on the same device. Save it with `save_pretrained`.

    Raises:
        ValueError: if the model is quantized already, or config, model and data do not fit each other.
        TypeError: if the config is of no known kind.
    """
    quantized = copy.deepcopy(model)
    quantize_(quantized, config, data)
    return quantized


def quantize_(model: nn.Module, config: Any, data: Data | None = None) -> None:
    """Quantizes a model in place; otherwise like `quantize`, and needs no room for a second model.

    Args:
        model (`nn.Module`): A Transformers model of a known architecture, in floating point.
        config (`Int8DynamicConfig`): The number format.
        data (`Iterable[Mapping[str, torch.Tensor]]`, *optional*): Batches of inputs without labels.

    Raises:
        ValueError: if the model is quantized already, or config, model and data do not fit each other.
        TypeError: if the config is of no known kind.
    """
    if type(config) not in _STEPS:
        known = ", ".join(step.__name__ for step in _STEPS)
        raise TypeError(f"A {type(config).__name__} does not say how to quantize: give one of {known}.")
    _STEPS[type(config)](unwrap(model), config, data)
