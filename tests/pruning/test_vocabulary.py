"""Fewer tokens: texts of kept pieces are read as before, all others with the same letters."""

import functools
import itertools
import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from hf_compress.modeling.blocks import token_embeddings
from hf_compress.pruning.vocabulary import prune_vocabulary
from hf_compress.pruning.vocabulary_config import VocabularyPruningConfig
from hf_compress.quantization.config import FixedPointConfig
from hf_compress.quantization.quantize import quantize
from tests.modeling.tiny import tiny_model
from tests.pruning.tiny_tokenizers import CORPUS, OTHERS, SENTENCES, TOKENIZERS, bert, roberta, t5

ALL = pytest.mark.parametrize("kind", TOKENIZERS)
# What the tokenizers were not trained on: unknown characters, spaces, special and added tokens.
ODD = ["", "  two  spaces ", "naïve Zürich 你好 😀", "<s> and [MASK] </s>", "thanks @user", "tab\tand\nline"]


def encoder(tokenizer, model_type="bert", class_name=None, **settings):
    """A model with more rows than the tokenizer has tokens, as those that are padded to a multiple."""
    return tiny_model(model_type, class_name or "BertModel", vocab_size=len(tokenizer) + 5, **settings)


def prune(tokenizer, texts=tuple(CORPUS), **settings):
    return prune_vocabulary(encoder(tokenizer), tokenizer, texts, VocabularyPruningConfig(**settings))


def tokens(tokenizer, text, **options):
    return tokenizer.convert_ids_to_tokens(tokenizer(text, **options)["input_ids"])


def states(model, tokenizer, text):
    inputs = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        return model(input_ids=inputs["input_ids"]).last_hidden_state


@functools.cache
def pair(kind):
    """A model and its tokenizer, and both with fewer tokens."""
    tokenizer = TOKENIZERS[kind]()
    model = encoder(tokenizer)
    return model, tokenizer, *prune_vocabulary(model, tokenizer, CORPUS)


@ALL
def test_texts_of_kept_pieces_are_read_as_before(kind):
    model, tokenizer, small, smaller = pair(kind)
    assert len(smaller) < len(tokenizer)
    assert small.config.vocab_size == len(smaller) == token_embeddings(small)[0].num_embeddings
    for text in CORPUS:
        assert tokens(smaller, text) == tokens(tokenizer, text)
        assert torch.equal(states(small, smaller, text), states(model, tokenizer, text))


