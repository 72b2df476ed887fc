"""Whether a model, its tokenizer and its rows fit each other."""

from typing import TYPE_CHECKING

import torch

from hf_compress.modeling.blocks import find_stacks
from hf_compress.modeling.tasks import forward_columns

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_tokenizer(tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel") -> None:
    """Raises if a tokenizer cannot feed a model.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
        model (`PreTrainedModel`): The model.

    Raises:
        ValueError: if it knows no words, can produce ids that the model has no embedding for, or cannot pad.
    """
    # Where its files are missing, `AutoTokenizer` makes one of special tokens, and of T5's one more.
    words = tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens)
    if len(words) < 2:
        raise ValueError(
            f"The tokenizer of {tokenizer.name_or_path!r} knows special tokens alone, so every text would be unknown "
            "to it: its files are not there. Save the tokenizer that the model was trained with in the same folder, "
            "by tokenizer.save_pretrained."
        )
    rows = model.get_input_embeddings().num_embeddings
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path!r} has ids up to {largest}, but the model embeds only {rows} "
            "tokens: they do not belong together. Load both from the same folder, or call "
            "model.resize_token_embeddings."
        )
    ours, theirs = tokenizer.pad_token_id, model.config.pad_token_id
    # A decoder's head reads the last token that is not the config's padding.
    if None in (ours, theirs) or (ours != theirs and find_stacks(model).keys() == {"decoder"}):
        raise ValueError(
            f"Padding is undefined or differs (tokenizer {ours}, model config {theirs}): set tokenizer.pad_token = "
            "tokenizer.eos_token and model.config.pad_token_id = tokenizer.pad_token_id, and save both."
        )


def check_length(model: "PreTrainedModel", dataset: "Dataset") -> None:
    """Raises if a model cannot read the longest row, by letting it try.

    Args:
        model (`PreTrainedModel`): The model.
        dataset (`Dataset`): Tokenized rows, as `tokenize` returns them.

    Raises:
        ValueError: if it fails, as it does beyond the last position that it has an embedding for.
    """
    lengths = list(dataset["length"])
    row = dataset[lengths.index(max(lengths))]
    names = forward_columns(model) & set(row) - {"labels"}
    inputs = {name: torch.tensor([row[name]], device=model.device) for name in names}
    try:
        with torch.inference_mode():
            model(**inputs)
    except (IndexError, RuntimeError) as error:
        raise ValueError(
            f"{type(model).__name__} cannot read the longest row, of {max(lengths)} tokens: {error}. "
            "Give --max-length at most the number of positions that the model has, 512 for most."
        ) from error
