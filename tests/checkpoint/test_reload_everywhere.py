"""A cut checkpoint goes wherever a stock one goes, and its weights come out bit for bit."""

import copy
import json
import subprocess
import sys

import huggingface_hub
import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
    pipeline,
)

from hf_compress.checkpoint.quantizer import CompressionQuantizer
from hf_compress.checkpoint.widths import cut_to_widths_, read_widths, write_widths_
from hf_compress.modeling.blocks import find_blocks
from hf_compress.modeling.removal import can_remove, remove_attention_, remove_ffn_
from hf_compress.modeling.surgery import keep_neurons_
from tests.checkpoint.test_reload import cut_unevenly_
from tests.modeling.test_surgery import generate
from tests.modeling.tiny import DECODERS, MODEL_TYPES, auto_class, difference, predict, tiny_batch, tiny_model
from tests.tiny_job import save_tiny_bert, tiny_texts, tiny_tokenizer


def remove_unevenly_(model) -> None:
    """Whole parts here and there; the other blocks keep other heads and neurons each."""
    cut_unevenly_(model)
    for block in find_blocks(model):
        for number, attention in enumerate(block.attentions):
            if (block.index + number) % 3 == 1 and can_remove(attention):
                remove_attention_(attention)
        if block.index % 3 == 2:
            remove_ffn_(block.ffn)


def cut_evenly_(model) -> None:
    for number, block in enumerate(find_blocks(model)):
        keep_neurons_(block.ffn, range(number, number + 13))


