"""Fewer tokens: a model and its tokenizer cut to the word pieces that a corpus uses."""

import copy
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from tokenizers import Tokenizer
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_compress.modeling.blocks import find_layout, token_embeddings
from hf_compress.modeling.surgery import configs
from hf_compress.modeling.tasks import unwrap
from hf_compress.modeling.tokens import keep_tokens_
from hf_compress.pruning.tokenizer_rebuild import PieceVocabulary, with_backend
from hf_compress.pruning.vocabulary_config import VocabularyPruningConfig

logger = logging.getLogger(__name__)

_BATCH_TEXTS = 256
# Tokens that are kept free for others, such as [unused7] and <extra_id_3>: no text has them.
_PLACEHOLDER = re.compile(r"\[.+\]|<.+>")


def prune_vocabulary(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    texts: Iterable[str | Sequence[str]],
    config: VocabularyPruningConfig | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Keeps the word pieces that a corpus uses; other words are split into these, down to single characters.

    Texts whose pieces are all kept are tokenized as before, and the model makes the same of them. No word of the
    corpus becomes unknown that was not so before. Both results load with plain `from_pretrained`.

    Args:
        model (`PreTrainedModel`): A text model.
        tokenizer (`PreTrainedTokenizerFast`): Its tokenizer, a fast one of the kind WordPiece, BPE or Unigram.
        texts (`Iterable`): The corpus: strings, or tuples of strings where an input is several texts. Read once, and
            never held as a whole.
        config (`VocabularyPruningConfig`, *optional*): What to keep.

    Returns:
        `tuple[PreTrainedModel, PreTrainedTokenizerFast]`: New ones; special and added tokens are all there.

    Raises:
        ValueError: if the model has no tokens, the two do not fit, the corpus is empty, or what must be kept is more
            than `max_size`.
        TypeError: if the tokenizer is not a fast one, or the texts are no texts.
    """
    config = config or VocabularyPruningConfig()
    vocabulary = PieceVocabulary(tokenizer)
    _check_fit(model, vocabulary)
    required = vocabulary.required_ids() | _config_ids(model, vocabulary)
    required |= _parts(vocabulary, _ids_to_keep(vocabulary, config.keep))
    counts, whole_words = _count(vocabulary.backend(), texts, vocabulary.unbreakable_ids())
    required |= _parts(vocabulary, whole_words)
    required |= vocabulary.character_ids(counts if config.characters == "corpus" else None)
    kept = _choose(vocabulary, required, counts, config)
    has_fixed_pad = find_layout(unwrap(model).config).pad_token_is_fixed
    order = vocabulary.order(kept, fixed=[unwrap(model).config.pad_token_id] if has_fixed_pad else [])
    pruned = copy.deepcopy(model)
    keep_tokens_(pruned, order)
    logger.info("Kept %d of %d tokens.", len(order), len(vocabulary.ids))
    return pruned, with_backend(tokenizer, vocabulary.backend(order))


def _check_fit(model: PreTrainedModel, vocabulary: PieceVocabulary) -> None:
    embeddings = token_embeddings(model)
    name = type(unwrap(model)).__name__
    if not embeddings:
        raise ValueError(f"{name} has no tokens to prune: its inputs are not text. Give a text model.")
    if not embeddings[0].weight.is_floating_point():
        raise ValueError(
            f"The embeddings of {name} are quantized, and their rows cannot be cut: cut the vocabulary of the "
            "full-precision model, and quantize it then."
        )
    n_rows, largest = embeddings[0].num_embeddings, max(vocabulary.ids.values())
    if largest >= n_rows:
        raise ValueError(
            f"The tokenizer has ids up to {largest}, but {name} has embeddings for {n_rows} tokens: give the "
            "tokenizer that belongs to the model, or, where tokens were added to it, call "
            "model.resize_token_embeddings(len(tokenizer)) and train them first."
        )


def _config_ids(model: PreTrainedModel, vocabulary: PieceVocabulary) -> set[int]:
    """Tokens that the configs of a model name, which it cannot do without."""
    model = unwrap(model)
    n_rows = token_embeddings(model)[0].num_embeddings
    known, found = set(vocabulary.ids.values()), set()
    for config in configs(model) + ([model.generation_config] if model.can_generate() else []):
        for key, value in vars(config).items():
            ids = value if isinstance(value, list) else [value]
            if not key.endswith("_token_id") or not all(isinstance(index, int) for index in ids):
                continue
            used = {index for index in ids if 0 <= index < n_rows}
            if used - known:
                raise ValueError(
                    f"{key}={value} of the {type(config).__name__} is the id of no token of the tokenizer, so it "
                    f"cannot be kept: set {key} to the id of the right token, or to None."
                )
            found |= used
    return found


def _ids_to_keep(vocabulary: PieceVocabulary, tokens: Sequence[str]) -> set[int]:
    unknown = [token for token in tokens if token not in vocabulary.ids]
    if unknown:
        raise ValueError(
            f"keep has {unknown}, which are no tokens of the tokenizer: spell them as in tokenizer.get_vocab(), or "
            "give the tokens that tokenizer.tokenize(...) makes of the words."
        )
    return {vocabulary.ids[token] for token in tokens}


def _parts(vocabulary: PieceVocabulary, ids: Iterable[int]) -> set[int]:
    return {part for index in ids for part in vocabulary.parts(index)}


def _count(backend: Tokenizer, texts: Iterable, unbreakable: set[int]) -> tuple[Counter[int], set[int]]:
    """How often each token occurs, and all tokens of words with unbreakable pieces.

    Such a word has to be split as before, or it may become unknown.
    """
    counts: Counter[int] = Counter()
    bound: set[int] = set()
    for batch in _batches(texts):
        for encoding in backend.encode_batch(batch, add_special_tokens=False):
            ids = encoding.ids
            counts.update(ids)
            if not unbreakable.isdisjoint(ids):
                words = encoding.word_ids
                whole = {word for index, word in zip(ids, words, strict=True) if index in unbreakable}
                bound.update(index for index, word in zip(ids, words, strict=True) if word in whole)
    if not counts:
        raise ValueError("The corpus has no texts that are not empty, so no tokens are used in it: give texts.")
    return counts, bound


def _batches(texts: Iterable) -> Iterator[list[str]]:
    if isinstance(texts, str):
        raise TypeError("texts is one string, which is no corpus: give a list of strings.")
    n_rows = len(texts) if hasattr(texts, "__len__") else None
    rows, n_read = iter(texts), 0
    with tqdm(total=n_rows, desc="Counting tokens", unit="text") as bar:
        while batch := list(islice(rows, _BATCH_TEXTS)):
            yield [text for number, row in enumerate(batch, start=n_read) for text in _strings(row, number)]
            n_read += len(batch)
            bar.update(len(batch))


def _strings(row: Any, number: int) -> Sequence[str]:
    strings = [row] if isinstance(row, str) else row
    if not isinstance(strings, list | tuple) or not all(isinstance(text, str) for text in strings):
        raise TypeError(
            f"Text {number} of the corpus is {row!r:.80}, but a text is a string, or a tuple of strings: give "
            "strings, for instance dataset['text'] instead of dataset."
        )
    return strings


def _choose(
    vocabulary: PieceVocabulary, required: set[int], counts: Counter[int], config: VocabularyPruningConfig
) -> set[int]:
    limit = len(vocabulary.ids) if config.max_size is None else config.max_size
    if len(required) > limit:
        raise ValueError(
            f"max_size={limit} is less than the {len(required)} tokens that cannot be dropped, which are special, "
            f"single characters, or named by keep or the model's config: give max_size={len(required)} or more"
            + ("." if config.characters == "corpus" else ", or characters='corpus' to keep fewer characters.")
        )
    kept = set(required)
    frequent = [index for index, count in counts.items() if count >= config.min_count]
    ranked = sorted(frequent, key=lambda index: (-counts[index], index))
    if config.fill:
        ranked += sorted(index for piece, index in vocabulary.ids.items() if not _PLACEHOLDER.fullmatch(piece))
    for index in ranked:
        added = vocabulary.parts(index) - kept
        if len(kept) + len(added) <= limit:
            kept |= added
    return kept
