"""Proposals follow from what was measured, and what is written can be run."""

from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from hf_compress.cli.main import main
from hf_compress.evaluation.cost import saved_bytes
from hf_compress.jobs.task_data import read_task
from hf_compress.pipeline.compress import compress
from hf_compress.pipeline.estimate import Size, after, estimate, size_of
from hf_compress.pipeline.planner import FORMATS, Sensitivity, measure_sensitivity, propose
from hf_compress.pruning.prune import prune
from hf_compress.quantization.quantize import quantize
from hf_compress.recipe.recipe import Recipe
from hf_compress.recipe.steps import FinetuneStep, PruneStep, QuantizeStep, SparsifyStep, StudentStep
from tests.modeling.tiny import tiny_model
from tests.tiny_job import save_tiny_bert, tiny_tokenizer
from tests.tiny_recipe import tiny_data, tiny_recipe

SIZES = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 8, "vocab_size": 400}
SIZE = Size(blocks=10e6, embeddings=10e6, rest=0.0)
FOUND = Sensitivity(
    SIZE,
    tokens=0.5,
    pruned={1.0: 1.0, 0.5: 0.99, 0.25: 0.8},
    rounded={"float32": 1.0, "int8": 0.999, "fixed-point 4": 0.97},
    rows=500,
)


def keys(proposal):
    return [step.key for step in proposal.steps]


def test_what_needs_no_training_comes_first():
    best = propose(FOUND, target_mb=21.0, min_retention=0.98)[0]
    assert keys(best) == ["quantize", "evaluate"]
    assert best.megabytes == pytest.approx(20.0)
    assert (best.macs, best.retention, best.needs_training) == (1.0, 0.999, False)


def test_fewer_macs_need_pruning_and_less_quality_a_recovery():
    half = propose(FOUND, target_mb=None, min_retention=0.985, max_macs=0.5)[0]
    assert keys(half) == ["prune", "evaluate"] or keys(half) == ["vocabulary", "prune", "evaluate"]
    assert half.retention == pytest.approx(0.99)
    quarter = propose(FOUND, target_mb=6.0, min_retention=0.98, max_macs=0.25)[0]
    assert keys(quarter) == ["vocabulary", "prune", "recover", "quantize", "evaluate"]
    assert quarter.needs_training
    assert quarter.megabytes <= 6.0


def test_what_will_fail_comes_last():
    rough = replace(FOUND, rounded={"float32": 1.0, "int8": 0.999, "fixed-point 4": 0.7})
    found = propose(rough, target_mb=9.0, min_retention=0.98)
    assert "recover" in keys(found[0])
    assert keys(found[-1]) == ["vocabulary", "quantize", "evaluate"]


def test_every_proposal_meets_the_target():
    for target in (40.0, 12.0, 5.0):
        for one in propose(FOUND, target, 0.98):
            assert one.megabytes <= target
            assert one.needs_training == ("recover" in keys(one))


def test_a_size_that_nothing_meets():
    with pytest.raises(ValueError, match=r"Nothing gets to 0.1 MB.*smallest is \d.*larger --target-mb"):
        propose(FOUND, 0.1, 0.98)


@pytest.mark.parametrize(
    "step",
    [
        StudentStep(num_layers=2),
        PruneStep(budget=0.5, score="l2", repair="none", multiple_of=1),
        QuantizeStep("bf16"),
        *FORMATS.values(),
        QuantizeStep("nf4"),
    ],
    ids=str,
)
def test_expected_sizes_are_near_those_of_the_files(tmp_path, step):
    save_tiny_bert(tmp_path / "model", **SIZES)
    data = read_task(tiny_data(tmp_path / "data"), 0)
    recipe = Recipe(str(tmp_path / "model"), data.config, [step])
    model = AutoModelForSequenceClassification.from_pretrained(recipe.model)
    assert size_of(model).megabytes == pytest.approx(saved_bytes(model) / 1e6, rel=0.02)
    expected = estimate(recipe, model, tiny_tokenizer(), data)[0]
    made = compress(recipe, tmp_path / "out")["steps"][-1]
    assert expected.megabytes == pytest.approx(made["cost"]["bytes_on_disk"] / 1e6, rel=0.15)


