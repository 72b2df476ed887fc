"""The loader: rebuilds the skeleton of a compressed model before its weights are loaded.

Transformers calls whatever rebuilds modules before loading a quantizer; see the design for why this one also loads
models that are only pruned: cut, or stored without their zeros. One model has one quantizer, so that of another
library works inside this one, which passes every hook on.
"""

from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from hf_compress.checkpoint.config import METHOD, CompressionConfig
from hf_compress.checkpoint.inner import (
    cast_plain_,
    dequantize_,
    inner_quantizer,
    make_safe_,
    mark_inner_,
    plain_dtypes,
    stored_conversions,
    stored_state,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CompressionQuantizer(HfQuantizer):
    """Loads checkpoints whose `quantization_config` is a `CompressionConfig`."""

    def __init__(self, quantization_config: CompressionConfig, **settings: Any) -> None:
        super().__init__(quantization_config, **settings)
        if not self.pre_quantized:
            raise ValueError(
                "A CompressionConfig says what is in a checkpoint of hf_compress, and this checkpoint is none, so it "
                "cannot be loaded by it: load it without quantization_config, then prune or quantize the model."
            )
        self.inner = inner_quantizer(quantization_config, quantization_config.inner)
        self._sparse: dict[str, str] = {}
        self._refused: list[str] = []
        self._dtypes: dict[str, torch.dtype] = {}

    def _process_model_before_weight_loading(self, model: "PreTrainedModel", **settings: Any) -> None:
        # Imported here because importing hf_compress must not import the models' code.
        from hf_compress.checkpoint.packed_modules import build_formats_
        from hf_compress.checkpoint.sparse import match_parameters
        from hf_compress.checkpoint.widths import cut_to_widths_

        if self.quantization_config.widths is not None:
            cut_to_widths_(model, self.quantization_config.widths)
        build_formats_(model, self.quantization_config.formats or [])
        # Last, because the other library reads the widths off the modules that it replaces.
        self.inner._process_model_before_weight_loading(model, **settings)
        make_safe_(model, self.inner)
        self._dtypes = plain_dtypes(model, self.inner)
        self._sparse = match_parameters(model, self.quantization_config.sparse or [])

    def update_weight_conversions(self, weight_conversions: list[Any], model: "PreTrainedModel") -> list[Any]:
        """Adds the conversions of the other library, and of the weights that are stored without their zeros."""
        from hf_compress.checkpoint.sparse import loading_conversions

        # Before those of the other library, which may be for whatever is called a weight: the first match counts.
        conversions = weight_conversions + loading_conversions(self._sparse, self._refused)
        return stored_conversions(self.inner.update_weight_conversions(conversions, model), self.inner)

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **_: Any) -> "PreTrainedModel":
        from hf_compress.checkpoint.packed_modules import missing_tensors
        from hf_compress.checkpoint.sparse import write_config_
        from hf_compress.modeling.surgery import configs

        if self._refused:
            raise ValueError("Sparse weights cannot be loaded. " + " ".join(self._refused))
        lost = missing_tensors(model)
        if lost:
            raise ValueError(
                f"The checkpoint lacks {', '.join(lost[:3])}{' and more' * (len(lost) > 3)}, without which its "
                "packed weights mean nothing: get or save it again."
            )
        if not self.quantization_config.is_packed:
            # The model holds plain dense tensors: it may train, be cast and be saved like any other, which
            # Transformers refuses while these flags are set. The config stays, for the next save.
            del model.hf_quantizer, model.quantization_method
            model.is_quantized = False
            for config in configs(model):
                vars(config).pop("_is_quantized", None)
        write_config_(model, self.quantization_config.widths, list(self._sparse.values()))
        cast_plain_(model, self._dtypes)
        mark_inner_(model, self.inner)
        return model

    def is_serializable(self) -> bool:
        """Whether such a model can be saved: if the other library's can."""
        return self.inner.is_serializable()

    @property
    def is_trainable(self) -> bool:
        """Whether adapters, or the weights where they are plain tensors, can be trained."""
        return self.quantization_config.formats is None and self.inner.is_trainable

    @property
    def is_qat_trainable(self) -> bool:
        """Whether the quantized weights themselves can be trained: if the other library's can."""
        return self.inner.is_qat_trainable

    @property
    def is_compileable(self) -> bool:
        """Whether the model can be compiled: if the other library's can."""
        return self.inner.is_compileable

    def validate_environment(self, *args: Any, **settings: Any) -> None:
        """Raises if the other library is missing, or cannot do what `from_pretrained` was asked for."""
        self.inner.validate_environment(*args, **settings)

    def update_device_map(self, device_map: dict[str, Any] | None) -> dict[str, Any] | None:
        """Where the model goes, by the other library's default."""
        return self.inner.update_device_map(device_map)

    def adjust_max_memory(self, max_memory: dict[str, int | str]) -> dict[str, int | str]:
        """Leaves room for what the other library allocates while it loads."""
        return self.inner.adjust_max_memory(max_memory)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of what is not quantized, as the other library needs it."""
        return self.inner.update_dtype(dtype)

    def update_attn_implementation(self, config: Any) -> Any:
        """The config with the attention that the other library needs."""
        return self.inner.update_attn_implementation(config)

    def update_parallel_plan(self, model: "PreTrainedModel", plan: dict[str, str]) -> None:
        """Adds the other library's tensors to the plan of a model on several devices."""
        self.inner.update_parallel_plan(model, plan)

    def param_element_size(self, model: "PreTrainedModel", param_name: str, param: torch.Tensor) -> float:
        """Bytes per element of one parameter."""
        return self.inner.param_element_size(model, param_name, param)

    def param_needs_quantization(self, model: "PreTrainedModel", param_name: str, **settings: Any) -> bool:
        """Whether a parameter belongs to a module of the other library: its stored shape is another one then."""
        return self.inner.param_needs_quantization(model, param_name, **settings)

    def get_new_dtype(self, converter: Any, param: torch.Tensor, dtype: torch.dtype | None) -> torch.dtype | None:
        """The dtype that a stored tensor is cast to when it is loaded, if any."""
        return self.inner.get_new_dtype(converter, param, dtype)

    def _dequantize(self, model: "PreTrainedModel", dtype: torch.dtype | None = None) -> "PreTrainedModel":
        if self.quantization_config.inner is None:
            raise ValueError(
                f"{type(model).__name__} is in a number format of hf_compress, which is not turned back into floating "
                "point: load the model that it was made from."
            )
        return dequantize_(model, self.inner, dtype)

    def remove_quantization_config(self, model: "PreTrainedModel") -> None:
        """Takes the number format out of the config, and leaves what else the next load needs."""
        from hf_compress.checkpoint.sparse import sparse_names, write_config_

        widths, sparse = self.quantization_config.widths, sparse_names(model)
        super().remove_quantization_config(model)
        write_config_(model, widths, sparse)

    def get_state_dict_and_metadata(self, model: "PreTrainedModel") -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """What is saved in place of the model's own tensors, if anything."""
        state, metadata = self.inner.get_state_dict_and_metadata(model)
        return state or stored_state(model, self.inner), metadata


def register() -> None:
    """Makes `from_pretrained` read compressed checkpoints; calling it again changes nothing."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(CompressionConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(CompressionQuantizer)
