"""The choice of a number format: measured on the user's model, and explained."""

import json

import pytest
import torch

from hf_compress.quantization.config import Int8DynamicConfig
from hf_compress.quantization.quantize import quantize
from hf_compress.recommend import FORMATS, choose, recommend_format
from tests.modeling.tiny import tiny_batch, tiny_model


@pytest.mark.parametrize(
    ("times", "choice"),
    [
        ({"float32": 1.0, "bf16": 2.0, "int8": 3.0}, "float32"),
        ({"float32": 3.0, "bf16": 1.05, "int8": 1.0}, "bf16"),
        ({"float32": 3.0, "bf16": 1.2, "int8": 1.0}, "int8"),
        ({"float32": 1.1, "bf16": 1.0}, "float32"),
    ],
)
def test_the_least_change_within_a_tenth(times, choice):
    assert choose(times, 0.1) == choice


def test_every_format_is_timed_or_explained():
    model = tiny_model("bert", "BertForSequenceClassification")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = recommend_format(model, tiny_batch(model), formats=["bf16", "fp16", "int8"], n_runs=2)
    timed = [candidate.name for candidate in found.candidates]
    assert sorted([*timed, *found.skipped]) == ["bf16", "float32", "fp16", "int8"]
    assert found.choice in timed
    by_name = {candidate.name: candidate for candidate in found.candidates}
    assert by_name["int8"].bytes_on_disk < by_name["float32"].bytes_on_disk
    assert by_name["float32"].speedup == 1
    assert type(found.config) is type(FORMATS[found.choice])
    assert json.loads(json.dumps(found.to_dict()))["choice"] == found.choice
    assert f"batch {len(tiny_batch(model)['input_ids'])}" in str(found)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_does_not_fit_the_model_is_explained():
    model = tiny_model("bert", "BertForSequenceClassification")
    found = recommend_format(model, tiny_batch(model), formats=["nf4", "int8", "bf16"], n_runs=1)
    assert "widths that 4 bits can take" in found.skipped["nf4"]
    # The order of preference is not that of the argument.
    timed = [candidate.name for candidate in found.candidates]
    assert timed == [name for name in FORMATS if name in timed]


def test_what_is_given_comes_back_fresh():
    model = tiny_model("bert")
    found = recommend_format(model, tiny_batch(model), formats=["int8"], tolerance=0.0, n_runs=1)
    if found.config is not None:
        assert found.config is not FORMATS[found.choice]


def test_bad_input():
    model = tiny_model("bert")
    with pytest.raises(ValueError, match=r"formats=\['float32', 'int7'\].*int8"):
        recommend_format(model, tiny_batch(model), formats=["int7"])
    with pytest.raises(ValueError, match="tolerance=-1"):
        recommend_format(model, tiny_batch(model), tolerance=-1)
    with pytest.raises(ValueError, match="quantized already"):
        recommend_format(quantize(model, Int8DynamicConfig()), tiny_batch(model))
