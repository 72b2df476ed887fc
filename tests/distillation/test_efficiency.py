"""Shortcuts of the training: what each does to the student, and that it is undone."""

import json

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_compress.distillation.arguments import DistillationArguments
from hf_compress.distillation.efficiency import (
    attention_as_products,
    check_dropout,
    dropout_set_to,
    frozen_embeddings,
    plain_attention_pays,
    training_shortcuts,
)
from hf_compress.modeling.blocks import token_embeddings
from tests.distillation import tiny as tasks
from tests.modeling.tiny import (
    MODEL_TYPES,
    class_names,
    difference,
    predict,
    supports,
    tiny_batch,
    tiny_config,
    tiny_model,
)

TEXT_MODELS = [model_type for model_type in MODEL_TYPES if model_type != "vit"]


def dropout_model(model_type: str):
    """A model whose every dropout is 0.5."""
    keys = [key for key in tiny_config(model_type).to_dict() if "dropout" in key or key.endswith("pdrop")]
    return tiny_model(model_type, **dict.fromkeys(keys, 0.5)).train()


def numbers_of(model) -> list:
    return [value for module in model.modules() for value in vars(module).values() if isinstance(value, int | float)]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_without_dropout_training_predicts_as_evaluation_does(model_type):
    model = dropout_model(model_type)
    batch, before = tiny_batch(model), numbers_of(model)
    with dropout_set_to(model, 0.0):
        in_training = predict(model, batch)
    assert numbers_of(model) == before
    assert difference(predict(model, batch), in_training) > 0
    assert torch.equal(predict(model.eval(), batch), in_training)


def test_dropout_can_be_raised():
    model = tiny_model("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    with dropout_set_to(model, 0.3):
        assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.3}


def test_a_checkpoint_says_what_the_user_chose(tmp_path):
    model = dropout_model("bert")
    model.set_attn_implementation("sdpa")
    model.save_pretrained(tmp_path / "before")
    with training_shortcuts(model, dropout=0.0, plain_attention=True):
        model.save_pretrained(tmp_path / "inside")
    before, inside = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("before", "inside"))
    assert before == inside
    assert inside["hidden_dropout_prob"] == 0.5


def test_all_is_undone_after_an_error():
    model = tasks.tiny_model("single-label", hidden_dropout_prob=0.2)
    model.set_attn_implementation("sdpa")
    before = numbers_of(model)

    def stop() -> None:
        with training_shortcuts(model, dropout=0.0, freeze_embeddings=True, plain_attention=True):
            assert model.config._attn_implementation == "eager"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert numbers_of(model) == before
    assert model.config._attn_implementation == "sdpa"
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_nothing_asked_changes_nothing():
    model = tasks.tiny_model("single-label", hidden_dropout_prob=0.2)
    before = numbers_of(model)
    with training_shortcuts(model):
        assert numbers_of(model) == before
        assert all(parameter.requires_grad for parameter in model.parameters())


def headless(model_type: str):
    return tiny_model(model_type, class_names(model_type)[0]).train()


@pytest.mark.parametrize("model_type", TEXT_MODELS)
def test_token_embeddings_alone_get_no_gradient(model_type):
    model = headless(model_type)
    batch = tiny_batch(model) | {"use_cache": False}
    if model_type == "bart":
        batch["decoder_input_ids"] = batch["input_ids"]
    tables = {id(table.weight) for table in token_embeddings(model)}
    with dropout_set_to(model, 0.0):
        model(**batch)[0].pow(2).sum().backward()
        whole = {name: parameter.grad for name, parameter in model.named_parameters()}
        model.zero_grad(set_to_none=True)
        with frozen_embeddings(model):
            model(**batch)[0].pow(2).sum().backward()
    for name, parameter in model.named_parameters():
        if id(parameter) in tables:
            assert parameter.grad is None
            assert whole[name] is not None
        elif whole[name] is None:
            assert parameter.grad is None
        else:
            assert torch.equal(parameter.grad, whole[name])
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_layers_learn_under_checkpointing_with_frozen_embeddings():
    model = headless("llama")
    model.activation_checkpointing_enable()
    with frozen_embeddings(model):
        model(**tiny_batch(model), use_cache=False)[0].sum().backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert missing == ["embed_tokens.weight"]


def test_a_frozen_table_is_not_decayed(tmp_path):
    model = tasks.tiny_model("single-label", hidden_dropout_prob=0.0)
    table = model.get_input_embeddings().weight
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    arguments = {"learning_rate": 0.1, "weight_decay": 0.5, "max_steps": 2, "save_strategy": "no"}
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, **arguments),
        train_dataset=tasks.tiny_rows("single-label"),
        data_collator=tasks.PadCollator(),
    )
    with frozen_embeddings(model):
        trainer.train()
    equal = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert [before[name].shape for name in equal] == [table.shape]
    assert not any(table is one for group in trainer.optimizer.param_groups for one in group["params"])


def test_what_was_frozen_before_stays_frozen():
    model = headless("bert")
    table = model.get_input_embeddings().weight.requires_grad_(False)
    with frozen_embeddings(model):
        assert not table.requires_grad
    assert not table.requires_grad


@pytest.mark.parametrize("task", ["masked-lm", "seq2seq"])
def test_a_tied_output_layer_cannot_be_frozen(task):
    with pytest.raises(ValueError, match="output layer"), frozen_embeddings(tasks.tiny_model(task)):
        pass


def test_an_output_layer_of_its_own_stays_trained():
    model = tasks.tiny_model("causal-lm", tie_word_embeddings=False)
    with frozen_embeddings(model):
        assert model.get_output_embeddings().weight.requires_grad


def test_images_have_no_token_embeddings():
    with pytest.raises(ValueError, match="no token embeddings"), frozen_embeddings(tiny_model("vit")):
        pass


@pytest.mark.parametrize("model_type", [name for name in MODEL_TYPES if supports(name, "sdpa")])
def test_plain_attention_predicts_the_same(model_type):
    model = tiny_model(model_type, attention="sdpa")
    batch = tiny_batch(model)
    fused = predict(model, batch)
    with attention_as_products(model):
        assert model.config._attn_implementation == "eager"
        assert difference(predict(model, batch), fused) < 1e-4
    assert torch.equal(predict(model, batch), fused)


def test_plain_attention_pays_in_bfloat16_alone():
    model = tiny_model("bert", attention="sdpa")
    assert plain_attention_pays(model, torch.bfloat16)
    assert not plain_attention_pays(model)
    assert not plain_attention_pays(model, torch.float16)
    assert plain_attention_pays(model.to(torch.bfloat16))
    assert not plain_attention_pays(tiny_model("bert", attention="eager"), torch.bfloat16)


@pytest.mark.parametrize("probability", [-0.1, 1.0, float("nan")])
def test_a_dropout_that_is_no_probability_raises(probability):
    with pytest.raises(ValueError, match="dropout="):
        check_dropout(probability)


@pytest.mark.parametrize("name", ["bf16", "fp16"])
@pytest.mark.parametrize("features", [{}, {"avx2": True}, {"amx_bf16": True, "avx512_fp16": True}])
def test_sixteen_bits_without_instructions_for_them_warn(name, features, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    DistillationArguments(output_dir=str(tmp_path), use_cpu=True, **{name: True})
    assert (f"{name}=True, but this CPU" in caplog.text) is (len(features) < 2)
    caplog.clear()
    DistillationArguments(output_dir=str(tmp_path), use_cpu=True)
    assert not caplog.records
