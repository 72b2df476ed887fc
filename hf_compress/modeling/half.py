"""Which devices compute in 16 bits."""

import torch

FAST_INSTRUCTIONS = {"bf16": ("avx512_bf16", "amx_bf16", "bf16"), "fp16": ("avx512_fp16", "amx_fp16", "fp16_arith")}
"""Those of x86 and Arm that multiply matrices of the type, as `torch.cpu.get_capabilities` calls them."""


def is_fast(device: torch.device, name: str) -> bool:
    """Whether a device multiplies matrices of a 16-bit type by instructions of its own.

    Args:
        device (`torch.device`): A CPU, or an accelerator, of which it is taken for granted.
        name (`Literal["bf16", "fp16"]`): The type.

    Returns:
        `bool`: Without such instructions, a CPU takes many times as long as in float32.
    """
    capabilities = torch.cpu.get_capabilities()
    return device.type != "cpu" or any(capabilities.get(feature) for feature in FAST_INSTRUCTIONS[name])
