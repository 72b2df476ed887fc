"""Bytes and seconds by part: all of them are counted, and each once."""

import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hf_compress.checkpoint.widths import write_widths_
from hf_compress.evaluation.parts import (
    ATTENTION,
    EMBEDDINGS,
    FEED_FORWARD,
    HEAD,
    OTHER,
    PARTS,
    bytes_by_part,
    name_parts,
    seconds_by_part,
)
from hf_compress.evaluation.stored import build_skeleton, names_in_model, read_config, read_headers
from hf_compress.modeling.blocks import find_blocks, find_layout, task_head_names, token_embeddings
from hf_compress.modeling.removal import can_remove, remove_attention_, remove_ffn_
from hf_compress.modeling.surgery import keep_neurons_
from hf_compress.quantization.quantize import quantize
from tests.checkpoint.test_sparse_reload import make_sparse_
from tests.modeling.tiny import MODEL_TYPES, auto_class, class_names, tiny_batch, tiny_model
from tests.quantization.test_reload import CONFIGS
from tests.quantization.wide import INT8, NF4, wide_model


def cut_(model):
    for number, block in enumerate(find_blocks(model)):
        keep_neurons_(block.ffn, range(8 + 4 * (number % 2)))
    last = find_blocks(model)[-1]
    if can_remove(last.attention):
        remove_attention_(last.attention)
    remove_ffn_(last.ffn)
    write_widths_(model)
    return model


KINDS = {
    "float": lambda model_type: tiny_model(model_type),
    "cut": lambda model_type: cut_(tiny_model(model_type)),
    "sparse": lambda model_type: make_sparse_(tiny_model(model_type)),
    "cut and sparse": lambda model_type: make_sparse_(cut_(tiny_model(model_type))),
    **{
        name: lambda model_type, config=config: quantize(cut_(tiny_model(model_type)), config)
        for name, config in CONFIGS.items()
    },
}


def saved(model, folder):
    model.save_pretrained(folder, max_shard_size="20KB")
    return folder


