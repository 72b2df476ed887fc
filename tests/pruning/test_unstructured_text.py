"""What pruning costs a language model that has learned something: the better the method, the less."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hf_compress.pruning.prune import prune
from hf_compress.pruning.unstructured_config import UnstructuredPruningConfig

SCORES = ("sparsegpt", "wanda", "magnitude")
TOKENS, TOPICS, LENGTH = 64, 8, 24


def texts(n_texts: int, seed: int) -> torch.Tensor:
    """Texts whose first token is their topic: from it and the last token follows the next, one of four."""
    following = torch.randint(TOKENS, (TOKENS, 4), generator=torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.zeros(n_texts, LENGTH, dtype=torch.long)
    tokens[:, 0] = torch.randint(TOPICS, (n_texts,), generator=draw)
    for place in range(1, LENGTH):
        chosen = torch.multinomial(torch.tensor([0.6, 0.25, 0.1, 0.05]), n_texts, True, generator=draw)
        tokens[:, place] = following[(tokens[:, place - 1] + TOPICS * tokens[:, 0]) % TOKENS, chosen]
    return tokens


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    """A small GPT-2 that has read 6,400 such texts."""
    torch.manual_seed(0)
    sizes = {"vocab_size": TOKENS, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": LENGTH}
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **quiet, bos_token_id=0, eos_token_id=0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for batch in texts(6400, seed=1).split(16):
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def perplexity(model: GPT2LMHeadModel, **values) -> float:
    """On new texts, after pruning by others."""
    batches = [{"input_ids": part} for part in texts(256, seed=2).split(128)]
    pruned = prune(model, UnstructuredPruningConfig(**values), batches)
    tokens = texts(256, seed=3)
    return pruned(input_ids=tokens, labels=tokens).loss.exp().item()


def test_sparsegpt_costs_less_than_wanda_and_that_less_than_magnitude(model):
    dense = perplexity(model, sparsity=0.0)
    # 8 of 48 columns, as 128 are of 768.
    sparsegpt, wanda, magnitude = (
        perplexity(model, sparsity=0.5, score=score, sweep_width=8, repair="none") for score in SCORES
    )
    assert dense < sparsegpt < wanda < magnitude
    assert dense < 5


def test_sparsegpt_costs_less_with_2_of_4_too(model):
    sparsegpt, wanda, magnitude = (perplexity(model, pattern="2:4", score=score, repair="none") for score in SCORES)
    assert sparsegpt < 0.9 * min(wanda, magnitude)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("share", [{"sparsity": 0.7}, {"pattern": "2:4"}])
def test_a_repair_costs_less(model, share, score):
    plain, repaired = (perplexity(model, score=score, repair=repair, **share) for repair in ("none", "least_squares"))
    assert repaired < 0.98 * plain


@pytest.mark.parametrize(
    ("score", "repair"), [("sparsegpt", "none"), ("sparsegpt", "least_squares"), ("magnitude", "least_squares")]
)
def test_more_rounds_cost_less(model, score, repair):
    once, often = (perplexity(model, sparsity=0.7, score=score, repair=repair, steps=steps) for steps in (1, 4))
    assert often < (0.9 if repair == "none" else 0.98) * once
