"""Weights without their zeros go wherever dense ones go, and come out bit for bit."""

import copy
import json

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    T5EncoderModel,
    Trainer,
    TrainingArguments,
    pipeline,
)

from hf_compress.checkpoint.sparse import BITMASK, mark_sparse_, sparse_names
from hf_compress.checkpoint.widths import read_widths, write_widths_
from hf_compress.modeling.blocks import find_blocks
from hf_compress.modeling.surgery import keep_neurons_
from hf_compress.pruning.weight_layers import find_layers
from hf_compress.quantization.config import FixedPointConfig, Int8DynamicConfig
from hf_compress.quantization.quantize import quantize
from tests.checkpoint.test_reload_everywhere import assert_equal, cast_, remove_unevenly_
from tests.modeling.tiny import MODEL_TYPES, auto_class, tiny_model
from tests.tiny_job import save_tiny_bert, tiny_texts, tiny_tokenizer


def matrices(model) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.ndim == 2]


@torch.no_grad()
def make_sparse_(model, sparsity: float = 0.6, names: list[str] | None = None):
    generator = torch.Generator().manual_seed(3)
    names = matrices(model) if names is None else names
    for name in names:
        parameter = model.get_parameter(name)
        parameter.masked_fill_(torch.rand(parameter.shape, generator=generator) < sparsity, 0)
    mark_sparse_(model, names)
    return model


def load(model, folder, **settings):
    return type(model).from_pretrained(folder, attn_implementation="eager", **settings)


