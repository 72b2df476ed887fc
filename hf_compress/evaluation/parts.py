"""Where the bytes and the time of a model go: embeddings, attention, feed-forward networks, head, and the rest."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from hf_compress.evaluation.inference import inference, model_inputs
from hf_compress.evaluation.latency import compare_latency
from hf_compress.evaluation.stored import StoredTensor, build_skeleton, names_in_model, read_config, read_headers
from hf_compress.modeling.blocks import FFN, Block, embedding_names, find_blocks, find_module, find_stacks, join
from hf_compress.modeling.blocks import task_head_names as head_names
from hf_compress.modeling.tasks import unwrap
from hf_compress.modeling.timing import wait_for

EMBEDDINGS, ATTENTION, FEED_FORWARD, HEAD, OTHER = "embeddings", "attention", "feed-forward", "head", "other"
PARTS = (EMBEDDINGS, ATTENTION, FEED_FORWARD, HEAD, OTHER)


def bytes_by_part(folder: str | Path) -> dict[str, int]:
    """The bytes of a saved model's tensors, by part of the model.

    Weights are counted as they are stored: packed, in bits, or without their zeros; scales and bitmasks count with
    the weight that they belong to. A weight that several modules share is stored once, and counts where its name is.

    Args:
        folder (`str` or `Path`): Where the model is saved.

    Returns:
        `dict[str, int]`: Bytes by each of `PARTS`. They sum to the weight files without their headers.

    Raises:
        ValueError: if the folder holds no saved model, a file is damaged, or the architecture is unknown.
    """
    return split_bytes(build_skeleton(read_config(folder)), read_headers(folder))


def split_bytes(model: PreTrainedModel, headers: Mapping[str, StoredTensor]) -> dict[str, int]:
    """The bytes of stored tensors, by part of the model that they belong to.

    Args:
        model (`PreTrainedModel`): The stock model that the config describes; it needs no weights.
        headers (`Mapping[str, StoredTensor]`): As `read_headers` returns them.

    Returns:
        `dict[str, int]`: As `bytes_by_part`.

    Raises:
        ValueError: if the architecture is unknown.
    """
    parts, names = name_parts(model), names_in_model(model, headers)
    n_bytes = Counter(dict.fromkeys(PARTS, 0))
    for name, tensor in headers.items():
        n_bytes[_part_of(names[name], parts)] += tensor.n_bytes
    return dict(n_bytes)


def seconds_by_part(
    model: nn.Module, batch: Mapping[str, torch.Tensor], *, n_warmup: int = 2, n_runs: int = 10
) -> dict[str, float]:
    """The time of a forward, by part of the model.

    Each part is timed where the model calls it. Watching costs time of its own, on an accelerator most, which has to
    be waited for. So as many forwards are timed without it, and the medians of the parts are scaled to sum to theirs.

    Args:
        model (`nn.Module`): A Transformers model; its training flags are left as they were.
        batch (`Mapping[str, torch.Tensor]`): Inputs, for example `(batch, tokens)`.
        n_warmup (`int`, *optional*, defaults to `2`): Forwards before the clock starts.
        n_runs (`int`, *optional*, defaults to `10`): Forwards on the clock, in either way.

    Returns:
        `dict[str, float]`: Seconds by each of `PARTS`. They sum to the median time of a whole forward.

    Raises:
        ValueError: if there is no run, the architecture is unknown, or the batch has no input of the model.
    """
    whole = compare_latency({"model": model}, batch, n_warmup=n_warmup, n_runs=n_runs).latency["model"].median_s
    inputs = model_inputs(model, batch)
    clock = _Clock(unwrap(model).device)
    handles = [handle for start, end, part in _spans(unwrap(model)) for handle in clock.watch(start, end, part)]
    try:
        with inference(model):
            runs = [clock.time(lambda: model(**inputs)) for _ in range(n_warmup + n_runs)][n_warmup:]
    finally:
        for handle in handles:
            handle.remove()
    medians = {part: float(np.median([run[part] for run in runs])) for part in PARTS}
    scale = whole / sum(medians.values())
    return {part: seconds * scale for part, seconds in medians.items()}


def name_parts(model: nn.Module) -> dict[str, str]:
    """Which part of a model its modules are.

    Embeddings are taken with what is around them and holds no block: tables of types, their norm. Attention includes
    tables of relative positions that are added to its scores. Norms between the parts are none of them.

    Args:
        model (`nn.Module`): A Transformers model of a known architecture, on any device.

    Returns:
        `dict[str, str]`: Dotted names of modules, or of parameters, -> one of `PARTS`. All that is in a module is of
        its part; what has no name here is `OTHER`.

    Raises:
        ValueError: if the architecture is unknown.
    """
    core = unwrap(model)
    blocks = find_blocks(core)
    parts = dict.fromkeys(head_names(core), HEAD)
    parts |= {_around(name, blocks): EMBEDDINGS for name in embedding_names(core)}
    parts |= dict.fromkeys(_bias_names(core), ATTENTION)
    for block in blocks:
        parts |= {attention.name: ATTENTION for attention in block.attentions}
        parts |= dict.fromkeys(_ffn_names(block.ffn), FEED_FORWARD)
    return parts


def _part_of(name: str, parts: Mapping[str, str]) -> str:
    while name and name not in parts:
        name = name.rpartition(".")[0]
    return parts.get(name, OTHER)


def _around(name: str, blocks: list[Block]) -> str:
    """The largest module around a table that holds no block."""
    parent = name.rpartition(".")[0]
    while parent and not any(block.name.startswith(f"{parent}.") for block in blocks):
        name, parent = parent, parent.rpartition(".")[0]
    return name


def _bias_names(model: nn.Module) -> Iterator[str]:
    """Tables of relative positions that lie outside of the attentions."""
    base_name = "" if model.base_model is model else model.base_model_prefix
    for stack in find_stacks(model).values():
        if stack.position_bias is not None and not stack.position_bias.in_first_block:
            yield join(base_name, stack.position_bias.owner, stack.position_bias.table)


def _ffn_names(ffn: FFN) -> list[str]:
    if ffn.layout.module:
        return [ffn.name]
    return [*(join(ffn.name, path) for path in ffn.input_paths), ffn.output_name]


def _spans(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module, str]]:
    """The modules at whose call a part begins, and at whose return it ends, each once."""
    spans: dict[int, tuple[nn.Module, nn.Module, str]] = {}
    for name, part in name_parts(model).items():
        module = find_module(model, name)
        # A table that is a parameter is not called.
        if module is not None and part != FEED_FORWARD:
            spans.setdefault(id(module), (module, module, part))
    for block in find_blocks(model):
        ffn = block.ffn
        # A network without a module of its own is what happens between its projections, the activation too.
        start, end = (ffn.module, ffn.module) if ffn.layout.module else (ffn.inputs[0], ffn.output)
        spans.setdefault(id(start), (start, end, FEED_FORWARD))
    yield from spans.values()


class _Clock:
    """Sums up the time that a forward spends in each part."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spent: Counter[str] = Counter()
        self._began = 0.0

    def watch(self, start: nn.Module, end: nn.Module, part: str) -> tuple[RemovableHandle, RemovableHandle]:
        """Counts the time from the call of one module to the return of another, or of the same."""

        def begin(*_: Any) -> None:
            self._began = self._now()

        def stop(*_: Any) -> None:
            self._spent[part] += self._now() - self._began

        return start.register_forward_pre_hook(begin), end.register_forward_hook(stop)

    def time(self, forward: Callable[[], Any]) -> dict[str, float]:
        """Seconds by part of one forward."""
        self._spent.clear()
        start = self._now()
        forward()
        whole = self._now() - start
        spent = {part: self._spent[part] for part in PARTS}
        return spent | {OTHER: whole - sum(spent.values())}

    def _now(self) -> float:
        wait_for(self._device)
        return time.perf_counter()
