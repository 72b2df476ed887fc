"""Cutting the vocabulary of a model in place; the tokenizer must be cut to match."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from hf_compress.modeling.blocks import find_layout, token_embeddings
from hf_compress.modeling.projections import check_indices, keep
from hf_compress.modeling.surgery import configs
from hf_compress.modeling.tasks import unwrap

# Settings of `generate` that hold token ids in nested forms: left alone, they would silently mean other tokens.
_GENERATION_TOKEN_SETTINGS = (
    "bad_words_ids",
    "begin_suppress_tokens",
    "force_words_ids",
    "forced_decoder_ids",
    "sequence_bias",
    "suppress_tokens",
)


def keep_tokens_(model: nn.Module, token_ids: Iterable[int]) -> None:
    """Keep some tokens of the vocabulary: token `token_ids[i]` becomes token `i`.

    Cuts the token embeddings and the language-modelling head with its bias, leaves tied weights tied, and rewrites
    `vocab_size` and every `..._token_id` in the config and the generation config.

    Args:
        model (`nn.Module`): A Transformers model, wrapped or not.
        token_ids (`Iterable[int]`): Ids of the tokens to keep, in the order of their new ids.

    Raises:
        ValueError: if an id is wrong, a special token is dropped or may not move, the generation config holds lists of
            token ids, or the model has no tokens.
    """
    model = unwrap(model)
    layout = find_layout(model.config)
    embeddings = token_embeddings(model)
    if not embeddings:
        raise ValueError(f"{type(model).__name__} has no tokens to keep: its inputs are not text.")
    kept = check_indices(token_ids, embeddings[0].num_embeddings, "token_ids", "tokens")
    new_ids = {old: new for new, old in enumerate(kept)}
    settings = configs(model) + ([model.generation_config] if model.can_generate() else [])
    updates = [_special_tokens(config, new_ids, embeddings[0].num_embeddings) for config in settings]
    pad = model.config.pad_token_id
    if layout.pad_token_is_fixed and new_ids[pad] != pad:
        raise ValueError(
            f"token_ids moves pad_token_id={pad} to {new_ids[pad]}, but {type(model).__name__} counts positions from "
            f"that id: order token_ids so that token_ids[{pad}] is {pad}."
        )
    _cut_tensors_(model, embeddings, kept)
    for embedding in embeddings:
        embedding.num_embeddings = len(kept)
        embedding.padding_idx = new_ids.get(embedding.padding_idx)
    for config, update in zip(settings, updates, strict=True):
        for key, value in update.items():
            setattr(config, key, value)
    for config in configs(model):
        config.vocab_size = len(kept)


def _special_tokens(config: Any, new_ids: dict[int, int], vocab_size: int) -> dict[str, int | list[int]]:
    """The special tokens of a config under their new ids; ids outside of the old vocabulary name no token and stay."""
    update = {}
    for key, value in vars(config).items():
        if key in _GENERATION_TOKEN_SETTINGS and value is not None:
            raise ValueError(
                f"{type(config).__name__}.{key}={value} lists tokens by their old ids: set it to None, cut the "
                "vocabulary, then set it with the new ids."
            )
        ids = value if isinstance(value, list) else [value]
        if not key.endswith("_token_id") or not all(isinstance(index, int) for index in ids):
            continue
        lost = [index for index in ids if 0 <= index < vocab_size and index not in new_ids]
        if lost:
            raise ValueError(f"token_ids drops {lost[0]}, which is {key} of the {type(config).__name__}: keep it too.")
        moved = [new_ids.get(index, index) for index in ids]
        update[key] = moved if isinstance(value, list) else moved[0]
    return update


def _cut_tensors_(model: nn.Module, embeddings: list[nn.Embedding], kept: list[int]) -> None:
    layout = find_layout(model.config)
    present = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    places = [(embedding, "weight", 0) for embedding in embeddings]
    for paths, axis in ((layout.token_rows, 0), (layout.token_columns, 1)):
        for path in paths:
            owner, _, name = path.rpartition(".")
            if path in present:
                places.append((model.get_submodule(owner), name, axis))
    # Keyed by identity, and holding the old tensor so that its identity is not reused: tied weights are cut once.
    cut: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for owner, name, axis in places:
        old = getattr(owner, name)
        if id(old) not in cut:
            cut[id(old)] = (old, keep(old, kept, axis))
        setattr(owner, name, cut[id(old)][1])
        if isinstance(owner, nn.Linear):
            owner.out_features = len(kept)
