"""Which kernel is the fastest, by times, and what a model computes with: figures, no model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class LayerKernel:
    """What one projection computes with.

    Attributes:
        layer (`str`): Dotted name.
        shape (`tuple[int, int]`): Outputs and inputs.
        sparsity (`float`): Share of its weights that are 0.
        chosen (`str`): `"dense"` or a sparse format.
        n_tokens (`int` or `None`): Inputs that it was timed with; `None` where it was not.
        times (`dict[str, float]`): Median milliseconds by format, `"dense"` first; empty where it was not timed.
    """

    layer: str
    shape: tuple[int, int]
    sparsity: float
    chosen: str
    n_tokens: int | None
    times: dict[str, float]


@dataclass(frozen=True)
class KernelReport:
    """What a model computes with, and under what that was measured.

    Attributes:
        layers (`list[LayerKernel]`): In the order of the blocks.
        times (`dict[str, float]`): Median milliseconds of a forward pass of the whole model, `"dense"` and
            `"sparse"`; empty where nothing was timed.
        device (`str`): For example `"cpu"`.
        threads (`int`): Threads of PyTorch's kernels on the CPU.
        dtype (`str`): Of the model's weights.
        n_runs (`int`): Rounds on the clock; times are medians.
        torch_version (`str`): Version of PyTorch.
    """

    layers: list[LayerKernel]
    times: dict[str, float]
    device: str
    threads: int
    dtype: str
    n_runs: int
    torch_version: str

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON types."""
        return asdict(self) | {"layers": [asdict(layer) | {"shape": list(layer.shape)} for layer in self.layers]}

    def describe(self) -> str:
        """A table: layer, shape, sparsity, format, milliseconds dense and as chosen."""
        rows = [("layer", "shape", "zeros", "format", "dense ms", "chosen ms")]
        for layer in self.layers:
            times = [f"{layer.times[name]:.3f}" if layer.times else "-" for name in ("dense", layer.chosen)]
            shape = f"{layer.shape[0]} x {layer.shape[1]}"
            rows.append((layer.layer, shape, f"{100 * layer.sparsity:.1f} %", layer.chosen, *times))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        if self.times:
            lines.append(f"whole model: {self.times['dense']:.2f} ms dense, {self.times['sparse']:.2f} ms sparse")
        lines.append(f"{self.dtype} on {self.device}, {self.threads} threads, PyTorch {self.torch_version}")
        return "\n".join(lines)


def choose(times: Mapping[str, Sequence[float]], margin: float = 0.05) -> str:
    """The format with the shortest median that is clearly shorter than that of the dense product.

    Clearly: by more than a share of the dense median, and twice the standard error of the difference of both medians,
    1.253 s / sqrt(n) each, where s is the distance between the quartiles over 1.349 (both as for normal noise).

    Args:
        times (`Mapping[str, Sequence[float]]`): Times of each format, in any unit, taken in turn; `"dense"` is one.
        margin (`float`, *optional*, defaults to 0.05): Least gain, as a share of the dense median.

    Returns:
        `str`: A key, `"dense"` where no other is clearly faster.

    Raises:
        ValueError: if there is no `"dense"`.
    """
    if "dense" not in times:
        raise ValueError(f"Of the formats {list(times)}, none is 'dense', beside which the others count: time it too.")
    medians = {name: float(np.median(values)) for name, values in times.items()}
    for name in sorted(medians, key=medians.__getitem__):
        noise = 2 * math.hypot(_standard_error(times[name]), _standard_error(times["dense"]))
        if name == "dense" or medians[name] + noise < (1 - margin) * medians["dense"]:
            return name
    raise AssertionError("dense is always a choice")


def _standard_error(values: Sequence[float]) -> float:
    low, high = np.quantile(values, [0.25, 0.75])
    return float(1.253 * (high - low) / 1.349 / math.sqrt(len(values)))
