"""Batches that are padded in less time."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import DataCollatorWithPadding


def quick_collator(collator: Callable) -> Callable:
    """A collator of equal batches that takes less time, where there is one.

    Args:
        collator (`Callable`): Any.

    Returns:
        `Callable`: `ThroughNumpy` in place of Transformers' own `DataCollatorWithPadding`, else the same collator.
    """
    is_known = type(collator) is DataCollatorWithPadding and collator.return_tensors == "pt"
    return ThroughNumpy(collator) if is_known else collator


class ThroughNumpy:
    """`DataCollatorWithPadding`, whose lists of numbers become tensors by way of NumPy, which reads them faster.

    With a small student on a GPU, padding 32 texts is a tenth of a step.

    Args:
        collator (`DataCollatorWithPadding`): Pads rows.
    """

    def __init__(self, collator: DataCollatorWithPadding) -> None:
        self.collator = collator
        self._to_arrays = replace(collator, return_tensors="np")

    def __call__(self, rows: list[dict[str, Any]]) -> Mapping[str, torch.Tensor]:
        # What is no plain number has a dtype of its own, which PyTorch would keep.
        if all(type(_first_number(value)) in (int, float, bool) for value in rows[0].values()):
            batch = self._to_arrays(rows)
            if all(array.dtype in (np.int64, np.float64, np.bool_) for array in batch.values()):
                for name, array in batch.items():
                    tensor = torch.from_numpy(array)
                    batch[name] = tensor.to(torch.get_default_dtype()) if tensor.is_floating_point() else tensor
                return batch
        return self.collator(rows)


def _first_number(value: Any) -> Any:
    while isinstance(value, list) and value:
        value = value[0]
    return value
