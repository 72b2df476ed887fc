"""Where things are in each architecture, read off the sources of Transformers: facts, no logic.

This is the only file with names of modules. What each field means is said in `roles.py`.
"""

from dataclasses import replace

from hf_compress.modeling.roles import AttentionLayout, FFNLayout, Layout, PositionBias, Requirement, StackLayout

_BERT_ATTENTION = AttentionLayout(
    module="attention",
    inputs=("self.query", "self.key", "self.value"),
    output="output.dense",
    head_dim="attention_head_size",
    attributes="self",
    head_count=("num_attention_heads",),
    all_heads_width=("all_head_size",),
    has_plain_scores=True,
)
_BERT_STACK = StackLayout(
    blocks="encoder.layer",
    attentions=(
        _BERT_ATTENTION,
        replace(_BERT_ATTENTION, module="crossattention", kind="cross", present_if="add_cross_attention"),
    ),
    ffn=FFNLayout(module="", inputs=("intermediate.dense",), output="output.dense"),
)
_BERT = Layout(
    stacks={"encoder": _BERT_STACK},
    token_embeddings=("embeddings.word_embeddings",),
    position_embeddings=("embeddings.position_embeddings",),
    heads=("classifier", "cls", "qa_outputs"),
    pooler="pooler.dense",
    token_rows=("cls.predictions.decoder.weight", "cls.predictions.decoder.bias", "cls.predictions.bias"),
)
_ROBERTA = replace(
    _BERT,
    heads=("classifier", "lm_head", "qa_outputs"),
    token_rows=("lm_head.decoder.weight", "lm_head.decoder.bias", "lm_head.bias"),
    pad_token_is_fixed=True,
)
_ELECTRA = replace(
    _BERT,
    heads=(
        "classifier",
        "discriminator_predictions",
        "generator_lm_head",
        "generator_predictions",
        "qa_outputs",
        "sequence_summary",
    ),
    token_rows=("generator_lm_head.weight", "generator_lm_head.bias"),
    follows_hidden=("embedding_size",),
)
_MPNET = replace(
    _ROBERTA,
    stacks={
        "encoder": replace(
            _BERT_STACK,
            attentions=(
                replace(
                    _BERT_ATTENTION,
                    inputs=("attn.q", "attn.k", "attn.v"),
                    output="attn.o",
                    attributes="attn",
                    tail=("o",),
                    has_plain_scores=False,
                ),
            ),
            position_bias=PositionBias(
                owner="encoder", table="relative_attention_bias", in_first_block=False, head_count="n_heads"
            ),
        )
    },
)
_DEBERTA_V2 = replace(
    _BERT,
    stacks={
        "encoder": replace(
            _BERT_STACK,
            attentions=(
                replace(
                    _BERT_ATTENTION,
                    inputs=("self.query_proj", "self.key_proj", "self.value_proj"),
                    extra_inputs=("self.pos_key_proj", "self.pos_query_proj"),
                    has_plain_scores=False,
                ),
            ),
            first_stays="its convolution belongs to the first block",
            first_stays_if="conv_kernel_size",
        )
    },
    position_embeddings=("embeddings.position_embeddings", "encoder.rel_embeddings"),
    read_whole=("encoder.rel_embeddings",),
    heads=("classifier", "cls", "lm_predictions", "pooler", "qa_outputs"),
    token_rows=(*_BERT.token_rows, "lm_predictions.lm_head.bias"),
    follows_hidden=("embedding_size", "pooler_hidden_size"),
)
_ALBERT = replace(
    _BERT,
    stacks={
        "encoder": replace(
            _BERT_STACK,
            blocks="encoder.albert_layer_groups.0.albert_layers",
            attentions=(
                replace(
                    _BERT_ATTENTION,
                    inputs=("query", "key", "value"),
                    output="dense",
                    attributes="",
                    tail=("dense", "output_dropout"),
                    post_norm="LayerNorm",
                ),
            ),
            ffn=FFNLayout(module="", inputs=("ffn",), output="ffn_output"),
            is_shared=True,
        )
    },
    heads=("classifier", "predictions", "qa_outputs", "sop_classifier"),
    pooler="pooler",
    token_rows=("predictions.decoder.weight", "predictions.decoder.bias", "predictions.bias"),
    requires=(
        Requirement("num_hidden_groups", 1, "only one group of shared weights is supported"),
        Requirement("inner_group_num", 1, "only one block per group is supported"),
    ),
)
_DISTILBERT = Layout(
    stacks={
        "encoder": StackLayout(
            blocks="transformer.layer",
            attentions=(
                AttentionLayout(
                    module="attention",
                    inputs=("q_lin", "k_lin", "v_lin"),
                    output="out_lin",
                    tail=("out_lin",),
                    head_dim="attention_head_size",
                    head_count=("n_heads",),
                    has_plain_scores=True,
                ),
            ),
            ffn=FFNLayout(module="ffn", inputs=("lin1",), output="lin2"),
            num_layers="n_layers",
            num_heads="n_heads",
            ffn_width="hidden_dim",
        )
    },
    token_embeddings=("embeddings.word_embeddings",),
    position_embeddings=("embeddings.position_embeddings",),
    heads=("classifier", "pre_classifier", "qa_outputs", "vocab_layer_norm", "vocab_projector", "vocab_transform"),
    token_rows=("vocab_projector.weight", "vocab_projector.bias"),
    hidden_size="dim",
)
_MODERNBERT = Layout(
    stacks={
        "encoder": StackLayout(
            blocks="layers",
            attentions=(
                AttentionLayout(
                    module="attn", inputs=("Wqkv",), output="Wo", tail=("Wo", "out_drop"), head_dim="head_dim"
                ),
            ),
            ffn=FFNLayout(module="mlp", inputs=("Wi",), output="Wo", fused=2),
            first_stays="the first block is the one without a norm before its attention",
            is_pre_norm=True,
        )
    },
    token_embeddings=("embeddings.tok_embeddings",),
    heads=("classifier", "decoder", "head"),
    token_rows=("decoder.weight", "decoder.bias"),
    per_layer=("layer_types",),
)
_VIT = Layout(
    stacks={
        "encoder": StackLayout(
            blocks="layers",
            attentions=(
                AttentionLayout(
                    module="attention",
                    inputs=("q_proj", "k_proj", "v_proj"),
                    output="o_proj",
                    tail=("o_proj",),
                    head_dim="head_dim",
                    head_count=("num_attention_heads",),
                    has_plain_scores=True,
                ),
            ),
            ffn=FFNLayout(module="mlp", inputs=("fc1",), output="fc2"),
            is_pre_norm=True,
        )
    },
    token_embeddings=(),
    position_embeddings=("embeddings.position_embeddings",),
    heads=("classifier", "decoder"),
    pooler="pooler.dense",
    follows_hidden=("pooler_output_size",),
    head_dim="head_dim",
)
_GPT2 = Layout(
    stacks={
        "decoder": StackLayout(
            blocks="h",
            attentions=(
                AttentionLayout(
                    module="attn",
                    inputs=("c_attn",),
                    output="c_proj",
                    tail=("c_proj", "resid_dropout"),
                    head_dim="head_dim",
                    head_count=("num_heads",),
                    all_heads_width=("split_size",),
                    has_plain_scores=True,
                    plain_scores_if=(("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)),
                ),
            ),
            ffn=FFNLayout(module="mlp", inputs=("c_fc",), output="c_proj"),
            is_pre_norm=True,
            num_layers="n_layer",
            num_heads="n_head",
            ffn_width="n_inner",
            layers_require=(
                Requirement(
                    "scale_attn_by_inverse_layer_idx", False, "attention scores are scaled by the index of the block"
                ),
            ),
        )
    },
    token_embeddings=("wte",),
    position_embeddings=("wpe",),
    heads=("classifier", "lm_head", "multiple_choice_head", "qa_outputs", "score"),
    token_rows=("lm_head.weight",),
    hidden_size="n_embd",
    requires=(Requirement("add_cross_attention", False, "cross-attention that fuses k and v alone is not supported"),),
)
_QWEN2 = Layout(
    stacks={
        "decoder": StackLayout(
            blocks="layers",
            attentions=(
                AttentionLayout(
                    module="self_attn",
                    inputs=("q_proj", "k_proj", "v_proj"),
                    output="o_proj",
                    tail=("o_proj",),
                    head_dim="head_dim",
                    kv_group_size="num_key_value_groups",
                ),
            ),
            ffn=FFNLayout(
                module="mlp", inputs=("gate_proj", "up_proj"), output="down_proj", width=("intermediate_size",)
            ),
            is_pre_norm=True,
        )
    },
    token_embeddings=("embed_tokens",),
    heads=("lm_head", "qa_outputs", "score"),
    token_rows=("lm_head.weight",),
    per_layer=("layer_types",),
    num_kv_heads="num_key_value_heads",
    head_dim="head_dim",
)
_MISTRAL = _QWEN2
_LLAMA = replace(_MISTRAL, heads_divide_hidden=True)

_T5_ATTENTION = AttentionLayout(
    module="layer.0.SelfAttention",
    inputs=("q", "k", "v"),
    output="o",
    tail=("o",),
    passes_on=("position_bias",),
    head_dim="key_value_proj_dim",
    head_count=("n_heads",),
    all_heads_width=("inner_dim",),
)
_T5_ENCODER = StackLayout(
    blocks="encoder.block",
    attentions=(_T5_ATTENTION,),
    ffn=FFNLayout(
        module="layer.1.DenseReluDense",
        inputs=("wi",),
        output="wo",
        gated_inputs=("wi_0", "wi_1"),
        gated_if="is_gated_act",
    ),
    num_layers="num_layers",
    num_heads="num_heads",
    ffn_width="d_ff",
    own_config="encoder",
    own_num_layers="num_layers",
    is_pre_norm=True,
    position_bias=PositionBias(
        owner="layer.0.SelfAttention",
        table="relative_attention_bias",
        in_first_block=True,
        flag="has_relative_attention_bias",
    ),
)
_T5 = Layout(
    stacks={
        "encoder": _T5_ENCODER,
        "decoder": replace(
            _T5_ENCODER,
            blocks="decoder.block",
            attentions=(_T5_ATTENTION, replace(_T5_ATTENTION, module="layer.1.EncDecAttention", kind="cross")),
            ffn=replace(_T5_ENCODER.ffn, module="layer.2.DenseReluDense"),
            num_layers="num_decoder_layers",
            own_config="decoder",
            cache_num_layers="decoder_layers",
        ),
    },
    token_embeddings=("shared", "encoder.embed_tokens", "decoder.embed_tokens"),
    heads=("classification_head", "classifier", "lm_head", "qa_outputs"),
    token_rows=("lm_head.weight",),
    hidden_size="d_model",
    head_dim="d_kv",
)
_BART_ATTENTION = AttentionLayout(
    module="self_attn",
    inputs=("q_proj", "k_proj", "v_proj"),
    output="out_proj",
    tail=("out_proj",),
    head_dim="head_dim",
    head_count=("num_heads",),
    has_plain_scores=True,
)
_BART_ENCODER = StackLayout(
    blocks="encoder.layers",
    attentions=(_BART_ATTENTION,),
    ffn=FFNLayout(module="", inputs=("fc1",), output="fc2"),
    num_layers="encoder_layers",
    num_heads="encoder_attention_heads",
    ffn_width="encoder_ffn_dim",
)
_BART = Layout(
    stacks={
        "encoder": _BART_ENCODER,
        "decoder": replace(
            _BART_ENCODER,
            blocks="decoder.layers",
            attentions=(_BART_ATTENTION, replace(_BART_ATTENTION, module="encoder_attn", kind="cross")),
            num_layers="decoder_layers",
            num_heads="decoder_attention_heads",
            ffn_width="decoder_ffn_dim",
        ),
    },
    token_embeddings=("shared", "encoder.embed_tokens", "decoder.embed_tokens"),
    position_embeddings=("encoder.embed_positions", "decoder.embed_positions"),
    heads=("classification_head", "lm_head", "qa_outputs"),
    token_rows=("lm_head.weight",),
    token_columns=("final_logits_bias",),
    hidden_size="d_model",
)

LAYOUTS: dict[str, Layout] = {
    "albert": _ALBERT,
    "bart": _BART,
    "bert": _BERT,
    "deberta-v2": _DEBERTA_V2,
    "distilbert": _DISTILBERT,
    "electra": _ELECTRA,
    "gpt2": _GPT2,
    "llama": _LLAMA,
    "mistral": _MISTRAL,
    "modernbert": _MODERNBERT,
    "mpnet": _MPNET,
    "qwen2": _QWEN2,
    "qwen3": _QWEN2,
    "roberta": _ROBERTA,
    "t5": _T5,
    "vit": _VIT,
    "xlm-roberta": _ROBERTA,
}
