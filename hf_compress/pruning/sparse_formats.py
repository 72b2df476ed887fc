"""Layouts of a weight with zeros, and how inputs are multiplied by it: functions of tensors, for inference only.

A packer takes a weight of shape (outputs, inputs) and returns a function of inputs, of shape (tokens, inputs), and of
a bias or `None`, whose result has shape (tokens, outputs). All of them compute `inputs @ weight.T + bias`, with sums
in another order than the dense product.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
from torch.nn import functional

from hf_compress.pruning.masks import true_share

SparseFormat = Literal["csr", "bsr", "row_groups", "sliced", "semi_structured"]
Multiply = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]

# Rows and columns of square blocks.
BLOCK_SIZES = (64, 32, 16, 8, 4, 2)
# Rows that share their inputs. Products of fewer rows are slow: they are taken only where no larger number divides.
GROUP_SIZES = (64, 32, 16, 8)
SMALL_GROUP_SIZES = (4, 2, 1)
# Triton's kernels need at least so much.
TRITON_BLOCK = 16
# More is stored than needed where that makes larger blocks: they are so much faster.
WASTE = 1.25
# Gathered inputs of several groups are multiplied in one call as long as they stay in a core's cache.
GATHERED_BYTES = 1 << 20


def pack_csr(weight: torch.Tensor) -> Multiply:
    """Single weights, row after row, each with its column.

    Args:
        weight (`torch.Tensor`): Shape (outputs, inputs).

    Returns:
        `Callable`: See the top of this file.
    """
    with _no_beta_warning():
        return partial(_multiply_compressed, weight.to_sparse_csr())


def pack_bsr(weight: torch.Tensor) -> Multiply:
    """Square blocks, row after row, each with its column.

    Args:
        weight (`torch.Tensor`): Shape (outputs, inputs), both divisible by a size of `BLOCK_SIZES`.

    Returns:
        `Callable`: See the top of this file.
    """
    size = best_block(weight)
    with _no_beta_warning():
        packed = weight.contiguous().to_sparse_bsr((size, size))
    return partial(_multiply_padded if weight.is_cuda else _multiply_compressed, packed)


def pack_row_groups(weight: torch.Tensor) -> Multiply:
    """Groups of neighbouring rows, each a small dense matrix of the columns that one of its rows needs.

    Args:
        weight (`torch.Tensor`): Shape (outputs, inputs).

    Returns:
        `Callable`: See the top of this file.
    """
    groups = weight.unflatten(0, (-1, best_group(weight)))
    is_live = (groups != 0).any(1)
    # All groups get as many columns as the one with the most: of the others, some are multiplied by zeros.
    n_columns = max(1, int(is_live.sum(1).max()))
    columns = is_live.int().argsort(dim=1, descending=True, stable=True)[:, :n_columns].contiguous()
    values = groups.gather(2, columns[:, None].expand(-1, groups.shape[1], -1))
    return partial(_multiply_row_groups, columns, values)


def pack_sliced(weight: torch.Tensor) -> Multiply:
    """What is left of the dense weight without the rows and columns that are 0 as a whole.

    Args:
        weight (`torch.Tensor`): Shape (outputs, inputs).

    Returns:
        `Callable`: See the top of this file.
    """
    rows, columns = ((weight != 0).any(axis).nonzero().flatten() for axis in (1, 0))
    kept = weight.index_select(0, rows).index_select(1, columns)
    all_rows, all_columns = len(rows) == weight.shape[0], len(columns) == weight.shape[1]
    n_outputs = weight.shape[0]
    return partial(_multiply_sliced, kept, None if all_rows else rows, None if all_columns else columns, n_outputs)


def pack_semi_structured(weight: torch.Tensor) -> Multiply:
    """Two of each four weights side by side, for the sparse tensor cores of NVIDIA GPUs.

    Args:
        weight (`torch.Tensor`): Shape (outputs, inputs), on a GPU, with at most two of each four weights not 0.

    Returns:
        `Callable`: See the top of this file.
    """
    with _no_beta_warning():
        packed = torch.sparse.to_sparse_semi_structured(weight.contiguous())
    return lambda inputs, bias: functional.linear(inputs, packed, bias)


PACKERS: dict[SparseFormat, Callable[[torch.Tensor], Multiply]] = {
    "csr": pack_csr,
    "bsr": pack_bsr,
    "row_groups": pack_row_groups,
    "sliced": pack_sliced,
    "semi_structured": pack_semi_structured,
}


def why_not(name: SparseFormat, weight: torch.Tensor) -> str | None:
    """Why a format cannot hold a weight where it is.

    Args:
        name (`str`): A format.
        weight (`torch.Tensor`): Shape (outputs, inputs).

    Returns:
        `str` or `None`: The reason, the end of a sentence; `None` where it can.
    """
    if name in ("csr", "bsr") and weight.device.type == "cpu":
        if weight.dtype not in (torch.float32, torch.float64):
            return f"PyTorch multiplies it on a CPU in float32 and float64 only, and the weight is {weight.dtype}"
        if not torch.backends.mkl.is_available():
            return "PyTorch multiplies it on a CPU with MKL only, and this build has none"
    if name == "bsr" and weight.is_cuda and weight.dtype not in (torch.float16, torch.bfloat16):
        return f"Triton multiplies it in float16 and bfloat16, else with TF32, and the weight is {weight.dtype}"
    if name == "bsr" and not block_sizes(weight):
        least = TRITON_BLOCK if weight.is_cuda else BLOCK_SIZES[-1]
        return (
            f"square blocks of at least {least} x {least} do not divide {weight.shape[0]} x {weight.shape[1]} weights"
        )
    return _why_not_semi_structured(weight) if name == "semi_structured" else None


def _why_not_semi_structured(weight: torch.Tensor) -> str | None:
    if not weight.is_cuda or torch.version.hip is not None:
        return f"only NVIDIA GPUs multiply by it, and the weight is on {weight.device}"
    if not torch.backends.cusparselt.is_available():
        return "this build of PyTorch has no cuSPARSELt"
    if torch.cuda.get_device_capability(weight.device) < (8, 0):
        return f"{torch.cuda.get_device_name(weight.device)} has no sparse tensor cores: that takes Ampere or later"
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 or bfloat16, and the weight is {weight.dtype}"
    if any(width % 16 for width in weight.shape):
        return f"{weight.shape[0]} outputs or {weight.shape[1]} inputs are not divisible by 16"
    if not is_two_of_four(weight):
        return "more than two of four weights side by side are not 0: prune with pattern='2:4'"
    return None


def is_two_of_four(weight: torch.Tensor) -> bool:
    """Whether at most two of each four weights side by side are not 0.

    Args:
        weight (`torch.Tensor`): Shape (outputs, inputs).
    """
    return weight.shape[1] % 4 == 0 and bool(((weight != 0).unflatten(1, (-1, 4)).sum(2) <= 2).all())


def block_sizes(weight: torch.Tensor) -> list[int]:
    """The sizes of square blocks that divide a weight and that its device has kernels for, from large to small.

    Args:
        weight (`torch.Tensor`): Shape (outputs, inputs).
    """
    least = TRITON_BLOCK if weight.is_cuda else 1
    return [size for size in BLOCK_SIZES if size >= least and not any(width % size for width in weight.shape)]


def best_block(weight: torch.Tensor) -> int:
    """The largest size of square blocks that stores at most `WASTE` times as much as the best one.

    Args:
        weight (`torch.Tensor`): Shape (outputs, inputs).
    """
    return _largest({size: block_share(weight, size, size) for size in block_sizes(weight)})


def best_group(weight: torch.Tensor) -> int:
    """The largest number of rows for which groups store at most `WASTE` times as much as with the best one.

    Args:
        weight (`torch.Tensor`): Shape (outputs, inputs).
    """
    shares = {size: block_share(weight, size, 1) for size in GROUP_SIZES if weight.shape[0] % size == 0}
    return _largest(shares) if shares else next(size for size in SMALL_GROUP_SIZES if weight.shape[0] % size == 0)


def block_share(weight: torch.Tensor, rows: int, columns: int) -> float:
    """The share of blocks that are not 0.

    Args:
        weight (`torch.Tensor`): Shape (outputs, inputs).
        rows (`int`): Of a block, a divisor of the outputs.
        columns (`int`): Of a block, a divisor of the inputs.
    """
    blocks = (weight != 0).unflatten(0, (-1, rows)).unflatten(2, (-1, columns))
    return true_share(blocks.any(3).any(1))


@contextmanager
def _no_beta_warning() -> Iterator[None]:
    # PyTorch calls these layouts beta or prototypes, which is of no use to whoever runs the model.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(beta state|prototype stage)", category=UserWarning)
        yield


def _largest(shares: dict[int, float]) -> int:
    return max(size for size, share in shares.items() if share <= WASTE * min(shares.values()))


def _multiply_compressed(packed: torch.Tensor, inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    # The sparse factor has to come first: the other order is several times slower.
    return _transposed(packed @ inputs.T, bias)


def _multiply_padded(packed: torch.Tensor, inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    # Triton's kernel takes whole tiles of tokens.
    n_tokens, size = len(inputs), packed.values().shape[-1]
    padded = functional.pad(inputs, (0, 0, 0, -n_tokens % size))
    return _transposed((packed @ padded.T)[:, :n_tokens], bias)


def _transposed(outputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    result = outputs.new_empty(outputs.shape[::-1])
    return result.copy_(outputs.T) if bias is None else torch.add(outputs.T, bias, out=result)


def _multiply_row_groups(
    columns: torch.Tensor, values: torch.Tensor, inputs: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    (n_groups, n_rows, n_columns), n_tokens = values.shape, len(inputs)
    # A gathered column is then one stretch of memory.
    by_column = inputs.T.contiguous()
    outputs = inputs.new_empty(n_tokens, n_groups * n_rows)
    by_group = outputs.view(n_tokens, n_groups, n_rows).transpose(0, 1)
    step = max(1, GATHERED_BYTES // max(1, n_columns * n_tokens * inputs.element_size()))
    for start in range(0, n_groups, step):
        part = slice(start, start + step)
        gathered = by_column.index_select(0, columns[part].flatten()).view(-1, n_columns, n_tokens)
        torch.bmm(gathered.transpose(1, 2), values[part].transpose(1, 2), out=by_group[part])
    return outputs if bias is None else outputs.add_(bias)


def _multiply_sliced(
    kept: torch.Tensor,
    rows: torch.Tensor | None,
    columns: torch.Tensor | None,
    n_outputs: int,
    inputs: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    inputs = inputs if columns is None else inputs.index_select(1, columns)
    if rows is None:
        return functional.linear(inputs, kept, bias)
    outputs = inputs.new_zeros(len(inputs), n_outputs)
    outputs.index_copy_(1, rows, inputs @ kept.T)
    return outputs if bias is None else outputs.add_(bias)
