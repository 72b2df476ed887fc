"""Between a live model, whose weights are dense, and a checkpoint that stores some of them without their zeros.

Transformers converts weights between the layouts of checkpoints and models, both when it loads and when it saves. Each
sparse weight gets such a conversion, so a model needs nothing else to stay sparse on disk.
"""

import logging
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, PrefixChange, WeightConverter

from hf_compress.checkpoint.config import CompressionConfig
from hf_compress.checkpoint.names import find_name, is_same_class
from hf_compress.checkpoint.packed_modules import read_formats
from hf_compress.checkpoint.packing import Arena, pack_sparse, unpack_sparse
from hf_compress.formats.packed import PackedModule
from hf_compress.modeling.tasks import unwrap

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The values keep the name of the weight: without the plug-in, their shape is refused, while a missing name would only
# be warned about.
BITMASK = "_bitmask"
_PLAIN_NAME = r"[\w.-]+"

logger = logging.getLogger(__name__)


def mark_sparse_(model: "PreTrainedModel", names: Iterable[str]) -> None:
    """Has every later save of a model, and of what is loaded from it, leave out the zeros of some of its weights.

    The model itself does not change. A weight with too few zeros to save bytes is stored as it is, and so is, with a
    warning, one whose name is not of letters, digits, `_`, `-` and dots.

    Args:
        model (`PreTrainedModel`): A model of any architecture.
        names (`Iterable[str]`): Names of parameters, as in `named_parameters()`, or of the integers in the place of
            some. They replace those of an earlier call; without any, all weights are stored as they are.

    Raises:
        ValueError: if a name is not that of a weight, or the model is quantized by another library.
    """
    model = unwrap(model)
    weights = _weights(model)
    names = list(names)
    _check_known(model, [name for name in names if name not in weights])
    method = vars(model.config).get("quantization_config")
    if method is not None and not isinstance(method, CompressionConfig):
        raise ValueError(
            f"The weights of this {type(model).__name__} are packed already (quantization_config is a "
            f"{type(method).__name__}): mark the weights of the full-precision model."
        )
    # Which name of a tied weight is saved is up to the architecture.
    chosen = {id(weights[name]) for name in names}
    found = [name for name, weight in weights.items() if id(weight) in chosen]
    sparse = [name for name in found if re.fullmatch(_PLAIN_NAME, name)]
    if len(sparse) < len(found):
        logger.warning(
            "%s will be stored with all zeros: Transformers converts weights by regular expressions, and the names "
            "have characters that mean something there. Name modules by letters, digits, '_' and '-'.",
            ", ".join(sorted({*found} - {*sparse})),
        )
    write_config_(model, method.widths if method else None, sparse)


def sparse_names(model: "PreTrainedModel") -> list[str]:
    """The weights whose zeros are left out when a model is saved.

    Args:
        model (`PreTrainedModel`): Any model; names of weights that it lost since they were marked are skipped.

    Returns:
        `list[str]`: Names of parameters, and of integers in their place.
    """
    weights = _weights(model)
    return [name for name in _marked(model.config) if name in weights]


def write_config_(model: "PreTrainedModel", widths: dict[str, dict[str, int]] | None, sparse: list[str]) -> None:
    """Writes into a model and its config what the next save and the next load need.

    Args:
        model (`PreTrainedModel`): The model, not wrapped.
        widths (`dict[str, dict[str, int]]`, *optional*): As in `CompressionConfig.widths`.
        sparse (`list[str]`): As in `CompressionConfig.sparse`. With neither, and all modules in floating point, the
            checkpoint needs no plug-in.
    """
    method = vars(model.config).pop("quantization_config", None)
    inner = method.inner if isinstance(method, CompressionConfig) else None
    formats = read_formats(model) or None
    if widths is not None or sparse or formats or inner:
        model.config.quantization_config = CompressionConfig(widths, sparse or None, formats, inner)
    if sparse or "_weight_conversions" in vars(model):
        others = [conversion for conversion in _conversions(model) if not _is_sparse(conversion)]
        model._weight_conversions = others + saving_conversions(sparse)
    if sparse and not any(_unpack_state_dict_ is hook.hook for hook in model._load_state_dict_pre_hooks.values()):
        model.register_load_state_dict_pre_hook(_unpack_state_dict_)


def match_parameters(model: "PreTrainedModel", names: list[str]) -> dict[str, str]:
    """Finds the parameters of a skeleton that a checkpoint stores without zeros.

    Args:
        model (`PreTrainedModel`): The skeleton.
        names (`list[str]`): Their names in the checkpoint, which may be that of a model with another head or none.

    Returns:
        `dict[str, str]`: Names in the checkpoint -> names in the model.

    Raises:
        ValueError: if the model is of the class that was saved, but a name is not that of a weight.
    """
    weights = _weights(model)
    matches = {name: found for name in names if (found := find_name(model, name, weights)) is not None}
    if is_same_class(model):
        _check_known(model, [name for name in names if name not in matches])
    return matches


