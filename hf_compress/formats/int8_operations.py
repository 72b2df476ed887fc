"""Eight-bit products put together from PyTorch's operations: rounding of tokens, product of integers, rescaling."""

import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.functional import pad

LARGEST = 127
# Of unsigned integers, stands for 0: processors multiply unsigned by signed ones.
ZERO = 128
# What FBGEMM writes behind each row of integers, and adds to the range of a row before it divides by it.
_ROW_TAIL, _ROW_EPSILON = 8, 1e-8
# Modules may be made, and this file imported, where another device or dtype is the default.
_FLOAT = {"device": "cpu", "dtype": torch.float32}
_ROW_LIMITS = torch.tensor([[-ZERO / LARGEST, 1.0]], **_FLOAT)
_ROW_EPSILONS = torch.tensor([[0.0, -_ROW_EPSILON]], **_FLOAT)
# Fewer numbers than this stay in the cache of a processor.
_FEW = 1 << 16

Rounded = tuple[torch.Tensor, torch.Tensor]
"""Integers of some kind, a row per token, and what products of each token are to be multiplied by, (tokens, 1)."""
Product = Callable[[torch.Tensor], torch.Tensor]
"""From the integers of tokens to numbers in float32, of shape (tokens, outputs)."""
Projection = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
"""From hidden states, of shape (..., inputs) and any dtype of floating point, not empty, and a bias, of shape
(outputs,), to outputs of shape (tokens, outputs), in float32 or the dtype of the states."""
Prepare = Callable[[torch.Tensor, torch.Tensor], Projection]
"""From weights, in int8 of shape (outputs, inputs), and their scales, of shape (outputs,). It is called once, and what
it gives often."""


