"""What can be chosen about a smaller vocabulary."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Characters = Literal["all", "corpus"]


@dataclass
class VocabularyPruningConfig:
    """Which tokens a model keeps: those that a corpus uses, and what it takes to spell all other words."""

    min_count: int = field(
        default=1,
        metadata={
            "help": "How often a word piece must occur in the corpus to be kept, at least 1. With 1, the corpus is "
            "tokenized as before (as in TextPruner)."
        },
    )
    max_size: int | None = field(
        default=None,
        metadata={
            "help": "Largest number of tokens to keep, special ones and single characters included; the most frequent "
            "ones stay. Without it, `min_count` alone decides."
        },
    )
    fill: bool = field(
        default=False,
        metadata={
            "help": "Whether tokens that the corpus lacks take the room that is left below `max_size`, those with the "
            "lowest numbers first: vocabularies are usually numbered from frequent to rare, and new texts have words "
            "that a small corpus lacks."
        },
    )
    characters: Characters = field(
        default="all",
        metadata={
            "help": "Which of the vocabulary's single characters to keep, of which words are spelled that the kept "
            "pieces do not cover: 'all', or 'corpus' for those of the corpus, of ASCII, Latin-1 and of byte-level "
            "vocabularies. 'corpus' saves thousands of tokens of a multilingual vocabulary, but characters that the "
            "corpus lacks become unknown, unless the tokenizer falls back on bytes."
        },
    )
    keep: Sequence[str] = field(
        default=(),
        metadata={"help": "Tokens to keep however rare they are, spelled as in `tokenizer.get_vocab()`."},
    )

    def __post_init__(self) -> None:
        for name, value in (("min_count", self.min_count), ("max_size", self.max_size)):
            if value is None and name == "max_size":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r} counts tokens: give a whole number of at least 1.")
        if self.fill and self.max_size is None:
            raise ValueError("fill=True needs a size to fill up to: give max_size, such as 12000.")
        if self.characters not in Characters.__args__:
            raise ValueError(f"characters={self.characters!r} is unknown: give 'all' or 'corpus'.")
        if isinstance(self.keep, str):
            raise TypeError(
                f"keep={self.keep!r} is one string, and a list of tokens is needed: give ({self.keep!r},)."
            )