def tensor_bytes(folder) -> int:
    return sum(tensor.nbytes for file in folder.glob("*.safetensors") for tensor in load_file(file).values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_bytes_of_parts_sum_to_those_of_the_files(model_type, kind, tmp_path):
    model = KINDS[kind](model_type)
    n_bytes = bytes_by_part(saved(model, tmp_path))
    assert tuple(n_bytes) == PARTS
    assert sum(n_bytes.values()) == tensor_bytes(tmp_path)
    # Each name of a file leads to a tensor of the model: a bitmask to its weight.
    names = names_in_model(build_skeleton(read_config(tmp_path)), read_headers(tmp_path))
    assert {name.removesuffix("_bitmask") for name in names.values()} <= model.state_dict().keys()


@pytest.mark.bitsandbytes
@pytest.mark.parametrize("config", [INT8, NF4], ids=["int8", "nf4"])
@pytest.mark.parametrize("model_type", ["bert", "gpt2", "t5"])
def test_bytes_of_another_library_count_with_their_weights(model_type, config, tmp_path):
    model = wide_model(model_type)
    before = bytes_by_part(saved(model, tmp_path / "float"))
    after = bytes_by_part(saved(quantize(model, config), tmp_path / "quantized"))
    assert sum(after.values()) == tensor_bytes(tmp_path / "quantized")
    assert all(after[part] < before[part] / 1.5 for part in (ATTENTION, FEED_FORWARD))
    assert all(after[part] == before[part] for part in (EMBEDDINGS, HEAD, OTHER))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_each_part_holds_what_the_model_calls_so(model_type, tmp_path):
    for class_name in (class_names(model_type)[0], class_names(model_type)[-1]):
        model = tiny_model(model_type, class_name)
        n_bytes = bytes_by_part(saved(model, tmp_path / class_name))

        def nbytes(*modules) -> int:
            return sum({id(p): p.nbytes for m in modules for p in m.parameters()}.values())

        attentions = [attention.module for block in find_blocks(model) for attention in block.attentions]
        biases = [module for name, module in model.named_modules() if name.endswith("relative_attention_bias")]
        assert n_bytes[ATTENTION] == nbytes(*attentions, *biases)
        ffns = [block.ffn for block in find_blocks(model)]
        inside = [module for ffn in ffns for module in (*ffn.inputs, ffn.output)]
        assert n_bytes[FEED_FORWARD] == nbytes(*inside, *(ffn.module for ffn in ffns if ffn.layout.module))
        assert n_bytes[HEAD] == nbytes(*map(model.get_submodule, task_head_names(model)))
        assert n_bytes[EMBEDDINGS] >= nbytes(*token_embeddings(model))


def test_a_model_with_a_head_and_the_file_of_one_without(tmp_path):
    bare, whole = tiny_model("bert", "BertModel"), tiny_model("bert", "BertForSequenceClassification")
    of_bare = bytes_by_part(saved(bare, tmp_path / "bare"))
    saved(bare, tmp_path / "mixed")
    whole.config.save_pretrained(tmp_path / "mixed")
    assert bytes_by_part(tmp_path / "mixed") == of_bare
    saved(whole, tmp_path / "other")
    bare.config.save_pretrained(tmp_path / "other")
    of_other = bytes_by_part(tmp_path / "other")
    assert all(of_other[part] == of_bare[part] for part in (EMBEDDINGS, ATTENTION, FEED_FORWARD))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_seconds_of_parts_sum_to_those_of_a_forward(model_type, monkeypatch):
    model = cut_(tiny_model(model_type))
    # A clock that moves by 1 whenever it is read: a forward takes as many seconds as it has marks.
    ticks = iter(range(10**6))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    whole = SimpleNamespace(latency={"model": SimpleNamespace(median_s=7.0)})
    monkeypatch.setattr("hf_compress.evaluation.parts.compare_latency", lambda *_, **__: whole)
    seconds = seconds_by_part(model, tiny_batch(model), n_runs=3)
    assert tuple(seconds) == PARTS
    assert sum(seconds.values()) == pytest.approx(7.0)
    # Each part that is called lasts from one mark to the next.
    blocks = find_blocks(model)
    called = {
        ATTENTION: sum(len(block.attentions) * block.repeats for block in blocks),
        FEED_FORWARD: sum(block.repeats for block in blocks),
    }
    assert seconds[ATTENTION] / seconds[FEED_FORWARD] >= called[ATTENTION] / called[FEED_FORWARD] - 1e-9
    assert all(seconds[part] > 0 for part in (*called, EMBEDDINGS, OTHER))
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_hooks_go_where_a_forward_fails(monkeypatch):
    model = tiny_model("bert")
    monkeypatch.setattr("hf_compress.evaluation.parts.compare_latency", lambda *_, **__: SimpleNamespace(
        latency={"model": SimpleNamespace(median_s=1.0)}
    ))  # fmt: skip
    with pytest.raises(IndexError):
        seconds_by_part(model, {"input_ids": torch.full((1, 3), 10**4)})
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_a_training_model_goes_on_training():
    model = tiny_model("gpt2").train()
    seconds = seconds_by_part(model, tiny_batch(model), n_runs=1)
    assert model.training
    assert min(seconds.values()) >= 0


def test_no_part_lies_in_another():
    for model_type in MODEL_TYPES:
        model = auto_class(model_type).from_config(tiny_model(model_type).config)
        assert find_layout(model.config)
        parts = name_parts(model)
        inside = [(a, b) for a in parts for b in parts if a.startswith(f"{b}.") and parts[a] != parts[b]]
        assert not inside


def test_files_that_are_none(tmp_path):
    model = tiny_model("bert")
    folder = saved(model, tmp_path / "model")
    with pytest.raises(ValueError, match="There is no folder"):
        bytes_by_part(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        bytes_by_part(tmp_path)
    file = sorted(folder.glob("*.safetensors"))[0]
    content = file.read_bytes()
    for cut_off in (content[:-1], content[:100], content[:4], b"", content + b"x", b"\xff" * 100):
        file.write_bytes(cut_off)
        with pytest.raises(ValueError, match="damaged or was cut off"):
            bytes_by_part(folder)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(ValueError, match=r"lacks model-00001-of-\d+\.safetensors, .* which model\.safetensors\.index"):
        bytes_by_part(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"holds no \*\.safetensors\. Give the folder"):
        bytes_by_part(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="can run code"):
        bytes_by_part(folder)


def test_unknown_architectures_are_refused(tmp_path):
    model = tiny_model("bert")
    saved(model, tmp_path)
    config = read_config(tmp_path)
    config.architectures = ["BertForPoetry"]
    with pytest.raises(ValueError, match="BertForPoetry"):
        build_skeleton(config)
    assert isinstance(build_skeleton(read_config(tmp_path)), nn.Module)
