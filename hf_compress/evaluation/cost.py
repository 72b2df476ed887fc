"""What a model costs: parameters, bytes on disk, multiply-accumulates, time and memory."""

import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers.utils import logging as transformers_logging

from hf_compress.evaluation.files import weight_files
from hf_compress.evaluation.inference import inference, model_inputs
from hf_compress.evaluation.latency import Conditions, Latency, compare_latency
from hf_compress.formats.int8 import Int8Linear
from hf_compress.formats.packed import PackedEmbedding
from hf_compress.modeling.blocks import find_blocks
from hf_compress.modeling.tasks import unwrap

logger = logging.getLogger(__name__)

# Where a module that packs its weights says which matrix they stand for.
_MATRIX_SIZES = (("out_features", "in_features"), ("num_embeddings", "embedding_dim"))


@dataclass(frozen=True)
class Parameters:
    """Numbers of weights; a tensor that several modules share counts once.

    Attributes:
        total (`int`): All weights.
        embeddings (`int`): Embedding tables outside the blocks, a tied output layer included.
        encoder (`int` or `None`): Everything inside the transformer blocks, a decoder's too; `None` for an
            architecture that `modeling.layouts` does not know.
        other (`int` or `None`): The rest: task head, pooler, norms outside the blocks; `None` likewise.
    """

    total: int
    embeddings: int
    encoder: int | None
    other: int | None


