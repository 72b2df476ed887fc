"""The quantizer of another library that works inside ours: one model can have one quantizer alone."""

import logging
from typing import TYPE_CHECKING, Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import AutoHfQuantizer, HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CAST_LOGGER = "bitsandbytes.autograd._functions"
_CAST_MESSAGE = "MatMul8bitLt: inputs will be cast from"


class NoInner(HfQuantizer):
    """Stands for no other library: a quantizer that does nothing."""

    def is_serializable(self) -> bool:
        """Always."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Always."""
        return True


def inner_quantizer(config: QuantizationConfigMixin, inner: dict[str, Any] | None) -> HfQuantizer:
    """The quantizer that the hooks of ours are passed on to.

    Args:
        config (`QuantizationConfigMixin`): Our own config.
        inner (`dict[str, Any]`, *optional*): As in `CompressionConfig.inner`.

    Returns:
        `HfQuantizer`: For weights that are quantized already.

    Raises:
        ValueError: if Transformers knows no such quantizer.
    """
    if inner is None:
        return NoInner(config)
    return AutoHfQuantizer.from_config(inner, pre_quantized=True)


def make_safe_(model: "PreTrainedModel", inner: HfQuantizer) -> None:
    """Replaces modules of another library whose state is not safe after an inference by ones that compute the same.

    Args:
        model (`PreTrainedModel`): Is changed; it may be a skeleton.
        inner (`HfQuantizer`): The other library's quantizer.
    """
    if inner.quantization_config.quant_method == QuantizationMethod.BITS_AND_BYTES:
        # Imported here because bitsandbytes takes seconds, and may be missing.
        from hf_compress.formats.linear4bit import make_exact_

        make_exact_(model)


def dequantize_(model: "PreTrainedModel", inner: HfQuantizer, dtype: torch.dtype | None) -> "PreTrainedModel":
    """Turns modules of another library back into projections as the architecture has them.

    Args:
        model (`PreTrainedModel`): Is changed.
        inner (`HfQuantizer`): The other library's quantizer.
        dtype (`torch.dtype`, *optional*): Of the weights.

    Returns:
        `PreTrainedModel`: The model.
    """
    # Imported here because importing hf_compress must not import the models' code.
    from transformers.pytorch_utils import Conv1D

    from hf_compress.modeling.projections import as_conv1d

    transposed = []
    for name, module in model.named_modules():
        if issubclass(getattr(module, "source_cls", torch.nn.Linear), Conv1D):
            transposed.append(name)
        if hasattr(module, "unpack_"):
            # An inference has rearranged the weights.
            module.unpack_()
    model = inner._dequantize(model, dtype=dtype)
    for name in transposed:
        model.set_submodule(name, as_conv1d(model.get_submodule(name)))
    return model


def plain_dtypes(model: "PreTrainedModel", inner: HfQuantizer) -> dict[str, torch.dtype]:
    """What the tensors that stay in floating point are to be cast to.

    Transformers leaves casting to the other library for all names that it loads something from, and that library
    does not cast what it has not rounded.

    Args:
        model (`PreTrainedModel`): The skeleton, with the other library's modules.
        inner (`HfQuantizer`): The other library's quantizer.

    Returns:
        `dict[str, torch.dtype]`: By name; without what a model wants in float32 in any case.
    """
    if isinstance(inner, NoInner):
        return {}
    kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    return {
        name: parameter.dtype
        for name, parameter in model.named_parameters()
        if type(parameter) is torch.nn.Parameter and parameter.is_floating_point() and kept.isdisjoint(name.split("."))
    }


def cast_plain_(model: "PreTrainedModel", dtypes: dict[str, torch.dtype]) -> None:
    """Casts what `plain_dtypes` found in the skeleton.

    Args:
        model (`PreTrainedModel`): Has its weights.
        dtypes (`dict[str, torch.dtype]`): By name.
    """
    for name, parameter in model.named_parameters():
        if type(parameter) is torch.nn.Parameter and parameter.dtype != dtypes.get(name, parameter.dtype):
            parameter.data = parameter.data.to(dtypes[name])


