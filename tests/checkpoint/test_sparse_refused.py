"""What is refused of weights without their zeros: damaged files, configs that do not fit, and no plug-in."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from hf_compress.checkpoint.config import METHOD, CompressionConfig
from hf_compress.checkpoint.sparse import BITMASK, mark_sparse_
from tests.checkpoint.test_sparse_reload import load, make_sparse_, stored
from tests.modeling.tiny import tiny_model

NAME = "bert.encoder.layer.1.output.dense.weight"


def test_without_the_plugin(tmp_path, monkeypatch):
    model = make_sparse_(tiny_model("bert"))
    model.save_pretrained(tmp_path)
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, METHOD)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(model, tmp_path)


def drop(name):
    return lambda tensors: tensors.pop(name)


def replace(name, change):
    return lambda tensors: tensors.update({name: change(tensors[name])})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace(NAME, lambda values: values[1:].clone()), "marks .* elements, but"),
        (replace(NAME, lambda values: torch.cat([values, values])), "marks .* elements, but"),
        (replace(NAME, lambda values: values[None].contiguous()), "values of one dimension"),
        (replace(NAME + BITMASK, lambda mask: mask ^ 1), "marks .* elements, but"),
        (replace(NAME + BITMASK, lambda mask: mask[:-1].clone()), r"has a bitmask of shape \(32, 3\)"),
        (replace(NAME + BITMASK, lambda mask: mask.to(torch.int16)), "torch.int16"),
        (replace(NAME + BITMASK, lambda mask: mask.repeat(1000, 1)), r"has a bitmask of shape \(32, 3\)"),
        (drop(NAME), "has its bitmask, but not its values"),
    ],
)
def test_damaged_weights_are_refused(change, message, tmp_path):
    model = make_sparse_(tiny_model("bert"))
    model.save_pretrained(tmp_path)
    tensors = stored(tmp_path)
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"Sparse weights cannot be loaded\. {NAME}: .*{message}"):
        load(model, tmp_path)
    with pytest.raises(ValueError, match=message):
        model.load_state_dict(tensors)


def test_a_weight_without_its_bitmask_is_refused(tmp_path):
    model = make_sparse_(tiny_model("bert"))
    model.save_pretrained(tmp_path)
    tensors = stored(tmp_path)
    del tensors[NAME + BITMASK]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(model, tmp_path)


@pytest.mark.parametrize(
    ("sparse", "message"),
    [
        (["bert.encoder.layer.9.output.dense.weight"], "BertForMaskedLM has no such weight"),
        (["bert.encoder.layer.1.output.dense"], "has no such weight"),
        (["bert.embeddings.position_ids"], "has no such weight"),
        (["(bert|.*)*$"], "has no such weight"),
        ([NAME, NAME], "distinct names"),
        ([1], "distinct names"),
        (NAME, "distinct names"),
        ({NAME: 1}, "distinct names"),
        (None, "widths=None in quantization_config must map"),
    ],
)
def test_a_doubtful_config_is_refused(sparse, message, tmp_path):
    model = make_sparse_(tiny_model("bert"))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["sparse"] = sparse
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load(model, tmp_path)


def test_names_that_cannot_be_marked():
    model = tiny_model("bert")
    for name in ("bert.embeddings.position_ids", "bert.encoder", "surprise"):
        with pytest.raises(ValueError, match=f"{name} should be sparse, but BertForMaskedLM has no such weight"):
            mark_sparse_(model, [NAME, name])
    assert not hasattr(model.config, "quantization_config")


@pytest.mark.parametrize("key", ["q(x)", "c|d", "1\\1", "a+b"])
def test_names_that_are_expressions_keep_their_zeros(key, tmp_path, caplog):
    model = tiny_model("bert")
    model.add_module("extra", torch.nn.ModuleDict({key: torch.nn.Linear(16, 16, bias=False)}))
    with torch.no_grad():
        model.extra[key].weight[:, ::2] = 0
    mark_sparse_(model, [f"extra.{key}.weight"])
    assert f"extra.{key}.weight will be stored with all zeros" in caplog.text
    model.save_pretrained(tmp_path)
    assert torch.equal(load_file(tmp_path / "model.safetensors")[f"extra.{key}.weight"], model.extra[key].weight)


def test_the_config_has_only_what_it_needs():
    assert "sparse" not in CompressionConfig({"encoder.0": {"self": 1, "ffn": 2}}).to_dict()
    config = CompressionConfig(sparse=["a.weight"])
    assert CompressionConfig(**config.to_dict()).to_dict() == config.to_dict()
    assert config.widths is None
