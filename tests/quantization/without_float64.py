"""Tensors as they are on an accelerator that has no float64."""

import torch


class WithoutFloat64(torch.Tensor):
    """Becomes a tensor like others on the CPU alone."""

    def cpu(self) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)

    def double(self) -> torch.Tensor:
        raise TypeError("There is no float64 here.")
