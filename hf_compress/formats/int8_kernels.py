"""Products of hidden states with eight-bit weights, by the fastest way that is exact on this machine.

All ways round tokens and multiply integers alike, y = (q_x q_w^T) s_x s_w + b, and differ in nothing but speed: a
model predicts the same wherever it runs, up to the rounding of float32.
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch.nn.functional import pad

logger = logging.getLogger(__name__)

LARGEST = 127
# Of unsigned integers, stands for 0: processors multiply unsigned by signed ones.
_ZERO = 128
# What FBGEMM writes behind each row of integers, and adds to the range of a row before it divides by it.
_ROW_TAIL, _ROW_EPSILON = 8, 1e-8
# Modules may be made, and this file imported, where another device or dtype is the default.
_FLOAT = {"device": "cpu", "dtype": torch.float32}
_ROW_LIMITS = torch.tensor([[-_ZERO / LARGEST, 1.0]], **_FLOAT)
_ROW_EPSILONS = torch.tensor([[0.0, -_ROW_EPSILON]], **_FLOAT)
# Fewer numbers than this stay in the cache of a processor.
_FEW = 1 << 16

Rounded = tuple[torch.Tensor, torch.Tensor]
"""Integers of some kind, a row per token, and what products of each token are to be multiplied by, (tokens, 1)."""
Product = Callable[[torch.Tensor], torch.Tensor]
"""From the integers of tokens to numbers in float32, of shape (tokens, outputs)."""


class Kernel(NamedTuple):
    """One way to multiply.

    Attributes:
        name (`str`): For messages.
        round_tokens (`Callable`): From tokens in float32, of shape (tokens, inputs), none of the two 0, to integers
            and factors.
        prepare (`Callable`): From weights, in int8 of shape (outputs, inputs), and their scales, of shape (outputs,),
            to a product. It is called once, and the product often.
    """

    name: str
    round_tokens: Callable[[torch.Tensor], Rounded]
    prepare: Callable[[torch.Tensor, torch.Tensor], Product]


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


@cache
def kernel_for(device_type: str) -> Kernel:
    """The fastest kernel that multiplies exactly on a kind of device, found out once by small products.

    Args:
        device_type (`str`): `"cpu"` or `"cuda"`; on any other, products are in float32.

    Returns:
        `Kernel`: What `Int8Linear` uses. If it is no faster than floating point, that is logged once.
    """
    with torch.no_grad(), torch.inference_mode(False):
        found = next((kernel for kernel in CANDIDATES.get(device_type, ()) if is_exact(kernel, device_type)), None)
    if found is None:
        logger.warning(
            "This %s has no exact product of eight-bit integers that PyTorch %s knows of (a CPU needs VNNI or AMX, a "
            "GPU compute capability 7.5), so int8 models multiply in float32: they predict the same, but are slower "
            "than in floating point. Load the model in floating point here, or move it to another machine.",
            device_type,
            torch.__version__,
        )
        return FLOAT32
    logger.info("Products of int8 weights on %s: %s.", device_type, found.name)
    return found


def is_exact(kernel: Kernel, device_type: str) -> bool:
    """Whether a kernel is there and gives exactly the integers that it should, the largest ones included.

    Processors without VNNI add pairs of products in 16 bits, and clip what is too large.

    Args:
        kernel (`Kernel`): Any.
        device_type (`str`): Where to try.

    Returns:
        `bool`: Whether it can be used.
    """
    n_tokens, n_inputs, n_outputs = 41, 75, 37
    # Whole numbers from -127 to 127, of which each row has the largest: rounding leaves them as they are.
    count = torch.arange(n_tokens * n_inputs, device=device_type).view(n_tokens, n_inputs)
    tokens = count * 37 % (2 * LARGEST + 1) - LARGEST
    weight = count[:n_outputs] * 101 % (2 * LARGEST + 1) - LARGEST
    tokens[:, :2], tokens[:2], weight[:2], tokens[2] = LARGEST, LARGEST, LARGEST, 0
    expected = (tokens.double() @ weight.double().T).float()
    scales = torch.ones(n_outputs, device=device_type, dtype=torch.float32)
    try:
        product = kernel.prepare(weight.to(torch.int8), scales)
        for n in (1, n_tokens):
            numbers, factors = kernel.round_tokens(tokens[:n].float())
            outputs = rescale_(product(numbers)[:n], factors, None)
            if not torch.allclose(outputs, expected[:n], rtol=1e-6, atol=1e-3):
                return False
    except (AttributeError, RuntimeError, TypeError, NotImplementedError) as error:
        logger.info("%s cannot be used: %s", kernel.name, error)
        return False
    return True


def _round_signed(tokens: torch.Tensor) -> Rounded:
    # Of a row of zeros, the integers may be anything, since their factor is 0.
    factors = largest_of_rows(tokens).div_(LARGEST)
    return (tokens / factors).round_().to(torch.int8), factors


def _round_unsigned(tokens: torch.Tensor) -> Rounded:
    numbers, factors = _round_signed(tokens)
    # The highest bit turned over adds 128.
    return numbers.view(torch.uint8).bitwise_xor_(_ZERO), factors


def _round_unsigned_at_once(tokens: torch.Tensor) -> Rounded:
    """Rounds by one operation that is made for tables of embeddings, and writes eight bytes more behind each row.

    Given the limits of each row, it rounds x to (x - lower) 255 / (upper - lower + epsilon), which is x / s + 128 for
    lower = -128 s and upper = 127 s - epsilon. The factors are max |x| = 127 s, which saves an operation.
    """
    largest = largest_of_rows(tokens)
    limits = torch.addcmul(_ROW_EPSILONS, largest, _ROW_LIMITS)
    return torch.ops.quantized.embedding_bag_byte_prepack_with_rowwise_min_max.default(tokens, limits), largest


def _prepare_onednn(weight: torch.Tensor, scales: torch.Tensor) -> Product:
    packed = torch.ops.onednn.qlinear_prepack.default(weight, None)
    zeros = torch.zeros(len(weight), dtype=torch.long, device="cpu")
    scales, product = scales.clone(), torch.ops.onednn.qlinear_pointwise.default

    def multiply(numbers: torch.Tensor) -> torch.Tensor:
        return product(numbers, 1.0, _ZERO, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], "")

    return multiply


def _prepare_onednn_rows(weight: torch.Tensor, scales: torch.Tensor) -> Product:
    # Weights of zero for what stands behind each row of integers.
    return _prepare_onednn(pad(weight, (0, _ROW_TAIL)), scales / LARGEST)


def _prepare_int_mm(weight: torch.Tensor, scales: torch.Tensor) -> Product:
    return lambda numbers: torch._int_mm(numbers, weight.T).float().mul_(scales)


def _prepare_int_mm_cuda(weight: torch.Tensor, scales: torch.Tensor) -> Product:
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


def _prepare_float32(weight: torch.Tensor, scales: torch.Tensor) -> Product:
    def multiply(numbers: torch.Tensor) -> torch.Tensor:
        # Sums of whole numbers leave the range of float16.
        with torch.autocast(numbers.device.type, enabled=False):
            return (numbers.float() @ weight.float().T).mul_(scales)

    return multiply


ONEDNN_ROWS = Kernel("oneDNN, rounding by FBGEMM", _round_unsigned_at_once, _prepare_onednn_rows)
ONEDNN = Kernel("oneDNN", _round_unsigned, _prepare_onednn)
INT_MM = Kernel("torch._int_mm", _round_signed, _prepare_int_mm)
INT_MM_CUDA = Kernel("torch._int_mm on CUDA", _round_signed, _prepare_int_mm_cuda)
FLOAT32 = Kernel("float32", _round_signed, _prepare_float32)
CANDIDATES: dict[str, tuple[Kernel, ...]] = {"cpu": (ONEDNN_ROWS, ONEDNN, INT_MM), "cuda": (INT_MM_CUDA,)}
"""By kind of device, what may be there, fastest first."""
