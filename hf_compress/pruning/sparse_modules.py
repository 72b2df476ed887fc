"""Projections that compute with a sparse layout of their weight, which stays the dense parameter that it was."""

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_compress.formats.packed import version
from hf_compress.modeling.projections import out_width, read_matrix
from hf_compress.pruning.sparse_formats import PACKERS, SparseFormat, why_not

# Numbers of a weight that are looked at before each product.
_N_SEEN = 64


class _Sparse(nn.Module):
    """What both kinds of projections share; `sparse_format` says which layout.

    The packed copy belongs to one state of the weight. Once that has changed, it is packed anew: results are right
    also after `load_state_dict`, `.to(...)`, a copy, more pruning or, on a CPU, merged adapters. Writes of single
    numbers through `.data` may not be seen.
    """

    sparse_format: SparseFormat

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and (inputs.requires_grad or self.weight.requires_grad):
            raise RuntimeError(
                f"A projection in the sparse format {self.sparse_format!r} has no gradient: call the model under "
                "torch.inference_mode() or torch.no_grad(), or call use_dense_kernels_(model) before it is trained."
            )
        if inputs.dtype != self.weight.dtype or torch.is_autocast_enabled(inputs.device.type):
            raise RuntimeError(
                f"A projection in the sparse format {self.sparse_format!r} has weights of {self.weight.dtype} and got "
                f"{inputs.dtype}, or runs under autocast, which does not know it: load the model in the dtype that is "
                "wanted and leave out autocast, or call use_dense_kernels_(model)."
            )
        outputs = self._multiply()(inputs.reshape(-1, inputs.shape[-1]), self.bias)
        return outputs.reshape(*inputs.shape[:-1], out_width(self))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, sparse_format={self.sparse_format!r}".removeprefix(", ")

    def __getstate__(self) -> dict[str, Any]:
        # A copy packs its own weight.
        return {name: value for name, value in vars(self).items() if name != "_packed"}

    def forget_packed_(self) -> None:
        """Gives back the memory of the packed weight, until the next product."""
        vars(self).pop("_packed", None)

    def _multiply(self) -> Any:
        state = _state(self.weight)
        packed = vars(self).get("_packed")
        if packed is None or packed[0] != state:
            matrix = read_matrix(self)
            reason = why_not(self.sparse_format, matrix)
            if reason:
                raise RuntimeError(
                    f"The weight has changed and no longer fits sparse_compute={self.sparse_format!r}: {reason}. Call "
                    "use_sparse_kernels_ again, or use_dense_kernels_."
                )
            packed = self._packed = state, PACKERS[self.sparse_format](matrix)
        return packed[1]


class SparseLinear(_Sparse, nn.Linear):
    """An `nn.Linear` that computes with a sparse layout of its weight; for inference."""


class SparseConv1D(_Sparse, Conv1D):
    """A `Conv1D` that computes with a sparse layout of its weight; for inference."""


_SPARSE: dict[type, type] = {nn.Linear: SparseLinear, Conv1D: SparseConv1D}
_DENSE = {sparse: dense for dense, sparse in _SPARSE.items()}


def can_be_sparse(module: nn.Module) -> bool:
    """Whether a projection is a plain one, without another forward than its own.

    Args:
        module (`nn.Module`): A projection.
    """
    # A hook of accelerate is a forward of the module's own, which another class does not change.
    return "forward" not in vars(module) and (type(module) in _SPARSE or type(module) in _DENSE)


def make_sparse_(module: nn.Module, name: SparseFormat) -> None:
    """Has a projection compute with a sparse layout; its parameters, hooks and identity stay.

    Args:
        module (`nn.Module`): Of a kind that `can_be_sparse`.
        name (`str`): A format that can hold the weight.
    """
    make_dense_(module)
    module.__class__ = _SPARSE[type(module)]
    module.sparse_format = name


def make_dense_(module: nn.Module) -> None:
    """Has a projection compute with its dense weight again, and frees the packed copy.

    Args:
        module (`nn.Module`): Any; what is not sparse stays as it is.
    """
    if type(module) in _DENSE:
        module.__class__ = _DENSE[type(module)]
        vars(module).pop("_packed", None)
        del module.sparse_format


def _state(weight: torch.Tensor) -> tuple[Any, ...]:
    # Adapters are merged past the version; some numbers show that, and cost a wait on other devices.
    step = max(1, weight.numel() // _N_SEEN)
    seen = tuple(weight.detach().flatten()[::step].tolist()) if weight.device.type == "cpu" else None
    return version(weight), weight.dtype, weight.device, seen