@dataclass(frozen=True)
class Cost:
    """What a model costs.

    Attributes:
        parameters (`Parameters`): Numbers of weights.
        bytes_on_disk (`int`): Size of the saved weights.
        macs (`int`): Multiply-accumulates of one forward of the batch, all examples together.
        latency (`Latency`): Times of a forward.
        peak_memory_bytes (`int`): Highest memory during a forward, see `peak_memory`.
        conditions (`Conditions`): Device, sizes and versions.
    """

    parameters: Parameters
    bytes_on_disk: int
    macs: int
    latency: Latency
    peak_memory_bytes: int
    conditions: Conditions

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON types."""
        return asdict(self)


def measure_cost(
    model: nn.Module,
    batch: Mapping[str, torch.Tensor],
    *,
    path: str | Path | None = None,
    n_warmup: int = 3,
    n_runs: int = 20,
) -> Cost:
    """Measures what a model costs on one batch.

    Measure a model that was saved and loaded again, and give its folder as `path`: then the figures are those of the
    checkpoint. Training flags are left as they were.

    Args:
        model (`nn.Module`): A Transformers model.
        batch (`Mapping[str, torch.Tensor]`): Inputs; columns that the model does not take, and labels, are left out.
        path (`str` or `Path`, *optional*): Folder of the saved model; without it the model is saved into a temporary
            folder to be weighed.
        n_warmup (`int`, *optional*, defaults to `3`): Forwards before the clock starts.
        n_runs (`int`, *optional*, defaults to `20`): Forwards on the clock.

    Returns:
        `Cost`: The figures and what they were measured under.

    Raises:
        ValueError: if the batch has no input of the model, or `path` no safetensors.
    """
    # First, because a forward may repack quantized weights (bitsandbytes does on CPUs) and so change what is saved.
    n_bytes = saved_bytes(model, path)
    times = compare_latency({"model": model}, batch, n_warmup=n_warmup, n_runs=n_runs)
    return Cost(
        parameters=count_parameters(model),
        bytes_on_disk=n_bytes,
        macs=count_macs(model, batch),
        latency=times.latency["model"],
        peak_memory_bytes=peak_memory(model, batch),
        conditions=times.conditions,
    )


def count_parameters(model: nn.Module) -> Parameters:
    """Counts weights, however they are stored.

    Floating-point parameters count by element. A module that stores its weights as integers, in parameters or
    buffers, counts as the matrix they stand for (`in_features * out_features`), so that packing several weights into
    one byte does not look like pruning.

    Args:
        model (`nn.Module`): A Transformers model.

    Returns:
        `Parameters`: In all, and by part of the model. For an unknown architecture a warning is logged and the parts
        that need the blocks are `None`, because a guess would pass for a measurement.
    """
    model = unwrap(model)
    try:
        in_blocks = [module for block in find_blocks(model) for module in block.module.modules()]
    except ValueError as error:
        logger.warning("Parameters inside and outside the blocks are not told apart: %s", error)
        in_blocks = None
    block_ids = {id(module) for module in in_blocks or []}
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding | PackedEmbedding) and id(m) not in block_ids]
    seen: set[int] = set()
    # Tables go first: an output layer tied to one is the same tensor.
    embeddings = sum(_count_own(module, seen) for module in tables)
    encoder = sum(_count_own(module, seen) for module in in_blocks or [])
    rest = sum(_count_own(module, seen) for module in model.modules())
    is_known = in_blocks is not None
    return Parameters(
        embeddings + encoder + rest, embeddings, encoder if is_known else None, rest if is_known else None
    )


def _count_own(module: nn.Module, seen: set[int]) -> int:
    """Weights that a module holds itself and that are not in `seen`, to which they are added."""
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    new = [tensor for tensor in tensors if id(tensor) not in seen]
    seen.update(map(id, new))
    parameters = [tensor for tensor in new if isinstance(tensor, nn.Parameter)]
    floating = [tensor.numel() for tensor in parameters if tensor.is_floating_point()]
    names = vars(module)
    sizes = next(((names[a], names[b]) for a, b in _MATRIX_SIZES if a in names and b in names), None)
    if sizes is None:
        return sum(tensor.numel() for tensor in parameters)
    # A mask beside a floating-point weight is no weight; integers without one are.
    has_packed = any(not tensor.is_floating_point() for tensor in new) and max(floating, default=0) < prod(sizes)
    return sum(floating) + (prod(sizes) if has_packed else 0)


def saved_bytes(model: nn.Module, path: str | Path | None = None) -> int:
    """Size of a model's safetensors.

    Args:
        model (`nn.Module`): A Transformers model.
        path (`str` or `Path`, *optional*): Folder where it is saved; without it, it is saved to a temporary one.

    Returns:
        `int`: Bytes of the `*.safetensors` in the folder that `from_pretrained` reads.

    Raises:
        ValueError: if the folder has none.
    """
    if path is None:
        with tempfile.TemporaryDirectory() as folder, _no_progress_bar():
            unwrap(model).save_pretrained(folder)
            return saved_bytes(model, folder)
    sizes = [file.stat().st_size for file in weight_files(path)]
    if not sizes:
        raise ValueError(
            f"{str(path)!r} holds no *.safetensors, so there is nothing to weigh. Give the folder that "
            "`model.save_pretrained(folder)` wrote, or no path."
        )
    return sum(sizes)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()


def count_macs(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> int:
    """Multiply-accumulates of one forward, from the shapes that its kernels really see.

    Matrix products, convolutions and attention count (half of PyTorch's FLOPs), elementwise operations do not, as is
    usual. Removed heads and neurons are missing from the shapes and so from the count; zeros inside a dense matrix are
    multiplied like any number, and count; sparse kernels count what they multiply, but for CSR, which counts as
    dense. A quantized layer counts like the matrix product that it stands for.

    Args:
        model (`nn.Module`): A Transformers model.
        batch (`Mapping[str, torch.Tensor]`): Inputs.

    Returns:
        `int`: Multiply-accumulates of the whole batch; the same for eager attention and sdpa.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_flop_formulas())
    # The counter follows modules by the autograd graph of their inputs, and fails where a parameter is one (DeBERTa's
    # relative positions), which has a graph only while it is asked for gradients.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with inference(model), counter, _counted_by_shape(model, counter) as corrections:
            model(**model_inputs(model, batch))
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    return counter.get_total_flops() // 2 + sum(corrections)


@contextmanager
def _counted_by_shape(model: nn.Module, counter: FlopCounterMode) -> Iterator[list[int]]:
    """What has to be added to the count of operations, which C code is not among and others may pad."""
    corrections: list[int] = []
    before = 0

    def start(module: nn.Module, *_: Any) -> None:
        nonlocal before
        before = counter.get_total_flops()

    def end(module: nn.Module, inputs: tuple[torch.Tensor, ...], outputs: torch.Tensor) -> None:
        counted = (counter.get_total_flops() - before) // 2
        corrections.append(outputs.numel() * module.in_features - counted)

    hooks = [
        hook
        for module in model.modules()
        if isinstance(module, Int8Linear)
        for hook in (module.register_forward_pre_hook(start), module.register_forward_hook(end))
    ]
    try:
        yield corrections
    finally:
        for hook in hooks:
            hook.remove()


