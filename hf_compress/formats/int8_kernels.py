"""Products of hidden states with eight-bit weights, by the fastest way that is exact on this machine.

Each way multiplies integers exactly, q_x q_w^T, and gives what `rescale` turns into y = s_x s_w (q_x q_w^T) + b. They
differ in nothing but speed, so a model predicts the same wherever it runs, up to the rounding of float32.
"""

import logging
from collections.abc import Callable
from functools import cache

import torch
from torch.nn.functional import pad

logger = logging.getLogger(__name__)

LARGEST = 127
# Of unsigned integers, stands for 0: processors multiply unsigned by signed ones.
_ZERO = 128
# What FBGEMM writes behind each row of integers, and adds to the range of a row before it divides by it.
_ROW_TAIL, _ROW_EPSILON = 8, 1e-8

Multiply = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""From tokens in float32, of shape (tokens, inputs), of which there is at least one, to numbers in float32 of shape
(tokens, outputs) and what those of each token are to be multiplied by, of shape (tokens, 1)."""
Kernel = Callable[[torch.Tensor, torch.Tensor], Multiply]
"""One way to multiply: from weights, in int8 of shape (outputs, inputs), and their scales, of shape (outputs,)."""


def largest_of_rows(rows: torch.Tensor) -> torch.Tensor:
    """max |x| of each row, NaN if one number is.

    Args:
        rows (`torch.Tensor`): Of shape (rows, columns).

    Returns:
        `torch.Tensor`: Of shape (rows, 1).
    """
    # Two reductions cost a third of one behind `abs`, which writes a copy.
    return torch.maximum(rows.amax(1, keepdim=True), rows.amin(1, keepdim=True).neg_())


def rescale(numbers: torch.Tensor, factors: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
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
        return float32
    logger.info("Products of int8 weights on %s: %s.", device_type, found.__name__)
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
    try:
        multiply = kernel(weight.to(torch.int8), torch.ones(n_outputs, device=device_type))
        for n in (1, n_tokens):
            outputs = rescale(*multiply(tokens[:n].float()), None)
            if not torch.allclose(outputs, expected[:n], rtol=1e-6, atol=1e-3):
                return False
    except (AttributeError, RuntimeError, TypeError, NotImplementedError) as error:
        logger.info("%s cannot be used: %s", kernel.__name__, error)
        return False
    return True


def onednn_rows(weight: torch.Tensor, scales: torch.Tensor) -> Multiply:
    """oneDNN's product, where FBGEMM rounds all tokens in one operation; it is made for tables of embeddings.

    Given the limits of each row, that operation rounds x to (x - lower) 255 / (upper - lower + epsilon), which is
    x / s + 128 for lower = -128 s and upper = 127 s - epsilon. It writes eight bytes of its own behind each row, so
    the weights get as many inputs more, all zero.
    """
    # Tokens are multiplied by max |x| instead of s = max |x| / 127, which saves an operation per pass.
    product = _onednn_product(pad(weight, (0, _ROW_TAIL)), scales / LARGEST)
    factors = torch.tensor([[-_ZERO, LARGEST]]) / LARGEST
    epsilon = torch.tensor([[0.0, -_ROW_EPSILON]])
    round_rows = torch.ops.quantized.embedding_bag_byte_prepack_with_rowwise_min_max.default

    def multiply(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        largest = largest_of_rows(tokens)
        return product(round_rows(tokens, torch.addcmul(epsilon, largest, factors))), largest

    return multiply


def onednn(weight: torch.Tensor, scales: torch.Tensor) -> Multiply:
    """oneDNN's product, where tokens are rounded by operations that every PyTorch has."""
    product = _onednn_product(weight, scales.clone())

    def multiply(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        numbers, factors = _round_rows(tokens)
        # The highest bit turned over adds 128.
        return product(numbers.view(torch.uint8).bitwise_xor_(_ZERO)), factors

    return multiply


def int_mm(weight: torch.Tensor, scales: torch.Tensor) -> Multiply:
    """PyTorch's own product of integers."""

    def multiply(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        numbers, factors = _round_rows(tokens)
        return torch._int_mm(numbers, weight.T).float().mul_(scales), factors

    return multiply


def int_mm_padded(weight: torch.Tensor, scales: torch.Tensor) -> Multiply:
    """The same for cuBLAS, which takes multiples of 8 alone, and more than 16 tokens."""
    n_outputs, n_inputs = weight.shape
    more_inputs, more_outputs = -n_inputs % 8, -n_outputs % 8
    if more_inputs or more_outputs:
        weight = pad(weight, (0, more_inputs, 0, more_outputs))

    def multiply(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        numbers, factors = _round_rows(tokens)
        more_tokens = max(17 - len(tokens), 0)
        if more_inputs or more_tokens:
            numbers = pad(numbers, (0, more_inputs, 0, more_tokens))
        products = torch._int_mm(numbers, weight.T)[: len(tokens), :n_outputs]
        return products.float().mul_(scales), factors

    return multiply


def float32(weight: torch.Tensor, scales: torch.Tensor) -> Multiply:
    """A product of the same integers in floating point: exact up to 24 bits, but slow."""

    def multiply(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        numbers, factors = _round_rows(tokens)
        return (numbers.float() @ weight.float().T).mul_(scales), factors

    return multiply


CANDIDATES: dict[str, tuple[Kernel, ...]] = {"cpu": (onednn_rows, onednn, int_mm), "cuda": (int_mm_padded,)}
"""By kind of device, what may be there, fastest first."""


def _round_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Signed integers and the scales of their rows; those of a row of zeros may be anything, as its scale is 0."""
    scales = largest_of_rows(rows).div_(LARGEST)
    return (rows / scales).round_().to(torch.int8), scales


def _onednn_product(weight: torch.Tensor, scales: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    packed = torch.ops.onednn.qlinear_prepack.default(weight, None)
    zeros = torch.zeros(len(weight), dtype=torch.long)
    product = torch.ops.onednn.qlinear_pointwise.default

    def multiply(numbers: torch.Tensor) -> torch.Tensor:
        return product(numbers, 1.0, _ZERO, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], "")

    return multiply
