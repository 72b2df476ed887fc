"""Which modules are quantized, and their replacement."""

import logging
import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_compress.checkpoint.config import CompressionConfig
from hf_compress.checkpoint.quantizer import CompressionQuantizer
from hf_compress.checkpoint.sparse import sparse_names, write_config_
from hf_compress.checkpoint.widths import write_widths_
from hf_compress.formats.packed import PackedModule
from hf_compress.modeling.blocks import embedding_names, lookup_tables, task_head_names
from hf_compress.modeling.patterns import matching_names
from hf_compress.modeling.surgery import configs

logger = logging.getLogger(__name__)


def choose_modules(
    model: PreTrainedModel,
    exclude: Sequence[str] = (),
    embeddings: bool = False,
    dtype: torch.dtype | None = None,
) -> dict[str, nn.Module]:
    """The projections of a model, and its tables of embeddings where asked, that a number format may take.

    Task heads stay in floating point, as do weights that are shared with a module that does.

    Args:
        model (`PreTrainedModel`): A model of a known architecture, in floating point.
        exclude (`Sequence[str]`, *optional*): Names, or regular expressions for whole names, of modules that stay too,
            with all that is in them. They come on top of the task head.
        embeddings (`bool`, *optional*, defaults to `False`): Whether tables of embeddings are taken.
        dtype (`torch.dtype`, *optional*): What the rest of the model is going to be in; by default what it is.

    Returns:
        `dict[str, nn.Module]`: `nn.Linear`, `Conv1D` and `nn.Embedding` by dotted name, in the order of the model.

    Raises:
        ValueError: if the model is quantized already, a pattern is no regular expression or matches nothing, or
            nothing is left.
    """
    check_float(model)
    tables = _tables(model) if embeddings else {}
    found = {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear | Conv1D) or name in tables) and module.weight.numel()
    }
    heads = [name for name in found if any(_is_in(name, head) for head in task_head_names(model))]
    excluded = {name for pattern in exclude for name in _matches(found, pattern)}
    float32 = stays_float32(model, dtype or model.dtype)
    kept = {name for name in found if float32(f"{name}.weight") and found[name].weight.dtype == torch.float32}
    stays = {*heads, *excluded, *kept}
    stays |= _shared_outside(model, [name for name in found if name not in stays])
    chosen = {name: module for name, module in found.items() if name not in stays}
    if not chosen:
        raise ValueError(f"exclude={list(exclude)} leaves nothing to quantize: name fewer modules.")
    if heads:
        logger.info("The task head stays in floating point: %s.", ", ".join(heads))
    return chosen


def stays_float32(model: PreTrainedModel, dtype: torch.dtype) -> Callable[[str], bool]:
    """What Transformers keeps in float32 when it loads a model in another dtype, whose range it would leave.

    Args:
        model (`PreTrainedModel`): The model.
        dtype (`torch.dtype`): Of all other weights.

    Returns:
        `Callable[[str], bool]`: Whether a tensor of a name does.
    """
    names = list(model._get_dtype_plan(dtype))
    pattern = re.compile("|".join(f"(?:{name.replace('*', '.*')})" for name in names)) if names else None
    return lambda name: pattern is not None and pattern.search(name) is not None


def check_float(model: PreTrainedModel) -> None:
    """Raises if a model is quantized already, has adapters, or computes with sparse kernels.

    Args:
        model (`PreTrainedModel`): The model.

    Raises:
        ValueError: if so.
    """
    if any(name.endswith(".base_layer") for name, _ in model.named_modules()):
        raise ValueError(
            f"The model {type(model).__name__} has adapters, whose own layers would be rounded too: give "
            "`peft_model.merge_and_unload()`, or quantize the model first and add adapters then."
        )
    if any("sparse_format" in vars(module) for module in model.modules()):
        raise ValueError(
            f"The model {type(model).__name__} computes with sparse kernels, which know no integers: call "
            "use_dense_kernels_(model), and quantize it then."
        )
    if getattr(model, "is_quantized", False) or any(isinstance(module, PackedModule) for module in model.modules()):
        method = getattr(model.config, "quantization_config", None)
        raise ValueError(
            f"The model {type(model).__name__} is quantized already ({type(method).__name__}), and rounding it again "
            "would add one error to another: load the model in floating point, and quantize that."
        )


def check_finite(name: str, weight: torch.Tensor) -> None:
    """Raises if a weight cannot be rounded.

    Args:
        name (`str`): Name of the module, for the message.
        weight (`torch.Tensor`): Its weight.

    Raises:
        ValueError: if a number is NaN or infinite.
    """
    if not torch.isfinite(weight).all():
        raise ValueError(
            f"The weights of {name} hold NaN or infinity, which no integer stands for: load a checkpoint with finite "
            f"weights, or add {name!r} to exclude."
        )


def replace_(
    model: PreTrainedModel, modules: Mapping[str, nn.Module], make: Callable[[str, nn.Module], PackedModule]
) -> None:
    """Puts packed modules in the place of others, and writes into the model and its config that it is quantized.

    All of them are made before the first is placed, so that an error leaves the model as it was.

    Args:
        model (`PreTrainedModel`): Is changed.
        modules (`Mapping[str, nn.Module]`): From `choose_modules`.
        make (`Callable`): From the name of a module and the module to the packed one.
    """
    packed = {name: make(name, module) for name, module in modules.items()}
    # Widths are read from the projections, which are there no longer afterwards.
    write_widths_(model)
    for name, module in packed.items():
        model.set_submodule(name, module.train(model.get_submodule(name).training))
    mark_quantized_(model)


def mark_quantized_(model: PreTrainedModel) -> None:
    """Gives a model with packed modules the config and the flags that it will have after it was saved and loaded.

    Args:
        model (`PreTrainedModel`): Is changed.
    """
    method = vars(model.config).get("quantization_config")
    write_config_(model, method.widths if isinstance(method, CompressionConfig) else None, sparse_names(model))
    model.hf_quantizer = CompressionQuantizer(model.config.quantization_config, pre_quantized=True)
    model.quantization_method = model.config.quantization_config.quant_method
    model.is_quantized = True
    for config in configs(model):
        config._is_quantized = True


def _is_in(name: str, parent: str) -> bool:
    return name == parent or name.startswith(f"{parent}.")


def _matches(names: Mapping[str, nn.Module], pattern: str) -> list[str]:
    return matching_names(names, pattern, "exclude", "modules that could be quantized")


def _tables(model: PreTrainedModel) -> dict[str, nn.Embedding]:
    """Tables of which each has a weight of its own: a module in a number format shares its numbers with no other."""
    tables = lookup_tables(model)
    stay = [name for name in embedding_names(model) if name not in tables]
    stay += [name for name in tables if _shared_outside(model, [name])]
    if stay:
        logger.info(
            "Embeddings that are tied to each other or to a task head, or computed by a class of their own, stay in "
            "floating point: %s.",
            ", ".join(stay),
        )
    return {name: table for name, table in tables.items() if name not in stay}


def _shared_outside(model: PreTrainedModel, names: Sequence[str]) -> set[str]:
    """Of some modules, those whose weight is also that of a module or parameter that is not among them."""
    users: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), set()).add(name.rpartition(".")[0])
    chosen = set(names)
    return {name for name in names if users[id(model.get_submodule(name).weight)] - chosen}
