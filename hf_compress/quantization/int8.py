"""Eight-bit integers with activations rounded while the model runs: from a live model to a quantized one."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_compress.formats.int8 import Int8Embedding, Int8Linear
from hf_compress.formats.packed import PackedModule
from hf_compress.modeling.projections import read_matrix
from hf_compress.quantization.config import FixedPointConfig, FloatConfig, Int8DynamicConfig
from hf_compress.quantization.fake_quant import fake_quantized
from hf_compress.quantization.fixed_point import pack_table
from hf_compress.quantization.float import DTYPES, cast_rest_, check_ranges
from hf_compress.quantization.modules import check_finite, choose_modules, replace_
from hf_compress.quantization.observers import visit_inputs

logger = logging.getLogger(__name__)

Data = Iterable[Mapping[str, Any]]


def quantize_int8_(model: PreTrainedModel, config: Int8DynamicConfig, data: Data | None = None) -> None:
    """Rounds the projections of a model to eight bits, in place.

    Args:
        model (`PreTrainedModel`): A model of a known architecture, in floating point.
        config (`Int8DynamicConfig`): What stays in floating point and of which type, and whether input channels are
            smoothed.
        data (`Iterable[Mapping[str, torch.Tensor]]`, *optional*): Batches of inputs, needed with `config.smooth`
            alone: otherwise, activations are measured token by token.

    Raises:
        ValueError: if the model is quantized already, a pattern matches nothing, a weight is not finite or out of
            range, or data are missing or do not reach all projections. The model is as it was.
    """
    rest = None if config.dtype is None else FloatConfig(config.dtype)
    modules = choose_modules(model, config.exclude, config.embeddings, None if rest is None else DTYPES[rest.dtype])
    for name, module in modules.items():
        check_finite(name, module.weight)
    factors: dict[str, torch.Tensor] = {}
    if config.smooth is not None:
        factors = _smoothing(model, modules, config.smooth, data)
    elif data is not None:
        logger.warning("The data are not read, because smooth=None: give smooth=0.5, say, or no data.")

    def pack(name: str, module: nn.Module) -> PackedModule:
        if isinstance(module, nn.Embedding):
            return _pack_table(module, config.embedding_bits)
        weight = read_matrix(module)
        if name in factors:
            return Int8Linear.from_smoothed(weight, module.bias, factors[name])
        return Int8Linear.from_float(weight, module.bias)

    if rest is not None:
        check_ranges(model, rest, without=[f"{name}.weight" for name in modules])
    replace_(model, modules, pack)
    if rest is not None:
        cast_rest_(model, rest)


def _pack_table(table: nn.Embedding, bits: int) -> PackedModule:
    if bits == 8:
        return Int8Embedding.from_float(table.weight, table.padding_idx)
    return pack_table(table, FixedPointConfig(bits=bits, granularity="group", ranges="mse"))


def smoothing_factors(largest_inputs: torch.Tensor, largest_weights: torch.Tensor, alpha: float) -> torch.Tensor:
    """s = max |X|^alpha / max |W|^(1 - alpha), by which inputs are divided and weights multiplied.

    Xiao et al., "SmoothQuant" (2023), equation 4.

    Args:
        largest_inputs (`torch.Tensor`): max |X| of each input channel, of shape (inputs,).
        largest_weights (`torch.Tensor`): max |W| of each, of the same shape.
        alpha (`float`): How much of the range moves from inputs to weights, 0 to 1.

    Returns:
        `torch.Tensor`: Of shape (inputs,), in float32; 1 for channels that are always 0.
    """
    factors = largest_inputs.float() ** alpha / largest_weights.float() ** (1 - alpha)
    # 0 ** 0 is 1, so the quotient alone does not tell.
    is_sound = (largest_inputs > 0) & (largest_weights > 0) & factors.isfinite() & (factors > 0)
    return torch.where(is_sound, factors, 1.0)


def _smoothing(
    model: PreTrainedModel, modules: Mapping[str, nn.Module], alpha: float, data: Data | None
) -> dict[str, torch.Tensor]:
    if fake_quantized(model):
        raise ValueError(
            f"smooth={alpha}, but the model was trained with rounded inputs, and learned to live with their ranges: "
            "leave smooth out."
        )
    if data is None:
        raise ValueError(
            f"smooth={alpha} needs the ranges of input channels, but data=None: give some hundred texts as tokenized "
            "batches, or smooth=None."
        )
    projections = {name: module for name, module in modules.items() if not isinstance(module, nn.Embedding)}
    largest: dict[str, torch.Tensor] = {}

    def visit(name: str, inputs: torch.Tensor) -> None:
        if inputs.numel():
            found = inputs.detach().flatten(0, -2).abs().amax(0).float()
            largest[name] = torch.maximum(largest[name], found) if name in largest else found

    visit_inputs(model, projections, data, visit)
    for name in projections:
        if name not in largest or not largest[name].isfinite().all():
            what = "hold NaN or infinity at" if name in largest else "never reach"
            raise ValueError(
                f"The calibration data {what} {name}, so the ranges of its inputs are unknown: give other batches, or "
                f"add {name!r} to exclude."
            )
    return {
        name: smoothing_factors(largest[name], read_matrix(module).abs().amax(0), alpha)
        for name, module in projections.items()
    }
