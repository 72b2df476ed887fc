"""Fake quantization: modules that compute with rounded numbers, and whose weights learn as if nothing was rounded.

The modules of a model stay `nn.Linear`, `Conv1D` and `nn.Embedding`, with the same parameters of the same names; they
get another class. What is learned of their inputs sits in a submodule `input_norm`, whose name keeps it out of weight
decay: the `Trainer` of Transformers decays no parameter of a normalization.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_compress.formats.int8 import quantize_rows
from hf_compress.formats.products import multiply_unscaled
from hf_compress.modeling.projections import oriented

Rounded = tuple[torch.Tensor, torch.Tensor]
"""Numbers of a format, and the scales that they are multiplied by."""


def straight_through(values: torch.Tensor, rounded: torch.Tensor, slope: torch.Tensor | None = None) -> torch.Tensor:
    """Rounded values with the gradient of those that they were rounded from.

    Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons" (2013).

    Args:
        values (`torch.Tensor`): Of any shape; gradients go here.
        rounded (`torch.Tensor`): Of the same shape; what is returned, bit for bit.
        slope (`torch.Tensor`, *optional*): What gradients are multiplied by, where `rounded` stands for multiples of
            `values`; must broadcast to that shape.

    Returns:
        `torch.Tensor`: Of the dtype of `rounded`.
    """
    return _StraightThrough.apply(values, rounded.detach(), slope)


def scale_gradient(values: torch.Tensor, factor: float) -> torch.Tensor:
    """The same values, with a gradient that is multiplied by a factor on its way back.

    Args:
        values (`torch.Tensor`): Of any shape.
        factor (`float`): The factor.

    Returns:
        `torch.Tensor`: Equal to `values`.
    """
    return _ScaleGradient.apply(values, factor)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, rounded, slope):
        ctx.dtype, ctx.slope = values.dtype, slope
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient if ctx.slope is None else gradient * ctx.slope
        return gradient.to(ctx.dtype), None, None


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, factor):
        ctx.factor = factor
        return values.view_as(values)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


def int8_rows(rows: torch.Tensor) -> Rounded:
    """Rows rounded to eight bits, with the straight-through gradient; see `quantize_rows`.

    Args:
        rows (`torch.Tensor`): Of shape (..., columns).

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: In float32: the integers, of the same shape, and the scales, of shape
        (..., 1), which are taken for constants.
    """
    numbers, scales = quantize_rows(rows.detach())
    return straight_through(rows, numbers.float(), 1 / scales), scales


def int8_weight(matrix: torch.Tensor) -> Rounded:
    """A matrix rounded to eight bits per output channel.

    Args:
        matrix (`torch.Tensor`): Of shape (outputs, inputs).

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: As `int8_rows`, but with scales of shape (outputs,).
    """
    numbers, scales = int8_rows(matrix)
    return numbers, scales[:, 0]


def int8_table_rows(rows: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rows of a table rounded to eight bits each.

    Args:
        rows (`torch.Tensor`): Of shape (..., channels).
        table (`torch.Tensor`): All rows; not needed.

    Returns:
        `torch.Tensor`: In float32, of the shape of the rows.
    """
    numbers, scales = int8_rows(rows)
    return numbers * scales


class Inputs(nn.Module, ABC):
    """What rounds the inputs of a projection, and holds what is learned of them."""

    @abstractmethod
    def forward(self, hidden_states: torch.Tensor) -> Rounded:
        """From hidden states, of shape (..., inputs), to their numbers and scales, of shape (1,) or (..., 1)."""

    def target(self, config: Any) -> Any:
        """What the model is now being trained for, where that may change.

        Args:
            config (`Any`): What it was prepared for.

        Returns:
            `Any`: The same, or another config of its type.
        """
        return config


class Int8Inputs(Inputs):
    """Inputs rounded to eight bits token by token: nothing to learn."""

    def forward(self, hidden_states: torch.Tensor) -> Rounded:
        """See `int8_rows`."""
        return int8_rows(hidden_states)


class FloatInputs(Inputs):
    """Inputs that are not rounded."""

    def forward(self, hidden_states: torch.Tensor) -> Rounded:
        """The hidden states, and 1."""
        return hidden_states, torch.ones(1, device=hidden_states.device)


class FakeQuantized(nn.Module):
    """What modules with fake quantization have in common.

    Attributes:
        prepared_for (`Any`): The config.
    """

    prepared_for: Any

    def target(self) -> Any:
        """The config that the module may be converted to."""
        return self.prepared_for


