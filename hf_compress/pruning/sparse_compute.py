"""Computing with sparse weights: the fastest layout of each projection, by the clock of the machine at hand."""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from hf_compress.modeling.autocast import remove_autocast_
from hf_compress.modeling.projections import in_width
from hf_compress.modeling.tasks import unwrap, without_cache
from hf_compress.pruning.batches import Batch, read_batches
from hf_compress.pruning.latency import time_in_turn
from hf_compress.pruning.masks import true_share
from hf_compress.pruning.sensitivity import frozen
from hf_compress.pruning.sparse_formats import PACKERS, best_group, block_share, is_two_of_four, why_not
from hf_compress.pruning.sparse_modules import can_be_sparse, make_dense_, make_sparse_
from hf_compress.pruning.sparse_report import KernelReport, LayerKernel, choose
from hf_compress.pruning.weight_layers import Layer, find_layers

logger = logging.getLogger(__name__)

SparseCompute = Literal["auto", "dense", "csr", "bsr", "row_groups", "sliced", "semi_structured"]
Timer = Callable[[Sequence[Callable[[], Any]], torch.device, int, int], np.ndarray]
# Below, zeros are accidents.
LEAST_SPARSITY = 0.05
# A format that takes so much longer than the dense product in each of a few rounds gets no more of them.
N_FIRST_RUNS, HOPELESS = 3, 2.0


def use_sparse_kernels_(
    model: nn.Module,
    batch: Mapping[str, torch.Tensor] | None = None,
    sparse_compute: SparseCompute = "auto",
    *,
    margin: float = 0.05,
    n_warmup: int = 3,
    n_runs: int = 30,
    timer: Timer = time_in_turn,
) -> KernelReport:
    """Has the projections of a pruned model compute without their zeros, in place, where that is faster.

    For inference only: `use_dense_kernels_` undoes it, before a training say.

    With `"auto"`, each kind of projection (shape, sparsity, pattern, number of tokens) is timed once, in all formats
    that can hold it, in turn. A sparse one is used where it is clearly faster, and the model stays dense where it is
    not faster as a whole. Results differ from the dense ones by rounding, at any batch size; what is saved does not
    differ. The packed weights need memory beside the dense ones. Merge adapters before; autocast that a training left
    on the model is removed.

    Args:
        model (`nn.Module`): A Transformers model of a known architecture with zeros in its projections, from `prune`.
        batch (`Mapping[str, torch.Tensor]`, *optional*): Inputs of the size that matters; needed for `"auto"`.
        sparse_compute (`str`, *optional*, defaults to `"auto"`): Or one format for all layers with zeros, and nothing
            is timed: `"dense"`; `"csr"`; `"bsr"` (square blocks); `"row_groups"` (small dense products for rows that
            share their inputs, for blocks such as 32 x 1); `"sliced"` (the dense product without rows and columns of
            zeros); `"semi_structured"` (2:4 on NVIDIA GPUs).
        margin (`float`, *optional*, defaults to 0.05): Least gain, as a share of the dense time.
        n_warmup (`int`, *optional*, defaults to 3): Rounds before the clock starts.
        n_runs (`int`, *optional*, defaults to 30): Rounds on the clock.
        timer (`Callable`, *optional*): Takes the times; see `time_in_turn`.

    Returns:
        `KernelReport`: What each layer computes with, and times; also logged.

    Raises:
        ValueError: if a format is unknown, or cannot hold a layer, or `"auto"` has no batch. The model is then as it
            was.
        TypeError: if a projection is of a kind that is not known, or quantized.
    """
    model = unwrap(model)
    remove_autocast_(model.modules())
    if sparse_compute not in ("auto", "dense", *PACKERS):
        known = ", ".join(map(repr, ("auto", "dense", *PACKERS)))
        raise ValueError(f"sparse_compute={sparse_compute!r} is unknown: give one of {known}.")
    if sparse_compute == "auto" and (batch is None or n_runs < 1):
        raise ValueError(
            f"sparse_compute='auto' takes times, and got batch={'None' if batch is None else '{...}'} and "
            f"n_runs={n_runs}: give a batch of inputs of the size that matters, and n_runs of at least 1."
        )
    layers = find_layers(model)
    sparse = _with_zeros(layers)
    medians: dict[Layer, dict[str, float]] = {}
    n_tokens: dict[Layer, int] = {}
    whole: dict[str, float] = {}
    if sparse_compute == "auto":
        inputs = _inputs(model, batch)
        with dense_kernels(model):
            medians, chosen, n_tokens = _time_layers(model, sparse, inputs, margin, n_warmup, n_runs, timer)
            if set(chosen.values()) - {"dense"}:
                times = _time_whole(model, chosen, inputs, n_warmup, n_runs, timer)
                whole = _medians(times)
                if choose(times, margin=0) == "dense":
                    logger.info("A forward pass with sparse kernels is not clearly faster: all layers stay dense.")
                    chosen = {}
    else:
        _check_holds(sparse, sparse_compute)
        chosen = dict.fromkeys(sparse, sparse_compute)
    use_dense_kernels_(model)
    _apply_(model, chosen)
    report = KernelReport(
        [
            LayerKernel(
                layer=layer.name,
                shape=tuple(layer.weight.shape),
                sparsity=true_share(layer.weight == 0),
                chosen=chosen.get(layer, "dense"),
                n_tokens=n_tokens.get(layer),
                times=medians.get(layer, {}),
            )
            for layer in layers
        ],
        whole,
        device=str(model.device),
        threads=torch.get_num_threads(),
        dtype=str(model.dtype).removeprefix("torch."),
        n_runs=n_runs if sparse_compute == "auto" else 0,
        torch_version=str(torch.__version__),
    )
    logger.info("Sparse kernels:\n%s", report.describe())
    return report


