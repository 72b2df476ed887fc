"""Eight-bit integers with activations rounded while the model runs: from a live model to a quantized one."""

from torch import nn
from transformers import PreTrainedModel

from hf_compress.formats.int8 import Int8Linear
from hf_compress.formats.packed import PackedModule
from hf_compress.modeling.projections import read_matrix
from hf_compress.quantization.config import Int8DynamicConfig
from hf_compress.quantization.modules import choose_modules, replace_


def quantize_int8_(model: PreTrainedModel, config: Int8DynamicConfig, data: None = None) -> None:
    """Rounds the projections of a model to eight bits, in place.

    Args:
        model (`PreTrainedModel`): A model of a known architecture, in floating point.
        config (`Int8DynamicConfig`): What stays in floating point.
        data (`None`, *optional*): Not needed: activations are measured token by token.

    Raises:
        ValueError: if the model is quantized already, or a pattern matches nothing.
    """
    replace_(model, choose_modules(model, config.exclude, config.embeddings), _pack)


def _pack(name: str, module: nn.Module) -> PackedModule:
    return Int8Linear.from_float(read_matrix(module), module.bias)
