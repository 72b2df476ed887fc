"""How long a model takes at each width that its parts may get: a table, measured on the machine at hand.

Multiply-accumulates are not time: norms, residuals and small kernels stay whatever is cut. Every width is therefore
timed in the block that it belongs to, with the arguments that the model really gives that block.
"""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers
from sklearn.isotonic import IsotonicRegression
from torch import nn

from hf_compress.modeling.blocks import Block, find_blocks
from hf_compress.modeling.removal import can_remove
from hf_compress.modeling.tasks import count_rows, unwrap, without_cache
from hf_compress.modeling.timing import processor_name, wait_for
from hf_compress.pruning.batches import Batch, read_batches
from hf_compress.pruning.cutting import cut_
from hf_compress.pruning.sensitivity import frozen
from hf_compress.pruning.units import Site, find_sites

# Of more levels, so many are measured, and the others lie on the lines between them.
MOST_WIDTHS = 12

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, eq=False)
class LatencyTable:
    """Times in milliseconds, and under what they were measured.

    Attributes:
        levels (`dict[str, tuple[int, ...]]`): By site, numbers of units that may stay, falling.
        times (`dict[str, np.ndarray]`): By site, what it takes at each of these levels, falling too.
        total (`float`): A forward pass of the whole model.
        fixed (`float`): What of it no site accounts for, and no cut saves.
        device (`str`): For example `"cpu"` or `"cuda:0"`.
        processor (`str`): Name of the GPU; of a CPU its architecture and the instructions that PyTorch uses.
        threads (`int`): Threads of PyTorch's kernels on the CPU.
        dtype (`str`): Of the model's weights, for example `"float32"`.
        batch_size (`int`): Examples per forward.
        sequence_length (`int` or `None`): Tokens per example with padding; `None` for images.
        n_warmup (`int`): Forwards before the clock starts.
        n_runs (`int`): Forwards on the clock; times are their medians.
        torch_version (`str`): Version of PyTorch.
        transformers_version (`str`): Version of Transformers.
    """

    levels: dict[str, tuple[int, ...]]
    times: dict[str, np.ndarray]
    total: float
    fixed: float
    device: str
    processor: str
    threads: int
    dtype: str
    batch_size: int
    sequence_length: int | None
    n_warmup: int
    n_runs: int
    torch_version: str
    transformers_version: str

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON types."""
        return asdict(self) | {
            "levels": {name: list(levels) for name, levels in self.levels.items()},
            "times": {name: times.tolist() for name, times in self.times.items()},
        }

    def describe(self) -> str:
        """The conditions, the time of a forward, and how much of it can be saved, for the log."""
        shape = f"batch {self.batch_size}" + (f" x {self.sequence_length} tokens" if self.sequence_length else "")
        least = self.fixed + sum(float(times[-1]) for times in self.times.values())
        return (
            f"{self.total:.2f} ms for a forward pass, {shape}, {self.dtype}, on {self.device} ({self.processor}, "
            f"{self.threads} threads, PyTorch {self.torch_version}), median of {self.n_runs} runs; "
            f"{least:.2f} ms ({100 * least / self.total:.0f} %) are left with the least of all {len(self.times)} sites"
        )


def measure_latency_table(
    model: nn.Module,
    sites: Sequence[Site],
    levels: Mapping[Site, Sequence[int]],
    batch: Batch,
    n_warmup: int = 3,
    n_runs: int = 30,
) -> LatencyTable:
    """Times a model's blocks at the widths that their parts may get.

    Blocks with equal weights and arguments in shape are timed once. All widths of a part take turns, and the whole
    model with them, so that whatever slows the machine for a while slows all of them. Times are made monotone: a part
    that keeps more never counts as faster.

    Args:
        model (`nn.Module`): A Transformers model of a known architecture; it is not changed.
        sites (`Sequence[Site]`): What may be cut, from `find_sites`.
        levels (`Mapping[Site, Sequence[int]]`): Numbers of units that may stay, falling, all of them first; 0 where a
            part may be removed.
        batch (`dict[str, torch.Tensor]`): Inputs of the size that matters.
        n_warmup (`int`, *optional*, defaults to 3): Forwards before the clock starts.
        n_runs (`int`, *optional*, defaults to 30): Forwards on the clock.

    Returns:
        `LatencyTable`: Times and conditions.

    Raises:
        ValueError: if there is no site, levels do not fall from all units, or a part cannot be removed.
    """
    model = unwrap(model)
    allowed = _check_levels(sites, levels)
    inputs = _inputs(model, batch)
    owner = {part.name: block for block in find_blocks(model) for part in (*block.attentions, block.ffn)}
    with frozen(model), torch.inference_mode():
        calls = _record_calls(model, list(owner.values()), inputs)
        # Parts with the same key take the same time.
        keys = {
            part.name: (_shape_of(owner[part.name], calls), _role(site), tuple(_measured_widths(site, allowed[site])))
            for site in sites
            for part in site.parts
        }
        examples = {keys[part.name]: (site, owner[part.name]) for site in sites for part in site.parts}
        runs = {}
        for key, (site, block) in examples.items():
            variants = [_cut_block(model, site, width, block, inputs) for width in key[-1]]
            runs[key] = time_in_turn([partial(model, **inputs), *variants], model.device, n_warmup, n_runs)
    total = float(np.median(np.concatenate([found[:, 0] for found in runs.values()])))
    curves = {key: _smooth(key[-1], found, total) for key, found in runs.items()}
    times = {}
    for site in sites:
        of_parts = [np.interp(allowed[site], *curves[keys[part.name]]) for part in site.parts]
        times[site.name] = site.repeats * np.sum(of_parts, axis=0)
    accounted = sum(float(site_times[0]) for site_times in times.values())
    # Noise can make the parts of a tiny model seem slower than the whole.
    scale = min(1.0, total / accounted) if accounted > 0 else 1.0
    return LatencyTable(
        levels={site.name: allowed[site] for site in sites},
        times={name: scale * site_times for name, site_times in times.items()},
        total=total,
        fixed=total - scale * accounted,
        **_conditions(model, inputs),
        n_warmup=n_warmup,
        n_runs=n_runs,
    )


def predict_latency(table: LatencyTable, kept: Mapping[str, int]) -> float:
    """How long a cut model takes, by a table.

    Args:
        table (`LatencyTable`): Of the whole model.
        kept (`Mapping[str, int]`): Number of units that stay, by site; sites that are not named keep all.

    Returns:
        `float`: Milliseconds; between two levels, on the line between them.

    Raises:
        ValueError: if the table has no such site, or no level that small or large.
    """
    unknown = sorted(kept.keys() - table.times.keys())
    if unknown:
        raise ValueError(f"The table has no sites {unknown}: give some of {', '.join(table.times)}.")
    predicted = table.fixed
    for name, times in table.times.items():
        levels = table.levels[name]
        width = kept.get(name, levels[0])
        if not levels[-1] <= width <= levels[0]:
            raise ValueError(
                f"{name} cannot keep {width} units: the table was measured from {levels[0]} down to {levels[-1]}."
            )
        predicted += float(np.interp(width, levels[::-1], times[::-1]))
    return predicted


def check_prediction(
    model: nn.Module, batch: Batch, table: LatencyTable, kept: Mapping[str, int]
) -> tuple[float, float]:
    """Compares a prediction with the time that the cut model really takes.

    The cut model and the whole one take turns. What is returned as measured is their ratio times the table's total:
    whether the machine is now faster or slower than it was for the table makes no difference.

    Args:
        model (`nn.Module`): The model of the table; it is not changed.
        batch (`dict[str, torch.Tensor]`): Inputs of the size for which the table was measured.
        table (`LatencyTable`): Of the model.
        kept (`Mapping[str, int]`): Number of units that stay, by site; sites that are not named keep all.

    Returns:
        `tuple[float, float]`: Milliseconds predicted, and measured with as many runs as the table.

    Raises:
        ValueError: if the table has no such site, or no level that small or large.
    """
    model = unwrap(model)
    predicted = predict_latency(table, kept)
    inputs = _inputs(model, batch)
    with frozen(model), torch.inference_mode():
        calls = [partial(model, **inputs), partial(_cut_copy(model, kept), **inputs)]
        whole, cut = np.median(time_in_turn(calls, model.device, table.n_warmup, table.n_runs), axis=0)
    return predicted, float(table.total * cut / whole)


def time_forward(model: nn.Module, batch: Batch) -> float:
    """The median time of a forward pass, in milliseconds.

    Args:
        model (`nn.Module`): A Transformers model.
        batch (`dict[str, torch.Tensor]`): Inputs.
    """
    inputs = _inputs(model, batch)
    with frozen(model), torch.inference_mode():
        return float(np.median(time_in_turn([partial(model, **inputs)], model.device, n_warmup=3, n_runs=30)))


def time_in_turn(calls: Sequence[Callable[[], Any]], device: torch.device, n_warmup: int, n_runs: int) -> np.ndarray:
    """Times several functions, one call of each in turn: A B C, A B C, ...

    Args:
        calls (`Sequence[Callable]`): Functions without arguments.
        device (`torch.device`): Where they compute.
        n_warmup (`int`): Rounds before the clock starts.
        n_runs (`int`): Rounds on the clock.

    Returns:
        `np.ndarray`: Milliseconds, shape (n_runs, functions).
    """
    times = np.empty((n_warmup + n_runs, len(calls)))
    for run in times:
        for index, call in enumerate(calls):
            wait_for(device)
            start = time.perf_counter()
            call()
            wait_for(device)
            run[index] = 1000 * (time.perf_counter() - start)
    return times[n_warmup:]


def _check_levels(sites: Sequence[Site], levels: Mapping[Site, Sequence[int]]) -> dict[Site, tuple[int, ...]]:
    if not sites:
        raise ValueError("There is no site to measure: give what find_sites returns for the blocks of the model.")
    checked = {}
    for site in sites:
        widths = tuple(int(width) for width in levels.get(site, ()))
        is_falling = all(wide > narrow for wide, narrow in zip(widths, widths[1:], strict=False))
        if not widths or widths[0] != site.n_units or widths[-1] < 0 or not is_falling:
            raise ValueError(
                f"The levels {list(widths)} of {site.name} do not fall from all its units to fewer: start with "
                f"{site.n_units}, and end with 0 or more."
            )
        if widths[-1] == 0 and not _can_remove(site):
            raise ValueError(f"{site.name} cannot be removed as a whole: let its levels end with 1 or more, not 0.")
        checked[site] = widths
    return checked


def _can_remove(site: Site) -> bool:
    return all(can_remove(part) for part in site.parts)


def _role(site: Site) -> str:
    return site.name.split(".")[-1]


def _measured_widths(site: Site, levels: Sequence[int]) -> list[int]:
    """Some of the levels, rising, and below them what tells the time of the block without the part."""
    chosen = np.linspace(0, len(levels) - 1, MOST_WIDTHS).round().astype(int)
    return sorted({levels[index] for index in chosen} | {0 if _can_remove(site) else 1})


def _inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    (inputs,) = read_batches(model, [batch])
    return without_cache(model, inputs)


def _record_calls(model: nn.Module, blocks: Sequence[Block], inputs: Mapping[str, Any]) -> dict[str, Call]:
    """The arguments with which some blocks are called, by name; those of the first call where there are several."""
    calls: dict[str, Call] = {}
    hooks = [
        block.module.register_forward_pre_hook(
            lambda _, args, kwargs, name=block.name: calls.setdefault(name, (args, kwargs)) and None, with_kwargs=True
        )
        for block in blocks
    ]
    try:
        model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _shape_of(block: Block, calls: Mapping[str, Call]) -> tuple[Any, ...]:
    args, kwargs = calls[block.name]
    weights = tuple((name, tuple(parameter.shape)) for name, parameter in block.module.named_parameters())
    given = tuple(
        tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        for value in (*args, *kwargs.values())
    )
    return block.stack, weights, given


def _cut_block(model: nn.Module, site: Site, width: int, block: Block, inputs: Mapping[str, Any]) -> Callable[[], Any]:
    """A call of a block, as it is in the model with a site cut to a width."""
    small = _cut_copy(model, {site.name: width})
    (cut,) = [other for other in find_blocks(small, block.stack) if other.index == block.index]
    # The arguments may change too, where all heads of a stack share a bias that is handed on.
    args, kwargs = _record_calls(small, [cut], inputs)[cut.name]
    return partial(cut.module, *args, **kwargs)


def _cut_copy(model: nn.Module, kept: Mapping[str, int]) -> nn.Module:
    """A copy with fewer units that shares all tensors with the model, but for those that are cut."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    small = copy.deepcopy(model, shared)
    # Which units stay makes no difference to the time.
    cut_(small, find_sites(find_blocks(small)), {name: range(width) for name, width in kept.items()})
    return small


def _smooth(widths: Sequence[int], runs: np.ndarray, total: float) -> tuple[np.ndarray, np.ndarray]:
    """Widths, rising, and the time of the part at each of them; `runs` has the whole model in its first column."""
    medians = np.median(runs, axis=0)
    # Relative to the whole model of the same minutes, so that parts measured one after the other can be compared.
    times = medians[1:] * total / medians[0]
    times = IsotonicRegression().fit_transform(widths, times)
    without = times[0]
    if widths[0] > 0 and len(widths) > 1:
        without -= widths[0] * (times[1] - times[0]) / (widths[1] - widths[0])
    return np.array(widths), times - without


def _conditions(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    device = model.device
    return {
        "device": str(device),
        "processor": processor_name(device),
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "batch_size": count_rows(inputs),
        "sequence_length": inputs["input_ids"].shape[1] if "input_ids" in inputs else None,
        "torch_version": str(torch.__version__),
        "transformers_version": transformers.__version__,
    }
