"""Training for fixed point: weights rounded anew in every pass, inputs by a step that is learned."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_compress.formats.fixed_point import (
    dequantize,
    fraction_bits,
    integer_range,
    power_of_two,
    quantize,
    to_groups,
)
from hf_compress.formats.fixed_point_modules import Scales, group_size
from hf_compress.modeling.projections import in_width
from hf_compress.quantization.config import FixedPointConfig
from hf_compress.quantization.fake_quant import FloatInputs, Inputs, Rounded, attach_, scale_gradient, straight_through
from hf_compress.quantization.fixed_point import fit_inputs, fit_weights, format_fields
from hf_compress.quantization.modules import choose_modules
from hf_compress.quantization.observers import observe_inputs

LARGEST_BITS = 8


def fixed_point_rows(rows: torch.Tensor, scales: Scales, config: FixedPointConfig) -> torch.Tensor:
    """Weights in fixed point, with the straight-through gradient.

    Args:
        rows (`torch.Tensor`): Of shape (rows, columns).
        scales (`tuple[torch.Tensor, torch.Tensor]`): From `fit_weights`, taken for constants.
        config (`FixedPointConfig`): The format.

    Returns:
        `torch.Tensor`: The rounded numbers, of the same shape, in float32.
    """
    steps, zeros = (tensor[..., None] for tensor in scales)
    n_columns = rows.shape[1]
    groups = to_groups(rows.detach(), group_size(format_fields(config), n_columns))
    rounded = dequantize(quantize(groups, steps, zeros, config.bits, config.symmetric), steps, zeros)
    return straight_through(rows, rounded.flatten(1)[:, :n_columns])


def learned_step(
    inputs: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int, symmetric: bool
) -> torch.Tensor:
    """Inputs as whole numbers, with gradients for their step.

    Esser et al., "Learned Step Size Quantization" (2020), equations 1 to 3. Times the step s, they have the gradients
    of s * round(clip(x / s)) with the rounding taken for the identity: for x, 1 inside the clip and 0 outside; for s,
    round(x / s) - x / s inside, and the limit outside.

    Args:
        inputs (`torch.Tensor`): x, of any shape.
        scale (`torch.Tensor`): s, of shape (1,), above zero.
        zero (`torch.Tensor`): Zero point, of shape (1,).
        bits (`int`): Per number.
        symmetric (`bool`): As for `quantize`.

    Returns:
        `torch.Tensor`: q - z in float32, of the same shape.
    """
    lowest, highest = (limit - zero for limit in integer_range(bits, symmetric))
    clipped = (inputs.float() / scale).clamp(lowest, highest)
    return straight_through(clipped, quantize(inputs.detach(), scale.detach(), zero, bits, symmetric) - zero)


class FixedPointInputs(Inputs):
    """Inputs in fixed point with a learned step; the zero point stays where it was measured.

    The step is learned by its logarithm, as in `ElasticInputs`. A power of two is the least one that is not below what
    is learned, and passes its gradient on.

    Args:
        scales (`tuple[torch.Tensor, torch.Tensor]`): Step and zero point to begin with, each of shape (1,).
        config (`FixedPointConfig`): The format.
        in_features (`int`): Inputs.
    """

    def __init__(self, scales: Scales, config: FixedPointConfig, in_features: int) -> None:
        super().__init__()
        scale, zero = scales
        # In the middle of what is rounded up to the same power of two.
        self.log_scale = nn.Parameter((scale.float() * (0.5**0.5 if config.power_of_two else 1.0)).log())
        self.register_buffer("zero", zero.float())
        self.config, self.in_features = config, in_features

    def scale(self) -> torch.Tensor:
        """The step, of shape (1,), in float32."""
        scale = self.log_scale.float().exp()
        return straight_through(scale, power_of_two(fraction_bits(scale))) if self.config.power_of_two else scale

    def scales(self) -> Scales:
        """The step and the zero point, each of shape (1,), as they are stored."""
        return self.scale().detach(), self.zero.to(torch.int32)

    def forward(self, hidden_states: torch.Tensor) -> Rounded:
        """See `learned_step`."""
        bits, symmetric = self.config.activations, self.config.symmetric
        factor = (self.in_features * integer_range(bits, symmetric)[1]) ** -0.5
        scale = scale_gradient(self.scale(), factor)
        return learned_step(hidden_states, scale, self.zero, bits, symmetric), scale


def prepare_fixed_point_(
    model: PreTrainedModel, config: FixedPointConfig, data: Iterable[Mapping[str, Any]] | None
) -> None:
    """Has a model compute in fixed point, to be trained.

    Args:
        model (`PreTrainedModel`): A model of a known architecture, in floating point.
        config (`FixedPointConfig`): The format, of at most 8 bits, and what stays in floating point.
        data (`Iterable[Mapping[str, torch.Tensor]]`, *optional*): Batches, for the steps of inputs.

    Raises:
        ValueError: if there are more than 8 bits, or inputs are to be rounded and there are no data.
    """
    if max(config.bits, config.activations or 0) > LARGEST_BITS:
        raise ValueError(
            f"bits={config.bits} and activations={config.activations} lose next to nothing: quantize such a model "
            f"without training, or give at most {LARGEST_BITS}."
        )
    modules = choose_modules(model, config.exclude, config.embeddings)
    projections = {name: module for name, module in modules.items() if not isinstance(module, nn.Embedding)}
    if config.activations is not None and data is None:
        raise ValueError(
            f"activations={config.activations} bits begin with ranges that are measured, but data=None: give a few "
            "tokenized batches, or activations=None."
        )
    read = observe_inputs(model, projections, data) if config.activations is not None else {}

    def parts(name: str, module: nn.Module) -> dict[str, Any]:
        if isinstance(module, nn.Embedding):
            return {"round_rows": partial(_round_looked_up, config=config.of_tables())}
        inputs = FloatInputs()
        if name in read:
            inputs = FixedPointInputs(fit_inputs(read[name], config), config, in_width(module))
        return {"round_weight": partial(_round_weight, config=config), "input_norm": inputs}

    attach_(modules, config, parts)


def _round_weight(matrix: torch.Tensor, config: FixedPointConfig) -> Rounded:
    rounded = fixed_point_rows(matrix, fit_weights(matrix.detach(), config), config)
    return rounded, torch.ones(1, device=matrix.device)


def _round_looked_up(rows: torch.Tensor, table: torch.Tensor, config: FixedPointConfig) -> torch.Tensor:
    flat = rows.flatten(0, -2)
    # Steps of the whole table where it has one; others are each row's own.
    fitted = table if config.granularity == "per_tensor" else flat
    return fixed_point_rows(flat, fit_weights(fitted.detach(), config), config).view_as(rows)