def stored(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def packed(folder) -> set[str]:
    return {name.removesuffix(BITMASK) for name in stored(folder) if name.endswith(BITMASK)}


@pytest.mark.parametrize(
    ("model_type", "dtype"),
    [(model_type, torch.bfloat16) for model_type in MODEL_TYPES]
    + [(model_type, dtype) for model_type in ("bert", "gpt2", "vit") for dtype in (torch.float32, torch.float16)],
)
def test_twice(model_type, dtype, tmp_path):
    model = make_sparse_(cast_(tiny_model(model_type), dtype))
    model.save_pretrained(tmp_path / "once")
    assert len(packed(tmp_path / "once")) == len(matrices(model))
    once = auto_class(model_type).from_pretrained(tmp_path / "once", attn_implementation="eager")
    assert_equal(once, model)
    once.save_pretrained(tmp_path / "twice", max_shard_size="3KB")
    assert (tmp_path / "twice" / "model.safetensors.index.json").exists()
    assert packed(tmp_path / "twice") == packed(tmp_path / "once")
    assert_equal(auto_class(model_type).from_pretrained(tmp_path / "twice", attn_implementation="eager"), model)


def test_weights_of_8_bits(tmp_path):
    model = tiny_model("bert")
    for name in (names := [name for name in matrices(model) if "encoder" in name]):
        numbers = (model.get_parameter(name) * 30).to(torch.int8)
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, nn.Parameter(numbers, requires_grad=False))
    make_sparse_(model, names=names).save_pretrained(tmp_path / "once")
    load(model, tmp_path / "once").save_pretrained(tmp_path / "twice")
    assert packed(tmp_path / "twice") == set(names)
    tensors = load(model, tmp_path / "twice").state_dict()
    assert all(tensors[name].dtype == tensor.dtype for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensors[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("config", [Int8DynamicConfig(), FixedPointConfig(bits=8)], ids=["int8", "fixed"])
@pytest.mark.parametrize("model_type", ["bert", "gpt2"])
def test_integers_of_sparse_weights_are_sparse(model_type, config, tmp_path):
    dense = tiny_model(model_type)
    layers = [layer.name + ".weight" for layer in find_layers(dense)]
    model = quantize(make_sparse_(copy.deepcopy(dense), 0.8, layers), config)
    quantize(dense, config).save_pretrained(tmp_path / "dense")
    model.save_pretrained(tmp_path / "once")
    bytes_of = {one: sum(tensor.nbytes for tensor in stored(tmp_path / one).values()) for one in ("once", "dense")}
    assert bytes_of["once"] < 0.8 * bytes_of["dense"]
    assert packed(tmp_path / "once") == set(layers)
    once = auto_class(model_type).from_pretrained(tmp_path / "once", attn_implementation="eager")
    assert_equal(once, model)
    once.save_pretrained(tmp_path / "twice", max_shard_size="3KB")
    assert packed(tmp_path / "twice") == set(layers)
    assert_equal(auto_class(model_type).from_pretrained(tmp_path / "twice", attn_implementation="eager"), model)
    again = copy.deepcopy(model)
    again.load_state_dict(stored(tmp_path / "once"), strict=False)
    assert_equal(again, model)


@pytest.mark.parametrize(("dtype", "sparsity", "bound"), [("float16", 0.5, 0.58), ("float32", 0.7, 0.35)])
def test_bytes(dtype, sparsity, bound, tmp_path):
    size = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = BertModel(BertConfig(**size, vocab_size=50)).to(getattr(torch, dtype))
    names = [name for name in matrices(model) if "layer" in name]
    make_sparse_(model, sparsity, names).save_pretrained(tmp_path)
    tensors = stored(tmp_path)
    dense = sum(model.get_parameter(name).nbytes for name in names)
    assert sum(tensors[name].nbytes + tensors[name + BITMASK].nbytes for name in names) <= bound * dense


def test_special_values(tmp_path):
    model = tiny_model("bert")
    (name, *_) = matrices(model)
    with torch.no_grad():
        values = model.get_parameter(name).view(-1)
        values[:-20:2] = 0
        values[:5] = torch.tensor([-0.0, float("nan"), float("inf"), 1e-45, 0.0])
    mark_sparse_(model, [name])
    model.save_pretrained(tmp_path)
    loaded = load(model, tmp_path).get_parameter(name)
    assert packed(tmp_path) == {name}
    assert torch.equal(loaded.view(torch.int32), model.get_parameter(name).view(torch.int32))


def classifier(folder, sparsity: float = 0.6):
    model = AutoModelForSequenceClassification.from_pretrained(save_tiny_bert(folder / "whole"))
    make_sparse_(model, sparsity, [name for name in matrices(model) if "layer" in name])
    model.save_pretrained(folder / "sparse")
    tiny_tokenizer().save_pretrained(folder / "sparse")
    return model, folder / "sparse"


def test_a_reloaded_model_is_like_any_other(tmp_path):
    model, folder = classifier(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(folder)
    assert not loaded.is_quantized
    assert not hasattr(loaded, "hf_quantizer")
    assert not hasattr(loaded.config, "_is_quantized")
    assert all(parameter.requires_grad and parameter.is_contiguous() for parameter in loaded.parameters())
    loaded.half().save_pretrained(tmp_path / "half")
    assert packed(tmp_path / "half") == packed(folder)
    assert_equal(AutoModelForSequenceClassification.from_pretrained(tmp_path / "half"), copy.deepcopy(model).half())
    cast = AutoModelForSequenceClassification.from_pretrained(folder, dtype="bfloat16")
    assert_equal(cast, model.bfloat16())


@pytest.mark.parametrize("device", ["cpu", "auto", "disk"])
def test_device_map(device, tmp_path):
    model = make_sparse_(tiny_model("bert", "BertModel"))
    model.save_pretrained(tmp_path / "saved")
    settings = {"device_map": device}
    if device == "disk":
        parts = {"embeddings": "cpu", "encoder": "disk", "pooler": "cpu"}
        settings = {"device_map": parts, "offload_folder": str(tmp_path / "disk")}
    loaded = load(model, tmp_path / "saved", **settings)
    loaded.save_pretrained(tmp_path / "again", max_shard_size="10KB")
    assert packed(tmp_path / "again") == packed(tmp_path / "saved")
    assert_equal(load(model, tmp_path / "again"), model)


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "t5", "albert"])
def test_cut_and_sparse(model_type, tmp_path):
    for number, steps in enumerate([(remove_unevenly_, make_sparse_), (make_sparse_, remove_unevenly_)]):
        model = tiny_model(model_type)
        for step in steps:
            step(model)
            write_widths_(model)
        names = sparse_names(model)
        assert names
        model.save_pretrained(tmp_path / f"{number}")
        loaded = auto_class(model_type).from_pretrained(tmp_path / f"{number}", attn_implementation="eager")
        assert_equal(loaded, model)
        assert read_widths(loaded) == read_widths(model)
        assert sparse_names(loaded) == names
        assert write_widths_(loaded)
        assert loaded.config.quantization_config.to_dict() == model.config.quantization_config.to_dict()


def test_a_cut_that_the_stock_config_can_express(tmp_path):
    model = make_sparse_(tiny_model("bert"))
    for block in find_blocks(model):
        keep_neurons_(block.ffn, range(8))
    assert write_widths_(model)
    assert "widths" not in model.config.quantization_config.to_dict()
    model.save_pretrained(tmp_path)
    assert_equal(load(model, tmp_path), model)


def test_other_classes(tmp_path):
    model = make_sparse_(tiny_model("bert", "BertForSequenceClassification"))
    model.save_pretrained(tmp_path / "head")
    base = AutoModel.from_pretrained(tmp_path / "head", attn_implementation="eager")
    assert torch.equal(base.encoder.layer[0].output.dense.weight, model.bert.encoder.layer[0].output.dense.weight)
    assert not any(name.startswith("bert.") for name in sparse_names(base))
    base.save_pretrained(tmp_path / "base")
    assert packed(tmp_path / "base") == set(sparse_names(base))
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    assert set(sparse_names(again)) == {f"bert.{name}" for name in sparse_names(base)}
    assert torch.equal(again.bert.pooler.dense.weight, model.bert.pooler.dense.weight)

    whole = make_sparse_(tiny_model("t5"))
    whole.save_pretrained(tmp_path / "t5")
    encoder = T5EncoderModel.from_pretrained(tmp_path / "t5")
    assert torch.equal(encoder.shared.weight, whole.shared.weight)
    encoder.save_pretrained(tmp_path / "encoder")
    assert_encoder = T5EncoderModel.from_pretrained(tmp_path / "encoder")
    assert all(torch.equal(t, assert_encoder.state_dict()[name]) for name, t in encoder.state_dict().items())
    assert not any(name.startswith("decoder") for name in packed(tmp_path / "encoder"))


def test_tied_weights_are_stored_once(tmp_path):
    model = tiny_model("bert", "BertForMaskedLM")
    make_sparse_(model, names=["cls.predictions.decoder.weight"])
    model.save_pretrained(tmp_path)
    assert packed(tmp_path) == {"bert.embeddings.word_embeddings.weight"}
    loaded = load(model, tmp_path)
    assert_equal(loaded, model)
    assert loaded.cls.predictions.decoder.weight is loaded.bert.embeddings.word_embeddings.weight


def test_pipeline(tmp_path):
    model, folder = classifier(tmp_path)
    texts = [row["text"] for row in tiny_texts(6)]
    expected = pipeline("text-classification", model=model, tokenizer=tiny_tokenizer(), device="cpu")(texts)
    found = pipeline("text-classification", model=str(folder), device="cpu")(texts)
    assert [answer["label"] for answer in found] == [answer["label"] for answer in expected]
    # Weights are equal bit for bit; where they lie in memory may change the last bit of what is computed with them.
    assert [answer["score"] for answer in found] == pytest.approx([answer["score"] for answer in expected], rel=1e-6)


def trainer_for(model, folder, **settings) -> Trainer:
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
        **settings,
    )
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)


