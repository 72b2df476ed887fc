"""What the projections of a model read on calibration data: exact extremes, and counts of the numbers between."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_compress.modeling.batches import read_inputs
from hf_compress.modeling.blocks import find_blocks
from hf_compress.modeling.modes import evaluating
from hf_compress.modeling.tasks import without_cache


class Histogram:
    """Counts of numbers, each rounded to bfloat16: a step of 0.4 % at every magnitude, whatever comes later.

    Attributes:
        lower (`float`): The smallest number so far, exactly.
        upper (`float`): The largest number so far, exactly.
        is_finite (`bool`): Whether all were finite.
    """

    def __init__(self) -> None:
        self.lower, self.upper, self.is_finite = torch.inf, -torch.inf, True
        self._counts = torch.zeros(1 << 16, dtype=torch.long)

    def add(self, values: torch.Tensor) -> None:
        """Counts more numbers.

        Args:
            values (`torch.Tensor`): Of any shape and dtype of floating point.
        """
        if not values.numel():
            return
        values = values.detach().float()
        lower, upper = (float(limit) for limit in values.aminmax())
        self.lower, self.upper = min(self.lower, lower), max(self.upper, upper)
        # Limits that are NaN compare with nothing, so the numbers themselves are asked.
        self.is_finite = self.is_finite and bool(values.isfinite().all())
        patterns = values.to(torch.bfloat16).view(torch.int16).flatten().cpu().long() & 0xFFFF
        self._counts += torch.bincount(patterns, minlength=len(self._counts))

    def is_empty(self) -> bool:
        """Whether nothing was counted."""
        return not bool(self._counts.any())

    def values(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The numbers that occurred.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: The distinct numbers in float32, sorted and within the extremes, and
            how often each occurred.
        """
        patterns = self._counts.nonzero()[:, 0]
        values = patterns.to(torch.int16).view(torch.bfloat16).float().clamp(self.lower, self.upper)
        values, order = values.sort()
        if len(values) > 1:
            # bfloat16 may have rounded them inwards.
            values[0], values[-1] = self.lower, self.upper
        return values, self._counts[patterns[order]]


def observe_inputs(
    model: PreTrainedModel, modules: Mapping[str, nn.Module], data: Iterable[Mapping[str, Any]]
) -> dict[str, Histogram]:
    """Counts what modules read, of real tokens alone where an attention mask tells them from padding.

    Args:
        model (`PreTrainedModel`): Is run without dropout, and left in the mode that it was in.
        modules (`Mapping[str, nn.Module]`): Its projections by name.
        data (`Iterable[Mapping[str, torch.Tensor]]`): Batches of inputs.

    Returns:
        `dict[str, Histogram]`: By name.

    Raises:
        ValueError: if there is no batch, or a module reads nothing, zeros alone, NaN or infinity.
        TypeError: if the batches are no dicts of tensors.
    """
    found = {name: Histogram() for name in modules}
    visit_inputs(model, modules, data, lambda name, inputs: found[name].add(inputs))
    for name, histogram in found.items():
        _check(name, histogram)
    return found


def visit_inputs(
    model: PreTrainedModel,
    modules: Mapping[str, nn.Module],
    data: Iterable[Mapping[str, Any]],
    visit: Callable[[str, torch.Tensor], None],
) -> None:
    """Runs a model, and calls a function with what modules read, of real tokens alone.

    Args:
        model (`PreTrainedModel`): Is run without dropout, and left in the mode that it was in.
        modules (`Mapping[str, nn.Module]`): Some of its modules by name.
        data (`Iterable[Mapping[str, torch.Tensor]]`): Batches of inputs.
        visit (`Callable`): Called as `visit(name, inputs)`, where inputs have the shape (tokens, channels) if an
            attention mask tells tokens from padding, else (..., channels).

    Raises:
        ValueError: if there is no batch, or one has no input of the model, or padding that is not marked.
        TypeError: if the batches are no dicts of tensors.
    """
    in_decoder = _modules_of_decoder(model)
    with evaluating(model):
        n_batches = 0
        for batch in tqdm(data, desc="Measuring ranges", unit="batch"):
            inputs = read_inputs(model, batch)
            with torch.no_grad(), ExitStack() as hooks:
                for name, module in modules.items():
                    mask = _mask(inputs, module in in_decoder)

                    def hook(_: nn.Module, args: tuple, name: str = name, mask: torch.Tensor | None = mask) -> None:
                        visit(name, _real_tokens(args[0], mask))

                    hooks.enter_context(module.register_forward_pre_hook(hook))
                model(**without_cache(model, inputs))
            n_batches += 1
    if not n_batches:
        raise ValueError("The calibration data hold no batch: give an iterable of dicts of tensors, a DataLoader say.")


def _modules_of_decoder(model: PreTrainedModel) -> set[nn.Module]:
    """Modules that read the second of two sequences."""
    if not model.config.is_encoder_decoder:
        return set()
    found: set[nn.Module] = set()
    for block in find_blocks(model):
        if block.stack == "decoder":
            # The keys and values of an attention over the encoder's states are made of those.
            encoded = {module for part in block.attentions if part.kind == "cross" for module in part.inputs[1:]}
            found |= set(block.module.modules()) - encoded
    return found


def _mask(batch: Mapping[str, torch.Tensor], is_second: bool) -> torch.Tensor | None:
    is_second = is_second and "decoder_input_ids" in batch
    mask = batch.get("decoder_attention_mask" if is_second else "attention_mask")
    # Of several choices per question, each is a row of its own inside the model.
    return None if mask is None else (mask != 0).flatten(0, -2)


def _real_tokens(inputs: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    # What is no sequence of tokens has another shape: a pooled state, or relative positions.
    return inputs if mask is None or inputs.shape[:-1] != mask.shape else inputs[mask.to(inputs.device)]


def _check(name: str, histogram: Histogram) -> None:
    if histogram.is_empty():
        raise ValueError(
            f"The calibration data never reach {name}, so the range of its activations is unknown: give batches with "
            f"all inputs that lead there, or add {name!r} to exclude."
        )
    if not histogram.is_finite:
        raise ValueError(
            f"The activations of {name} hold NaN or infinity on the calibration data: check the model's outputs on "
            "them, and load it in float32 or bfloat16 (`dtype='float32'`) if it is in float16."
        )
    if histogram.lower == histogram.upper == 0:
        raise ValueError(
            f"{name} reads zeros alone on the calibration data, so the range of its activations is unknown: give "
            f"other batches, or add {name!r} to exclude."
        )
