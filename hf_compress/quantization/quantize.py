"""`quantize` and `quantize_`: the type of the config chooses the number format."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from transformers import BitsAndBytesConfig

from hf_compress.modeling.autocast import remove_autocast_
from hf_compress.modeling.capture import release_gates_
from hf_compress.modeling.tasks import unwrap
from hf_compress.quantization.binary import quantize_binary_
from hf_compress.quantization.bitsandbytes import choose_projections, quantize_bitsandbytes_
from hf_compress.quantization.config import BinaryConfig, FixedPointConfig, FloatConfig, Int8DynamicConfig
from hf_compress.quantization.fake_quant import check_prepared, fake_quantized
from hf_compress.quantization.fixed_point import quantize_fixed_point_
from hf_compress.quantization.float import cast_
from hf_compress.quantization.gate import Evaluate, Gate, exclude, excluded_names, find_exclusions
from hf_compress.quantization.int8 import quantize_int8_
from hf_compress.quantization.modules import choose_modules

_STEPS = {
    BitsAndBytesConfig: quantize_bitsandbytes_,
    BinaryConfig: quantize_binary_,
    FixedPointConfig: quantize_fixed_point_,
    FloatConfig: cast_,
    Int8DynamicConfig: quantize_int8_,
}

Data = Iterable[Mapping[str, Any]]


def quantize(
    model: nn.Module,
    config: Any,
    data: Data | None = None,
    evaluate: Evaluate | None = None,
    max_drop: float = 0.01,
) -> nn.Module:
    """A copy of a model with numbers of fewer bits; the model itself is left as it is.

    Args:
        model (`nn.Module`): A Transformers model of a known architecture, in floating point; pruned ones included.
        config (`Int8DynamicConfig`, `transformers.BitsAndBytesConfig` ...): The number format, and what stays in
            floating point besides the task head.
        data (`Iterable[Mapping[str, torch.Tensor]]`, *optional*): Batches of inputs without labels, for formats with
            ranges that are measured before.
        evaluate (`Callable[[nn.Module], float]`, *optional*): From a model to its score, higher is better. With it,
            the modules that cost most stay in floating point, as many as it takes for the score to hold; they are
            logged.
        max_drop (`float`, *optional*, defaults to 0.01): How much of the score may be lost, in its unit.

    Returns:
        `nn.Module`: Of the same class, on the same device. Save it with `save_pretrained`.

    Raises:
        ValueError: if the model is quantized already, config, model and data do not fit each other, or the score
            cannot hold.
        TypeError: if the config is of no known kind, or `evaluate` gives no number.
    """
    release_gates_(model)
    quantized = copy.deepcopy(model)
    quantize_(quantized, config, data, evaluate, max_drop)
    return quantized


def quantize_(
    model: nn.Module,
    config: Any,
    data: Data | None = None,
    evaluate: Evaluate | None = None,
    max_drop: float = 0.01,
) -> None:
    """Quantizes a model in place; otherwise like `quantize`, and needs no room for a second model.

    Args:
        model (`nn.Module`): A Transformers model of a known architecture, in floating point.
        config (`Int8DynamicConfig`): The number format.
        data (`Iterable[Mapping[str, torch.Tensor]]`, *optional*): Batches of inputs without labels.
        evaluate (`Callable[[nn.Module], float]`, *optional*): From a model to its score. It is called with copies, in
            evaluation mode.
        max_drop (`float`, *optional*, defaults to 0.01): How much of the score may be lost.

    Raises:
        ValueError: if the model is quantized already, config, model and data do not fit each other, or the score
            cannot hold.
        TypeError: if the config is of no known kind, or `evaluate` gives no number.
    """
    if type(config) not in _STEPS:
        known = ", ".join(step.__name__ for step in _STEPS)
        raise TypeError(f"A {type(config).__name__} does not say how to quantize: give one of {known}.")
    model = unwrap(model)
    remove_autocast_(model.modules())
    release_gates_(model)
    check_prepared(model, config)
    if evaluate is not None:
        if fake_quantized(model):
            raise ValueError(
                "The model was trained with all of these modules rounded, so that none can be left out now: leave "
                "evaluate out, or name modules in exclude before fake_quantize_ and train again."
            )
        names = _names(model, config)
        data = None if data is None else list(data)
        gate = Gate(evaluate, max_drop)
        config = exclude(config, find_exclusions(model, config, names, lambda m, c: quantize_(m, c, data), gate))
    _STEPS[type(config)](model, config, data)


def _names(model: nn.Module, config: Any) -> list[str]:
    """The modules that a config quantizes; none for one that takes the whole model."""
    excluded = excluded_names(config)
    if excluded is None:
        return []
    if isinstance(config, BitsAndBytesConfig):
        return list(choose_projections(model, config))
    return list(choose_modules(model, excluded, getattr(config, "embeddings", False)))
