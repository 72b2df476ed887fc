"""Projections of hidden states by eight-bit weights, by the fastest way that is exact on this machine.

All ways round tokens and multiply integers alike, y = (q_x q_w^T) s_x s_w + b, and differ in nothing but speed: a
model predicts the same wherever it runs, up to the rounding of float32.
"""

import logging
import time
from functools import cache
from typing import NamedTuple

import torch

from hf_compress.formats import int8_operations as operations
from hf_compress.formats.int8_compiled import INSTRUCTIONS, prepare_with
from hf_compress.formats.int8_operations import Prepare, in_steps

logger = logging.getLogger(__name__)


class Kernel(NamedTuple):
    """One way to project.

    Attributes:
        name (`str`): For messages.
        prepare (`Prepare`): From weights and their scales to a projection.
    """

    name: str
    prepare: Prepare


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
        if found is INT_MM and not bytes_pay():
            found = None
    if found is None:
        logger.warning(
            "This %s has no fast and exact product of eight-bit integers that PyTorch %s knows of (an x86 CPU needs "
            "VNNI or AMX, or AVX2 and a C compiler when hf_compress is installed, a GPU compute capability 7.5), so "
            "int8 models multiply in float32: they predict the same, but are slower than in floating point. Load the "
            "model in floating point here, or move it to another machine.",
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
    tokens, weight = operations.largest_numbers(device_type)
    expected = (tokens.double() @ weight.double().T).float()
    scales = torch.ones(len(weight), device=device_type, dtype=torch.float32)
    try:
        project = kernel.prepare(weight, scales)
        for n in (1, len(tokens)):
            if not torch.allclose(project(tokens[:n], None), expected[:n], rtol=1e-6, atol=1e-3):
                return False
    except (AttributeError, ImportError, RuntimeError, TypeError) as error:
        logger.info("%s cannot be used: %s", kernel.name, error)
        return False
    return True


# torch.compile sees through a cache, and would trace the clock.
@cache
@torch.compiler.assume_constant_result
def bytes_pay() -> bool:
    """Whether PyTorch's own product of bytes on the CPU, `torch._int_mm`, is exact and faster than one in float32.

    Returns:
        `bool`: Found out once.
    """
    with torch.no_grad(), torch.inference_mode(False):
        return is_exact(INT_MM, "cpu") and is_faster(INT_MM, FLOAT32)


def is_faster(kernel: Kernel, other: Kernel) -> bool:
    """Whether one kernel takes less time than another on the CPU.

    `torch._int_mm` takes fifty times as long as a product in float32 where processors have no instructions for it.

    Args:
        kernel, other (`Kernel`): Both exact.

    Returns:
        `bool`: By the fastest of three products of 64 tokens each.
    """
    # Where this is asked, another device or dtype may be the default.
    tokens = torch.ones(64, 256, dtype=torch.float32, device="cpu")
    weight, scales = torch.ones(256, 256, dtype=torch.int8, device="cpu"), torch.ones_like(tokens[0])
    seconds = []
    for one in (kernel, other):
        project, times = one.prepare(weight, scales), []
        for _ in range(3):
            start = time.perf_counter()
            project(tokens.clone(), None)
            times.append(time.perf_counter() - start)
        seconds.append(min(times))
    return seconds[0] < seconds[1]


COMPILED_AVX2, COMPILED_VNNI, COMPILED_AMX = (
    Kernel(f"compiled for {name}", prepare_with(name)) for name in INSTRUCTIONS
)
ONEDNN_ROWS = Kernel(
    "oneDNN, rounding by FBGEMM", in_steps(operations.round_unsigned_at_once, operations.prepare_onednn_rows)
)
ONEDNN = Kernel("oneDNN", in_steps(operations.round_unsigned, operations.prepare_onednn))
INT_MM = Kernel("torch._int_mm", in_steps(operations.round_signed, operations.prepare_int_mm))
INT_MM_CUDA = Kernel("torch._int_mm on CUDA", in_steps(operations.round_signed, operations.prepare_int_mm_cuda))
FLOAT32 = Kernel("float32", in_steps(operations.round_signed, operations.prepare_float32))
CANDIDATES: dict[str, tuple[Kernel, ...]] = {
    "cpu": (COMPILED_AMX, COMPILED_VNNI, ONEDNN_ROWS, ONEDNN, COMPILED_AVX2, INT_MM),
    "cuda": (INT_MM_CUDA,),
}
"""By kind of device, what may be there, fastest first."""
