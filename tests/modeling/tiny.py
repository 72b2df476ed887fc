"""Tiny models of every architecture with random weights, in which nothing is zero, one or alike by accident."""

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

HEADS, FFN, VOCAB, LAYERS = 4, 24, 40, 3

_BERT = {"hidden_size": 32, "num_attention_heads": HEADS, "intermediate_size": FFN, "num_hidden_layers": LAYERS}
_LLAMA = _BERT | {"num_attention_heads": 2 * HEADS, "num_key_value_heads": HEADS, "bos_token_id": 0, "eos_token_id": 2}
_SETTINGS = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "electra": _BERT | {"embedding_size": 16},
    "mpnet": _BERT,
    "albert": _BERT | {"embedding_size": 16, "bos_token_id": 0, "eos_token_id": 2},
    "deberta-v2": _BERT
    | {
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "position_buckets": 8,
        "max_relative_positions": 32,
        "norm_rel_ebd": "layer_norm",
        "type_vocab_size": 2,
    },
    "distilbert": {"dim": 32, "n_heads": HEADS, "hidden_dim": FFN, "n_layers": LAYERS},
    "modernbert": _BERT
    | {
        "num_hidden_layers": 4,
        "local_attention": 4,
        "bos_token_id": 0,
        "cls_token_id": 0,
        "eos_token_id": 2,
        "sep_token_id": 2,
    },
    "gpt2": {
        "n_embd": 32,
        "n_head": HEADS,
        "n_inner": FFN,
        "n_layer": LAYERS,
        "bos_token_id": 0,
        "eos_token_id": 2,
    },
    "llama": _LLAMA | {"head_dim": 6},
    "mistral": _LLAMA | {"sliding_window": 5},
    "qwen2": _LLAMA | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    "qwen3": _LLAMA | {"head_dim": 6},
    "vit": _BERT | {"image_size": 8, "patch_size": 4, "num_channels": 2},
    "t5": {
        "d_model": 32,
        "d_kv": 6,
        "num_heads": HEADS,
        "d_ff": FFN,
        "num_layers": LAYERS,
        "num_decoder_layers": LAYERS,
        "feed_forward_proj": "gated-gelu",
        "decoder_start_token_id": 1,
        "eos_token_id": 2,
    },
    "bart": {
        "d_model": 32,
        "encoder_layers": LAYERS,
        "decoder_layers": LAYERS,
        "encoder_attention_heads": HEADS,
        "decoder_attention_heads": HEADS,
        "encoder_ffn_dim": FFN,
        "decoder_ffn_dim": FFN,
    },
}
MODEL_TYPES = sorted(_SETTINGS)
STACK_WIDE = ("mpnet", "t5")
DECODERS = ("bart", "gpt2", "llama", "mistral", "qwen2", "qwen3", "t5")

_FAMILY = {
    "albert": "Albert",
    "bart": "Bart",
    "bert": "Bert",
    "deberta-v2": "DebertaV2",
    "distilbert": "DistilBert",
    "electra": "Electra",
    "gpt2": "GPT2",
    "llama": "Llama",
    "mistral": "Mistral",
    "modernbert": "ModernBert",
    "mpnet": "MPNet",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "roberta": "Roberta",
    "t5": "T5",
    "vit": "ViT",
    "xlm-roberta": "XLMRoberta",
}


_TASKS = (
    "Model",
    "EncoderModel",
    "LMHeadModel",
    "DoubleHeadsModel",
    "ForCausalLM",
    "ForConditionalGeneration",
    "ForImageClassification",
    "ForMaskedImageModeling",
    "ForMaskedLM",
    "ForMultipleChoice",
    "ForNextSentencePrediction",
    "ForPreTraining",
    "ForQuestionAnswering",
    "ForSequenceClassification",
    "ForTokenClassification",
)
_AUTO = {
    "bart": transformers.AutoModelForSeq2SeqLM,
    "t5": transformers.AutoModelForSeq2SeqLM,
    "vit": transformers.AutoModelForImageClassification,
    **dict.fromkeys(("gpt2", "llama", "mistral", "qwen2", "qwen3"), transformers.AutoModelForCausalLM),
}


def class_names(model_type: str) -> list[str]:
    """Names of the classes of this architecture that Transformers has, headless ones first."""
    names = (_FAMILY[model_type] + task for task in _TASKS)
    return [name for name in names if hasattr(transformers, name)]


def auto_class(model_type: str) -> type:
    """The Auto class for the main task: predicting tokens, or the class of an image."""
    return _AUTO.get(model_type, transformers.AutoModelForMaskedLM)


def supports(model_type: str, attention: str) -> bool:
    """Whether the architecture has this attention implementation."""
    return attention == "eager" or getattr(transformers, class_names(model_type)[0])._supports_sdpa


def tiny_config(model_type: str, attention: str = "eager", **settings) -> PreTrainedConfig:
    """A small config; `settings` override its values."""
    common = {"pad_token_id": 1, "vocab_size": VOCAB, "max_position_embeddings": 48}
    if model_type == "t5":
        del common["max_position_embeddings"]
    if model_type == "vit":
        common = {}
    config = AutoConfig.for_model(model_type, **(common | _SETTINGS[model_type] | settings))
    config._attn_implementation = attention
    return config


def tiny_model(
    model_type: str, class_name: str | None = None, attention: str = "eager", **settings
) -> PreTrainedModel:
    """A model, by default of the main task, whose every parameter is random, biases and norms included."""
    config = tiny_config(model_type, attention, **settings)
    model = getattr(transformers, class_name)(config) if class_name else auto_class(model_type).from_config(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.2 if parameter.ndim > 1 else 1 + noise * 0.3)
    return model.eval()


def tiny_batch(model: PreTrainedModel, tokens: tuple[int, ...] = tuple(range(3, VOCAB))) -> dict[str, torch.Tensor]:
    """Two rows of unlike lengths made of `tokens`, 0 first and 2 last, padded with 1 on the right; or two images."""
    generator = torch.Generator().manual_seed(2)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 2, 8, 8, generator=generator)}
    input_ids = torch.tensor(tokens)[torch.randint(len(tokens), (2, 8), generator=generator)]
    input_ids[:, 0] = 0
    input_ids[0, 7] = input_ids[1, 5] = 2
    input_ids[1, 6:] = 1
    inputs = {"input_ids": input_ids, "attention_mask": (input_ids != 1).long()}
    if type(model).__name__ in ("T5Model", "T5ForConditionalGeneration"):
        inputs["decoder_input_ids"] = input_ids[:, :5]
    if type(model).__name__.endswith("MultipleChoice"):
        inputs = {name: tensor[:, None].repeat(1, 3, 1) for name, tensor in inputs.items()}
    return inputs


def predict(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """All that a model predicts, as one row per sample."""
    with torch.no_grad():
        outputs = model(**inputs)
    tensors = [value for name, value in outputs.items() if isinstance(value, torch.Tensor) and name != "loss"]
    return torch.cat([tensor.reshape(tensor.shape[0], -1) for tensor in tensors], dim=1)


def difference(first: torch.Tensor, second: torch.Tensor) -> float:
    """Largest absolute difference."""
    return (first - second).abs().max().item()
