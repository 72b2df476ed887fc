"""Floating-point numbers of 16 bits: a cast that keeps in float32 what must stay there."""

import logging

import torch
from transformers import PreTrainedModel

from hf_compress.modeling.surgery import configs
from hf_compress.quantization.config import FloatConfig
from hf_compress.quantization.modules import check_float, stays_float32

logger = logging.getLogger(__name__)

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Instructions of x86 and Arm that multiply matrices of the type, as `torch.cpu.get_capabilities` calls them.
_FAST = {"bf16": ("avx512_bf16", "amx_bf16", "bf16"), "fp16": ("avx512_fp16", "amx_fp16", "fp16_arith")}


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
    dtype = _DTYPES[config.dtype]
    # The same rule as in `from_pretrained`, or a model that is loaded would differ from the one that was saved.
    is_kept = stays_float32(model, dtype)
    # Unlike `.to`, leaves tables of angles as they are, which no checkpoint holds.
    tensors = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if tensor.is_floating_point()}
    kept = {id(tensor) for name, tensor in tensors.items() if is_kept(name)}
    for name, tensor in tensors.items():
        if id(tensor) not in kept:
            _check_range(name, tensor.detach(), dtype)
    for tensor in tensors.values():
        tensor.data = tensor.detach().to(torch.float32 if id(tensor) in kept else dtype)
    for sub_config in configs(model):
        sub_config.dtype = dtype
    _warn_if_slow(model.device, config.dtype)


def _check_range(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    if (tensor.isfinite() & ~tensor.to(dtype).isfinite()).any():
        raise ValueError(
            f"{name} holds numbers up to {tensor.abs().max():.6g}, and {dtype} ends at {largest:.6g}: give "
            "FloatConfig('bf16'), which has the range of float32."
        )


def is_fast(device: torch.device, name: str) -> bool:
    """Whether a device multiplies matrices of a 16-bit type by instructions of its own.

    Args:
        device (`torch.device`): A CPU, or an accelerator, of which it is taken for granted.
        name (`Literal["bf16", "fp16"]`): The type.

    Returns:
        `bool`: Without such instructions, a CPU takes many times as long as in float32.
    """
    capabilities = torch.cpu.get_capabilities()
    return device.type != "cpu" or any(capabilities.get(feature) for feature in _FAST[name])


def _warn_if_slow(device: torch.device, name: str) -> None:
    if not is_fast(device, name):
        logger.warning(
            "This CPU has no instructions for %s (%s): matrix products take many times as long as in float32. Keep "
            "float32 to run the model here, or quantize it to Int8DynamicConfig; the files are half as large in any "
            "case.",
            name,
            ", ".join(_FAST[name]),
        )
