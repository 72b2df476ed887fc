"""Tiny models and a tokenizer made on the spot."""

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification


@pytest.fixture
def make_bert():
    """Builds a tiny BERT of any head with weights large enough for decisions to differ between rows."""

    def build(model_class=BertForSequenceClassification, seed=0, **overrides):
        torch.manual_seed(seed)
        sizes = {
            "vocab_size": 40,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "max_position_embeddings": 32,
            "initializer_range": 0.5,
        }
        return model_class(BertConfig(**{**sizes, **overrides}))

    return build


@pytest.fixture(scope="session")
def tokenizer():
    """Words `w0` to `w36` and three special tokens, 40 ids in all."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[MASK]", *(f"w{i}" for i in range(37))])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]")


@pytest.fixture
def make_rows():
    """Builds a dataset of rows of different lengths; `labels(length, generator)` makes the label of each."""
    from datasets import Dataset

    def build(labels=None, n=24, seed=0, column="labels"):
        generator = torch.Generator().manual_seed(seed)
        rows = []
        for i in range(n):
            ids = torch.randint(3, 40, (3 + i % 6,), generator=generator).tolist()
            row = {"text": "extra", "input_ids": ids, "attention_mask": [1] * len(ids)}
            row["token_type_ids"] = [0] * (len(ids) - 1) + [1]
            rows.append({**row, **({} if labels is None else {column: labels(len(ids), generator)})})
        return Dataset.from_list(rows)

    return build
