"""Texts to time models on, whatever their tokenizers are."""

from collections.abc import Sequence

import torch
from torch import nn

from hf_compress.modeling.blocks import token_embeddings
from hf_compress.modeling.tasks import forward_columns, unwrap


def sample_batch(models: Sequence[nn.Module], size: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Texts of one length, of usual tokens that all models know; each ends as texts of the first model do.

    Args:
        models (sequence of `nn.Module`): Transformers models of texts.
        size (`int`): Texts.
        length (`int`): Tokens of each.
        seed (`int`, *optional*, defaults to `0`): Of the choice of tokens.

    Returns:
        `dict[str, torch.Tensor]`: Inputs of shape `(size, length)`, on the first model's device.
    """
    n_tokens = min(table.num_embeddings for model in models for table in token_embeddings(model))
    first = unwrap(models[0])
    # Not all configs have each of them, and some have several of a kind.
    given = {name: ids for name, ids in vars(first.config).items() if name.endswith("_token_id")}
    special = {name: ids if isinstance(ids, list) else [ids] for name, ids in given.items() if ids is not None}
    usual = torch.tensor(sorted(set(range(n_tokens)) - {token for ids in special.values() for token in ids}))
    ids = usual[torch.randint(len(usual), (size, length), generator=torch.Generator().manual_seed(seed))]
    if "eos_token_id" in special:
        # Some architectures classify a text by what they make of its end.
        ids[:, -1] = special["eos_token_id"][0]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if any("token_type_ids" in forward_columns(model) for model in models):
        batch["token_type_ids"] = torch.zeros_like(ids)
    return {name: value.to(first.device) for name, value in batch.items()}
