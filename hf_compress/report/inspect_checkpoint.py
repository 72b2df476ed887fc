"""What a saved model holds, without running it and without reading its weights."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedConfig, PreTrainedModel

from hf_compress.checkpoint.config import METHOD, CompressionConfig
from hf_compress.checkpoint.packed_modules import build_formats_, match_modules
from hf_compress.checkpoint.sparse import BITMASK
from hf_compress.checkpoint.widths import cut_to_widths_
from hf_compress.evaluation.cost import count_parameters, saved_bytes
from hf_compress.evaluation.parts import split_bytes
from hf_compress.evaluation.stored import (
    CONFIG_FILE,
    StoredTensor,
    build_skeleton,
    names_in_model,
    read_config,
    read_headers,
)
from hf_compress.modeling.blocks import find_blocks, find_layout, token_embeddings
from hf_compress.modeling.tasks import CLASSIFICATION, names_of_labels, problem_type, task_of
from hf_compress.report.inspect_run import inspect_run, is_run, origin_of

SCHEMA = 1
_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

Content = dict[str, Any]


class _Opened(NamedTuple):
    """A checkpoint without its weights.

    Attributes:
        config: The config.
        compression: What it says that a stock config cannot.
        model: The skeleton, cut to its widths, all of it in floating point.
        headers: The stored tensors by their names in the model.
        stock: Heads and neurons of the stock config, before the cut; `None` for an unknown architecture.
    """

    config: PreTrainedConfig
    compression: CompressionConfig | None
    model: PreTrainedModel
    headers: dict[str, StoredTensor]
    stock: list[Content] | None


def inspect(path: str | Path) -> Content:
    """What a folder holds: a saved model, or a run of `hf-compress`.

    Args:
        path (`str` or `Path`): The folder.

    Returns:
        `dict`: As `inspect_checkpoint`, with the `kind` `"checkpoint"`; or with the `kind` `"run"` as `inspect_run`,
        and under `checkpoint` what its result holds, `None` if there is none.

    Raises:
        ValueError: if it is neither, or a file is damaged.
    """
    folder = Path(path).expanduser()
    if (folder / CONFIG_FILE).is_file() or not folder.is_dir():
        return inspect_checkpoint(folder)
    if not is_run(folder):
        raise ValueError(
            f"The folder {str(path)!r} holds neither a {CONFIG_FILE} nor a run of hf-compress: give a folder that "
            "`model.save_pretrained` wrote, or one that `hf-compress run`, distill, prune or quantize wrote."
        )
    run = inspect_run(folder)
    result = folder / run["result"] if run["result"] else None
    checkpoint = inspect_checkpoint(result) if result is not None and result.is_dir() else None
    return {"schema": SCHEMA, "kind": "run", "path": str(path)} | run | {"checkpoint": checkpoint}


def inspect_checkpoint(folder: str | Path) -> Content:
    """What a saved model holds, from its config.json and the headers of its weight files.

    Args:
        folder (`str` or `Path`): Where it is saved.

    Returns:
        `dict`: Plain JSON types. Of an architecture that the library does not know, `stacks`, `blocks`, `vocabulary`
        and `bytes["parts"]` are `None`, and `note` says why.

    Raises:
        ValueError: if it is no saved model, a file is damaged, or it is in a newer version of the format.
    """
    folder = Path(folder)
    opened = _open(folder)
    config, compression, model = opened.config, opened.compression, opened.model
    is_known, note = opened.stock is not None, _why_unknown(config)
    formats = _formats(opened)
    blocks = _blocks(opened) if is_known else None
    tables = token_embeddings(model) if is_known else []
    sizes = opened.headers.values()
    content = {
        "schema": SCHEMA,
        "kind": "checkpoint",
        "path": str(folder),
        "class": type(model).__name__,
        "model_type": config.model_type,
        **_task(model),
        "needs_hf_compress": compression is not None,
        "format_version": compression.version if compression else None,
        "other_library": _settings_of_other(opened).get("quant_method"),
        "dtype": _dtype(opened),
        "vocabulary": tables[0].num_embeddings if tables else None,
        "hidden_size": getattr(config, find_layout(config).hidden_size) if is_known else None,
        "stacks": _stacks(model) if is_known else None,
        "blocks": blocks,
        "formats": formats,
        "sparse": _sparse(opened),
        "missing": _missing(opened),
        "bytes": {
            "files": saved_bytes(model, folder),
            "tensors": sum(tensor.n_bytes for tensor in sizes),
            "parts": split_bytes(build_skeleton(config), opened.headers) if is_known else None,
        },
        "note": note,
        "recipe": origin_of(folder),
    }
    # Last, since it packs the skeleton.
    if compression is not None:
        build_formats_(model, compression.formats or [])
    return content | {"parameters": asdict(count_parameters(model))}


def _open(folder: Path) -> _Opened:
    config = read_config(folder)
    given = getattr(config, "quantization_config", None) or {}
    compression = CompressionConfig(**given) if given.get("quant_method") == METHOD else None
    stored = read_headers(folder)
    model = build_skeleton(config)
    names = names_in_model(model, stored)
    stock = _widths(model) if _why_unknown(config) is None else None
    if compression is not None and compression.widths is not None:
        cut_to_widths_(model, compression.widths)
    return _Opened(config, compression, model, {names[name]: tensor for name, tensor in stored.items()}, stock)


def _why_unknown(config: PreTrainedConfig) -> str | None:
    try:
        find_layout(config)
    except ValueError as error:
        return str(error)
    return None


def _task(model: PreTrainedModel) -> Content:
    try:
        task = task_of(model)
    except ValueError:
        return {"task": None, "problem_type": None, "labels": None}
    config = model.config
    kind = problem_type(config) if task in CLASSIFICATION else None
    has_labels = (kind is not None and kind != "regression") or task == "token-classification"
    labels = names_of_labels(config) if has_labels else None
    return {"task": task, "problem_type": kind, "labels": labels}


def _dtype(opened: _Opened) -> str | None:
    """What the model computes in once it is loaded."""
    if opened.config.dtype is not None:
        return str(opened.config.dtype).removeprefix("torch.")
    n_bytes: Counter[str] = Counter()
    for tensor in opened.headers.values():
        if tensor.dtype in _FLOATS:
            n_bytes[_FLOATS[tensor.dtype]] += tensor.n_bytes
    return n_bytes.most_common(1)[0][0] if n_bytes else None


def _widths(model: PreTrainedModel) -> list[Content]:
    return [
        {
            "stack": block.stack,
            "index": block.index,
            "repeats": block.repeats,
            "heads": {part.kind: part.num_heads for part in block.attentions},
            "groups": {part.kind: part.num_groups for part in block.attentions},
            "neurons": block.ffn.width,
        }
        for block in find_blocks(model)
    ]


def _blocks(opened: _Opened) -> list[Content]:
    """What is left of each block; of how much, where the stock config says something else."""
    # Without widths of its own, the config says what is left, and not what there was.
    is_cut = opened.compression is not None and opened.compression.widths is not None
    stock = opened.stock if is_cut else [dict.fromkeys(("heads", "groups", "neurons"))] * len(opened.stock)
    return [
        {**left, **{f"of_{name}": before[name] for name in ("heads", "groups", "neurons")}}
        for left, before in zip(_widths(opened.model), stock, strict=True)
    ]


def _stacks(model: PreTrainedModel) -> dict[str, int]:
    """Layers by stack; those that share their weights count each."""
    layers: Counter[str] = Counter()
    for block in find_blocks(model):
        layers[block.stack] += block.repeats
    return dict(layers)


def _matrices(opened: _Opened) -> dict[str, int]:
    """Elements of the matrices and tables of a model, by the name of their module; of shared ones the stored."""
    return {
        name.removesuffix(".weight"): parameter.numel()
        for name, parameter in opened.model.named_parameters(remove_duplicate=False)
        if name.endswith(".weight") and parameter.ndim > 1 and parameter.numel() and name in opened.headers
    }


def _formats(opened: _Opened) -> list[Content]:
    """The number formats of the matrices and tables: each with its fields, its modules, and their bytes."""
    matrices = _matrices(opened)
    n_bytes = _bytes_of(matrices, opened.headers)
    groups: dict[str, list[str]] = defaultdict(list)
    ours = opened.compression.formats or [] if opened.compression else []
    found, taken = [], set()
    for entry in ours:
        names = match_modules(opened.model, entry["modules"], dict(opened.model.named_modules()))
        fields = {name: value for name, value in entry.items() if name not in ("format", "modules")}
        found.append({"format": entry["format"], "fields": fields, "modules": names})
        taken |= set(names)
    other = _other_library(opened)
    for name, n_elements in matrices.items():
        if name not in taken:
            tensor = opened.headers[f"{name}.weight"]
            is_packed = tensor.dtype not in _FLOATS or (
                tensor.n_elements != n_elements and f"{name}.weight{BITMASK}" not in opened.headers
            )
            label = other if is_packed else _FLOATS[tensor.dtype]
            groups[label or tensor.dtype].append(name)
    fields_of_other = _settings_of_other(opened)
    for label, names in groups.items():
        found.append({"format": label, "fields": fields_of_other if label == other else {}, "modules": names})
    return [one | {"bytes": sum(n_bytes[name] for name in one["modules"])} for one in found]


def _bytes_of(modules: Mapping[str, int], headers: Mapping[str, StoredTensor]) -> Counter[str]:
    """Bytes by module, with scales, bitmasks and biases."""
    n_bytes: Counter[str] = Counter()
    for name, tensor in headers.items():
        while name and name not in modules:
            name = name.rpartition(".")[0]
        n_bytes[name] += tensor.n_bytes
    return n_bytes


def _settings_of_other(opened: _Opened) -> Content:
    """The `quantization_config` of another library, alone or inside ours; empty without one."""
    if opened.compression is not None:
        return opened.compression.inner or {}
    return getattr(opened.config, "quantization_config", None) or {}


def _other_library(opened: _Opened) -> str | None:
    """What the format of another library is called."""
    settings = _settings_of_other(opened)
    if settings.get("load_in_8bit"):
        return "llm-int8"
    if settings.get("load_in_4bit"):
        return settings.get("bnb_4bit_quant_type")
    return settings.get("quant_method")


def _sparse(opened: _Opened) -> Content | None:
    """What is stored without its zeros; `None` where nothing is."""
    names = [name.removesuffix(BITMASK) for name in opened.headers if name.endswith(BITMASK)]
    if not names:
        return None
    shapes = {name: parameter.numel() for name, parameter in opened.model.named_parameters(remove_duplicate=False)}
    n_elements = sum(shapes[name] for name in names)
    n_zeros = n_elements - sum(opened.headers[name].n_elements for name in names)
    return {"weights": names, "elements": n_elements, "zeros": n_zeros, "share": n_zeros / n_elements}


def _missing(opened: _Opened) -> list[str]:
    """Parameters that no file holds, and none that they are tied to: they would be loaded untrained."""
    tied: dict[int, list[str]] = defaultdict(list)
    for name, parameter in opened.model.named_parameters(remove_duplicate=False):
        if parameter.numel():
            tied[id(parameter)].append(name)
    return [names[0] for names in tied.values() if not any(name in opened.headers for name in names)]
