"""What a model keeps of itself is everything; what it keeps of another does not depend on batches or label order."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import (
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForQuestionAnswering,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from hf_compress.evaluation.comparison import divergence
from hf_compress.evaluation.inference import predict
from hf_compress.evaluation.retention import retention_from_outputs, retention_from_predictions, score_retention

SMALL_GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
SMALL_T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
NER = {"id2label": {0: "O", 1: "B-PER", 2: "I-PER"}, "label2id": {"O": 0, "B-PER": 1, "I-PER": 2}}


def one_of(n_classes):
    return lambda length, generator: int(torch.randint(n_classes, (), generator=generator))


def each_token(low, high):
    return lambda length, generator: [-100, *torch.randint(low, high, (length - 1,), generator=generator).tolist()]


def several(length, generator):
    return torch.randint(2, (3,), generator=generator).float().tolist()


def number(length, generator):
    return float(torch.randn((), generator=generator))


def tiny_gpt2(seed):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(**SMALL_GPT2, n_positions=32, initializer_range=0.5))


def tiny_t5(seed):
    torch.manual_seed(seed)
    return T5ForConditionalGeneration(T5Config(**SMALL_T5, decoder_start_token_id=0, pad_token_id=0))


@pytest.fixture
def make_task(make_bert, make_rows):
    """Builds two models of a task, the rows, and a metric of the task."""

    def with_answers(rows):
        return rows.add_column("start_positions", [0] * len(rows)).add_column("end_positions", [2] * len(rows))

    multi = {"num_labels": 3, "problem_type": "multi_label_classification"}
    tasks = {
        "single-label": (lambda s: make_bert(seed=s, num_labels=3), make_rows(one_of(3)), "accuracy"),
        "multi-label": (lambda s: make_bert(seed=s, **multi), make_rows(several), "f1_macro"),
        "regression": (lambda s: make_bert(seed=s, num_labels=1), make_rows(number), "spearmanr"),
        "tokens": (lambda s: make_bert(BertForTokenClassification, s, **NER), make_rows(each_token(0, 3)), "seqeval"),
        "question": (lambda s: make_bert(BertForQuestionAnswering, s), with_answers(make_rows()), "exact_match"),
        "masked-lm": (lambda s: make_bert(BertForMaskedLM, s), make_rows(each_token(3, 40)), "perplexity"),
        "causal-lm": (tiny_gpt2, make_rows(), "perplexity"),
        "seq2seq-lm": (tiny_t5, make_rows(each_token(3, 40)), "perplexity"),
    }
    return lambda name: tasks[name]


def assert_close(report, expected):
    for name, value in expected.to_dict().items():
        values, others = (x if isinstance(x, list) else [x] for x in (value, report.to_dict()[name]))
        for one, other in zip(values, others, strict=True):
            assert one == (pytest.approx(other, rel=1e-4) if isinstance(other, float) else other), name


TASKS = ["single-label", "multi-label", "regression", "tokens", "question", "masked-lm", "causal-lm", "seq2seq-lm"]


@pytest.mark.filterwarnings("ignore:Retention of")
@pytest.mark.parametrize("name", TASKS)
def test_a_copy_keeps_everything(make_task, tokenizer, name):
    build, rows, metric = make_task(name)
    model = build(0)
    report = score_retention(model, copy.deepcopy(model), rows, metric, processing_class=tokenizer, n_bootstrap=200)
    assert report.teacher == report.compressed
    assert report.difference_interval == (0, 0)
    if report.teacher > 0:
        assert report.retention == 1
        assert report.retention_interval == (1, 1) or math.isnan(report.retention_interval[0])
    assert (report.mse if name == "regression" else report.kl) == 0
    assert report.agreement == (None if name == "regression" else 1)
    assert report.n_examples == len(rows)


@pytest.mark.filterwarnings("ignore:Retention of")
@pytest.mark.parametrize("name", TASKS)
def test_nothing_depends_on_the_batch_size(make_task, tokenizer, name):
    build, rows, metric = make_task(name)
    teacher, model = build(0), build(1)
    one, many = (
        score_retention(teacher, model, rows, metric, processing_class=tokenizer, n_bootstrap=50, batch_size=size)
        for size in (1, 16)
    )
    assert_close(many, one)
    assert (one.mse if name == "regression" else one.kl) > 0
    assert name == "regression" or one.agreement < 1


@pytest.mark.parametrize("name", TASKS)
def test_predictions_do_not_depend_on_padding(make_task, tokenizer, name):
    build, rows, _ = make_task(name)
    one, many = (predict(build(0), rows, processing_class=tokenizer, batch_size=size) for size in (1, 16))
    counts = np.ones(len(one.logits), dtype=bool)
    if name in ("tokens", "masked-lm", "causal-lm", "seq2seq-lm"):
        counts = one.labels != -100
    np.testing.assert_allclose(one.logits[counts], many.logits[counts], atol=1e-5)
    np.testing.assert_array_equal(one.labels, many.labels)


@pytest.mark.filterwarnings("ignore:Retention of")
@pytest.mark.parametrize("name", ["single-label", "multi-label", "regression", "tokens", "question", "masked-lm"])
def test_outputs_computed_elsewhere_score_the_same(make_task, tokenizer, name):
    build, rows, metric = make_task(name)
    teacher, model = build(0), build(1)
    report = score_retention(teacher, model, rows, metric, processing_class=tokenizer, n_bootstrap=50)
    a, b = (predict(x, rows, processing_class=tokenizer) for x in (teacher, model))
    kinds = {
        "single-label": "single_label_classification",
        "multi-label": "multi_label_classification",
        "regression": "regression",
        "tokens": "token-classification",
        "question": "question-answering",
        "masked-lm": "masked-lm",
    }
    options = {"metric": metric, "kind": kinds[name], "n_bootstrap": 50, "label_names": list(NER["label2id"])}
    assert_close(retention_from_outputs(a.logits, b.logits, a.labels, **options), report)


def test_order_of_the_teachers_labels_does_not_matter(make_bert, make_rows, tokenizer):
    names = ["sad", "glad", "mad"]
    model = make_bert(id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})
    teacher = copy.deepcopy(model)
    order = [2, 0, 1]
    teacher.config.id2label = {i: names[old] for i, old in enumerate(order)}
    teacher.config.label2id = {names[old]: i for i, old in enumerate(order)}
    with torch.no_grad():
        teacher.classifier.weight.copy_(model.classifier.weight[order])
        teacher.classifier.bias.copy_(model.classifier.bias[order])
    report = score_retention(teacher, model, make_rows(one_of(3)), processing_class=tokenizer, n_bootstrap=50)
    assert (report.retention, report.agreement, report.difference) == (1, 1, 0)
    assert report.kl == pytest.approx(0, abs=1e-6)


def test_each_model_gets_the_columns_that_it_takes(make_bert, make_rows, tokenizer):
    teacher = make_bert()
    sizes = {"vocab_size": 40, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32}
    student = DistilBertForSequenceClassification(DistilBertConfig(**sizes, max_position_embeddings=32))
    rows = make_rows(one_of(2))
    report = score_retention(teacher, student, rows, processing_class=tokenizer, n_bootstrap=50)
    a, b = predict(teacher, rows, processing_class=tokenizer), predict(student, rows, processing_class=tokenizer)
    assert report.teacher == np.mean(a.logits.argmax(-1) == a.labels)
    assert report.compressed == np.mean(b.logits.argmax(-1) == a.labels)
    without = predict(teacher, rows.remove_columns("token_type_ids"), processing_class=tokenizer)
    assert np.abs(without.logits - a.logits).max() > 1e-3, "the teacher must see token_type_ids"


def test_perplexity_does_not_depend_on_the_padding(make_rows, tokenizer):
    rows = make_rows().remove_columns("token_type_ids")
    labelled = rows.add_column("labels", rows["input_ids"][:])
    models, found = (tiny_gpt2(0), tiny_gpt2(1)), []
    for side in ("right", "left"):
        padding = copy.deepcopy(tokenizer)
        padding.padding_side = side
        for given in (rows, labelled):
            for size in (1, 8):
                settings = {"processing_class": padding, "batch_size": size, "n_bootstrap": 9}
                report = score_retention(*models, given, "perplexity", **settings)
                found.append([report.teacher, report.compressed])
    assert found == [pytest.approx(found[0], rel=1e-5)] * 8


def test_causal_perplexity_is_the_models_own_loss(make_rows, tokenizer):
    model, rows = tiny_gpt2(0).eval(), make_rows(n=6).remove_columns("token_type_ids")
    nll, tokens = 0.0, 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        nll += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    report = score_retention(model, tiny_gpt2(1), rows, "perplexity", processing_class=tokenizer, n_bootstrap=50)
    assert report.teacher == pytest.approx(math.exp(nll / tokens), rel=1e-4)
    assert report.retention == pytest.approx(report.teacher / report.compressed)
    assert not report.higher_is_better


def test_images(make_rows):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=3))
    rows = [{"pixel_values": torch.randn(3, 16, 16), "label": i % 3} for i in range(12)]
    assert score_retention(model, model, rows, n_bootstrap=20).agreement == 1


def test_labels_in_another_column(make_bert, make_rows, tokenizer):
    model = make_bert()
    expected = predict(model, make_rows(one_of(2)), processing_class=tokenizer).labels
    for column, options in (("label", {}), ("gold", {"label_column": "gold"})):
        rows = make_rows(one_of(2), column=column)
        np.testing.assert_array_equal(predict(model, rows, processing_class=tokenizer, **options).labels, expected)


def test_training_flags_come_back_one_by_one(make_bert, make_rows, tokenizer):
    teacher, model = make_bert(seed=1), make_bert()
    teacher.eval()
    model.train()
    model.bert.embeddings.eval()
    flags = [module.training for module in model.modules()]
    score_retention(teacher, model, make_rows(one_of(2)), processing_class=tokenizer, n_bootstrap=10)
    assert [module.training for module in model.modules()] == flags
    assert not teacher.training
    model(input_ids=torch.tensor([[3, 4]])).logits.sum().backward()


def test_progress_is_reported_by_rows(make_bert, make_rows, tokenizer):
    seen = []
    options = {"processing_class": tokenizer, "batch_size": 10, "n_bootstrap": 10}
    model = make_bert()
    score_retention(model, model, make_rows(one_of(2)), **options, progress=lambda *done: seen.append(done))
    assert seen == [(10, 24), (20, 24), (24, 24)]


def test_a_function_can_be_the_metric(make_bert, make_rows, tokenizer):
    def share_of_ones(references, predictions):
        return np.mean(predictions)

    options = {"processing_class": tokenizer, "n_bootstrap": 10}
    model = make_bert()
    report = score_retention(model, model, make_rows(one_of(2)), share_of_ones, **options)
    assert report.metric == "share_of_ones"


def test_divergence_by_hand():
    teacher, model = torch.tensor([[0.8, 0.2]]), torch.tensor([[0.5, 0.5]])
    expected = 0.8 * math.log(1.6) + 0.2 * math.log(0.4)
    kl = divergence(teacher.log(), model.log(), "single_label_classification")
    assert kl.item() == pytest.approx(expected, abs=1e-6)
    # A label of its own with probability p has the logit log(p / (1 - p)).
    kl = divergence((teacher / (1 - teacher)).log(), (model / (1 - model)).log(), "multi_label_classification")
    assert kl.item() == pytest.approx(2 * expected, abs=1e-6)
    excluded = torch.tensor([[0.0, -torch.inf]])
    assert divergence(excluded, excluded, "single_label_classification").item() == 0
    assert divergence(teacher, model, "regression").item() == pytest.approx(0.09)


@pytest.mark.parametrize("teacher", [[0, 0, 1, 1], [1, 1, 0, 0]])
def test_a_teacher_of_no_use_has_no_retention_but_a_difference(teacher):
    teacher = np.array(teacher)
    references, predictions = np.array([0, 1, 0, 1]), np.array([0, 1, 0, 1])
    with pytest.warns(UserWarning, match="Read `difference`"):
        report = retention_from_predictions(
            references, teacher, predictions, metric="matthews_correlation", n_bootstrap=20
        )
    assert math.isnan(report.retention)
    assert report.difference == 1
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["retention"] is None


def test_rows_without_a_label_do_not_count(make_bert, make_rows, tokenizer):
    model, rows = make_bert(), make_rows(lambda length, generator: -100 if length % 2 else length % 3 % 2)
    report = score_retention(make_bert(seed=1), model, rows, processing_class=tokenizer, n_bootstrap=20)
    labelled = rows.filter(lambda row: row["labels"] != -100)
    assert_close(
        report, score_retention(make_bert(seed=1), model, labelled, processing_class=tokenizer, n_bootstrap=20)
    )
    assert report.n_examples == len(labelled)


def test_answers_as_text():
    references = [{"id": str(i), "answers": {"text": ["a cat"]}} for i in range(4)]
    right = [{"id": str(i), "prediction_text": "Cat!"} for i in range(4)]
    half = [{"id": str(i), "prediction_text": "Cat!" if i % 2 else "dog"} for i in range(4)]
    report = retention_from_predictions(references, right, half, metric="squad_f1", n_bootstrap=100)
    assert (report.teacher, report.compressed, report.retention, report.agreement) == (100, 50, 0.5, 0.5)


def test_errors_say_what_to_do(make_bert, make_rows, tokenizer):
    model, rows = make_bert(), make_rows(one_of(2))
    with pytest.raises(ValueError, match="pearsonr"):
        score_retention(
            make_bert(num_labels=1), make_bert(num_labels=1), make_rows(number), processing_class=tokenizer
        )
    with pytest.raises(ValueError, match="processing_class=tokenizer"):
        score_retention(model, model, rows)
    with pytest.raises(ValueError, match="label_column"):
        score_retention(model, model, make_rows(), processing_class=tokenizer)
    with pytest.raises(ValueError, match="has no task head"):
        score_retention(make_bert(BertModel), make_bert(BertModel), rows)
    with pytest.raises(ValueError, match="for token-classification, the other model"):
        score_retention(make_bert(BertForTokenClassification), model, rows)
    with pytest.raises(ValueError, match="No position has a label"):
        score_retention(model, model, make_rows(lambda *_: -100), processing_class=tokenizer)
    with pytest.raises(ValueError, match="no rows"):
        score_retention(model, model, [])
    with pytest.raises(ValueError, match="label_names"):
        retention_from_outputs(
            np.zeros((1, 2, 3)),
            np.zeros((1, 2, 3)),
            np.zeros((1, 2), int),
            metric="seqeval",
            kind="token-classification",
        )
    with pytest.raises(ValueError, match="cannot be compared class by class"):
        retention_from_outputs(np.zeros((2, 3)), np.zeros((2, 4)), np.zeros(2, int))
    assert isinstance(model, BertForSequenceClassification)


def test_rows_without_a_label_are_not_scored():
    logits = torch.zeros(4, 2, 5)
    logits[:, :, 0] = 1.0
    labels = torch.tensor([[1, 1], [0, 0], [-100, -100], [-100, -100]])
    report = retention_from_outputs(logits, logits, labels, metric="exact_match", kind="question-answering")
    assert (report.n_examples, report.teacher) == (2, 0.5)


def test_outputs_that_are_no_numbers_are_no_decisions():
    logits = torch.full((3, 2), torch.nan)
    with pytest.raises(ValueError, match=r"not numbers \(NaN\): its training diverged"):
        retention_from_outputs(torch.zeros(3, 2), logits, torch.zeros(3, dtype=torch.long), metric="accuracy")


@pytest.mark.parametrize("side", ["left", "right"])
def test_answers_do_not_depend_on_the_side_of_the_padding(side, tokenizer):
    model = GPT2ForQuestionAnswering(tiny_gpt2(0).config).eval()
    padded = copy.deepcopy(tokenizer)
    padded.padding_side = side
    lengths = (5, 9, 3, 12)
    ids = [[5 + (row + n) % 7 for n in range(length)] for row, length in enumerate(lengths)]
    rows = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * length for length in lengths]})
    alone = predict(model, rows, processing_class=padded, batch_size=1).logits.argmax(-1)
    together = predict(model, rows, processing_class=padded, batch_size=8).logits.argmax(-1)
    assert alone.tolist() == together.tolist()
