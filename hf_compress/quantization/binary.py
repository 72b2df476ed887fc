"""Weights of one bit: learned inputs of few bits, and the way from a live model to a quantized one."""

import copy
import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_compress.formats.binary import FLOAT, BinaryLinear, binary_rows, input_levels, round_inputs
from hf_compress.formats.packed import PackedModule
from hf_compress.modeling.batches import read_inputs
from hf_compress.modeling.modes import evaluating
from hf_compress.modeling.projections import in_width, read_matrix
from hf_compress.modeling.tasks import without_cache
from hf_compress.quantization.config import BinaryConfig
from hf_compress.quantization.fake_quant import (
    Inputs,
    Rounded,
    attach_,
    detach_,
    fake_quantized,
    scale_gradient,
    straight_through,
)
from hf_compress.quantization.modules import check_finite, choose_modules, replace_

logger = logging.getLogger(__name__)

# Values of a batch that a scale is fitted to, and scales that are tried.
_N_VALUES, _N_SCALES = 1 << 14, 64


def fit_input_scale(values: torch.Tensor, bits: int, is_signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale that loses least of some values when they are rounded.

    Signs are scaled by mean |x| (Rastegari et al., "XNOR-Net", 2016, equation 6); else the best one of a row of
    scales is taken, from the one that reaches the largest value down to a hundredth of it.

    Args:
        values (`torch.Tensor`): x, of shape (values,), in float32.
        bits (`int`): Per number: 1, 2, 4 or 8.
        is_signed (`bool`): As in `input_levels`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The scale, more than 0, and the share of the sum of squares that is lost;
        both of shape ().
    """
    total = values.square().sum()
    if total == 0:
        return values.new_ones(()), values.new_zeros(())
    if bits == 1 and is_signed:
        scales = values.abs().mean()[None]
    else:
        steps = torch.logspace(-2, 0, _N_SCALES, device=values.device)
        scales = values.abs().max() / input_levels(bits, is_signed)[1] * steps
    rounded = round_inputs(values / scales[:, None], bits, is_signed) * scales[:, None]
    lost = (rounded - values).square().sum(1)
    best = lost.argmin()
    return scales[best], lost[best] / total


def elastic_numbers(
    inputs: torch.Tensor, scale: torch.Tensor, threshold: torch.Tensor, bits: int, is_signed: bool
) -> torch.Tensor:
    """Inputs as whole numbers, with gradients for what they are scaled and shifted by.

    Elastic binarization of Liu et al., "BiT" (2022), for one bit, and Esser et al., "Learned Step Size Quantization"
    (2020), equations 1 to 3, for more. Times the scale, they have the gradients of alpha * round(clip(z)), z =
    (x - beta) / alpha, with the rounding taken for the identity: for x, 1 inside the clip and 0 outside; for beta,
    the negative of it; for alpha, round(z) - z inside, the level outside, and sign(z) alone for signs.

    Args:
        inputs (`torch.Tensor`): x, of shape (..., inputs).
        scale (`torch.Tensor`): Alpha, of shape (1,), more than 0.
        threshold (`torch.Tensor`): Beta, of shape (inputs,) or (1,).
        bits (`int`): Per number: 1, 2, 4 or 8.
        is_signed (`bool`): As in `input_levels`.

    Returns:
        `torch.Tensor`: Of the shape of the inputs, not yet multiplied by the scale, in float32.
    """
    # Signs do not depend on the scale.
    divisor = scale.detach() if bits == 1 and is_signed else scale
    normalized = (inputs.float() - threshold) / divisor
    clipped = normalized.clamp(*input_levels(bits, is_signed))
    return straight_through(clipped, round_inputs(normalized.detach(), bits, is_signed))


def binary_weight(matrix: torch.Tensor) -> Rounded:
    """The signs and scales of `binary_rows`; times the scales, the signs have the gradient of the weights themselves.

    Args:
        matrix (`torch.Tensor`): Of shape (outputs, inputs).

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: In float32, of shape (outputs, inputs) and (outputs,).
    """
    signs, scales = binary_rows(matrix.detach())
    # Rows without a scale are of equal weights, and get no gradient.
    slopes = torch.where(scales == 0, 0.0, 1 / scales)[:, None]
    return straight_through(matrix, signs, slopes), scales


class ElasticInputs(Inputs):
    """Inputs rounded to few bits with a learned scale and threshold; see `elastic_numbers`.

    The scale is learned by its logarithm, so that it stays positive, and a step of AdamW changes it by a share of
    itself. Its gradient is multiplied by 1 / sqrt(inputs * largest level), as in "Learned Step Size Quantization".
    Bits and sign are a buffer too, so that a checkpoint tells what was being trained.

    Args:
        in_features (`int`): Inputs.
        bits (`int`): Per number; 32 for inputs that are not rounded.
    """

    def __init__(self, in_features: int, bits: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(1))
        self.threshold = nn.Parameter(torch.zeros(in_features))
        self.register_buffer("setting", torch.tensor([bits, 1], dtype=torch.int32))
        self.bits, self.is_signed = bits, True
        self._fits: dict[bool, list[Rounded]] | None = None

    def target(self, config: BinaryConfig) -> BinaryConfig:
        """The config with the bits as they are now."""
        return replace(config, activations=self.bits)

    def set_(self, bits: int, is_signed: bool) -> None:
        """Chooses the levels.

        Args:
            bits (`int`): Per number.
            is_signed (`bool`): As in `input_levels`.
        """
        self.bits, self.is_signed = bits, is_signed
        self.setting.copy_(torch.tensor([bits, is_signed]))

    def read_setting_(self) -> None:
        """Takes the levels from the buffer, after that has changed."""
        bits, is_signed = self.setting.tolist()
        self.bits, self.is_signed = bits, bool(is_signed)

    def begin_fit_(self, bits: int) -> None:
        """Has scale and sign follow the batches that come, until `end_fit_`.

        Args:
            bits (`int`): Per number, from now on.
        """
        self.set_(bits, self.is_signed)
        self._fits = {True: [], False: []}

    def end_fit_(self) -> bool:
        """Keeps scale and sign as they are.

        Returns:
            `bool`: Whether there was a batch, and its numbers were finite; always for 32 bits.
        """
        fits, self._fits = self._fits, None
        was_fitted = self.bits == FLOAT or bool(fits and fits[True] and self.log_scale.isfinite())
        return was_fitted

    def scale(self) -> torch.Tensor:
        """Alpha, of shape (1,), in float32."""
        return self.log_scale.float().exp()

    def forward(self, hidden_states: torch.Tensor) -> Rounded:
        """See `elastic_numbers`."""
        if self.bits == FLOAT:
            # Data-parallel training waits for the gradients of all parameters.
            unused = 0.0 * (self.log_scale + self.threshold.sum()).to(hidden_states.dtype)
            return hidden_states + unused, torch.ones_like(self.log_scale)
        if self._fits is not None:
            self._fit_(hidden_states)
        factor = (self.threshold.numel() * input_levels(self.bits, self.is_signed)[1]) ** -0.5
        scale = scale_gradient(self.scale(), factor)
        return elastic_numbers(hidden_states, scale, self.threshold, self.bits, self.is_signed), scale

    @torch.no_grad()
    def _fit_(self, hidden_states: torch.Tensor) -> None:
        values = (hidden_states.float() - self.threshold).flatten()
        if len(values) > _N_VALUES:
            generator = torch.Generator().manual_seed(0)
            values = values[torch.randint(len(values), (_N_VALUES,), generator=generator).to(values.device)]
        for is_signed, fits in self._fits.items():
            fits.append(fit_input_scale(values, self.bits, is_signed))
        lost = {is_signed: sum(share for _, share in fits) for is_signed, fits in self._fits.items()}
        is_signed = bool(lost[True] <= lost[False])
        self.set_(self.bits, is_signed)
        self.log_scale.fill_(torch.stack([scale.log() for scale, _ in self._fits[is_signed]]).mean())

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.read_setting_()


def prepare_binary_(model: PreTrainedModel, config: BinaryConfig, data: Iterable[Mapping[str, Any]] | None) -> None:
    """Gives the projections of a model weights of one bit and elastic inputs, to be trained.

    Args:
        model (`PreTrainedModel`): A model of a known architecture, in floating point.
        config (`BinaryConfig`): The bits of the inputs, and what stays in floating point.
        data (`Iterable[Mapping[str, torch.Tensor]]`, *optional*): Batches that the scales are fitted to.

    Raises:
        ValueError: if a weight is not finite, or the inputs are to be rounded and the data are missing or do not
            reach all projections. The model is as it was.
    """
    chosen = choose_modules(model, config.exclude)
    for name, module in chosen.items():
        check_finite(name, module.weight)
    batches = read_batches(model, data, config.activations)

    def parts(name: str, module: nn.Module) -> dict[str, Any]:
        return {"round_weight": binary_weight, "input_norm": ElasticInputs(in_width(module), config.activations)}

    attach_(chosen, config, parts)
    try:
        fit_inputs_(model, batches, config.activations)
    except BaseException:
        detach_(model)
        raise


def quantize_binary_(model: PreTrainedModel, config: BinaryConfig, data: Iterable[Mapping[str, Any]] | None) -> None:
    """Packs the projections of a model to one bit per weight, in place.

    Args:
        model (`PreTrainedModel`): A model that was prepared by `fake_quantize_` for the same config, and trained; or
            one in floating point, which will hardly predict anything.
        config (`BinaryConfig`): The bits of the inputs, and what stays in floating point.
        data (`Iterable[Mapping[str, torch.Tensor]]`, *optional*): For a model that was not prepared.

    Raises:
        ValueError: if the model is quantized already, a weight is not finite, or the model was not prepared and there
            are no data for its inputs.
    """
    if not fake_quantized(model):
        logger.warning(
            "This %s was not trained for weights of one bit, and will predict little better than chance. Call "
            "fake_quantize_(model, config, data), train it with DistillationTrainer, and quantize it then: the "
            "docstring of fake_quantize_ shows how.",
            type(model).__name__,
        )
        prepare_binary_(model, config, data)
    chosen = choose_modules(model, config.exclude)
    for name, module in chosen.items():
        check_finite(name, module.weight)
    replace_(model, chosen, _pack)


def fit_inputs_(model: PreTrainedModel, batches: Iterable[Mapping[str, torch.Tensor]], bits: int) -> None:
    """Fits scales and signs of elastic inputs to data, module by module in the order of the forward pass.

    Each module sees inputs that come out of rounded modules. The scale is the geometric mean of the batches' best
    ones, see `fit_input_scale`; whether numbers have a sign is what loses less.

    Args:
        model (`PreTrainedModel`): A prepared model; after an error, it is as it was.
        batches (`Iterable[Mapping[str, torch.Tensor]]`): From `read_batches`.
        bits (`int`): Of an input.

    Raises:
        ValueError: if no batch reaches a projection, or what does is not finite.
    """
    elastic = {name: module.input_norm for name, module in fake_quantized(model)}
    before = {name: copy.deepcopy(inputs.state_dict()) for name, inputs in elastic.items()}
    try:
        for inputs in elastic.values():
            inputs.begin_fit_(bits)
        with evaluating(model), torch.no_grad():
            for batch in batches:
                model(**without_cache(model, batch))
        wrong = [name for name, inputs in elastic.items() if not inputs.end_fit_()]
        if wrong:
            raise ValueError(
                f"The scale of the inputs of {wrong[0]} cannot be fitted: the data do not lead there, or hold NaN or "
                f"infinity there. Give batches that do, or add {wrong[0]!r} to exclude."
            )
    except BaseException:
        for name, inputs in elastic.items():
            inputs.end_fit_()
            inputs.load_state_dict(before[name])
        raise


def read_batches(
    model: PreTrainedModel, data: Iterable[Mapping[str, Any]] | None, bits: int
) -> list[dict[str, torch.Tensor]]:
    """Batches with the columns that a model's forward takes, without labels, on its device.

    Args:
        model (`PreTrainedModel`): A Transformers model.
        data (`Iterable[Mapping[str, torch.Tensor]]`, *optional*): Batches.
        bits (`int`): Of an input; 32 needs no data.

    Returns:
        `list[dict[str, torch.Tensor]]`: The batches.

    Raises:
        ValueError: if the inputs are to be rounded and there is no batch, or a batch lacks the model's main input.
        TypeError: if a batch is no dict of tensors.
    """
    if bits == FLOAT:
        return []
    batches = [read_inputs(model, batch) for batch in data or ()]
    if not batches:
        raise ValueError(
            f"activations={bits} needs data, which the scales of the inputs are fitted to, but there is no batch: "
            "give a few as data=, such as [tokenizer(texts, padding=True, return_tensors='pt')]."
        )
    return batches


def _pack(name: str, module: nn.Module) -> PackedModule:
    inputs = module.input_norm
    fields = {"activations": inputs.bits} | ({} if inputs.bits == FLOAT else {"signed": inputs.is_signed})
    return BinaryLinear.from_float(read_matrix(module), module.bias, inputs.scale(), inputs.threshold, **fields)
