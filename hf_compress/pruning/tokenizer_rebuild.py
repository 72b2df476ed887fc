"""The vocabulary of a fast tokenizer: what a piece is spelled with, and the same tokenizer with fewer pieces.

Works on the JSON that the `tokenizers` library makes of a tokenizer, which is also what `tokenizer.json` holds.
"""

import copy
import json
import re
from collections.abc import Collection, Iterable, Iterator
from itertools import pairwise
from typing import Any

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_MODELS = ("BPE", "Unigram", "WordPiece")


class PieceVocabulary:
    """The tokens of a fast tokenizer: the pieces into which its model splits words, and those added beside them.

    Args:
        tokenizer (`PreTrainedTokenizerFast`): It is only read.

    Attributes:
        ids (`dict[str, int]`): The id of every token.

    Raises:
        TypeError: if the tokenizer is not a fast one.
        ValueError: if its model is not WordPiece, BPE or Unigram.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise TypeError(
                f"The tokenizer is a {type(tokenizer).__name__}, which has no tokenizer.json to rebuild with fewer "
                "tokens: load a fast one, with AutoTokenizer.from_pretrained(...). Where there is none, as for models "
                "that read bytes, the vocabulary cannot be cut."
            )
        self._state = json.loads(tokenizer.backend_tokenizer.to_str())
        model = self._state["model"]
        if model["type"] not in _MODELS:
            raise ValueError(
                f"The tokenizer's model is {model['type']}, which knows whole words only, so words that are dropped "
                f"would become unknown: use a checkpoint with one of {', '.join(_MODELS)}."
            )
        self._splits_special_tokens = tokenizer.split_special_tokens
        # Two of the three kinds may lack these keys; a key may also be there and hold None.
        self._prefix: str = model.get("continuing_subword_prefix") or ""
        self._suffix: str = model.get("end_of_word_suffix") or ""
        vocab = model["vocab"]
        self._pieces = vocab if isinstance(vocab, dict) else {piece: index for index, (piece, _) in enumerate(vocab)}
        self._merge_ranks = {tuple(merge): rank for rank, merge in enumerate(model.get("merges", ()))}
        self.ids = {token["content"]: token["id"] for token in self._state["added_tokens"]} | self._pieces
        self._tokens = {index: token for token, index in self.ids.items()}

    def required_ids(self) -> set[int]:
        """Tokens without which the tokenizer would not work as before, whatever the texts are.

        Returns:
            `set[int]`: Special and other added tokens, those that the post-processor adds, the unknown token, the
            bytes to fall back on, and the least likely piece.
        """
        model = self._state["model"]
        required = {holder[key] for holder, key in _id_places(self._state)}
        required.update(self._byte_pieces())
        if model.get("unk_token") is not None:
            required.add(self.ids.get(model["unk_token"]))
        if model["type"] == "Unigram":
            # The price of an unknown character is set below the least likely piece: another one may change the split.
            scores = [score for _, score in model["vocab"]]
            required.add(scores.index(min(scores)))
        return required & self._tokens.keys()

    def character_ids(self, seen: Iterable[int] | None = None) -> set[int]:
        """Pieces of one character, in all forms that the vocabulary has: alone, within and at the end of a word.

        Args:
            seen (`Iterable[int]`, *optional*): Ids of tokens. With it, only the characters of these, of ASCII and
                Latin-1, and those that stand for bytes.

        Returns:
            `set[int]`: Their ids.
        """
        characters = {piece: body for piece in self._pieces if len(body := self._split(piece)[1]) == 1}
        if seen is not None:
            wanted = set(ByteLevel.alphabet()).union(*(self._split(self._tokens[index])[1] for index in seen))
            characters = {piece: body for piece, body in characters.items() if body in wanted}
        return {self._pieces[piece] for piece in characters}

    def unbreakable_ids(self) -> set[int]:
        """Pieces with a character that is no piece of its own: a word with them cannot be split further.

        Returns:
            `set[int]`: Their ids; none where unknown characters fall back on bytes.
        """
        if len(self._byte_pieces()) == 256:
            return set()
        return {
            index
            for piece, index in self._pieces.items()
            if not all(character in self._pieces for character in self._spell(piece))
        }

    def parts(self, index: int) -> set[int]:
        """A token and all pieces that are merged on the way to it.

        Args:
            index (`int`): Id of the token.

        Returns:
            `set[int]`: The token alone, unless it comes about by merges.
        """
        token = self._tokens[index]
        symbols = self._spell(token)
        made = {token, *symbols}
        # One merge at a time, the earliest learned one first, and the leftmost of its places, as the tokenizer does.
        while len(symbols) > 1:
            ranked = [(self._merge_ranks.get(pair), place) for place, pair in enumerate(pairwise(symbols))]
            known = [(rank, place) for rank, place in ranked if rank is not None]
            if not known:
                return {index}
            _, place = min(known)
            symbols[place : place + 2] = [self._merge(*symbols[place : place + 2])]
            made.add(symbols[place])
        return {self.ids[piece] for piece in made if piece in self.ids}

    def order(self, kept: Collection[int], fixed: Collection[int] = ()) -> list[int]:
        """Old ids in the order of the new ones.

        Args:
            kept (`Collection[int]`): Old ids of the tokens to keep.
            fixed (`Collection[int]`, *optional*): Ids that should not change, if enough tokens are kept.

        Returns:
            `list[int]`: Rising, but for the fixed ones; tokens added beside the model's come last, as the `tokenizers`
            library has it.
        """
        model = self._state["model"]
        # Tokenizer classes write the id of the unknown token into their code, T5's for one.
        fixed = {*fixed, model.get("unk_id")}
        own = set(self._pieces.values())
        order = sorted(index for index in kept if index in own and index not in fixed)
        for index in sorted(fixed & own & set(kept)):
            order.insert(index, index)
        return order + sorted(index for index in kept if index not in own)

    def backend(self, order: list[int] | None = None) -> Tokenizer:
        """The tokenizer of the `tokenizers` library, without truncation and padding as long as it has all tokens.

        Args:
            order (`list[int]`, *optional*): Old ids of the tokens to keep, in the order of their new ids.

        Returns:
            `Tokenizer`: A new object.
        """
        state = self._state | {"truncation": None, "padding": None} if order is None else self._cut_state(order)
        backend = Tokenizer.from_str(json.dumps(state))
        backend.encode_special_tokens = self._splits_special_tokens
        if order is not None:
            expected = {self._tokens[old]: new for new, old in enumerate(order)}
            assert backend.get_vocab(with_added_tokens=True) == expected
        return backend

    def _cut_state(self, order: list[int]) -> dict[str, Any]:
        new_ids = {old: new for new, old in enumerate(order)}
        state = copy.deepcopy(self._state)
        model = state["model"]
        pieces = {self._tokens[old]: new for old, new in new_ids.items() if self._tokens[old] in self._pieces}
        if model["type"] == "Unigram":
            model["vocab"] = [model["vocab"][self._pieces[piece]] for piece in pieces]
        else:
            model["vocab"] = pieces
        if model["type"] == "BPE":
            model["merges"] = [
                [left, right]
                for left, right in model["merges"]
                if left in pieces and right in pieces and self._merge(left, right) in pieces
            ]
        for holder, key in _id_places(state):
            holder[key] = new_ids.get(holder[key], holder[key])
        return state

    def _byte_pieces(self) -> set[int]:
        if not self._state["model"].get("byte_fallback"):
            return set()
        return {index for piece, index in self._pieces.items() if _BYTE_PIECE.fullmatch(piece)}

    def _merge(self, left: str, right: str) -> str:
        return left + right[len(self._prefix) :]

    def _split(self, piece: str) -> tuple[str, str, str]:
        """The mark of a piece within a word, its characters, and the mark of the end of a word."""
        start = self._prefix if len(piece) > len(self._prefix) and piece.startswith(self._prefix) else ""
        rest = piece[len(start) :]
        end = self._suffix if len(rest) > len(self._suffix) and rest.endswith(self._suffix) else ""
        return start, rest[: len(rest) - len(end)], end

    def _spell(self, piece: str) -> list[str]:
        """The pieces of one character that make up a piece, whether the vocabulary has them or not."""
        start, body, end = self._split(piece)
        if not body:
            return []
        symbols = [self._prefix + character for character in body]
        symbols[0] = start + body[0]
        symbols[-1] += end
        return symbols


def with_backend(tokenizer: PreTrainedTokenizerFast, backend: Tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer of the same class and with the same settings, with another vocabulary.

    Args:
        tokenizer (`PreTrainedTokenizerFast`): Whose settings to take.
        backend (`Tokenizer`): What splits the texts.

    Returns:
        `PreTrainedTokenizerFast`: A new object.
    """
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer._tokenizer = backend
    # They hold the old vocabulary, and `save_vocabulary` would copy them.
    for name in tokenizer.vocab_files_names:
        vars(tokenizer).pop(name, None)
        tokenizer.init_kwargs.pop(name, None)
    return tokenizer


def _id_places(state: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Where ids of tokens stand beside the vocabulary: containers and keys."""
    yield from ((token, "id") for token in state["added_tokens"])
    if state["padding"] is not None:
        yield state["padding"], "pad_id"
    if state["model"].get("unk_id") is not None:
        yield state["model"], "unk_id"
    if state["post_processor"] is not None:
        yield from _processor_places(state["post_processor"])


def _processor_places(processor: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    for part in processor.get("processors", ()):
        yield from _processor_places(part)
    for special in processor.get("special_tokens", {}).values():
        yield from ((special["ids"], place) for place in range(len(special["ids"])))
    # The processors of BERT and RoBERTa hold pairs of token and id.
    yield from ((processor[name], 1) for name in ("cls", "sep") if name in processor)
