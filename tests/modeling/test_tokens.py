"""A model with fewer tokens predicts the kept ones as before."""

import pytest
import torch

from hf_compress.modeling.blocks import token_embeddings
from hf_compress.modeling.tokens import keep_tokens_
from tests.modeling.tiny import DECODERS, MODEL_TYPES, VOCAB, auto_class, difference, tiny_batch, tiny_model

# 0, 1 and 2 are special and stay; the others change places.
KEPT = [0, 1, 2, 30, 7, 8, 25, 13, 39, 4]
CASES = [
    (model_type, is_tied)
    for model_type in MODEL_TYPES
    for is_tied in (True, False)
    # T5 always ties its embeddings, and an image model has none.
    if model_type != "vit" and (is_tied or model_type != "t5")
]


def logits_of(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def renumber(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    new_ids = torch.full((VOCAB,), -1)
    new_ids[torch.tensor(KEPT)] = torch.arange(len(KEPT))
    return {name: new_ids[tensor] if name.endswith("input_ids") else tensor for name, tensor in inputs.items()}


@pytest.mark.parametrize(("model_type", "is_tied"), CASES)
def test_kept_tokens_are_predicted_as_before(model_type, is_tied, tmp_path):
    model = tiny_model(model_type, tie_word_embeddings=is_tied)
    inputs = tiny_batch(model, tokens=tuple(KEPT[3:]))
    # BART adds a vector to its logits that is zero unless someone sets it.
    for buffer in (buffer for name, buffer in model.named_buffers() if name == "final_logits_bias"):
        buffer.normal_()
    before = logits_of(model, inputs)[..., KEPT]
    keep_tokens_(model, KEPT)
    after = logits_of(model, renumber(inputs))
    assert difference(before, after) <= 1e-5
    assert model.config.vocab_size == len(KEPT) == token_embeddings(model)[0].num_embeddings
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == is_tied
    assert model.get_output_embeddings().out_features == len(KEPT)
    model.save_pretrained(tmp_path)
    reloaded = auto_class(model_type).from_pretrained(tmp_path, attn_implementation="eager")
    assert difference(after, logits_of(reloaded, renumber(inputs))) == 0.0


@pytest.mark.parametrize("model_type", DECODERS)
def test_special_tokens_move_in_both_configs(model_type, tmp_path):
    model = tiny_model(model_type)
    model.generation_config.eos_token_id = [2, 5]
    model.generation_config.decoder_start_token_id = 0
    keep_tokens_(model, [5, 2, 1, 0, 9])
    assert model.config.pad_token_id == 2
    assert model.config.eos_token_id == 1
    assert model.generation_config.eos_token_id == [1, 0]
    assert model.generation_config.decoder_start_token_id == 3
    assert token_embeddings(model)[0].padding_idx in (None, 2)
    model.save_pretrained(tmp_path)
    reloaded = auto_class(model_type).from_pretrained(tmp_path)
    ids = torch.tensor([[4, 3, 4]])
    tokens = reloaded.generate(ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(tokens, model.generate(ids, max_new_tokens=3, do_sample=False))


def test_copies_of_the_config_follow():
    model = tiny_model("t5")
    keep_tokens_(model, [2, 1, 0])
    assert model.decoder.config.vocab_size == 3
    assert model.decoder.config.eos_token_id == model.encoder.config.eos_token_id == 0


def test_deberta_with_the_head_that_reads_the_embeddings(tmp_path):
    model = tiny_model("deberta-v2", legacy=False)
    inputs = tiny_batch(model, tokens=tuple(KEPT[3:]))
    before = logits_of(model, inputs)[..., KEPT]
    keep_tokens_(model, KEPT)
    assert difference(before, logits_of(model, renumber(inputs))) <= 1e-5


@pytest.mark.parametrize(
    ("model_type", "kept", "message"),
    [
        ("bert", [0, 2, 3], "drops 1, which is pad_token_id of the BertConfig"),
        ("llama", [0, 1, 3], "drops 2, which is eos_token_id of the LlamaConfig"),
        ("roberta", [1, 0, 2], r"moves pad_token_id=1 to 0.*token_ids\[1\] is 1"),
        ("mpnet", [1, 0, 2], "moves pad_token_id=1 to 0"),
        ("bert", [], "token_ids is empty"),
        ("bert", [1, 40], r"token_ids has \[40\], but there are 40 tokens"),
        ("bert", [1, 1], r"\[1\] more than once"),
        ("vit", [0], "no tokens to keep"),
    ],
)
def test_wrong_tokens_leave_the_model_as_it_is(model_type, kept, message):
    model = tiny_model(model_type)
    before = {name: parameter.shape for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        keep_tokens_(model, kept)
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == before


def test_lists_of_tokens_for_generation_are_not_renumbered_silently():
    model = tiny_model("gpt2")
    model.generation_config.suppress_tokens = [4]
    with pytest.raises(ValueError, match="suppress_tokens"):
        keep_tokens_(model, KEPT)