def loading_conversions(names: Iterable[str], refused: list[str]) -> list[WeightConverter]:
    """What Transformers does with weights without zeros when it loads.

    Args:
        names (`Iterable[str]`): Names of weights in the checkpoint.
        refused (`list[str]`): Takes what is wrong with weights that were loaded. Transformers would only log an
            exception, and raise one without the reason.

    Returns:
        `list[WeightConverter]`: One for all weights, since each is tried on each tensor; none without weights.
    """
    weight = "^(" + "|".join(map(re.escape, names)) + ")"
    return [_conversion([f"{weight}$", f"{weight}{BITMASK}$"], r"\1", refused)] if names else []


def saving_conversions(names: Iterable[str]) -> list[WeightConverter]:
    """What Transformers undoes, and so leaves out zeros, when it saves.

    Args:
        names (`Iterable[str]`): Names of weights in the model.

    Returns:
        `list[WeightConverter]`: One for each weight.
    """
    patterns = ["^" + name.replace(".", r"\.") for name in names]
    return [_conversion([name, name + BITMASK], name, []) for name in patterns]


def _conversion(sources: list[str], target: str, refused: list[str]) -> WeightConverter:
    # The tensors are unpacked where NumPy can reach them; Transformers then moves the weight to its device.
    return WeightConverter(sources, target, [_Unpack(refused)], force_cpu=True)


class _Unpack(ConversionOps):
    """Loads a weight, stored without zeros or as it is."""

    def __init__(self, refused: list[str]) -> None:
        self.refused = refused
        self.arena = Arena()

    def __deepcopy__(self, memo: dict) -> "_Unpack":
        # Transformers copies a conversion for each weight, but there is one list and one arena.
        return self

    def convert(
        self,
        input_dict: dict[str, list[torch.Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str,
        model: "PreTrainedModel",
        **_: Any,
    ) -> dict[str, torch.Tensor]:
        values, bitmask = (input_dict[pattern][0] if pattern in input_dict else None for pattern in source_patterns)
        if bitmask is None:
            return {full_layer_name: values}
        try:
            weight = model.get_parameter_or_buffer(full_layer_name)
            return {full_layer_name: _unpack(values, bitmask, weight, self.arena)}
        except ValueError as error:
            self.refused.append(f"{full_layer_name}: {error}")
            return {}

    @property
    def reverse_op(self) -> "_Pack":
        return _Pack()


class _Pack(ConversionOps):
    """Saves a weight without zeros, where that takes fewer bytes."""

    def convert(
        self,
        input_dict: dict[str, list[torch.Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        config: Any,
        **_: Any,
    ) -> dict[str, torch.Tensor]:
        ((tensor,),) = input_dict.values()
        name, bitmask_name = target_patterns
        # A config that was replaced would not say how to load it.
        if name in _marked(config):
            values, bitmask = pack_sparse(tensor)
            if values.nbytes + bitmask.nbytes < tensor.nbytes:
                return {name: values, bitmask_name: bitmask}
        return {name: tensor}


def _unpack(
    values: torch.Tensor | None, bitmask: torch.Tensor, weight: torch.Tensor, arena: Arena | None = None
) -> torch.Tensor:
    if values is None:
        raise ValueError(
            "the checkpoint has its bitmask, but not its values: get the file again, or, if it is one of several "
            "shards, load the folder with from_pretrained."
        )
    return unpack_sparse(values, bitmask, weight.shape, arena)


def _unpack_state_dict_(model: "PreTrainedModel", state_dict: dict[str, torch.Tensor], prefix: str, *_: Any) -> None:
    """Lets `load_state_dict` take what a checkpoint holds: `Trainer` resumes without `from_pretrained`."""
    for name, weight in _weights(model).items():
        name = prefix + name
        if name + BITMASK in state_dict:
            state_dict[name] = _unpack(state_dict.get(name), state_dict.pop(name + BITMASK), weight)


def _weights(model: "PreTrainedModel") -> dict[str, torch.Tensor]:
    """Parameters, and the integers in the place of some."""
    packed = {
        f"{name}.weight": module.weight
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, PackedModule)
    }
    return dict(model.named_parameters(remove_duplicate=False)) | packed


def _conversions(model: "PreTrainedModel") -> list[Any]:
    if "_weight_conversions" in vars(model):
        return model._weight_conversions
    # What Transformers takes when it saves a model that it did not load.
    default = get_model_conversion_mapping(model, add_legacy=False)
    return [conversion for conversion in default if not isinstance(conversion, PrefixChange)]


def _is_sparse(conversion: Any) -> bool:
    return isinstance(conversion, WeightConverter) and isinstance(conversion.operations[0], _Unpack)


def _marked(config: Any) -> Iterable[str]:
    method = vars(config).get("quantization_config")
    return method.sparse or [] if isinstance(method, CompressionConfig) else []


def _check_known(model: "PreTrainedModel", unknown: list[str]) -> None:
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)} should be sparse, but {type(model).__name__} has no such weight: give names out "
            "of model.named_parameters(), or restore the config.json that the checkpoint was saved with."
        )
