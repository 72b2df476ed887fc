"""What rounding did to each module: the signal-to-noise ratio of its weights and of its outputs."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_compress.formats.packed import PackedModule
from hf_compress.modeling.projections import read_matrix
from hf_compress.modeling.tasks import unwrap
from hf_compress.quantization.observers import visit_inputs


class Noise(NamedTuple):
    """Ratios of signal to noise, in decibels: 20 more stand for a tenth of the error; infinite without any.

    Attributes:
        weights (`float`): Of the rounded weights.
        outputs (`float`, *optional*): Of what the module gives, on its own: for the inputs that it has in the
            reference. `None` without data, or where none reached it.
    """

    weights: float
    outputs: float | None


def signal_to_noise(signal: torch.Tensor, noisy: torch.Tensor) -> float:
    """10 log10(sum x^2 / sum (x - y)^2).

    Args:
        signal (`torch.Tensor`): x, of any shape.
        noisy (`torch.Tensor`): y, of the same shape.

    Returns:
        `float`: In decibels; infinite if both are equal.
    """
    return _decibels(*_powers(signal, noisy))


def measure_noise(
    model: nn.Module, reference: nn.Module, batches: Iterable[Mapping[str, Any]] | None = None
) -> dict[str, Noise]:
    """Compares each module in a number format with that of a model in floating point.

    Args:
        model (`nn.Module`): The quantized model.
        reference (`nn.Module`): The model that it was made of, on the same device.
        batches (`Iterable[Mapping[str, torch.Tensor]]`, *optional*): Inputs without labels, on which outputs are
            compared, at real tokens alone where an attention mask tells them from padding.

    Returns:
        `dict[str, Noise]`: By name, in the order of the model.

    Raises:
        ValueError: if the model has no module in a number format of this library, or the reference lacks one, or has
            one of another size.
    """
    packed = {name: module for name, module in unwrap(model).named_modules() if isinstance(module, PackedModule)}
    if not packed:
        raise ValueError(
            f"{type(unwrap(model)).__name__} has no weights in a number format: give the quantized model first, then "
            "the one in floating point."
        )
    originals = dict(unwrap(reference).named_modules())
    weights, modules = {}, {}
    for name, module in packed.items():
        signal, noisy = _matrix(originals.get(name)), module.dequantize()
        if signal is None or signal.shape != noisy.shape:
            raise ValueError(
                f"The reference, a {type(unwrap(reference)).__name__}, has no module {name} in floating point of "
                f"shape {tuple(noisy.shape)}: give the model that was quantized, as it was before."
            )
        weights[name], modules[name] = signal_to_noise(signal, noisy), originals[name]
    powers: dict[str, tuple[float, float]] = {}

    def visit(name: str, inputs: torch.Tensor) -> None:
        # Not by calling the module, whose hooks lead here.
        found = _powers(modules[name].forward(inputs), packed[name].forward(inputs))
        powers[name] = tuple(a + b for a, b in zip(powers.get(name, (0.0, 0.0)), found, strict=True))

    if batches is not None:
        visit_inputs(unwrap(reference), modules, batches, visit)
    return {name: Noise(weights[name], _decibels(*powers[name]) if name in powers else None) for name in packed}


def _matrix(module: nn.Module | None) -> torch.Tensor | None:
    if isinstance(module, nn.Embedding):
        return module.weight.detach()
    return read_matrix(module) if isinstance(module, nn.Linear | Conv1D) else None


def _powers(signal: torch.Tensor, noisy: torch.Tensor) -> tuple[float, float]:
    # Not every accelerator has float64.
    signal, noisy = signal.detach().cpu().double(), noisy.detach().cpu().double()
    return float(signal.square().sum()), float((signal - noisy).square().sum())


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    ratio = signal / noise
    return -math.inf if ratio == 0 else 10 * math.log10(ratio)