def stored_state(model: "PreTrainedModel", inner: HfQuantizer) -> dict[str, torch.Tensor] | None:
    """What is stored of a model, where that is not its state: 8-bit integers of shape (1, outputs, inputs).

    Of the shape of the weights, Transformers would take them for the weights where hf_compress is not imported, and
    say no more than that it does not know their scales. Another shape is an error.

    Args:
        model (`PreTrainedModel`): Has its weights.
        inner (`HfQuantizer`): The other library's quantizer.

    Returns:
        `dict[str, torch.Tensor]` or `None`: The tensors by their names; `None` for the model's own state.
    """
    if not getattr(inner.quantization_config, "load_in_8bit", False):
        return None
    state = model.state_dict()
    names = [f"{name.removesuffix('SCB')}weight" for name in state if name.endswith(".SCB")]
    return state | {name: state[name][None] for name in names}


def stored_conversions(conversions: list[Any], inner: HfQuantizer) -> list[Any]:
    """The other library's conversions from stored tensors, behind one that undoes `stored_state`.

    Args:
        conversions (`list`): Of a model, in the order in which they are tried.
        inner (`HfQuantizer`): The other library's quantizer.

    Returns:
        `list`: The same; those that read 8-bit integers are changed.
    """
    if getattr(inner.quantization_config, "load_in_8bit", False):
        for conversion in conversions:
            if _is_one_of(conversion, tuple(inner.get_load_operations().values())):
                conversion.operations.insert(0, _Matrices())
    return conversions


class _Matrices(ConversionOps):
    """From weights of shape (1, outputs, inputs) to matrices; matrices, which stock checkpoints have, stay."""

    def convert(self, input_dict: dict[str, Any], **_: Any) -> dict[str, Any]:
        found = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
        return {name: value[0] if value.dim() == 3 else value for name, value in found.items()}


def mark_inner_(model: "PreTrainedModel", inner: HfQuantizer) -> None:
    """Gives a model what the other library is known by, and takes from it what would keep it from being saved.

    Args:
        model (`PreTrainedModel`): Has its weights.
        inner (`HfQuantizer`): The other library's quantizer.
    """
    if isinstance(inner, NoInner):
        return
    inner._process_model_after_weight_loading(model)
    # By its method, Transformers knows which casts and moves of the model it has to refuse.
    model.quantization_method = inner.quantization_config.quant_method
    if inner.quantization_config.quant_method == QuantizationMethod.BITS_AND_BYTES:
        _log_casts_once()
        # The modules save their own tensors. Transformers would first undo what it did to load them, which for
        # bitsandbytes is not implemented, so that what was loaded could not be saved any more.
        operations = tuple(inner.get_load_operations().values())
        if "_weight_conversions" in vars(model):
            conversions = model._weight_conversions
            model._weight_conversions = [known for known in conversions if not _is_one_of(known, operations)]


def _is_one_of(conversion: Any, operations: tuple[type, ...]) -> bool:
    return isinstance(conversion, WeightConverter) and isinstance(conversion.operations[-1], operations)


class _OncePerDtype(logging.Filter):
    """Lets a message of bitsandbytes pass once for each dtype: it comes from every layer in every forward."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[Any] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if not isinstance(record.msg, str) or not record.msg.startswith(_CAST_MESSAGE):
            return True
        is_new = record.args not in self._seen
        self._seen.add(record.args)
        return is_new


def _log_casts_once() -> None:
    """Has bitsandbytes say once, and not in every forward of every layer, that 8-bit products are made from float16.

    All its other messages pass. Calling it again changes nothing.
    """
    logger = logging.getLogger(_CAST_LOGGER)
    if not any(isinstance(known, _OncePerDtype) for known in logger.filters):
        logger.addFilter(_OncePerDtype())
