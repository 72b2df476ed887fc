"""Quick batches are those of Transformers, to the last bit and in type."""

import pickle

import numpy as np
import pytest
import torch
from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding

from hf_compress.distillation.padding import ThroughNumpy, quick_collator
from tests.tiny_job import tiny_tokenizer

LABELS = {
    "classes": [1, 0, -100],
    "numbers": [0.1, 2.0, float("nan")],
    "lists": [[0.0, 1.0], [1.0, 1.0], [0.3, 0.0]],
    "booleans": [True, False, True],
    "numpy": [np.float64(0.1), np.float64(0.2), np.float64(0.3)],
    "arrays": [np.array([1, 2], dtype=np.int32)] * 3,
    "tensors": [torch.tensor(1, dtype=torch.int32)] * 3,
}


def rows_with(labels: list, column: str = "labels") -> list[dict]:
    lengths = (3, 7, 1)
    return [
        {
            "input_ids": list(range(5, 5 + length)),
            "token_type_ids": [1] * length,
            "attention_mask": [1] * length,
            column: label,
        }
        for length, label in zip(lengths, labels, strict=True)
    ]


def assert_equal(found, expected) -> None:
    assert type(found) is type(expected)
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name].nan_to_num(7.0), value.nan_to_num(7.0))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("multiple", [None, 8])
@pytest.mark.parametrize("kind", LABELS)
def test_batches_are_equal(kind, multiple, side):
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    stock = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=multiple)
    for column in ("labels", "label", "label_ids"):
        rows = rows_with(LABELS[kind], column)
        assert_equal(quick_collator(stock)(rows), stock(rows_with(LABELS[kind], column)))
    assert_equal(pickle.loads(pickle.dumps(quick_collator(stock)))(rows), stock(rows))


def test_floats_have_the_default_dtype():
    stock = DataCollatorWithPadding(tiny_tokenizer())
    torch.set_default_dtype(torch.float64)
    try:
        assert_equal(quick_collator(stock)(rows_with([0.1, 0.2, 0.3])), stock(rows_with([0.1, 0.2, 0.3])))
    finally:
        torch.set_default_dtype(torch.float32)


def test_what_cannot_be_padded_raises_the_same():
    stock = DataCollatorWithPadding(tiny_tokenizer())
    ragged = rows_with([[1], [1, 2], [1]])
    messages = []
    for collator in (stock, quick_collator(stock)):
        with pytest.raises(ValueError, match="Unable to create tensor") as caught:
            collator(ragged)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_other_collators_stay():
    class Own(DataCollatorWithPadding):
        pass

    tokenizer = tiny_tokenizer()
    others = (
        Own(tokenizer),
        DataCollatorForTokenClassification(tokenizer),
        DataCollatorWithPadding(tokenizer, return_tensors="np"),
    )
    for collator in others:
        assert quick_collator(collator) is collator
    assert isinstance(quick_collator(DataCollatorWithPadding(tokenizer)), ThroughNumpy)
