"""A teacher's projections in the precision of mixed-precision training, cast once instead of in each step."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_compress.formats.packed import version


class _Cast(NamedTuple):
    """A weight, its version by then, and the same in another precision."""

    weight: nn.Parameter
    version: tuple[int, int]
    cast: nn.Parameter


class CastWeights:
    """The weights of a model's projections, in the dtype to which autocast brings them.

    Autocast casts the weights of projections wherever they are used, to the same numbers in every step. A weight that
    changed, or was replaced, is cast again. What other modules read too, such as tied embeddings, is left alone.

    Args:
        model (`nn.Module`): A model in evaluation. It holds its own weights again after each use.
    """

    def __init__(self, model: nn.Module) -> None:
        users = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
        self._places = [
            (module._parameters, name)
            for module in model.modules()
            if type(module) in (nn.Linear, Conv1D)
            for name, weight in module._parameters.items()
            if type(weight) is nn.Parameter and users[id(weight)] == 1 and not weight.is_meta
        ]
        self._casts: list[_Cast | None] = [None] * len(self._places)

    @contextmanager
    def in_place(self, device_type: str) -> Iterator[None]:
        """Has the model compute with them until the block ends, if autocast is on.

        Args:
            device_type (`str`): Where the model is.
        """
        if not torch.is_autocast_enabled(device_type):
            yield
            return
        dtype = torch.get_autocast_dtype(device_type)
        held = [place[name] for place, name in self._places]
        try:
            for number, ((place, name), weight) in enumerate(zip(self._places, held, strict=True)):
                if weight.dtype is torch.float32:
                    place[name] = self._cast(number, weight, dtype)
            yield
        finally:
            for (place, name), weight in zip(self._places, held, strict=True):
                place[name] = weight

    def _cast(self, number: int, weight: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
        known = self._casts[number]
        if (
            known is None
            or known.weight is not weight
            or known.cast.dtype is not dtype
            or known.version != version(weight)
        ):
            cast = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
            known = self._casts[number] = _Cast(weight, version(weight), cast)
        return known.cast
