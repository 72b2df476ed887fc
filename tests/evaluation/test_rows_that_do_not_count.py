"""Rows without a label, padding on either side, copies that modules keep: none of them distorts a figure."""

import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    RobertaConfig,
    RobertaForCausalLM,
    set_seed,
)

import hf_compress as hc
from hf_compress.cli.evaluate import _is_kept
from hf_compress.evaluation.cost import peak_memory
from hf_compress.evaluation.inference import predict, task_labels
from hf_compress.evaluation.retention import retention_from_outputs, retention_from_predictions
from hf_compress.modeling.blocks import find_blocks
from tests.modeling.tiny import tiny_batch, tiny_model

SHAPE = {"vocab_size": 50, "pad_token_id": 1, "initializer_range": 0.3}


def half_known(labels: np.ndarray) -> np.ndarray:
    labels = labels.astype("f4")
    labels[len(labels) // 2 :] = np.nan
    return labels


@pytest.mark.parametrize("metric", ["spearmanr", "pearsonr"])
def test_missing_numbers(metric):
    values = np.random.default_rng(0).normal(size=(200, 1)).astype("f4")
    found = retention_from_outputs(values, values, half_known(values[:, 0]), metric=metric, kind="regression")
    assert found.compressed == pytest.approx(1.0)
    assert found.n_examples == 100


@pytest.mark.parametrize("metric", ["accuracy", "f1_macro"])
def test_missing_lists_of_labels(metric):
    logits = np.random.default_rng(0).normal(size=(200, 4)).astype("f4")
    labels = half_known(logits > 0)
    found = retention_from_outputs(logits, logits, labels, metric=metric, kind="multi_label_classification")
    assert (found.compressed, found.n_examples) == (1.0, 100)


def test_answers_that_were_cut_off_have_no_label():
    batch = {
        "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]),
        "start_positions": torch.tensor([1, 4]),
        "end_positions": torch.tensor([3, 3]),
    }
    assert task_labels("question-answering", batch).tolist() == [[1, -100], [-100, 3]]


def padded(side):
    def collate(rows):
        width = max(len(row["input_ids"]) for row in rows)

        def fill(values, value):
            more = [value] * (width - len(values))
            return more + values if side == "left" else values + more

        ids = torch.tensor([fill(row["input_ids"], 1) for row in rows])
        mask = torch.tensor([fill([1] * len(row["input_ids"]), 0) for row in rows])
        return {"input_ids": ids, "attention_mask": mask}

    return collate


def gpt2():
    sizes = {"n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 32}
    return GPT2ForSequenceClassification(GPT2Config(**SHAPE, **sizes, num_labels=3))


def roberta():
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 24}
    return RobertaForCausalLM(RobertaConfig(**SHAPE, **sizes, max_position_embeddings=40, is_decoder=True))


@pytest.mark.parametrize("make", [gpt2, roberta])
def test_answers_do_not_depend_on_the_side_of_padding(make):
    set_seed(0)
    model = make().eval()
    rows = [{"input_ids": [5 + (i * j) % 40 for j in range(1, 4 + i)]} for i in range(8)]
    right, left, alone = (
        predict(model, rows, data_collator=padded(side), batch_size=size).logits
        for side, size in (("right", 8), ("left", 8), ("left", 1))
    )
    if right.ndim == 3:
        # The last three tokens of each row, which stand elsewhere.
        ends = [3 + i for i in range(8)]
        right, alone = (
            np.stack([row[end - 3 : end] for row, end in zip(one, ends, strict=True)]) for one in (right, alone)
        )
        left = left[:, -3:]
    assert np.allclose(right, left, atol=1e-5)
    assert np.allclose(alone, left, atol=1e-5)


def test_peak_memory_holds_what_modules_packed():
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 512, "num_hidden_layers": 2}
    model = tiny_model("bert", "BertForSequenceClassification", **sizes)
    batch = tiny_batch(model)
    int8 = hc.quantize(model, hc.Int8DynamicConfig())
    packed = sum(parameter.numel() for block in find_blocks(model) for parameter in block.module.parameters())
    weights = sum(tensor.nbytes for tensor in [*int8.parameters(), *int8.buffers()])
    assert peak_memory(int8, batch) > weights + 0.9 * packed
    assert peak_memory(int8, batch) == pytest.approx(peak_memory(int8, batch), rel=0.01)


@pytest.mark.parametrize(("first", "then", "least"), [(0.1, 0.09, 0.9), (0.7, 0.63, 0.9)])
def test_exactly_what_is_asked_for_is_kept(first, then, least):
    assert _is_kept({"retention": {"retention": then / first}}, least)
    assert not _is_kept({"retention": {"retention": then / first - 0.001}}, least)


def test_agreement_is_of_whole_rows_and_not_of_numbers():
    labels = np.random.default_rng(0).integers(0, 2, (200, 4))
    flipped = labels.copy()
    flipped[:, 0] ^= 1
    assert retention_from_predictions(labels, flipped, labels, metric="accuracy").agreement == 0.0
    numbers = np.random.default_rng(0).normal(size=200)

    def error(predictions, references):
        return float(-np.abs(np.asarray(predictions) - np.asarray(references)).mean())

    assert retention_from_predictions(numbers, numbers + 1e-4, numbers + 1, metric=error).agreement is None


def test_a_class_beside_a_text_is_no_token():
    model = tiny_model("gpt2", "GPT2LMHeadModel")
    rows = [{"input_ids": [3, 5, 7, 9 + i], "attention_mask": [1] * 4} for i in range(4)]
    found = [
        hc.score_retention(model, model, some, metric="perplexity", n_bootstrap=10)
        for some in (rows, [row | {"label": 1} for row in rows])
    ]
    assert found[0] == found[1]


def test_answers_of_other_lengths_or_with_more_to_say():
    tokens = [[1, 2, 3], [4, 5, 6]]
    found = retention_from_predictions(tokens, tokens, [[1, 2], [4, 5, 6]], metric="exact_match", n_bootstrap=10)
    assert (found.compressed, found.agreement) == (0.5, pytest.approx(3 / 4))
    answers = [[{"id": "0", "prediction_text": "x", "no_answer_probability": p}] for p in (0.1, 0.2)]
    reference = [{"id": "0", "answers": {"text": ["x"]}}]
    assert retention_from_predictions(reference, *answers, metric="squad_f1", n_bootstrap=10).agreement == 1


@pytest.mark.parametrize(("text", "expected"), [("", 100), ("the", 100), ("film", 0)])
@pytest.mark.parametrize("metric", ["squad_f1", "squad_exact_match"])
def test_questions_without_an_answer(metric, text, expected):
    given = [{"id": "0", "prediction_text": text}]
    reference = [{"id": "0", "answers": {"text": []}}]
    assert retention_from_predictions(reference, given, given, metric=metric, n_bootstrap=10).compressed == expected


@pytest.mark.parametrize(
    ("settings", "message"), [({"n_bootstrap": 0}, "^n_bootstrap=0 "), ({"confidence": 95}, "^confidence=95 ")]
)
def test_intervals_that_cannot_be_had_are_refused_before_anything_is_run(settings, message):
    with pytest.raises(ValueError, match=message):
        hc.score_retention(None, None, [], **settings)


def test_rows_are_told_by_what_is_read():
    model = tiny_model("bert", "BertForSequenceClassification").eval()
    read = tiny_batch(model)
    batch = {"position_ids": torch.arange(read["input_ids"].shape[1])[None], **read, "token_type_ids": None}
    assert hc.compare_latency({"one": model}, batch, n_runs=1).conditions.batch_size == len(batch["input_ids"])