def cast_(model, dtype: torch.dtype):
    """Cast what a checkpoint holds, unlike `.to`: tables of angles are computed in float32 when a model is loaded."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def batch_for(model) -> dict[str, torch.Tensor]:
    inputs = tiny_batch(model, tokens=tuple(range(3, 30)))
    return {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}


def assert_equal(first, second) -> None:
    """The same weights bit for bit, and the same predictions."""
    tensors = second.state_dict()
    assert first.state_dict().keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in first.state_dict().items())
    assert first.dtype == second.dtype
    assert type(first) is type(second)
    assert read_widths(first) == read_widths(second)
    assert difference(predict(first.eval(), batch_for(first)), predict(second.eval(), batch_for(second))) == 0


@pytest.mark.parametrize(
    ("cut_", "dtype"),
    [(cut_evenly_, torch.bfloat16), (remove_unevenly_, torch.bfloat16), (remove_unevenly_, torch.float32)],
)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_twice(model_type, cut_, dtype, tmp_path):
    model = tiny_model(model_type)
    cut_(model)
    assert write_widths_(cast_(model, dtype)) == (cut_ is not cut_evenly_)
    model.save_pretrained(tmp_path / "once")
    once = auto_class(model_type).from_pretrained(tmp_path / "once", attn_implementation="eager")
    assert_equal(once, model)
    once.save_pretrained(tmp_path / "twice")
    twice = auto_class(model_type).from_pretrained(tmp_path / "twice", attn_implementation="eager")
    assert_equal(twice, model)
    if model_type in DECODERS and dtype == torch.float32:
        assert difference(generate(twice)[1], generate(model)[1]) == 0


def removed_model(model_type: str, folder, name: str | None = None, **settings):
    model = tiny_model(model_type, name, **settings)
    remove_unevenly_(model)
    assert write_widths_(model)
    model.save_pretrained(folder, **({"max_shard_size": "10KB"} if "shard" in str(folder) else {}))
    return model


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "llama", "t5", "albert"])
def test_shards(model_type, tmp_path):
    model = removed_model(model_type, tmp_path / "shards")
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert_equal(auto_class(model_type).from_pretrained(tmp_path / "shards", attn_implementation="eager"), model)


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("settings", [{"device_map": "cpu"}, {"device_map": "auto"}, {"low_cpu_mem_usage": True}])
def test_device_map(model_type, settings, tmp_path):
    model = removed_model(model_type, tmp_path)
    loaded = auto_class(model_type).from_pretrained(tmp_path, attn_implementation="eager", **settings)
    assert_equal(loaded, model)
    loaded.save_pretrained(tmp_path / "again")
    assert_equal(auto_class(model_type).from_pretrained(tmp_path / "again", attn_implementation="eager"), model)


def test_no_memory_is_taken_for_what_was_cut(tmp_path, monkeypatch):
    model = removed_model("llama", tmp_path)
    devices = set()
    cut = CompressionQuantizer._process_model_before_weight_loading

    def watch(self, model, **kwargs):
        cut(self, model, **kwargs)
        devices.update(parameter.device.type for parameter in model.parameters())

    monkeypatch.setattr(CompressionQuantizer, "_process_model_before_weight_loading", watch)
    loaded = auto_class("llama").from_pretrained(tmp_path, attn_implementation="eager")
    assert devices == {"meta"}
    assert_equal(loaded, model)


def test_weights_that_a_checkpoint_lacks_are_initialized(tmp_path):
    removed_model("t5", tmp_path / "t5", "T5Model")
    removed_model("modernbert", tmp_path / "modernbert", "ModernBertModel")
    for name in ("t5", "modernbert"):
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / name)
        assert torch.isfinite(predict(model, tiny_batch(model) if name != "t5" else sequence())).all()
        assert_equal(AutoModel.from_pretrained(tmp_path / name), AutoModel.from_pretrained(tmp_path / name))


def sequence() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([[5, 6, 2]])}


def removed_classifier(folder):
    """A BERT that classifies texts, without its second attention and its third network, and its tokenizer."""
    model = AutoModelForSequenceClassification.from_pretrained(save_tiny_bert(folder / "whole"))
    first, second, third = find_blocks(model)
    keep_neurons_(first.ffn, range(7))
    remove_attention_(second.attention)
    remove_ffn_(third.ffn)
    assert write_widths_(model)
    model.save_pretrained(folder / "cut")
    tiny_tokenizer().save_pretrained(folder / "cut")
    return model, folder / "cut"


def test_pipeline(tmp_path):
    model, folder = removed_classifier(tmp_path)
    texts = [row["text"] for row in tiny_texts(6)]
    expected = pipeline("text-classification", model=model, tokenizer=tiny_tokenizer(), device="cpu")(texts)
    found = pipeline("text-classification", model=str(folder), device="cpu")(texts)
    assert [answer["label"] for answer in found] == [answer["label"] for answer in expected]
    # Weights are equal bit for bit; where they lie in memory may change the last bit of what is computed with them.
    assert [answer["score"] for answer in found] == pytest.approx([answer["score"] for answer in expected], rel=1e-6)
    assert len({answer["score"] for answer in expected}) > 1


def train(model, folder, **settings):
    tokenizer = tiny_tokenizer()
    rows = [tokenizer(row["text"]) | {"labels": row["label"]} for row in tiny_texts(8)]
    arguments = TrainingArguments(
        str(folder),
        max_steps=4,
        save_steps=2,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train(**settings)
    return trainer.model


def test_training_is_resumed_exactly(tmp_path):
    _, folder = removed_classifier(tmp_path)
    load = AutoModelForSequenceClassification.from_pretrained
    trained = train(load(folder), tmp_path / "run")
    assert_equal(load(tmp_path / "run" / "checkpoint-4"), trained)
    assert not torch.equal(load(folder).classifier.weight, trained.classifier.weight)
    resumed = train(load(folder), tmp_path / "run", resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert_equal(resumed, trained)


@pytest.mark.parametrize("targets", [["query", "value"], "all-linear"])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft reads it
@pytest.mark.filterwarnings("ignore:Adapter .default.. 3 LoRA tensor:UserWarning")  # removed parts have empty ones
def test_adapters(targets, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    _, folder = removed_classifier(tmp_path)
    load = AutoModelForSequenceClassification.from_pretrained
    config = LoraConfig(r=2, target_modules=targets, task_type="SEQ_CLS", init_lora_weights=False)
    adapted = train(get_peft_model(load(folder), config), tmp_path / "run").eval()
    adapted.save_pretrained(tmp_path / "adapter")
    reloaded = PeftModel.from_pretrained(load(folder), tmp_path / "adapter").eval()
    inputs = {"input_ids": torch.tensor([[2, 5, 6, 7, 3]])}
    assert difference(predict(reloaded, inputs), predict(adapted, inputs)) == 0
    assert difference(predict(reloaded, inputs), predict(load(folder), inputs)) > 1e-3
    merged = reloaded.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert_equal(load(tmp_path / "merged"), merged)


@pytest.mark.parametrize(("model_type", "n_shards"), [("bert", 1), ("gpt2", 1), ("gpt2", 6)])
def test_what_is_pushed(model_type, n_shards, tmp_path, monkeypatch):
    pushed = []

    def create_repo(self, repo_id, **_):
        return huggingface_hub.RepoUrl(f"https://huggingface.co/someone/{repo_id}")

    def create_commit(self, repo_id, operations, **_):
        pushed.extend(operation.path_in_repo for operation in operations)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", create_commit)
    model = removed_model(model_type, tmp_path / "local")
    settings = {"max_shard_size": "10KB"} if n_shards > 1 else {}
    model.save_pretrained(tmp_path / "pushed", push_to_hub=True, repo_id="cut", **settings)
    # The card is an empty one, which Transformers itself adds to every model.
    expected = {"README.md", "config.json"} | ({"generation_config.json"} if model.can_generate() else set())
    weights = {name for name in pushed if name.endswith(".safetensors")}
    assert len(weights) == n_shards
    index = {"model.safetensors.index.json"} if n_shards > 1 else set()
    assert set(pushed) == expected | weights | index


LOAD = """
import json, sys, traceback, torch
from transformers import AutoModelForMaskedLM

