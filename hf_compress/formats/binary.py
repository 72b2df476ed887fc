"""Weights of one bit: -1 or +1 times a scale per output channel, with inputs of few bits or in floating point."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import nn

from hf_compress.formats.bits import pack_bits, unpack_bits
from hf_compress.formats.int8_kernels import bytes_pay
from hf_compress.formats.packed import PackedLinear, version
from hf_compress.formats.products import multiply_unscaled, spoil_

FLOAT = 32
INPUT_BITS = (1, 2, 4, 8, FLOAT)

# What unsigned numbers of eight bits are lowered by, so that they fit into signed bytes.
_OFFSET = 128


def binary_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The signs of each row around its mean, and the scale that brings them closest to it.

    B = sign(W - mean W) and alpha = mean |W - mean W|: Rastegari et al., "XNOR-Net" (2016), equation 6, of centred
    weights, as in Liu et al., "BiT: Robustly Binarized Multi-distilled Transformer" (2022).

    Args:
        rows (`torch.Tensor`): Of shape (outputs, inputs).

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: In float32: the signs, -1 or +1, of the same shape, and the scales, of
        shape (outputs,). The scale of a row of equal numbers is 0.
    """
    rows = rows.float()
    centred = rows - rows.mean(1, keepdim=True)
    return torch.where(centred < 0, -1.0, 1.0), torch.linalg.vector_norm(centred, 1, dim=1) / rows.shape[1]


def input_levels(bits: int, is_signed: bool) -> tuple[int, int]:
    """The smallest and the largest number that inputs are rounded to.

    Args:
        bits (`int`): Per number: 1, 2, 4 or 8.
        is_signed (`bool`): Whether there are negative ones. Without, one bit stands for 0 and 1, else for -1 and +1.

    Returns:
        `tuple[int, int]`: For more than one bit, all whole numbers between them are levels too.
    """
    if not is_signed:
        return 0, (1 << bits) - 1
    return (-1, 1) if bits == 1 else (-(1 << bits - 1), (1 << bits - 1) - 1)