def largest_numbers(device_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and weights to try a product with: whole numbers from -127 to 127, the largest sums among the results.

    Args:
        device_type (`str`): Where they are made.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Tokens in float32, one of them 0 and all others with the largest number,
        so that rounding leaves them as they are; weights in int8, a row per output.
    """
    count = torch.arange(41 * 75, device=device_type).view(41, 75)
    tokens = count * 37 % (2 * LARGEST + 1) - LARGEST
    weight = count[:37] * 101 % (2 * LARGEST + 1) - LARGEST
    tokens[:, :2], tokens[:2], weight[:2], tokens[2] = LARGEST, LARGEST, LARGEST, 0
    return tokens.float(), weight.to(torch.int8)


def as_tokens(states: torch.Tensor) -> torch.Tensor:
    """Hidden states in float32, of shape (tokens, inputs)."""
    tokens = states.reshape(-1, states.shape[-1])
    return tokens if tokens.dtype is torch.float32 else tokens.float()


class _Known(NamedTuple):
    """Hidden states that were rounded, their version by then, by what, and the result."""

    states: weakref.ref
    version: int
    round_tokens: Callable[[torch.Tensor], Rounded]
    rounded: Rounded


class _LastRounded:
    """Rounds hidden states once for all projections that read the same ones: queries, keys and values, for example.

    Only the last ones are known, and only as long as they are there. A change in their place is seen by their
    version, which tensors of `torch.inference_mode` do not have: these are rounded each time.
    """

    def __init__(self) -> None:
        self._known: _Known | None = None

    def round(self, states: torch.Tensor, round_tokens: Callable[[torch.Tensor], Rounded]) -> Rounded:
        """The integers and factors of hidden states, by `round_tokens` where they are not known."""
        if states.is_inference():
            return round_tokens(as_tokens(states))
        # Read once: another thread may round others meanwhile.
        known = self._known
        if (
            known is None
            or known.states() is not states
            or known.version != states._version
            or known.round_tokens is not round_tokens
        ):
            rounded = round_tokens(as_tokens(states))
            known = self._known = _Known(weakref.ref(states, self._forget), states._version, round_tokens, rounded)
        return known.rounded

    def _forget(self, states: weakref.ref) -> None:
        if self._known is not None and self._known.states is states:
            self._known = None


_last_rounded = _LastRounded()


def in_steps(
    round_tokens: Callable[[torch.Tensor], Rounded], prepare: Callable[[torch.Tensor, torch.Tensor], Product]
) -> Prepare:
    """Projections that round, multiply and rescale one after the other.

    Args:
        round_tokens (`Callable`): From tokens in float32 to integers and factors.
        prepare (`Callable`): From weights and their scales to a product of such integers.

    Returns:
        `Prepare`: From weights and their scales to a projection.
    """

    def prepare_projection(weight: torch.Tensor, scales: torch.Tensor) -> Projection:
        product = prepare(weight, scales)

        def project(states: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            numbers, factors = _last_rounded.round(states, round_tokens)
            return rescale_(product(numbers), factors, bias)

        return project

    return prepare_projection


def largest_of_rows(rows: torch.Tensor) -> torch.Tensor:
    """max |x| of each row, NaN if one number is.

    Args:
        rows (`torch.Tensor`): Of shape (rows, columns).

    Returns:
        `torch.Tensor`: Of shape (rows, 1).
    """
    # Two operations fewer, but `abs` writes a copy, which of many numbers takes three times as long.
    if rows.numel() < _FEW:
        return rows.abs().amax(1, keepdim=True)
    return torch.maximum(rows.amax(1, keepdim=True), rows.amin(1, keepdim=True).neg_())


def rescale_(numbers: torch.Tensor, factors: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """y = z a + b, in one pass over memory.

    Args:
        numbers (`torch.Tensor`): z, in float32 of shape (tokens, outputs); is overwritten.
        factors (`torch.Tensor`): a, of shape (tokens, 1).
        bias (`torch.Tensor`, *optional*): b, of shape (outputs,).

    Returns:
        `torch.Tensor`: y, in the place of z.
    """
    return numbers.mul_(factors) if bias is None else torch.addcmul(bias.float(), numbers, factors, out=numbers)


def round_signed(tokens: torch.Tensor) -> Rounded:
    """Tokens in float32 to integers from -127 to 127, and the scale of each row."""
    # Of a row of zeros, the integers may be anything, since their factor is 0.
    factors = largest_of_rows(tokens).div_(LARGEST)
    return (tokens / factors).round_().to(torch.int8), factors


def round_unsigned(tokens: torch.Tensor) -> Rounded:
    """Tokens in float32 to the same integers plus 128, as unsigned ones, and the scale of each row."""
    numbers, factors = round_signed(tokens)
    # The highest bit turned over adds 128.
    return numbers.view(torch.uint8).bitwise_xor_(ZERO), factors


def round_unsigned_at_once(tokens: torch.Tensor) -> Rounded:
    """Rounds by one operation that is made for tables of embeddings, and writes eight bytes more behind each row.

    Given the limits of each row, it rounds x to (x - lower) 255 / (upper - lower + epsilon), which is x / s + 128 for
    lower = -128 s and upper = 127 s - epsilon. The factors are max |x| = 127 s, which saves an operation.
    """
    largest = largest_of_rows(tokens)
    limits = torch.addcmul(_ROW_EPSILONS, largest, _ROW_LIMITS)
    return torch.ops.quantized.embedding_bag_byte_prepack_with_rowwise_min_max.default(tokens, limits), largest


def prepare_onednn(weight: torch.Tensor, scales: torch.Tensor) -> Product:
    """Weights and their scales to a product, by oneDNN, with integers from `round_unsigned`."""
    packed = torch.ops.onednn.qlinear_prepack.default(weight, None)
    zeros = torch.zeros(len(weight), dtype=torch.long, device="cpu")
    scales, product = scales.clone(), torch.ops.onednn.qlinear_pointwise.default

    def multiply(numbers: torch.Tensor) -> torch.Tensor:
        return product(numbers, 1.0, ZERO, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], "")

    return multiply


def prepare_onednn_rows(weight: torch.Tensor, scales: torch.Tensor) -> Product:
    """The same with integers from `round_unsigned_at_once`."""
    # Weights of zero for what stands behind each row of integers.
    return prepare_onednn(pad(weight, (0, _ROW_TAIL)), scales / LARGEST)


def prepare_int_mm(weight: torch.Tensor, scales: torch.Tensor) -> Product:
    """Weights and their scales to a product, by PyTorch, with integers from `round_signed`."""
    return lambda numbers: torch._int_mm(numbers, weight.T).float().mul_(scales)


def prepare_int_mm_cuda(weight: torch.Tensor, scales: torch.Tensor) -> Product:
    """The same on a GPU, which multiplies some shapes alone."""
    n_outputs, n_inputs = weight.shape
    # cuBLAS takes multiples of 8 alone, and more than 16 tokens.
    more_inputs, more_outputs = -n_inputs % 8, -n_outputs % 8
    if more_inputs or more_outputs:
        weight = pad(weight, (0, more_inputs, 0, more_outputs))

    def multiply(numbers: torch.Tensor) -> torch.Tensor:
        n_tokens, more_tokens = len(numbers), max(17 - len(numbers), 0)
        if more_inputs or more_tokens:
            numbers = pad(numbers, (0, more_inputs, 0, more_tokens))
        return torch._int_mm(numbers, weight.T)[:n_tokens, :n_outputs].float().mul_(scales)

    return multiply


def prepare_float32(weight: torch.Tensor, scales: torch.Tensor) -> Product:
    """Weights and their scales to a product in floating point, with integers of any kind that float32 holds."""

    def multiply(numbers: torch.Tensor) -> torch.Tensor:
        # Sums of whole numbers leave the range of float16.
        with torch.autocast(numbers.device.type, enabled=False):
            return (numbers.float() @ weight.float().T).mul_(scales)

    return multiply
