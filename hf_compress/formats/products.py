"""What the products of several formats have in common."""

import torch
from torch.nn.functional import linear

from hf_compress.formats.int8_operations import largest_of_rows


def multiply_unscaled(numbers: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x W^T of numbers that are multiplied by their scales afterwards: in float32 where float16 has no room for it.

    Args:
        numbers (`torch.Tensor`): x, of shape (..., inputs), in floating point.
        weight (`torch.Tensor`): W, of shape (outputs, inputs) and any dtype.

    Returns:
        `torch.Tensor`: In float32, of shape (..., outputs).
    """
    device = numbers.device.type
    is_half = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is torch.float16
    if is_half or numbers.dtype is torch.float16:
        # Sums of whole numbers, or with signs, leave the range of float16, 65,504, before they are scaled.
        with torch.autocast(device, enabled=False):
            return linear(numbers.float(), weight.float())
    return linear(numbers, weight.to(numbers.dtype)).float()


def spoil_(outputs: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Makes NaN of the outputs of tokens that hold NaN or infinity, of which rounding makes numbers like any other.

    Args:
        outputs (`torch.Tensor`): Of shape (tokens, outputs); is overwritten.
        tokens (`torch.Tensor`): What they were made of, of shape (tokens, inputs).

    Returns:
        `torch.Tensor`: The outputs.
    """
    largest = largest_of_rows(tokens.detach())
    # 0 for what is finite, else NaN: to add that takes an eighth of the time of filling by a mask.
    return outputs.add_(largest - largest)