inputs, errors = torch.load("inputs.pt"), {}
for name in ("even", "uneven", "removed"):
    try:
        model = AutoModelForMaskedLM.from_pretrained(name, attn_implementation="eager").eval()
    except Exception:
        errors[name] = traceback.format_exc()
        continue
    with torch.no_grad():
        torch.save(model(**inputs).logits, f"{name}.pt")
assert "hf_compress" not in sys.modules
json.dump(errors, open("errors.json", "w"))
"""


def test_without_the_plugin_even_results_load_and_others_fail(tmp_path):
    model = tiny_model("bert")
    torch.save(tiny_batch(model), tmp_path / "inputs.pt")
    logits = {}
    for name, cut_ in (("even", cut_evenly_), ("uneven", cut_unevenly_), ("removed", remove_unevenly_)):
        cut = copy.deepcopy(model)
        cut_(cut)
        assert write_widths_(cut) == (name != "even")
        cut.save_pretrained(tmp_path / name)
        logits[name] = cut(**tiny_batch(model)).logits
    done = subprocess.run([sys.executable, "-c", LOAD], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert difference(torch.load(tmp_path / "even.pt"), logits["even"]) == 0
    errors = json.loads((tmp_path / "errors.json").read_text())
    assert errors.keys() == {"uneven", "removed"}
    assert all("`ignore_mismatched_sizes` to `False`, thus raising an error" in error for error in errors.values())
    # What it says before it fails is the only hint that a user gets.
    assert "hf_compress" in done.stderr


def test_widths_of_removed_parts_that_cannot_be(tmp_path):
    model = tiny_model("t5")
    widths = read_widths(model)
    widths["decoder.0"]["self"] = 0
    with pytest.raises(ValueError, match="cannot be removed: it holds the position bias"):
        cut_to_widths_(model, widths)