@ALL
def test_rare_words_are_split_into_kept_pieces(kind):
    _, tokenizer, _, smaller = pair(kind)
    before, after = ([tokens(one, text) for text in OTHERS] for one in (tokenizer, smaller))
    assert sum(map(len, after)) > sum(map(len, before))
    for text, split in zip(OTHERS, after, strict=True):
        assert smaller.unk_token not in split
        assert smaller.decode(smaller(text)["input_ids"], skip_special_tokens=True).strip() == text
    for text in ODD:
        assert tokens(smaller, text).count(smaller.unk_token) <= tokens(tokenizer, text).count(tokenizer.unk_token)
        # Without an unknown token, characters would silently be left out.
        assert smaller.decode(smaller(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"])


@ALL
def test_kept_tokens_keep_their_embeddings_in_their_order(kind):
    model, tokenizer, small, smaller = pair(kind)
    kept = sorted(smaller.get_vocab(), key=smaller.get_vocab().get)
    old_ids = [tokenizer.get_vocab()[token] for token in kept]
    assert old_ids == sorted(old_ids)
    assert [smaller.get_vocab()[token] for token in kept] == list(range(len(kept)))
    assert torch.equal(small.get_input_embeddings().weight, model.get_input_embeddings().weight[old_ids])


@ALL
def test_reloaded_tokenizer_is_the_one_in_memory(kind, tmp_path):
    tokenizer = TOKENIZERS[kind]()
    tokenizer.model_max_length = 77
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.padding_side = "left"
    _, smaller = prune(tokenizer)
    for name in ("model_max_length", "chat_template", "padding_side", "model_input_names", "special_tokens_map"):
        assert getattr(smaller, name) == getattr(tokenizer, name)
    assert type(smaller) is type(tokenizer)
    assert {*tokenizer.get_added_vocab()} == {*smaller.get_added_vocab()}
    assert tokenizer.convert_ids_to_tokens(tokenizer.all_special_ids) == smaller.convert_ids_to_tokens(
        smaller.all_special_ids
    )
    smaller.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(reloaded) is type(tokenizer)
    assert reloaded.get_vocab() == smaller.get_vocab()
    for text in SENTENCES + ODD:
        assert reloaded(text).data == smaller(text).data
        assert reloaded(text, CORPUS[0]).data == smaller(text, CORPUS[0]).data
        assert tokens(smaller, CORPUS[0], text_pair=CORPUS[1]) == tokens(tokenizer, CORPUS[0], text_pair=CORPUS[1])


@ALL
def test_the_inputs_stay_as_they_are(kind):
    tokenizer = TOKENIZERS[kind]()
    model = encoder(tokenizer)
    before = tokenizer.backend_tokenizer.to_str(), {name: tensor.clone() for name, tensor in model.named_parameters()}
    prune_vocabulary(model, tokenizer, CORPUS)
    assert tokenizer.backend_tokenizer.to_str() == before[0]
    assert all(torch.equal(tensor, before[1][name]) for name, tensor in model.named_parameters())
    assert model.config.vocab_size == len(tokenizer) + 5


@ALL
@pytest.mark.parametrize("settings", [{"min_count": 2}, {"min_count": 2, "characters": "corpus"}])
def test_dropped_pieces_of_the_corpus_do_not_become_unknown(kind, settings):
    tokenizer = TOKENIZERS[kind]()
    _, smaller = prune(tokenizer, **settings)
    assert len(smaller) < len(pair(kind)[3])
    for text in CORPUS:
        assert smaller.unk_token is None or smaller.unk_token not in tokens(smaller, text)
        assert smaller.decode(smaller(text)["input_ids"], skip_special_tokens=True).strip() == text


def models_of(*tokenizers):
    return [tokenizer.backend_tokenizer.model for tokenizer in tokenizers]


@pytest.mark.parametrize("kind", ["bare", "gpt2", "llama", "qwen2", "roberta"])
def test_kept_merges_still_make_every_kept_token(kind):
    tokenizer = TOKENIZERS[kind]()
    _, smaller = prune(tokenizer, max_size=len(tokenizer) - 60)
    merges = [tuple(merge) for merge in json.loads(smaller.backend_tokenizer.to_str())["model"]["merges"]]
    old = [tuple(merge) for merge in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]
    assert merges == [merge for merge in old if merge in set(merges)]
    for token in smaller.get_vocab():
        word = token.removesuffix("</w>")
        before, after = ([one.value for one in model.tokenize(word)] for model in models_of(tokenizer, smaller))
        if before == [token]:
            assert after == [token]


def test_rarer_pieces_go_first():
    tokenizer = bert()
    counts = {2: {"train", "ticket", "coast"}, 5: {"the"}, 1: {"price", "station"}}
    for min_count in (1, 2, 5):
        vocab = prune(tokenizer, min_count=min_count)[1].get_vocab()
        for count, words in counts.items():
            assert words & vocab.keys() == (words if count >= min_count else set())
    n_always = len(prune(tokenizer, min_count=1000)[1])
    largest = prune(tokenizer, max_size=n_always + 2)[1]
    assert len(largest) == n_always + 2
    assert {"the", "train"} <= largest.get_vocab().keys()
    with pytest.raises(ValueError, match=rf"max_size={n_always - 1} is less than the {n_always}.*characters='corpus'"):
        prune(tokenizer, max_size=n_always - 1)


def test_named_tokens_stay_and_can_still_be_made():
    tokenizer = roberta()
    assert "Ġrequest" not in prune(tokenizer)[1].get_vocab()
    _, smaller = prune(tokenizer, keep=["Ġrequest"])
    assert tokens(smaller, "a request", add_special_tokens=False) == ["a", "Ġrequest"]


def test_characters_of_the_corpus():
    tokenizer = bert()
    letters = [piece for piece in tokenizer.get_vocab() if len(piece.removeprefix("##")) == 1]
    both = {piece for piece in letters if piece.removeprefix("##") in "".join(CORPUS)}
    assert set(letters) <= prune(tokenizer)[1].get_vocab().keys()
    # The alphabet of this tokenizer is ASCII, which stays.
    assert both < set(letters) <= prune(tokenizer, characters="corpus")[1].get_vocab().keys()
    vocab = {piece: index for index, piece in enumerate(["[UNK]", "[PAD]", "[SEP]", "好", "##好", "你", "##你", "x"])}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    chinese = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")
    assert {"你", "##你"} <= prune(chinese, ["好"])[1].get_vocab().keys()
    kept = prune(chinese, ["好"], characters="corpus")[1].get_vocab().keys()
    assert {"好", "##好", "x"} <= kept
    assert not {"你", "##你"} & kept


def test_words_that_cannot_be_spelled_are_kept_whole():
    pieces = ["[UNK]", "[PAD]", "[CLS]", "a", "##a", "b", "##b", "ab", "##cb", "##ba", "##bb"]
    backend = Tokenizer(models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")
    texts = ["abcbba abb", "abb abb a"]
    assert tokens(tokenizer, texts[0]) == ["ab", "##cb", "##ba", "ab", "##b"]
    _, smaller = prune(tokenizer, texts, min_count=9)
    # There is no "##c": all pieces of the word stay, and no other one.
    assert smaller.get_vocab().keys() == {*pieces} - {"##bb", "[CLS]"}
    assert tokens(smaller, texts[0]) == tokens(tokenizer, texts[0])


def test_an_unknown_character_of_a_unigram_costs_as_much_as_before():
    scores = {"p": -24.0, "xc": -24.0, "px": -1.0, "zz": -40.0}
    pieces = [(special, 0.0) for special in ("<unk>", "<pad>", "</s>")] + list(scores.items())
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")
    # "px" and an unknown "c" cost -1 - 50, and without "zz", the unlikeliest piece, they would cost -1 - 34.
    _, smaller = prune(tokenizer, ["pxc", "px"])
    assert tokens(smaller, "pxc") == tokens(tokenizer, "pxc") == ["p", "xc"]


@pytest.mark.parametrize("build", [processors.BertProcessing, processors.RobertaProcessing])
def test_ids_of_post_processors_follow(build, tmp_path):
    names = ["你", "好", "<pad>", "</s>", "<s>", "<unk>", "a", "##a", "b", "##b"]
    backend = Tokenizer(models.WordPiece({name: index for index, name in enumerate(names)}, unk_token="<unk>"))
    backend.post_processor = build(("</s>", 3), ("<s>", 4))
    backend.enable_padding(pad_id=2, pad_token="<pad>", length=6)
    backend.enable_truncation(5)
    special = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    model = encoder(tokenizer, pad_token_id=2)
    small, smaller = prune_vocabulary(model, tokenizer, ["ab"], VocabularyPruningConfig(characters="corpus"))
    state = json.loads(smaller.backend_tokenizer.to_str())
    assert state["truncation"]["max_length"] == 5
    assert smaller.convert_ids_to_tokens(state["padding"]["pad_id"]) == "<pad>"
    assert small.config.pad_token_id == smaller.pad_token_id
    for second in (None, "ba"):
        encoded = [
            tokens(one, "ab", text_pair=second, padding="max_length", max_length=9) for one in (tokenizer, smaller)
        ]
        assert encoded[0] == encoded[1]


@pytest.mark.parametrize("model_type", ["roberta", "xlm-roberta", "mpnet"])
def test_a_padding_token_that_positions_are_counted_from_stays_in_its_place(model_type):
    # Nothing in front of the padding token is used.
    names = ["", "你", "[PAD]", "[UNK]", "[EOS]", "a", "##a", "b", "##b"]
    backend = Tokenizer(models.WordPiece({name: index for index, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")
    special = {"pad_token_id": 2, "bos_token_id": None, "eos_token_id": 4}
    name = {"roberta": "RobertaModel", "xlm-roberta": "XLMRobertaModel", "mpnet": "MPNetModel"}[model_type]
    model = encoder(tokenizer, model_type, name, **special)
    small, smaller = prune_vocabulary(model, tokenizer, ["ab"], VocabularyPruningConfig(characters="corpus"))
    assert not {"你", ""} & smaller.get_vocab().keys()
    assert small.config.pad_token_id == smaller.pad_token_id == 2
    assert torch.equal(states(small, smaller, "abba"), states(model, tokenizer, "abba"))


def test_texts_are_read_once_and_pairs_count_as_two():
    tokenizer = bert()
    pairs = zip(CORPUS[::2], CORPUS[1::2], strict=True)
    _, smaller = prune(tokenizer, pairs)
    assert smaller.get_vocab() == prune(tokenizer)[1].get_vocab()
    endless = itertools.chain(itertools.repeat(CORPUS[0], 1000), [list(CORPUS)])
    assert prune(tokenizer, endless)[1].get_vocab() == smaller.get_vocab()


def test_stored_truncation_hides_nothing():
    tokenizer = bert()
    tokenizer.backend_tokenizer.enable_truncation(4)
    assert prune(tokenizer)[1].get_vocab() == prune(bert())[1].get_vocab()


def test_special_tokens_in_texts_are_split_where_the_tokenizer_splits_them():
    tokenizer = roberta()
    tokenizer.add_special_tokens({"extra_special_tokens": ["partial refund"]})
    text = "a partial refund"
    assert "partial refund" in tokenizer.tokenize(text)
    tokenizer.split_special_tokens = tokenizer.backend_tokenizer.encode_special_tokens = True
    _, smaller = prune(tokenizer, [*CORPUS, text])
    assert smaller.tokenize(text) == tokenizer.tokenize(text) == ["a", "Ġpart", "ial", "Ġrefun", "d"]


def test_unknown_token_stays_where_its_class_expects_it(tmp_path):
    tokenizer = t5()
    _, smaller = prune(tokenizer)
    assert smaller.unk_token_id == 2
    assert smaller.convert_tokens_to_ids("<extra_id_0>") == len(smaller) - 1


def word_level():
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1, "a": 2}, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")


@pytest.mark.parametrize(
    ("build", "texts", "error", "message"),
    [
        (bert, [], ValueError, "corpus has no texts"),
        (bert, ["", " "], ValueError, "corpus has no texts"),
        (bert, "one text", TypeError, "give a list of strings"),
        (bert, ["a", {"text": "b"}], TypeError, r"Text 1 of the corpus is \{'text': 'b'\}.*dataset\['text'\]"),
        (bert, ["a", None], TypeError, "Text 1 of the corpus is None"),
        (ByT5Tokenizer, CORPUS, TypeError, "ByT5Tokenizer.*load a fast one"),
        (word_level, ["a"], ValueError, "WordLevel.*would become unknown.*BPE, Unigram, WordPiece"),
    ],
)
def test_what_cannot_be_counted_is_refused(build, texts, error, message):
    tokenizer = build()
    with pytest.raises(error, match=message):
        prune(tokenizer, texts)


def test_a_model_that_does_not_fit_is_refused():
    tokenizer = bert()
    with pytest.raises(ValueError, match="ids up to 97, but BertModel has embeddings for 40 tokens"):
        prune_vocabulary(tiny_model("bert", "BertModel"), tokenizer, CORPUS)
    with pytest.raises(ValueError, match="ViTForImageClassification has no tokens"):
        prune_vocabulary(tiny_model("vit"), tokenizer, CORPUS)
    model = tiny_model("gpt2", vocab_size=200, pad_token_id=195)
    with pytest.raises(ValueError, match="pad_token_id=195 of the GPT2Config is the id of no token"):
        prune_vocabulary(model, tokenizer, CORPUS)
    with pytest.raises(ValueError, match=r"keep has \['nosuch'\]"):
        prune(tokenizer, keep=["the", "nosuch"])


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"min_count": 0}, ValueError, "min_count=0"),
        ({"max_size": 0}, ValueError, "max_size=0"),
        ({"max_size": 1.5}, ValueError, "max_size=1.5"),
        ({"characters": "some"}, ValueError, "'all' or 'corpus'"),
        ({"keep": "the"}, TypeError, r"give \('the',\)"),
    ],
)
def test_wrong_settings(settings, error, message):
    with pytest.raises(error, match=message):
        VocabularyPruningConfig(**settings)


@ALL
def test_filled_up_to_a_size(kind):
    tokenizer = TOKENIZERS[kind]()
    _, alone = prune(tokenizer, texts=SENTENCES[:1])
    size = (len(alone) + len(tokenizer)) // 2
    _, smaller = prune(tokenizer, texts=SENTENCES[:1], max_size=size, fill=True)
    assert len(alone) < len(smaller) <= size
    assert set(alone.get_vocab()) <= set(smaller.get_vocab())
    # The lowest numbers first: what was left out is numbered higher than what was added, or needs more room.
    ids = tokenizer.get_vocab()
    added = sorted(ids[piece] for piece in set(smaller.get_vocab()) - set(alone.get_vocab()))
    free = [piece for piece in set(ids) - set(alone.get_vocab()) if piece[0] not in "<["]
    assert added[0] == min(ids[piece] for piece in free)


def test_filling_needs_a_size():
    with pytest.raises(ValueError, match="fill=True needs a size to fill up to: give max_size"):
        VocabularyPruningConfig(fill=True)


def test_rounded_tables_are_refused():
    tokenizer = bert()
    quantized = quantize(encoder(tokenizer), FixedPointConfig(bits=8))
    with pytest.raises(ValueError, match="embeddings of BertModel are quantized.*full-precision model, and quantize"):
        prune_vocabulary(quantized, tokenizer, CORPUS)
