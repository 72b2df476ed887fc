"""The loader: rebuilds the skeleton of a compressed model before its weights are loaded.

Transformers calls whatever rebuilds modules before loading a quantizer; see the design for why this one also loads
models that are only pruned.
"""

from typing import TYPE_CHECKING, Any

from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from hf_compress.checkpoint.config import METHOD, CompressionConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CompressionQuantizer(HfQuantizer):
    """Loads checkpoints whose `quantization_config` is a `CompressionConfig`."""

    def _process_model_before_weight_loading(self, model: "PreTrainedModel", **_: Any) -> None:
        # Imported here because importing hf_compress must not import the models' code.
        from hf_compress.checkpoint.widths import cut_to_widths_

        cut_to_widths_(model, self.quantization_config.widths)

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **_: Any) -> "PreTrainedModel":
        from hf_compress.modeling.surgery import configs

        # A model that is only cut holds plain floats: it may train, be cast and be saved like any other, which
        # Transformers refuses while these flags are set. The config stays, for the next save.
        del model.hf_quantizer, model.quantization_method
        model.is_quantized = False
        for config in configs(model):
            vars(config).pop("_is_quantized", None)
        return model

    def is_serializable(self) -> bool:
        """Whether such a model can be saved: always."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether such a model can be trained: always."""
        return True


def register() -> None:
    """Makes `from_pretrained` read compressed checkpoints; calling it again changes nothing."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(CompressionConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(CompressionQuantizer)