def multiply_signs(numbers: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """Sums of numbers with signs, without any rounding: sum_k q_k B_k.

    Args:
        numbers (`torch.Tensor`): Whole numbers from -128 to 255 in float32, of shape (tokens, inputs), with fewer than
            65,536 inputs.
        signs (`torch.Tensor`): -1 and +1 in int8, of shape (outputs, inputs).

    Returns:
        `torch.Tensor`: Whole numbers in float32, of shape (tokens, outputs).
    """
    # On other devices, the product of bytes takes some sizes only; on the CPU, PyTorch's is wrong for one input, and
    # slow where the processor has no instructions for it.
    if numbers.device.type != "cpu" or signs.shape[1] == 1 or not len(numbers) or not bytes_pay():
        # Below 2^24, integers in float32 are exact, in whatever order they are summed.
        with torch.autocast(numbers.device.type, enabled=False):
            return numbers @ signs.float().T
    # By rows, so that one with NaN, which compares with nothing, does not decide for the others.
    if not (numbers.amax(1) > 127).any():
        return torch._int_mm(numbers.to(torch.int8), signs.T).float()
    lowered = torch._int_mm((numbers - _OFFSET).to(torch.int8), signs.T)
    return (lowered + _OFFSET * signs.sum(1, dtype=torch.int32)).float()


def round_inputs(normalized: torch.Tensor, bits: int, is_signed: bool) -> torch.Tensor:
    """The nearest level of each input: sign(z), or round(clip(z, lowest, highest)).

    Liu et al., "BiT" (2022), equations 5 and 6, for one bit; Esser et al., "Learned Step Size Quantization" (2020),
    equation 1, for more.

    Args:
        normalized (`torch.Tensor`): z = (x - beta) / alpha for inputs x, threshold beta and scale alpha; any shape.
        bits (`int`): Per number: 1, 2, 4 or 8.
        is_signed (`bool`): As in `input_levels`.

    Returns:
        `torch.Tensor`: Whole numbers of the same shape and dtype.
    """
    if bits == 1 and is_signed:
        return torch.where(normalized < 0, -1.0, 1.0).to(normalized.dtype)
    return normalized.clamp(*input_levels(bits, is_signed)).round()


class BinaryLinear(PackedLinear):
    """y = (q_x B^T) alpha_x alpha_w + b, with signs B of one bit each, and inputs q_x of `activations` bits.

    The product of integers is exact. A token that holds NaN or infinity gives outputs that are not finite, and touches
    no other.

    On disk a weight takes one bit; in the first forward pass, the signs are unpacked to a byte each and kept beside
    the bits. They are multiplied as bytes, or in float32 where that is faster, because that is what PyTorch has fast
    products for: XOR and popcount on packed words, by NumPy, took 8 to 26 times as long on a CPU with AVX512-VNNI. One
    bit therefore saves storage and the way to the machine; it is not faster than the format int8.
    """

    format = "binary"

    def __init__(self, in_features: int, out_features: int, bias: bool, device=None, dtype=None, **fields: Any):
        super().__init__(in_features, out_features, bias, device, dtype, **fields)
        place = {"dtype": torch.float32, "device": device}
        n_bytes = -(-in_features // 8)
        self.register_buffer("weight", torch.empty(1, out_features, n_bytes, dtype=torch.int8, device=device))
        self.register_buffer("weight_scale", torch.empty(out_features, **place))
        is_rounded = self.fields["activations"] != FLOAT
        self.register_buffer("input_scale", torch.empty(1, **place) if is_rounded else None)
        self.register_buffer("input_threshold", torch.empty(in_features, **place) if is_rounded else None)
        self._signs: tuple[torch.Tensor, tuple[int, int], torch.Tensor] | None = None

    @staticmethod
    def check_fields(fields: Mapping[str, Any]) -> None:
        """`activations` are the bits of an input: 1, 2, 4, 8 or 32; below 32, `signed` says whether it has a sign."""
        bits = fields.get("activations")
        expected = {"activations"} if bits == FLOAT else {"activations", "signed"}
        is_sound = type(bits) is int and bits in INPUT_BITS and type(fields.get("signed", True)) is bool
        if not is_sound or fields.keys() != expected:
            raise ValueError(
                f"binary with {dict(fields)} is not known: give activations, one of {INPUT_BITS}, and below {FLOAT} "
                "signed, true or false, alone."
            )

    @classmethod
    def from_float(
        cls,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        input_scale: torch.Tensor | None = None,
        input_threshold: torch.Tensor | None = None,
        **fields: Any,
    ) -> Self:
        """Takes the signs of the weights, see `PackedLinear.from_float`.

        Args:
            weight (`torch.Tensor`): Of shape (outputs, inputs), finite.
            bias (`torch.Tensor`, *optional*): Of shape (outputs,).
            input_scale (`torch.Tensor`, *optional*): Alpha of the inputs, of shape (1,); below 32 bits of an input.
            input_threshold (`torch.Tensor`, *optional*): Beta, of shape (inputs,), or (1,) for all; likewise.
            **fields: As in config.json.
        """
        n_outputs, n_inputs = weight.shape
        module = cls(n_inputs, n_outputs, bias is not None, weight.device, weight.dtype, **fields)
        signs, scales = binary_rows(weight.detach())
        module.weight = pack_bits((signs > 0).to(torch.uint8), 1).view(torch.int8)[None].contiguous()
        module.weight_scale = scales
        if bias is not None:
            module.bias = nn.Parameter(bias.detach().clone())
        if module.input_scale is not None:
            module.input_scale = input_scale.detach().float().clone()
            module.input_threshold = input_threshold.detach().float().expand(n_inputs).clone()
        return module

    def signs(self) -> torch.Tensor:
        """-1 and +1 in int8, of shape (outputs, inputs); unpacked once, and again when the weights change."""
        known = self._signs
        if known is None or known[0] is not self.weight or known[1] != version(self.weight):
            bits = unpack_bits(self.weight[0].view(torch.uint8), 1, self.in_features)
            known = self._signs = self.weight, version(self.weight), bits.view(torch.int8) * 2 - 1
        return known[2]

    def dequantize(self) -> torch.Tensor:
        """The weights, of shape (outputs, inputs)."""
        return self.signs().float() * self.weight_scale[:, None]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Projects hidden states of shape (..., inputs)."""
        if self.input_scale is None:
            outputs = multiply_unscaled(hidden_states, self.signs()) * self.weight_scale
        else:
            outputs = self._integer_products(hidden_states) * (self.input_scale * self.weight_scale)
        if self.bias is not None:
            outputs += self.bias
        return outputs.to(hidden_states.dtype)

    def _integer_products(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = hidden_states.flatten(0, -2)
        normalized = (tokens.float() - self.input_threshold) / self.input_scale
        numbers = round_inputs(normalized, self.fields["activations"], self.fields["signed"])
        products = spoil_(multiply_signs(numbers, self.signs()), tokens)
        return products.unflatten(0, hidden_states.shape[:-1])

    def forget_packed_(self) -> None:
        """Gives back the memory of the unpacked signs, until the next product."""
        self._signs = None

    def _load_from_state_dict(self, *args: Any) -> None:
        self._signs = None
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles make their own.
        return self.__dict__ | {"_signs": None}
