"""The accuracy gate leaves the modules that hurt in floating point, and no others."""

import pytest
import torch

from hf_compress.formats.packed import PackedModule
from hf_compress.quantization.config import FixedPointConfig, FloatConfig, Int8DynamicConfig
from hf_compress.quantization.gate import Gate, find_exclusions
from hf_compress.quantization.modules import choose_modules
from hf_compress.quantization.quantize import quantize, quantize_
from hf_compress.quantization.training import fake_quantize_
from tests.modeling.tiny import tiny_model


def packed_names(model) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, PackedModule)}


def count_score(costs: dict[str, float]):
    """A score that falls by a known amount for each of some modules that is quantized."""
    return lambda model: 1 - sum(cost for name, cost in costs.items() if name in packed_names(model))


@pytest.fixture
def model():
    return tiny_model("bert")


def test_the_costliest_stay(model):
    names = list(choose_modules(model))
    costs = dict.fromkeys(names, 0.0001) | {names[3]: 0.5, names[7]: 0.2, names[9]: 0.1}
    quantized = quantize(model, Int8DynamicConfig(), evaluate=count_score(costs), max_drop=0.15)
    assert packed_names(quantized) == set(names) - {names[3], names[7]}
    assert not packed_names(model)


def test_what_a_score_does_to_a_model_does_not_count(model):
    dtypes = []

    def score(one):
        one.to(torch.bfloat16)
        dtypes.append(one.dtype)
        return 1.0

    quantized = quantize(model, Int8DynamicConfig(), evaluate=score)
    assert set(dtypes) == {torch.bfloat16}
    assert quantized.dtype == model.dtype == torch.float32


def test_a_trained_model_has_no_gate(model):
    config = FixedPointConfig(bits=4)
    fake_quantize_(model, config)
    with pytest.raises(ValueError, match="trained with all of these modules rounded.*leave evaluate out"):
        quantize(model, config, evaluate=lambda model: 0.5)


def test_nothing_stays_where_all_pass(model):
    quantized = quantize(model, Int8DynamicConfig(), evaluate=lambda model: 0.5, max_drop=0.0)
    assert packed_names(quantized) == set(choose_modules(model))


def test_what_the_user_excludes_stays_too(model):
    names = list(choose_modules(model))
    config = Int8DynamicConfig(exclude=(names[0],))
    quantized = quantize(model, config, evaluate=count_score({names[1]: 1.0}), max_drop=0.1)
    assert packed_names(quantized) == set(names[2:])


def test_a_gate_that_cannot_hold(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"max_drop=0.1 cannot be kept.*Allow more"):
        quantize_(model, Int8DynamicConfig(), evaluate=lambda model: float(not packed_names(model)), max_drop=0.1)
    assert not packed_names(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("result", "error"), [("good", TypeError), ({"accuracy": 1}, TypeError), (float("nan"), ValueError)]
)
def test_a_score_that_is_no_number(model, result, error):
    with pytest.raises(error, match="evaluate returned"):
        quantize(model, Int8DynamicConfig(), evaluate=lambda model: result)
    assert not packed_names(model)


@pytest.mark.parametrize("max_drop", [-0.1, float("nan"), float("inf")])
def test_impossible_drops(model, max_drop):
    with pytest.raises(ValueError, match="max_drop"):
        quantize(model, Int8DynamicConfig(), evaluate=lambda model: 1.0, max_drop=max_drop)


def test_evaluate_must_be_callable(model):
    with pytest.raises(TypeError, match="cannot be called"):
        quantize(model, Int8DynamicConfig(), evaluate=0.9)


def test_a_format_for_the_whole_model(model):
    config = FloatConfig("bf16")
    assert quantize(model, config, evaluate=lambda model: 0.5).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="takes the whole model"):
        quantize(model, config, evaluate=lambda model: float(model.dtype == torch.float32))


def test_few_evaluations(model):
    names = list(choose_modules(model))
    calls = []

    def score(model):
        calls.append(packed_names(model))
        return count_score({names[5]: 1.0})(model)

    assert find_exclusions(model, Int8DynamicConfig(), names, quantize_, Gate(score, 0.5)) == (names[5],)
    assert len(calls) == 2 + len(names) + 1


def test_a_drop_of_exactly_what_is_allowed_is_allowed(model):
    assert 0.9 - 0.89 > 0.01
    quantized = quantize(
        model, Int8DynamicConfig(), evaluate=lambda model: 0.89 if packed_names(model) else 0.9, max_drop=0.01
    )
    assert packed_names(quantized) == set(choose_modules(model))


def test_models_are_scored_without_their_dropout(model):
    modes = []
    quantize(model.train(), Int8DynamicConfig(), evaluate=lambda one: modes.append(one.training) or 0.5)
    assert modes == [False, False]
    assert model.training
