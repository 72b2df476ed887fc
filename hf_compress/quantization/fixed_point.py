"""Fixed point: from a live model to a quantized one, with ranges of activations from data where they are asked for."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_compress.formats.fixed_point import ScaleKind, fit_scales
from hf_compress.formats.fixed_point_modules import (
    FixedPointEmbedding,
    FixedPointLinear,
    Scales,
    scale_kind,
    weight_groups,
)
from hf_compress.formats.packed import PackedModule
from hf_compress.modeling.projections import read_matrix
from hf_compress.quantization.config import FixedPointConfig
from hf_compress.quantization.fake_quant import FakeQuantProjection, fake_quantized
from hf_compress.quantization.modules import check_finite, choose_modules, replace_
from hf_compress.quantization.observers import Histogram, observe_inputs
from hf_compress.quantization.ranges import mse_range, percentile_range

logger = logging.getLogger(__name__)

# Rows of a weight whose ranges are searched at a time: the search holds several copies of them.
_ROWS = 4096


def quantize_fixed_point_(
    model: PreTrainedModel, config: FixedPointConfig, data: Iterable[Mapping[str, Any]] | None = None
) -> None:
    """Rounds a model to fixed point, in place.

    Args:
        model (`PreTrainedModel`): A model of a known architecture, in floating point, or prepared by `fake_quantize_`.
        config (`FixedPointConfig`): The format, and what stays in floating point.
        data (`Iterable[Mapping[str, torch.Tensor]]`, *optional*): Batches of inputs, for ranges of activations: a few
            hundred texts. A prepared model has learned them.

    Raises:
        ValueError: if the model is quantized already, a weight is not finite, or data are missing, lead to no range,
            or do not reach all projections. The model is as it was.
    """
    modules = choose_modules(model, config.exclude, config.embeddings)
    for name, module in modules.items():
        check_finite(name, module.weight)
    inputs: dict[str, Histogram] = {}
    if config.activations is not None and not fake_quantized(model):
        if data is None:
            raise ValueError(
                f"activations={config.activations} bits have ranges that are measured, but data=None: give some "
                "hundred texts as tokenized batches, or activations=None."
            )
        projections = {name: module for name, module in modules.items() if not isinstance(module, nn.Embedding)}
        inputs = observe_inputs(model, projections, data)
    elif data is not None and config.activations is None:
        logger.warning("The data are not read, because activations=None: give activations=8, say, or no data.")

    def pack(name: str, module: nn.Module) -> PackedModule:
        fields = format_fields(config)
        if isinstance(module, nn.Embedding):
            return pack_table(module, config)
        weight = read_matrix(module)
        if config.activations is None:
            return FixedPointLinear.from_scales(weight, module.bias, fit_weights(weight, config), **fields)
        is_trained = isinstance(module, FakeQuantProjection)
        found = module.input_norm.scales() if is_trained else fit_inputs(inputs[name], config)
        scales = tuple(tensor.to(weight.device) for tensor in found)
        fields["activation_bits"] = config.activations
        return FixedPointLinear.from_scales(weight, module.bias, fit_weights(weight, config), scales, **fields)

    replace_(model, modules, pack)


def pack_table(table: nn.Embedding, config: FixedPointConfig) -> FixedPointEmbedding:
    """A table of embeddings in fixed point.

    Args:
        table (`nn.Embedding`): In floating point.
        config (`FixedPointConfig`): The format.

    Returns:
        `FixedPointEmbedding`: In its place.
    """
    config = config.of_tables()
    weight = table.weight.detach()
    scales = fit_weights(weight, config)
    return FixedPointEmbedding.from_scales(weight, table.padding_idx, scales, **format_fields(config))


def format_fields(config: FixedPointConfig) -> dict[str, Any]:
    """What config.json says of the weights of a format, see `FixedPointLinear.check_fields`.

    Args:
        config (`FixedPointConfig`): The config.

    Returns:
        `dict[str, Any]`: Fields.
    """
    fields = {
        "bits": config.bits,
        "granularity": config.granularity,
        "power_of_two": config.power_of_two,
        "symmetric": config.symmetric,
    }
    return fields | {"group_size": config.group_size} if config.granularity == "group" else fields


def fit_weights(weight: torch.Tensor, config: FixedPointConfig) -> Scales:
    """Scales and zero points of a weight.

    Args:
        weight (`torch.Tensor`): Of shape (rows, columns).
        config (`FixedPointConfig`): The format, and how ranges are chosen.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: As `minmax_scales` returns them.
    """
    fields = format_fields(config)
    groups = weight_groups(weight.float(), fields)
    parts = [_fit_weight_rows(part.flatten(0, 1), config, scale_kind(fields)) for part in groups.split(_ROWS)]
    scales, zeros = (torch.cat(tensors).view(groups.shape[:2]) for tensors in zip(*parts, strict=True))
    return scales, zeros


def fit_inputs(histogram: Histogram, config: FixedPointConfig) -> Scales:
    """Scale and zero point of activations.

    Args:
        histogram (`Histogram`): What was read.
        config (`FixedPointConfig`): The format, and how ranges are chosen.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Each of shape (1,).
    """
    kind = "power_of_two" if config.power_of_two else "float32"
    values, counts = histogram.values()
    return _fit(values[None], counts, config, config.ranges, config.activations, kind)


def _fit_weight_rows(rows: torch.Tensor, config: FixedPointConfig, kind: ScaleKind) -> Scales:
    ranges = config.ranges
    if ranges == "percentile":
        # A group has too few numbers to leave any out, and the last ones of a short group are filling.
        ranges, rows = ("minmax", rows) if config.granularity == "group" else (ranges, rows.sort(dim=1).values)
    return _fit(rows, torch.ones(rows.shape[1], device=rows.device), config, ranges, config.bits, kind)


def _fit(
    values: torch.Tensor, counts: torch.Tensor, config: FixedPointConfig, ranges: str, bits: int, kind: ScaleKind
) -> Scales:
    def fit(lower: torch.Tensor, upper: torch.Tensor) -> Scales:
        return fit_scales(lower, upper, bits, config.symmetric, kind)

    if ranges == "mse":
        return fit(*mse_range(values, counts, bits, config.symmetric, fit))
    if ranges == "percentile":
        return fit(*percentile_range(values, counts, config.percentile))
    return fit(*values.aminmax(dim=1))
