"""Tiny models whose projections have widths that 4-bit kernels take."""

from transformers import BitsAndBytesConfig, PreTrainedModel

from tests.modeling.tiny import tiny_config, tiny_model

HIDDEN, FFN, HEAD = 64, 128, 16
# Names of the widths in the configs.
_WIDTHS = {
    HIDDEN: ("hidden_size", "dim", "n_embd", "d_model", "embedding_size"),
    FFN: ("intermediate_size", "hidden_dim", "n_inner", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim"),
    HEAD: ("d_kv", "head_dim"),
}

INT8 = BitsAndBytesConfig(load_in_8bit=True)
FP4 = BitsAndBytesConfig(load_in_4bit=True)
NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype="bfloat16",
)


def wide_model(model_type: str, class_name: str | None = None, **settings) -> PreTrainedModel:
    """As `tiny_model`, with the same number of heads and layers."""
    known = vars(tiny_config(model_type))
    widths = {name: width for width, names in _WIDTHS.items() for name in names if name in known}
    return tiny_model(model_type, class_name, **(widths | settings))
