"""What all modules of a number format have in common."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import nn


def version(tensor: torch.Tensor) -> tuple[int, int]:
    """Tells whether a tensor was changed since something was made of it, as long as it is the same object.

    Args:
        tensor (`torch.Tensor`): Any.

    Returns:
        `tuple[int, int]`: Where it is stored, and how often it was changed; those made in inference mode do not count
        that.
    """
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


class PackedModule(nn.Module, ABC):
    """A module whose weight is stored in a number format of its own: the base of `PackedLinear` and `PackedEmbedding`.

    Its packed numbers are one buffer called `weight`, of dtype `torch.int8`: Transformers' own code asks the weights
    of some modules for their dtype, and knows this one. The buffer has three dimensions, so that a program without the
    plug-in refuses its shape instead of taking its integers for weights. Scales and the like are buffers in float32,
    which no cast of the model reaches.

    Attributes:
        fields (`dict[str, Any]`): What config.json says of this module beside its sizes, as plain JSON types.
    """

    format: ClassVar[str]
    """Name of the format in config.json."""

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        self.check_fields(fields)
        self.fields = fields

    @staticmethod
    @abstractmethod
    def check_fields(fields: Mapping[str, Any]) -> None:
        """Raises a `ValueError` if the fields are not complete, of their types and in range: they come from a file."""

    @abstractmethod
    def dequantize(self) -> torch.Tensor:
        """The numbers that the weight stands for.

        Returns:
            `torch.Tensor`: In float32, of shape (outputs, inputs), for an embedding (tokens, channels).
        """

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        exact = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            after = self._buffers[name]
            if after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self


class PackedLinear(PackedModule):
    """A projection in a number format; takes the place of `nn.Linear` and `Conv1D`.

    Args:
        in_features (`int`): Inputs.
        out_features (`int`): Outputs.
        bias (`bool`): Whether there is one, in floating point.
        device (`torch.device`, *optional*): Of all tensors; `"meta"` in a skeleton.
        dtype (`torch.dtype`, *optional*): Of the bias.
        **fields: As in config.json.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **fields: Any,
    ) -> None:
        super().__init__(**fields)
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None

    @classmethod
    @abstractmethod
    def from_float(cls, weight: torch.Tensor, bias: torch.Tensor | None, **fields: Any) -> Self:
        """Rounds a projection to the format.

        Args:
            weight (`torch.Tensor`): Of shape (outputs, inputs), finite.
            bias (`torch.Tensor`, *optional*): Of shape (outputs,).
            **fields: As in config.json.

        Returns:
            `PackedLinear`: On the same device; the arguments are not changed.

        Raises:
            ValueError: if the fields are unknown or out of range.
        """

    def extra_repr(self) -> str:
        """Sizes and fields, for `print(model)`."""
        fields = "".join(f", {name}={value}" for name, value in self.fields.items())
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}{fields}"
        )


class PackedEmbedding(PackedModule):
    """A table of embeddings in a number format; takes the place of `nn.Embedding`.

    Args:
        num_embeddings (`int`): Rows.
        embedding_dim (`int`): Channels.
        padding_idx (`int`, *optional*): As in `nn.Embedding`.
        device (`torch.device`, *optional*): Of all tensors; `"meta"` in a skeleton.
        dtype (`torch.dtype`, *optional*): Of what is looked up; by default that of new tensors.
        **fields: As in config.json.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **fields: Any,
    ) -> None:
        super().__init__(**fields)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        # An empty tensor, because a cast of the model is to change what is looked up, and reaches tensors alone.
        self.register_buffer("_like", torch.empty(0, device=device, dtype=dtype), persistent=False)

    @classmethod
    @abstractmethod
    def from_float(cls, weight: torch.Tensor, padding_idx: int | None, **fields: Any) -> Self:
        """Rounds a table to the format.

        Args:
            weight (`torch.Tensor`): Of shape (rows, channels), finite.
            padding_idx (`int`, *optional*): As in `nn.Embedding`.
            **fields: As in config.json.

        Returns:
            `PackedEmbedding`: On the same device.

        Raises:
            ValueError: if the fields are unknown or out of range.
        """

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        like = fn(self._like)
        super()._apply(fn, recurse)
        self._like = like
        return self

    def extra_repr(self) -> str:
        """Sizes and fields, for `print(model)`."""
        fields = "".join(f", {name}={value}" for name, value in self.fields.items())
        return f"{self.num_embeddings}, {self.embedding_dim}{fields}"
