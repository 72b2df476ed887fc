"""How long forward passes take, and under which conditions that was measured."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from hf_compress.evaluation.inference import inference, model_inputs
from hf_compress.modeling.tasks import count_rows, unwrap
from hf_compress.modeling.timing import processor_name, wait_for


@dataclass(frozen=True)
class Conditions:
    """Under what a time was measured: a figure without these means nothing.

    Attributes:
        device (`str`): For example `"cpu"` or `"cuda:0"`.
        processor (`str`): Name of the GPU; of a CPU its architecture and the instructions that PyTorch uses.
        threads (`int`): Threads of PyTorch's kernels on the CPU.
        batch_size (`int`): Examples per forward.
        sequence_length (`int` or `None`): Tokens per example with padding; `None` for images.
        n_warmup (`int`): Forwards per model before the clock starts.
        n_runs (`int`): Forwards per model on the clock.
        torch_version (`str`): Version of PyTorch.
        transformers_version (`str`): Version of Transformers.
    """

    device: str
    processor: str
    threads: int
    batch_size: int
    sequence_length: int | None
    n_warmup: int
    n_runs: int
    torch_version: str
    transformers_version: str


@dataclass(frozen=True)
class Latency:
    """Times of one model.

    Attributes:
        median_s (`float`): Median time of a forward in seconds.
        p95_s (`float`): 95th percentile in seconds.
        examples_per_s (`float`): Batch size divided by the median.
        dtype (`str`): Dtype of the model's floating-point weights, for example `"float32"`.
    """

    median_s: float
    p95_s: float
    examples_per_s: float
    dtype: str


@dataclass(frozen=True)
class LatencyComparison:
    """Times of several models whose forwards were interleaved.

    Attributes:
        latency (`dict[str, Latency]`): By name, in the given order.
        ratio (`dict[str, float]`): Median of each model divided by the median of the first: 0.5 is twice as fast.
        conditions (`Conditions`): What they share.
    """

    latency: dict[str, Latency]
    ratio: dict[str, float]
    conditions: Conditions

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON types."""
        return asdict(self)


def compare_latency(
    models: Mapping[str, nn.Module], batch: Mapping[str, torch.Tensor], *, n_warmup: int = 3, n_runs: int = 20
) -> LatencyComparison:
    """Times several models on one batch, one forward of each in turn: A B C, A B C, ...

    In turn, because whatever slows the machine for a while then slows all of them. Each model gets the columns of
    the batch that it takes; training flags are left as they were.

    Args:
        models (`Mapping[str, nn.Module]`): Transformers models on one device, by name; ratios refer to the first.
        batch (`Mapping[str, torch.Tensor]`): Inputs, for example `(batch, tokens)`.
        n_warmup (`int`, *optional*, defaults to `3`): Forwards of each before the clock starts.
        n_runs (`int`, *optional*, defaults to `20`): Forwards of each on the clock.

    Returns:
        `LatencyComparison`: Medians, 95th percentiles, ratios and conditions.

    Raises:
        ValueError: if there is no model or no run, or the models are on different devices.
    """
    devices = {name: unwrap(model).device for name, model in models.items()}
    if len(set(devices.values())) != 1 or n_runs < 1:
        raise ValueError(
            f"Models on { ({name: str(device) for name, device in devices.items()}) } with n_runs={n_runs} cannot be "
            "compared. Give at least one model and one run, and move all models to one device with `.to(device)`."
        )
    device = next(iter(devices.values()))
    inputs = {name: model_inputs(model, batch) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    with inference(*models.values()):
        for run in range(n_warmup + n_runs):
            for name, model in models.items():
                elapsed = _time_forward(model, inputs[name], device)
                if run >= n_warmup:
                    times[name].append(elapsed)
    conditions = conditions_of(device, batch, n_warmup=n_warmup, n_runs=n_runs)
    latency = {name: _summarise(times[name], models[name], conditions.batch_size) for name in models}
    reference = next(iter(latency.values())).median_s
    return LatencyComparison(latency, {name: x.median_s / reference for name, x in latency.items()}, conditions)


def conditions_of(
    device: torch.device, batch: Mapping[str, torch.Tensor], *, n_warmup: int, n_runs: int
) -> Conditions:
    """The facts of a measurement.

    Args:
        device (`torch.device`): Where the models are.
        batch (`Mapping[str, torch.Tensor]`): Its main input tells the batch size, `input_ids` the length.
        n_warmup (`int`): Forwards before the clock starts.
        n_runs (`int`): Forwards on the clock.

    Returns:
        `Conditions`: Device, processor, threads, sizes and versions.
    """
    return Conditions(
        device=str(device),
        processor=processor_name(device),
        threads=torch.get_num_threads(),
        batch_size=count_rows(batch),
        sequence_length=batch["input_ids"].shape[1] if "input_ids" in batch else None,
        n_warmup=n_warmup,
        n_runs=n_runs,
        torch_version=str(torch.__version__),
        transformers_version=transformers.__version__,
    )


def _time_forward(model: nn.Module, inputs: Mapping[str, torch.Tensor], device: torch.device) -> float:
    wait_for(device)
    start = time.perf_counter()
    model(**inputs)
    wait_for(device)
    return time.perf_counter() - start


def _summarise(times: list[float], model: nn.Module, batch_size: int) -> Latency:
    median, p95 = (float(x) for x in np.quantile(times, [0.5, 0.95]))
    return Latency(median, p95, batch_size / median, str(unwrap(model).dtype).removeprefix("torch."))