def use_dense_kernels_(model: nn.Module) -> None:
    """Undoes `use_sparse_kernels_`, in place: all projections compute with their dense weights again, and can train.

    Args:
        model (`nn.Module`): Any model.
    """
    for module in model.modules():
        make_dense_(module)


@contextmanager
def dense_kernels(model: nn.Module) -> Iterator[None]:
    """Has a model compute with its dense weights for a while.

    Args:
        model (`nn.Module`): Any model.
    """
    formats = {module: vars(module)["sparse_format"] for module in model.modules() if "sparse_format" in vars(module)}
    use_dense_kernels_(model)
    try:
        yield
    finally:
        for module, name in formats.items():
            make_sparse_(module, name)


def _with_zeros(layers: Sequence[Layer]) -> list[Layer]:
    found = [layer for layer in layers if true_share(layer.weight == 0) >= LEAST_SPARSITY]
    for layer in found:
        if not can_be_sparse(layer.module):
            raise TypeError(
                f"{layer.name} is a {type(layer.module).__name__}, which may compute more than a product: only "
                "nn.Linear and Conv1D themselves, without hooks of accelerate, can get a sparse kernel. Merge "
                "adapters first, and load the model without a device_map."
            )
    if not found:
        logger.warning(
            "None of the %d projections has %.0f %% zeros or more, so all stay dense: prune the model first.",
            len(layers),
            100 * LEAST_SPARSITY,
        )
    return found


def _check_holds(layers: Sequence[Layer], name: str) -> None:
    for layer in layers:
        reason = why_not(name, layer.weight)
        if reason:
            raise ValueError(
                f"sparse_compute={name!r} cannot hold {layer.name}: {reason}. Use sparse_compute='auto', which takes "
                "what fits."
            )