class FakeQuantProjection(FakeQuantized):
    """What `FakeQuantLinear` and `FakeQuantConv1D` add to the modules that they were.

    Attributes:
        round_weight (`Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]`): From the matrix, of shape
            (outputs, inputs), to its numbers and their scales, of shape (outputs,) or (1,), with straight-through
            gradients.
        input_norm (`Inputs`): From hidden states to their numbers and their scales.
    """

    round_weight: Callable[[torch.Tensor], Rounded]
    input_norm: Inputs

    def target(self) -> Any:
        """The config that the module may be converted to."""
        return self.input_norm.target(self.prepared_for)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Projects hidden states of shape (..., inputs), as the converted module will."""
        # Whole numbers are multiplied, and scaled afterwards: their products are exact here and in the converted
        # module, so that what follows rounds the same numbers.
        numbers, input_scales = self.input_norm(hidden_states)
        weight, weight_scales = self.round_weight(oriented(self, self.weight))
        outputs = multiply_unscaled(numbers, weight) * (input_scales * weight_scales)
        if self.bias is not None:
            outputs = outputs + self.bias
        return outputs.to(hidden_states.dtype)


class FakeQuantLinear(FakeQuantProjection, nn.Linear):
    """An `nn.Linear` with fake quantization."""


class FakeQuantConv1D(FakeQuantProjection, Conv1D):
    """A `Conv1D` with fake quantization."""


class FakeQuantEmbedding(FakeQuantized, nn.Embedding):
    """An `nn.Embedding` that rounds the rows that it looks up.

    Attributes:
        round_rows (`Callable[[torch.Tensor, torch.Tensor], torch.Tensor]`): From the rows, of shape (..., channels),
            and the whole table, of shape (tokens, channels), to the rounded rows, with straight-through gradients.
    """

    stands_for = nn.Embedding
    round_rows: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Looks up rows: of ids of any shape, (..., channels)."""
        rows = super().forward(input_ids)
        return self.round_rows(rows, self.weight).to(rows.dtype)


_CLASSES = {nn.Linear: FakeQuantLinear, Conv1D: FakeQuantConv1D, nn.Embedding: FakeQuantEmbedding}
_ORIGINALS = {fake: original for original, fake in _CLASSES.items()}


def attach_(modules: Mapping[str, nn.Module], config: Any, parts: Callable[[str, nn.Module], dict[str, Any]]) -> None:
    """Has modules compute with rounded numbers; they stay the same objects with the same parameters.

    Args:
        modules (`Mapping[str, nn.Module]`): From `choose_modules`.
        config (`Any`): What the model is prepared for.
        parts (`Callable[[str, nn.Module], dict[str, Any]]`): From the name of a module and the module to the other
            attributes of `FakeQuantProjection` or `FakeQuantEmbedding`.

    Raises:
        ValueError: if a module is of a subclass of its own.
    """
    for name, module in modules.items():
        if type(module) not in _CLASSES:
            known = ", ".join(kind.__name__ for kind in _CLASSES)
            raise ValueError(
                f"{name} is a {type(module).__name__}, whose forward pass may be its own: only {known} can be trained "
                "for quantization. Add it to exclude, or merge adapters first."
            )
    made = {name: parts(name, module) for name, module in modules.items()}
    for name, module in modules.items():
        for attribute, value in made[name].items():
            if isinstance(value, nn.Module):
                value.to(module.weight.device).train(module.training)
            setattr(module, attribute, value)
        module.prepared_for = config
        module.__class__ = _CLASSES[type(module)]


def detach_(model: nn.Module) -> None:
    """Turns modules with fake quantization back into what they were; weights stay as they are now.

    Args:
        model (`nn.Module`): A prepared model, or one in floating point.
    """
    for _, module in fake_quantized(model):
        module.__class__ = _ORIGINALS[type(module)]
        names = ["round_rows"] if isinstance(module, nn.Embedding) else ["round_weight", "input_norm"]
        for name in [*names, "prepared_for"]:
            delattr(module, name)


def fake_quantized(model: nn.Module) -> list[tuple[str, FakeQuantized]]:
    """The modules of a model that have fake quantization.

    Args:
        model (`nn.Module`): Any model.

    Returns:
        `list[tuple[str, FakeQuantized]]`: Names and modules.
    """
    return [(name, module) for name, module in model.named_modules() if isinstance(module, FakeQuantized)]


def check_prepared(model: nn.Module, config: Any) -> None:
    """Raises if a model was trained for another format than the one it is to be converted to.

    Args:
        model (`nn.Module`): The model.
        config (`Any`): What it is to be quantized to.

    Raises:
        ValueError: if so; a model that was not prepared at all passes.
    """
    for name, module in fake_quantized(model):
        if module.target() != config:
            raise ValueError(
                f"{name} was trained for {module.target()}, but is to be quantized to {config}, for which "
                "nothing was learned: give the former, or prepare the model for the latter and train it."
            )