def test_a_training_makes_weights_of_float32():
    size = size_of(tiny_model("bert", dtype=torch.bfloat16))
    assert after(size, FinetuneStep()).megabytes == pytest.approx(2 * size.megabytes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "step",
    [
        None,
        QuantizeStep("bf16"),
        QuantizeStep("int8"),
        QuantizeStep("fixed-point", options={"bits": 8, "symmetric": False}),
        QuantizeStep("fixed-point", options={"bits": 8, "granularity": "group"}),
        QuantizeStep("fixed-point", options={"bits": 12}),
        QuantizeStep("fixed-point", options={"bits": 4}),
        QuantizeStep("nf4"),
    ],
    ids=str,
)
def test_expected_sizes_of_sparse_models(tmp_path, step, dtype):
    save_tiny_bert(tmp_path, **SIZES | {"hidden_size": 256, "intermediate_size": 1024})
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=dtype)
    sparsify = SparsifyStep(sparsity=0.8, score="magnitude")
    expected = after(size_of(model), sparsify)
    made = prune(model, sparsify.config(0))
    if step is not None:
        expected, made = after(expected, step), quantize(made, step.config())
    assert expected.megabytes == pytest.approx(saved_bytes(made) / 1e6, rel=0.15)


def test_sparsity_counts_its_masks():
    assert after(SIZE, SparsifyStep(sparsity=0.5)).megabytes == pytest.approx((10e6 * 17 / 8 + 40e6) / 1e6)


def test_the_command_writes_a_recipe_that_runs(tmp_path, capsys):
    first = tiny_recipe(tmp_path)
    compress(tiny_recipe(tmp_path, steps=first.steps[:1]), tmp_path / "teacher")
    words = ["--dataset", first.data.dataset, "--max-length", "12", "--n-texts", "16", "--min-retention", "0.1"]
    words += ["--output", str(tmp_path / "recipe.yaml"), "--target-mb", "1", "--yes"]
    main_of = ["plan", str(tmp_path / "teacher" / "01-finetune"), *words]
    with pytest.raises(SystemExit) as exit_:
        main(main_of)
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    assert "hf-compress run" in shown
    recipe = Recipe.from_yaml(tmp_path / "recipe.yaml")
    assert compress(recipe, tmp_path / "out")["result"] is not None
    with pytest.raises(SystemExit):
        main(main_of)
    assert "--overwrite" in capsys.readouterr().err


def test_a_vocabulary_that_cannot_be_cut_is_left_alone(tmp_path):
    recipe = tiny_recipe(tmp_path)
    compress(tiny_recipe(tmp_path, steps=recipe.steps[:1]), tmp_path / "teacher")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "teacher" / "01-finetune")
    words = WordLevel(tiny_tokenizer().get_vocab(), unk_token="[UNK]")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="[PAD]", unk_token="[UNK]")
    found = measure_sensitivity(model, tokenizer, read_task(recipe.data, 0), n_texts=16, n_rows=20)
    assert found.tokens is None
    assert all("vocabulary" not in keys(one) for one in propose(found, None, 0.1))


def test_rows_to_choose_on_are_checked_by_their_own_name(tmp_path):
    recipe = tiny_recipe(tmp_path)
    compress(tiny_recipe(tmp_path, steps=recipe.steps[:1]), tmp_path / "teacher")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "teacher" / "01-finetune")
    data = read_task(recipe.data, 0)
    other = data.test.map(lambda row: {"label": "unheard of"})
    data = data._replace(held_out=other, held_out_split="validation")
    with pytest.raises(ValueError, match="of the split 'validation'"):
        measure_sensitivity(model, tiny_tokenizer(), data, n_texts=16, n_rows=20)


def test_nothing_is_chosen_on_the_rows_that_are_measured_on(tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path)
    compress(tiny_recipe(tmp_path, steps=recipe.steps[:1]), tmp_path / "teacher")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "teacher" / "01-finetune")
    data = read_task(recipe.data, 0)
    texts = set(data.test["text"][:]) - set(data.train["text"][:])
    seen = []
    real = type(data).outputs
    monkeypatch.setattr(
        type(data),
        "outputs",
        lambda self, *args, rows=None, **kw: seen.append(rows) or real(self, *args, rows=rows, **kw),
    )
    found = measure_sensitivity(model, tiny_tokenizer(), data, n_texts=16, n_rows=20)
    assert found.rows == 20
    assert seen
    assert all(not texts & set(rows["text"][:]) for rows in seen)


def test_limits_that_nothing_meets_are_named():
    with pytest.raises(ValueError, match=r"Nothing gets to 10 % of the multiply-accumulates: .* the least are 25 %"):
        propose(FOUND, target_mb=None, min_retention=0.9, max_macs=0.1)


def test_proposals_check_what_was_asked_for():
    best = propose(FOUND, target_mb=21.0, min_retention=0.98)[0]
    assert (best.steps[-1].min_retention, best.steps[-1].max_mb) == (0.98, 21.0)
