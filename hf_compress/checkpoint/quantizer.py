"""The loader: rebuilds the skeleton of a compressed model before its weights are loaded.

Transformers calls whatever rebuilds modules before loading a quantizer; see the design for why this one also loads
models that are only pruned: cut, or stored without their zeros.
"""

from typing import TYPE_CHECKING, Any

from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from hf_compress.checkpoint.config import METHOD, CompressionConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CompressionQuantizer(HfQuantizer):
    """Loads checkpoints whose `quantization_config` is a `CompressionConfig`."""

    def __init__(self, quantization_config: CompressionConfig, **settings: Any) -> None:
        super().__init__(quantization_config, **settings)
        self._sparse: dict[str, str] = {}
        self._refused: list[str] = []

    def _process_model_before_weight_loading(self, model: "PreTrainedModel", **_: Any) -> None:
        # Imported here because importing hf_compress must not import the models' code.
        from hf_compress.checkpoint.packed_modules import build_formats_
        from hf_compress.checkpoint.sparse import match_parameters
        from hf_compress.checkpoint.widths import cut_to_widths_

        if self.quantization_config.widths is not None:
            cut_to_widths_(model, self.quantization_config.widths)
        build_formats_(model, self.quantization_config.formats or [])
        self._sparse = match_parameters(model, self.quantization_config.sparse or [])

    def update_weight_conversions(self, weight_conversions: list[Any], model: "PreTrainedModel") -> list[Any]:
        """Adds the conversions of the weights that are stored without their zeros."""
        from hf_compress.checkpoint.sparse import sparse_conversions

        conversions = super().update_weight_conversions(weight_conversions, model)
        return conversions + sparse_conversions(self._sparse, self._refused)

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **_: Any) -> "PreTrainedModel":
        from hf_compress.checkpoint.sparse import write_config_
        from hf_compress.modeling.surgery import configs

        if self._refused:
            raise ValueError("Sparse weights cannot be loaded. " + " ".join(self._refused))
        if not self.quantization_config.is_packed:
            # The model holds plain dense tensors: it may train, be cast and be saved like any other, which
            # Transformers refuses while these flags are set. The config stays, for the next save.
            del model.hf_quantizer, model.quantization_method
            model.is_quantized = False
            for config in configs(model):
                vars(config).pop("_is_quantized", None)
        write_config_(model, self.quantization_config.widths, list(self._sparse.values()))
        return model

    def is_serializable(self) -> bool:
        """Whether such a model can be saved: always."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether such a model can be trained: where its weights are plain tensors."""
        return not self.quantization_config.is_packed


def register() -> None:
    """Makes `from_pretrained` read compressed checkpoints; calling it again changes nothing."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(CompressionConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(CompressionQuantizer)