def _inputs(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> Batch:
    (inputs,) = read_batches(model, [batch])
    return without_cache(model, inputs)


def _time_layers(
    model: nn.Module,
    layers: Sequence[Layer],
    inputs: Batch,
    margin: float,
    n_warmup: int,
    n_runs: int,
    timer: Timer,
) -> tuple[dict[Layer, dict[str, float]], dict[Layer, str], dict[Layer, int]]:
    """By layer: median times, the choice, and the number of tokens."""
    kinds: dict[tuple[Any, ...], tuple[dict[str, float], str]] = {}
    medians, chosen = {}, {}
    with frozen(model), torch.inference_mode():
        n_tokens = _count_tokens(model, layers, inputs)
        for layer in layers:
            if not n_tokens.get(layer):
                logger.warning(
                    "The batch never reaches %s, which stays dense: give one with all inputs that lead there.",
                    layer.name,
                )
                continue
            kind = (n_tokens[layer], *_kind(layer))
            if kind not in kinds:
                times = _time_formats(layer, n_tokens[layer], n_warmup, n_runs, timer)
                kinds[kind] = _medians(times), choose(times, margin)
            medians[layer], chosen[layer] = kinds[kind]
    return medians, chosen, n_tokens


def _kind(layer: Layer) -> tuple[Any, ...]:
    """Layers of one kind take the same time."""
    weight, is_live = layer.weight, layer.weight != 0
    group = best_group(weight)
    shares = [true_share(is_live), block_share(weight, group, 1)]
    shares += [true_share(is_live.any(axis)) for axis in (0, 1)]
    shares += [block_share(weight, 16, 16)] if not any(width % 16 for width in weight.shape) else []
    return (
        type(layer.module),
        tuple(weight.shape),
        layer.module.bias is None,
        group,
        is_two_of_four(weight),
        *(round(20 * share) for share in shares),
    )


def _count_tokens(model: nn.Module, layers: Sequence[Layer], inputs: Batch) -> dict[Layer, int]:
    counts: dict[Layer, int] = {}

    def count(layer: Layer, tensor: torch.Tensor) -> None:
        counts.setdefault(layer, tensor.numel() // tensor.shape[-1])

    hooks = [
        layer.module.register_forward_pre_hook(lambda _, args, layer=layer: count(layer, args[0])) for layer in layers
    ]
    try:
        model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return counts


def _time_formats(layer: Layer, n_tokens: int, n_warmup: int, n_runs: int, timer: Timer) -> dict[str, np.ndarray]:
    weight = layer.weight
    inputs = torch.randn(n_tokens, in_width(layer.module), dtype=weight.dtype, device=weight.device)
    has_empty = not all((weight != 0).any(axis).all() for axis in (0, 1))
    names = [name for name in PACKERS if why_not(name, weight) is None and (name != "sliced" or has_empty)]
    calls = {"dense": partial(layer.module, inputs)}
    calls |= {name: partial(PACKERS[name](weight), inputs, layer.module.bias) for name in names}

    def take(some: Sequence[str], n_warmup: int, n_runs: int) -> dict[str, np.ndarray]:
        times = timer([calls[name] for name in some], weight.device, n_warmup, n_runs)
        return dict(zip(some, times.T, strict=True))

    first = take(list(calls), 1, N_FIRST_RUNS)
    limit = HOPELESS * np.median(first["dense"])
    return first | take([name for name in calls if name == "dense" or np.min(first[name]) < limit], n_warmup, n_runs)


def _apply_(model: nn.Module, chosen: Mapping[Layer, str]) -> None:
    for layer, name in chosen.items():
        if name != "dense":
            make_sparse_(model.get_submodule(layer.name), name)


def _time_whole(
    model: nn.Module, chosen: Mapping[Layer, str], inputs: Batch, n_warmup: int, n_runs: int, timer: Timer
) -> dict[str, np.ndarray]:
    """Milliseconds of a forward pass, all dense and as chosen."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    with frozen(model), torch.inference_mode():
        twin = copy.deepcopy(model, shared)
        _apply_(twin, chosen)
        times = timer([partial(model, **inputs), partial(twin, **inputs)], model.device, n_warmup, n_runs)
    return dict(zip(("dense", "sparse"), times.T, strict=True))


def _medians(times: Mapping[str, np.ndarray]) -> dict[str, float]:
    return {name: float(np.median(values)) for name, values in times.items()}