def keep_zeros_(model) -> None:
    """Training that keeps a model sparse: gradients of zeros are zero, and so is what the optimizer makes of them."""
    for name in sparse_names(model):
        parameter = model.get_parameter(name)
        parameter.register_hook((parameter.detach() != 0).mul)


@pytest.mark.parametrize("stays_sparse", [True, False])
def test_training_is_resumed_exactly(stays_sparse, tmp_path):
    _, folder = classifier(tmp_path)
    models = [AutoModelForSequenceClassification.from_pretrained(folder) for _ in range(2)]
    if stays_sparse:
        for model in models:
            keep_zeros_(model)
    trainer = trainer_for(models[0], tmp_path / "run")
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    # What has become dense is stored as it is.
    assert packed(tmp_path / "saved") == (packed(folder) if stays_sparse else set())
    for saved in ("saved", "run/checkpoint-4"):
        assert_equal(AutoModelForSequenceClassification.from_pretrained(tmp_path / saved), trainer.model)
    resumed = trainer_for(models[1], tmp_path / "run")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert_equal(resumed.model, trainer.model)


def test_the_best_model_is_loaded(tmp_path):
    _, folder = classifier(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    keep_zeros_(model)
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    trainer = trainer_for(model, tmp_path / "run", **best)
    trainer.train()
    best_model = AutoModelForSequenceClassification.from_pretrained(trainer.state.best_model_checkpoint)
    assert packed(tmp_path / "run" / "checkpoint-2") == packed(folder)
    assert_equal(trainer.model, best_model)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft reads it
def test_adapters(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    model, folder = classifier(tmp_path)
    settings = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False)
    base = AutoModelForSequenceClassification.from_pretrained(folder)
    adapted = get_peft_model(base, settings)
    trainer_for(adapted, tmp_path / "run").train()
    adapted.save_pretrained(tmp_path / "adapter")
    reloaded = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(folder), tmp_path / "adapter"
    )
    assert_equal(reloaded, adapted)
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert packed(tmp_path / "merged") == {name for name in packed(folder) if "query" not in name}
    assert_equal(AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged"), merged)


def test_copies_and_marks(tmp_path):
    model = make_sparse_(tiny_model("vit"))
    names = sparse_names(model)
    other = copy.deepcopy(model)
    mark_sparse_(other, names[:1])
    for number, (each, expected) in enumerate([(model, len(names)), (other, 1)]):
        each.save_pretrained(tmp_path / f"{number}")
        assert len(packed(tmp_path / f"{number}")) == expected
        assert_equal(load(model, tmp_path / f"{number}"), model)
    mark_sparse_(model, [])
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert not packed(tmp_path / "dense")
    # The same, bit for bit, as if the model had never been sparse.
    del model._weight_conversions
    model.save_pretrained(tmp_path / "stock")
    assert stored(tmp_path / "dense").keys() == stored(tmp_path / "stock").keys()


def test_dense_tensors_under_a_sparse_config(tmp_path):
    model = make_sparse_(tiny_model("bert"))
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert_equal(type(model).from_pretrained(None, config=copy.deepcopy(model.config), state_dict=tensors), model)
    model.save_pretrained(tmp_path / "dense", save_original_format=False)
    assert not packed(tmp_path / "dense")
    assert_equal(load(model, tmp_path / "dense"), model)


def test_push_to_hub(tmp_path, monkeypatch):
    pushed = {}

    def create_commit(self, repo_id, operations, **_):
        for operation in operations:
            if operation.path_in_repo.endswith(".safetensors"):
                pushed.update(load_file(operation.path_or_fileobj))

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", create_commit)
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "create_repo",
        lambda self, repo_id, **_: huggingface_hub.RepoUrl(f"https://huggingface.co/someone/{repo_id}"),
    )
    model = make_sparse_(tiny_model("bert"))
    model.push_to_hub("sparse")
    assert {name.removesuffix(BITMASK) for name in pushed if name.endswith(BITMASK)} >= {sparse_names(model)[1]}
