"""Which steps may follow which, and that each refusal says why and what to do instead."""

import json

import pytest
import torch

from hf_compress.pruning.prune import prune
from hf_compress.pruning.unstructured_config import UnstructuredPruningConfig
from hf_compress.quantization.quantize import quantize
from hf_compress.recipe.format_options import FORMATS
from hf_compress.recipe.recipe import Recipe
from hf_compress.recipe.steps import (
    DataConfig,
    DistilStep,
    EvaluateStep,
    FinetuneStep,
    PruneStep,
    PushStep,
    QuantizeStep,
    RecoverStep,
    SparsifyStep,
    StudentStep,
    VocabularyStep,
)
from tests.quantization.test_reload import assert_same, reload
from tests.quantization.wide import wide_model
from tests.recipe.test_recipe import read_steps

FINETUNE, STUDENT, DISTIL, RECOVER = FinetuneStep(), StudentStep(num_layers=1), DistilStep(), RecoverStep()
PRUNE, SPARSIFY, VOCABULARY, EVALUATE = PruneStep(), SparsifyStep(), VocabularyStep(), EvaluateStep()
INT8, BINARY, PUSH = QuantizeStep("int8"), QuantizeStep("binary"), PushStep("a")


@pytest.mark.parametrize(
    "steps",
    [
        [FINETUNE, PUSH],
        [FINETUNE, EVALUATE, STUDENT, DISTIL, EVALUATE, VOCABULARY, PRUNE, RECOVER, INT8, EVALUATE, EVALUATE, PUSH],
        [PRUNE, RECOVER, PRUNE, RECOVER, SPARSIFY, RECOVER, VOCABULARY, INT8],
        [STUDENT, PRUNE, DISTIL, RECOVER],
        [STUDENT, RECOVER],
        [INT8],
        [BINARY],
    ],
)
def test_orders_that_work(steps):
    recipe = Recipe("m", DataConfig("d"), steps)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


@pytest.mark.parametrize(
    ("steps", "number", "reason"),
    [
        ([FINETUNE, FINETUNE], 2, "makes the teacher, so it comes first"),
        ([PRUNE, FINETUNE], 2, "makes the teacher, so it comes first"),
        ([STUDENT, STUDENT], 2, "there is a student already. Give its size in one step"),
        ([PRUNE, STUDENT], 2, "starts from a whole teacher. Put it first, or after finetune"),
        ([VOCABULARY, STUDENT], 2, "starts from a whole teacher"),
        ([FINETUNE, DISTIL], 2, "trains a student. Put `- student:` before it, or take `recover`"),
        ([PRUNE, DISTIL], 2, "trains a student"),
        ([FINETUNE, RECOVER], 2, "nothing was taken away that could be recovered. Put `- prune:`"),
        ([SPARSIFY, RECOVER, PRUNE], 3, "refit would fill the zeros of sparsify. Put it before"),
        ([SPARSIFY, SPARSIFY], 2, "zeros already. Ask for the final sparsity in one step"),
        ([VOCABULARY, VOCABULARY], 2, "cut already. Ask for the final size in one step"),
        *[([STUDENT, INT8, step], 3, "nothing changes weights after they are quantized") for step in (PRUNE, DISTIL)],
        *[([PRUNE, INT8, step], 3, "Put it before quantize") for step in (RECOVER, SPARSIFY, VOCABULARY, FINETUNE)],
        ([INT8, INT8], 2, "rounded already. Give one format"),
        ([SPARSIFY, BINARY], 2, "no zero, so those of sparsify would be lost. Give another format"),
        ([EVALUATE, PRUNE], 1, "nothing to evaluate yet. Put it after a step that makes a model"),
        ([PRUNE, PUSH, EVALUATE], 2, "what is pushed is finished. Put it last"),
        ([PUSH], 1, "nothing to push"),
    ],
)
def test_orders_that_cannot_work(steps, number, reason):
    message = f"tep {number}, {steps[number - 1].key}, cannot come here: .*{reason}"
    with pytest.raises(ValueError, match="^S" + message):
        Recipe("m", DataConfig("d"), steps)
    lines = [f"  - {json.dumps(written)}" for written in (with_needed(step) for step in steps)]
    with pytest.raises(ValueError, match=f"^The recipe, line {number + 4}: s{message}"):
        read_steps(*lines)


def with_needed(step) -> dict:
    needed = {"student": {"num_layers": 1}, "push": {"repo_id": "a"}}
    return {step.key: {"format": step.format} if isinstance(step, QuantizeStep) else needed.get(step.key, {})}


def test_what_is_no_step():
    with pytest.raises(ValueError, match="no steps, so nothing would be done"):
        Recipe("m", DataConfig("d"), [])
    with pytest.raises(TypeError, match="steps holds 'prune', which is no step"):
        Recipe("m", DataConfig("d"), ["prune"])


def zeros_of(model) -> float:
    """Share of the weights of a projection that have no effect, whatever they are stored as."""
    layer = model.base_model.encoder.layer[0].intermediate.dense
    one_by_one = torch.eye(layer.in_features, dtype=model.dtype)
    return (layer(one_by_one) == layer(torch.zeros_like(one_by_one))).float().mean().item()


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_stay_in_the_formats_that_may_follow(name, tmp_path):
    options = {"activations": 32} if name == "binary" else {}
    sparse = prune(wide_model("bert"), UnstructuredPruningConfig(sparsity=0.5, score="magnitude"))
    small = quantize(sparse, FORMATS[name].make(**options))
    again = reload(small, tmp_path)
    assert_same(again, small)
    with torch.no_grad():
        keeps_zeros = zeros_of(again) >= 0.5
    steps = [SPARSIFY, QuantizeStep(name)]
    if keeps_zeros:
        Recipe("m", DataConfig("d"), steps)
    else:
        with pytest.raises(ValueError, match="weights of one bit have no zero"):
            Recipe("m", DataConfig("d"), steps)
