"""Floating-point numbers of 16 bits: a cast that keeps in float32 what must stay there."""

import logging
from collections.abc import Collection

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_compress.formats.packed import PackedEmbedding, PackedModule
from hf_compress.modeling.half import FAST_INSTRUCTIONS, is_fast
from hf_compress.modeling.surgery import configs
from hf_compress.quantization.config import FloatConfig
from hf_compress.quantization.modules import check_float, stays_float32

logger = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def cast_(model: PreTrainedModel, config: FloatConfig, data: None = None) -> None:
    """Casts a model, in place; what Transformers keeps in float32 when it loads one stays there.

    Args:
        model (`PreTrainedModel`): A model in floating point.
        config (`FloatConfig`): The type.
        data (`None`, *optional*): Not needed.

    Raises:
        ValueError: if the model is quantized already, or a finite weight would become infinite. The model is as it
            was.
    """
    check_float(model)
    check_ranges(model, config)
    cast_rest_(model, config)


def check_ranges(model: nn.Module, config: FloatConfig, without: Collection[str] = ()) -> None:
    """Raises if a number is out of the range of a type.

    Args:
        model (`nn.Module`): A model in floating point.
        config (`FloatConfig`): The type.
        without (collection of `str`, *optional*): Names of tensors that are not going to be cast.

    Raises:
        ValueError: if a finite weight would become infinite.
    """
    dtype = DTYPES[config.dtype]
    for name, tensor in _to_cast(model, dtype)[0].items():
        if name not in without:
            _check_range(name, tensor.detach(), dtype)


def cast_rest_(model: PreTrainedModel, config: FloatConfig) -> None:
    """Casts what is in floating point, in place: not the scales of packed weights.

    Args:
        model (`PreTrainedModel`): A model, in which some modules may be in number formats.
        config (`FloatConfig`): The type.
    """
    dtype = DTYPES[config.dtype]
    cast, kept = _to_cast(model, dtype)
    for tensors, to in ((cast, dtype), (kept, torch.float32)):
        for tensor in tensors.values():
            tensor.data = tensor.detach().to(to)
    for module in model.modules():
        if isinstance(module, PackedEmbedding):
            module.to(dtype)
    for sub_config in configs(model):
        sub_config.dtype = dtype
    _warn_if_slow(model.device, config.dtype)


def _to_cast(model: nn.Module, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What is cast, and what stays in float32, by name."""
    # The same rule as in `from_pretrained`, or a model that is loaded would differ from the one that was saved.
    is_kept = stays_float32(model, dtype)
    packed = [module for module in model.modules() if isinstance(module, PackedModule)]
    scales = {id(buffer) for module in packed for buffer in module.buffers(recurse=False)}
    # Unlike `.to`, leaves tables of angles as they are, which no checkpoint holds.
    tensors = {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if tensor.is_floating_point() and id(tensor) not in scales
    }
    kept = {name: tensor for name, tensor in tensors.items() if is_kept(name)}
    ids = {id(tensor) for tensor in kept.values()}
    return {name: tensor for name, tensor in tensors.items() if id(tensor) not in ids}, kept


def _check_range(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    if (tensor.isfinite() & ~tensor.to(dtype).isfinite()).any():
        raise ValueError(
            f"{name} holds numbers up to {tensor.abs().max():.6g}, and {dtype} ends at {largest:.6g}: give "
            "FloatConfig('bf16'), which has the range of float32."
        )


def _warn_if_slow(device: torch.device, name: str) -> None:
    if not is_fast(device, name):
        logger.warning(
            "This CPU has no instructions for %s (%s): matrix products take many times as long as in float32. Keep "
            "float32 to run the model here, or quantize it to Int8DynamicConfig; the files are half as large in any "
            "case.",
            name,
            ", ".join(FAST_INSTRUCTIONS[name]),
        )
