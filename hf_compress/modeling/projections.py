"""Cutting one tensor or one projection: the only code that knows how `nn.Linear` and `Conv1D` differ."""

import operator
from collections import Counter
from collections.abc import Iterable

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


def in_width(projection: nn.Module) -> int:
    """Number of inputs of an `nn.Linear`, a `Conv1D`, or a module in a number format that stands for one."""
    return projection.nx if isinstance(projection, Conv1D) else projection.in_features


def out_width(projection: nn.Module) -> int:
    """Number of outputs of an `nn.Linear`, a `Conv1D`, or a module in a number format that stands for one."""
    return projection.nf if isinstance(projection, Conv1D) else projection.out_features


def read_matrix(projection: nn.Module) -> torch.Tensor:
    """The weights of an `nn.Linear` or `Conv1D` as a matrix of shape (outputs, inputs), a view without gradient."""
    return oriented(projection, projection.weight.detach())


def oriented(projection: nn.Module, matrix: torch.Tensor) -> torch.Tensor:
    """A view of a matrix of shape (outputs, inputs) that is laid out as the projection's weight is; or back."""
    return matrix if _in_axis(projection) == 1 else matrix.T


def write_matrix_(projection: nn.Module, matrix: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """Overwrites the weights, and the bias where one is given, of an `nn.Linear` or `Conv1D`.

    Args:
        projection (`nn.Module`): The module; its parameters keep their dtype, device and identity.
        matrix (`torch.Tensor`): Shape (outputs, inputs), of any floating-point dtype.
        bias (`torch.Tensor`, *optional*): Shape (outputs,).
    """
    with torch.no_grad():
        projection.weight.copy_(oriented(projection, matrix))
        if bias is not None:
            projection.bias.copy_(bias)


def keep_inputs_(projection: nn.Module, indices: list[int]) -> None:
    """Keep some inputs of a projection.

    Args:
        projection (`nn.Module`): An `nn.Linear`, weight (out, in), or `Conv1D`, weight (in, out).
        indices (`list[int]`): Inputs to keep, in their new order.

    Raises:
        TypeError: if the module is of another kind, or its weight is packed.
    """
    axis = _in_axis(projection)
    projection.weight = keep(projection.weight, indices, axis)
    if isinstance(projection, Conv1D):
        projection.nx = len(indices)
    else:
        projection.in_features = len(indices)


def as_conv1d(linear: nn.Linear) -> Conv1D:
    """The `Conv1D` that computes what an `nn.Linear` does, with the same bias."""
    with torch.device("meta"):
        projection = Conv1D(linear.out_features, linear.in_features)
    projection.weight = nn.Parameter(linear.weight.detach().T.contiguous(), linear.weight.requires_grad)
    projection.bias = linear.bias
    return projection.train(linear.training)


def without_inputs(projection: nn.Module) -> nn.Linear:
    """What is left of a projection that has no inputs any more: its bias, the same parameter, or zeros.

    Args:
        projection (`nn.Module`): An `nn.Linear` or `Conv1D`.

    Returns:
        `nn.Linear`: With a weight of shape (outputs, 0), also for a `Conv1D`, which fails on inputs without features.

    Raises:
        TypeError: if the module is of another kind, or its weight is packed.
    """
    weight, n_outputs = projection.weight, out_width(projection)
    # Made on the meta device, so that no random numbers are drawn for weights that go.
    linear = nn.Linear(1, n_outputs, bias=False, device="meta")
    linear.in_features = 0
    linear.weight = nn.Parameter(weight.detach().new_empty(n_outputs, 0), weight.requires_grad)
    linear.bias = projection.bias
    return linear.train(projection.training)


def keep_outputs_(projection: nn.Module, indices: list[int]) -> None:
    """Keep some outputs of a projection, with their biases.

    Args:
        projection (`nn.Module`): An `nn.Linear`, weight (out, in), or `Conv1D`, weight (in, out).
        indices (`list[int]`): Outputs to keep, in their new order.

    Raises:
        TypeError: if the module is of another kind, or its weight is packed.
    """
    axis = 1 - _in_axis(projection)
    projection.weight = keep(projection.weight, indices, axis)
    if projection.bias is not None:
        projection.bias = keep(projection.bias, indices, 0)
    if isinstance(projection, Conv1D):
        projection.nf = len(indices)
    else:
        projection.out_features = len(indices)


def keep(tensor: torch.Tensor, indices: list[int], axis: int) -> torch.Tensor:
    """A copy of a tensor with some of its entries along one axis; a parameter stays one.

    Args:
        tensor (`torch.Tensor`): Parameter or buffer.
        indices (`list[int]`): Entries to keep, in their new order.
        axis (`int`): Along which axis.

    Returns:
        `torch.Tensor`: An `nn.Parameter` with the same `requires_grad` for a parameter, else a plain tensor.
    """
    kept = tensor.detach().index_select(axis, torch.tensor(indices, dtype=torch.long, device=tensor.device))
    return nn.Parameter(kept, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else kept


def check_indices(indices: Iterable[int], size: int, name: str, unit: str) -> list[int]:
    """Indices as a list of distinct numbers in range.

    Args:
        indices (`Iterable[int]`): What the caller gave: numbers, or a one-dimensional integer tensor.
        size (`int`): How many units there are.
        name (`str`): Name of the argument, for the message.
        unit (`str`): What is counted, in the plural, for the message.

    Returns:
        `list[int]`: The indices in the order given.

    Raises:
        ValueError: if there are none, one occurs twice, one is out of range, or there is nothing to keep.
        TypeError: if one is not an integer.
    """
    checked = [operator.index(index) for index in indices]
    if size == 0:
        raise ValueError(f"{name}={checked} cannot be kept: there are no {unit}, all were removed before.")
    if not checked:
        raise ValueError(f"{name} is empty, but at least one of the {size} {unit} must stay: name it.")
    wrong = sorted({index for index in checked if not 0 <= index < size})
    if wrong:
        raise ValueError(f"{name} has {wrong}, but there are {size} {unit}: give numbers from 0 to {size - 1}.")
    twice = sorted(index for index, count in Counter(checked).items() if count > 1)
    if twice:
        raise ValueError(f"{name} names {twice} more than once, but a unit can be kept only once: remove repetitions.")
    return checked


def spread(units: Iterable[int], size: int) -> list[int]:
    """Indices of the features of some units that are `size` features wide each.

    Args:
        units (`Iterable[int]`): Indices of units.
        size (`int`): Features per unit.

    Returns:
        `list[int]`: Indices of features, unit after unit.
    """
    return [unit * size + offset for unit in units for offset in range(size)]


def _in_axis(projection: nn.Module) -> int:
    if isinstance(projection, Conv1D):
        return 0
    weight = projection.weight
    if not isinstance(projection, nn.Linear) or weight.ndim != 2 or not weight.is_floating_point():
        raise TypeError(
            f"{type(projection).__name__} with a weight of dtype {weight.dtype} cannot be cut: only nn.Linear and "
            "Conv1D with plain weights can. Merge adapters first, and prune before quantizing."
        )
    return 1