def _flop_formulas() -> dict[Any, Any]:
    """Formulas that PyTorch's counter lacks: fused attention on the CPU, and products of quantized matrices."""

    def attention(
        query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, out_shape: Any = None, **__: Any
    ) -> int:
        return sdpa_flop_count(query, key, value)

    def product(inputs: torch.Size, *_: Any, out_shape: Any = None, **__: Any) -> int:
        rows = prod(inputs[:-1])
        first = out_shape[0] if isinstance(out_shape, tuple) and not isinstance(out_shape, torch.Size) else out_shape
        return 2 * rows * inputs[-1] * first[-1]

    products = {
        torch.ops.aten: ("_int_mm", "_weight_int8pack_mm", "_weight_int4pack_mm_for_cpu", "_dyn_quant_matmul_4bit"),
        torch.ops.onednn: ("qlinear_pointwise",),
        torch.ops.quantized: ("linear", "linear_dynamic"),
        torch.ops.bitsandbytes: (
            "int8_linear_matmul",
            "int8_scaled_mm",
            "int8_mixed_scaled_mm",
            "gemm_4bit",
            "gemv_4bit",
        ),
    }
    # Which of these exist depends on the platform and on whether bitsandbytes was imported.
    known = [getattr(space, name) for space, names in products.items() for name in names if hasattr(space, name)]
    return {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
        **dict.fromkeys(known, product),
    }


def peak_memory(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> int:
    """Highest memory of one forward: the model's tensors plus the most that PyTorch allocated on top at one moment.

    Weights that modules keep in another order or form, to multiply by them, are among it.

    On the CPU the allocations and releases of PyTorch's allocator are summed up in their order (profiler); on CUDA
    `torch.cuda.max_memory_allocated` is compared with the memory before. Both exclude what is not PyTorch's: the
    interpreter, libraries, workspaces inside vendors' kernels. Resident memory would include those, and would depend
    on what the process did before. The batch itself is not counted.

    Args:
        model (`nn.Module`): A Transformers model.
        batch (`Mapping[str, torch.Tensor]`): Inputs.

    Returns:
        `int`: Bytes.
    """
    core = unwrap(model)
    tensors = {id(tensor): tensor for tensor in [*core.parameters(), *core.buffers()]}.values()
    inputs = model_inputs(model, batch)
    for module in core.modules():
        # Made again by the first forward, which is how its size is known.
        getattr(module, "forget_packed_", lambda: None)()
    with inference(model):
        if core.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(core.device)
            before = torch.cuda.memory_allocated(core.device)
            model(**inputs)
            # What a first forward needs only to pack weights is no part of the peak.
            torch.cuda.reset_peak_memory_stats(core.device)
            model(**inputs)
            peak = torch.cuda.max_memory_allocated(core.device) - before
        else:
            with _silent_profiler() as profiler:
                model(**inputs)
            kept = sum(allocation[1] for allocation in _allocations(profiler))
            with _silent_profiler() as profiler:
                model(**inputs)
            peak = kept + _highest_sum(_allocations(profiler))
    return sum(tensor.nbytes for tensor in tensors) + peak


def _allocations(profiler: Any) -> list[tuple[int, int]]:
    events = profiler.kineto_results.events()
    return [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]


def _highest_sum(allocations: list[tuple[int, int]]) -> int:
    current = highest = 0
    for _, n_bytes in sorted(allocations, key=lambda allocation: allocation[0]):
        current += n_bytes
        highest = max(highest, current)
    return highest


@contextmanager
def _silent_profiler() -> Iterator[Any]:
    # The profiler's library writes to stderr whenever it starts, unless this is set before its first use.
    level = os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    try:
        with torch.autograd.profiler.profile(profile_memory=True) as profiler:
            yield profiler
    finally:
        if level == "99":
            os.environ.pop("KINETO_LOG_LEVEL", None)
