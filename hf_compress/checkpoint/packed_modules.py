"""Between a model with modules in number formats and what config.json says of them."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_compress.checkpoint.names import find_name, is_same_class
from hf_compress.formats.packed import PackedEmbedding, PackedModule
from hf_compress.formats.registry import class_of
from hf_compress.modeling.projections import in_width, out_width

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Formats = list[dict[str, Any]]


def read_formats(model: nn.Module) -> Formats:
    """The number formats of a live model.

    Args:
        model (`nn.Module`): Any model.

    Returns:
        `list[dict[str, Any]]`: As in `CompressionConfig.formats`: modules that agree in format and fields share an
        entry.
    """
    found: Formats = []
    for name, module in model.named_modules():
        if isinstance(module, PackedModule):
            entry = {"format": module.format, **module.fields}
            same = next((other for other in found if {**other, "modules": None} == {**entry, "modules": None}), None)
            if same is None:
                same = entry | {"modules": []}
                found.append(same)
            same["modules"].append(name)
    return found


def missing_tensors(model: nn.Module) -> list[str]:
    """What number formats need and no file held, so that it is uninitialised memory.

    Args:
        model (`nn.Module`): A model, just loaded.

    Returns:
        `list[str]`: Names of buffers.
    """
    return [
        f"{name}.{buffer}"
        for name, module in model.named_modules()
        if isinstance(module, PackedModule)
        for buffer, tensor in module.named_buffers(recurse=False)
        if buffer not in module._non_persistent_buffers_set and not getattr(tensor, "_is_hf_initialized", False)
    ]


def build_formats_(model: "PreTrainedModel", formats: Formats) -> None:
    """Replaces modules of a skeleton by those of the recorded formats, of the same sizes, before the weights load.

    Args:
        model (`PreTrainedModel`): The skeleton, already of its final widths.
        formats (`list[dict[str, Any]]`): As in `CompressionConfig.formats`.

    Raises:
        ValueError: if a format or a field is unknown, or a module is missing or of another kind.
    """
    modules = dict(model.named_modules())
    for entry in formats:
        kind = class_of(entry["format"])
        fields = {name: value for name, value in entry.items() if name not in ("format", "modules")}
        kind.check_fields(fields)
        for name in match_modules(model, entry["modules"], modules):
            model.set_submodule(name, _skeleton(kind, name, modules[name], fields))
    _untie_tables_(model)


def _untie_tables_(model: "PreTrainedModel") -> None:
    """Takes packed tables out of what is tied, as by the class of another task: they share their numbers with none."""
    packed = {name for name, module in model.named_modules() if isinstance(module, PackedEmbedding)}
    for pair in list(model.all_tied_weights_keys.items()):
        if not packed.isdisjoint(name.rpartition(".")[0] for name in pair):
            del model.all_tied_weights_keys[pair[0]]
            model.config.tie_word_embeddings = False


def match_modules(model: "PreTrainedModel", names: Sequence[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """The modules of a model that a checkpoint names, which may be that of a model with another head or none.

    Args:
        model (`PreTrainedModel`): The skeleton.
        names (`Sequence[str]`): Names in the checkpoint.
        modules (`Mapping[str, nn.Module]`): The model's modules by name.

    Returns:
        `list[str]`: Names in the model.

    Raises:
        ValueError: if the model is of the class that was saved, but has no such module.
    """
    matches, missing = [], []
    for name in names:
        found = find_name(model, name, modules)
        (missing if found is None else matches).append(found or name)
    if missing and is_same_class(model):
        raise ValueError(
            f"quantization_config names the module {missing[0]}, which {type(model).__name__} does not have: restore "
            "the config.json that the checkpoint was saved with."
        )
    return matches


def _skeleton(kind: type[PackedModule], name: str, module: nn.Module, fields: Mapping[str, Any]) -> PackedModule:
    weight = getattr(module, "weight", None)
    is_table = isinstance(module, nn.Embedding)
    if not isinstance(weight, torch.Tensor) or is_table != issubclass(kind, PackedEmbedding):
        raise ValueError(
            f"quantization_config gives {name}, a {type(module).__name__}, the format {kind.format!r}, which is for "
            "other modules: restore the config.json that the checkpoint was saved with."
        )
    place = {"device": weight.device, "dtype": weight.dtype}
    if is_table:
        return kind(module.num_embeddings, module.embedding_dim, module.padding_idx, **place, **fields)
    return kind(in_width(module), out_width(module), module.bias is not None, **place, **fields)
