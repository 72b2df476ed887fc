"""Tokenizers of every kind, made of a few sentences; each is the same in every process."""

import itertools
import json
from collections.abc import Callable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AlbertTokenizer,
    BertTokenizer,
    DebertaV2Tokenizer,
    GPT2Tokenizer,
    LlamaTokenizer,
    MPNetTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    RobertaTokenizer,
    T5Tokenizer,
    XLMRobertaTokenizer,
)

# What a task is about, and what its users may also write; both are spelled with the same letters.
CORPUS = [
    "the price of the train ticket is too high",
    "the train to the coast was late again",
    "is the ticket valid on the later train",
    "the coast train stops at every station",
]
OTHERS = [
    "unhappy passengers requested a partial refund",
    "restless children crossed the platform without permission",
    "questionable weather makes journeys unexpectedly long",
    "the highest price at the latest station",
]
SENTENCES = CORPUS + OTHERS
WORDS = list(dict.fromkeys(" ".join(SENTENCES).split()))
LETTERS = sorted(set("".join(WORDS)))


def bert(cls: type = BertTokenizer, special: tuple = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")):
    """WordPiece, with every word and every letter."""
    letters = [form for letter in LETTERS for form in (letter, f"##{letter}")]
    pieces = [*special, *letters, "##er", "##ing", "un", "##est", *WORDS]
    return cls(vocab={piece: index for index, piece in enumerate(dict.fromkeys(pieces))})


def mpnet() -> MPNetTokenizer:
    """WordPiece whose special tokens are named as RoBERTa's."""
    return bert(MPNetTokenizer, ("<s>", "<pad>", "</s>", "<unk>", "[UNK]", "<mask>"))


def _byte_level(special: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(SENTENCES, trainer)
    model = json.loads(backend.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def roberta() -> RobertaTokenizer:
    """Byte-level BPE with its special tokens in front."""
    vocab, merges = _byte_level(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    return RobertaTokenizer(vocab=vocab, merges=merges)


def gpt2() -> GPT2Tokenizer:
    """Byte-level BPE with tokens that were added behind the vocabulary, a space before the first word."""
    vocab, merges = _byte_level([])
    tokenizer = GPT2Tokenizer(vocab=vocab, merges=merges, pad_token="<pad>", add_prefix_space=True)
    tokenizer.add_tokens(["@user"])
    return tokenizer


def qwen2() -> Qwen2Tokenizer:
    """Byte-level BPE that splits texts by a pattern of its own."""
    vocab, merges = _byte_level([])
    return Qwen2Tokenizer(vocab=vocab, merges=merges)


def llama() -> LlamaTokenizer:
    """BPE in the style of SentencePiece: bytes to fall back on, whole texts as words, many merges for one token."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=390, special_tokens=special, show_progress=False)
    backend.train_from_iterator(SENTENCES, trainer)
    vocab = backend.get_vocab()
    cuts = ((token, cut) for token in vocab if token not in special for cut in range(1, len(token)))
    pairs = ((vocab[token], token[:cut], token[cut:]) for token, cut in cuts)
    merges = sorted((rank, left, right) for rank, left, right in pairs if left in vocab and right in vocab)
    return LlamaTokenizer(vocab=vocab, merges=[(left, right) for _, left, right in merges])


def _unigram(special: list[str]) -> list[tuple[str, float]]:
    """Every letter, some endings and most words, each less likely than the one before."""
    words = [f"▁{word}" for word in WORDS if not word.endswith("er")]
    pieces = ["▁", "er", "est", "ing", "▁un", *words, *LETTERS]
    return [(piece, 0.0) for piece in special] + [(piece, -5 - index / 16) for index, piece in enumerate(pieces)]


def t5() -> T5Tokenizer:
    """Unigram, whose class knows the id of the unknown token by heart."""
    vocab = _unigram(["<pad>", "</s>", "<unk>"])
    return T5Tokenizer(vocab=vocab + [(f"<extra_id_{index}>", 0.0) for index in range(99, -1, -1)])


def xlm_roberta() -> XLMRobertaTokenizer:
    """Unigram with its mask at the end."""
    vocab = _unigram(["<s>", "<pad>", "</s>", "<unk>"])
    return XLMRobertaTokenizer(vocab=[*vocab, ("<mask>", 0.0)])


def albert() -> AlbertTokenizer:
    """Unigram that strips accents and capitals."""
    return AlbertTokenizer(vocab=_unigram(["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]))


def deberta_v2() -> DebertaV2Tokenizer:
    """Unigram whose class searches for the unknown token."""
    vocab = _unigram(["[PAD]", "[CLS]", "[SEP]", "[UNK]"])
    return DebertaV2Tokenizer(vocab=[*vocab, ("[MASK]", 0.0)])


def bare() -> PreTrainedTokenizerFast:
    """BPE of a class that adds nothing, with marks within and at the end of words, and two post-processors."""
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    forms = [form for letter in LETTERS for form in (letter, f"##{letter}", f"{letter}</w>", f"##{letter}</w>")]
    merges = []
    for word in WORDS:
        symbols = [word[0], *(f"##{letter}" for letter in word[1:-1]), f"##{word[-1]}</w>"]
        made = itertools.accumulate(symbols, lambda left, right: left + right[2:])
        merges += zip(made, symbols[1:] if len(word) > 1 else [], strict=False)
    merges = list(dict.fromkeys(merges))
    pieces = [*special.values(), *forms, *(left + right[2:] for left, right in merges)]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    marks = {"continuing_subword_prefix": "##", "end_of_word_suffix": "</w>"}
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", **marks))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.Sequence([decoders.Replace("##", ""), decoders.BPEDecoder("</w>")])
    ends = [("<s>", 0), ("</s>", 2)]
    template = processors.TemplateProcessing(single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=ends)
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    build.__name__: build
    for build in (albert, bare, bert, deberta_v2, gpt2, llama, mpnet, qwen2, roberta, t5, xlm_roberta)
}
