"""Distillation beside what else a `Trainer` can do: streams, subsets, adapters, stages that differ."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import random_split
from transformers import BartConfig, BartForSequenceClassification, DataCollatorWithPadding, set_seed

from hf_compress import StageConfig, TeacherCache, TeacherCollator, TermConfig, add_teacher_inputs
from hf_compress.distillation.term_log import TermLog
from tests.distillation.test_other_tokenizer import LETTERS, TEXTS, WORDS, kd_loss, trainer_of
from tests.distillation.tiny import PadCollator, make_trainer, tiny_model, tiny_rows

quiet_peft = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def bart(layerdrop=0.0):
    set_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 50}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    return BartForSequenceClassification(BartConfig(**sizes, **heads, **ids, encoder_layerdrop=layerdrop))


def test_layers_that_are_left_out_at_random_cannot_be_imitated(tmp_path):
    terms = [TermConfig("hidden_mse")]
    with pytest.raises(ValueError, match="^encoder_layerdrop=0.3 leaves out layers .* with encoder_layerdrop=0.$"):
        make_trainer("single-label", tmp_path, bart(), bart(0.3), terms=terms)
    make_trainer("single-label", tmp_path, bart(), bart(0.3))


def test_hidden_states_are_of_the_texts_that_are_trained_on(tmp_path):
    """What an evaluation before the step left behind is not taken for them."""
    trainer = make_trainer("single-label", tmp_path, terms=[TermConfig("hidden_mse")], eval_on_start=True)
    trainer.train()
    trainer._enter_stage()
    trainer.evaluate()
    assert trainer._probe.take()
    trainer.evaluate()
    trainer._enter_stage()
    assert not trainer._probe.take()


def both_tokenizers() -> Dataset:
    rows = Dataset.from_dict({"text": TEXTS, "labels": [0, 1, 2, 0, 1, 2]})
    rows = rows.map(lambda row: LETTERS(row["text"]), batched=True)
    return add_teacher_inputs(rows, WORDS)


@pytest.mark.parametrize("kind", ["subset", "stream"])
def test_a_teachers_own_inputs_in_data_without_names_of_columns(kind, tmp_path):
    rows = both_tokenizers().remove_columns("text")
    collator = TeacherCollator(DataCollatorWithPadding(LETTERS), WORDS)
    teacher = tiny_model("single-label", 2, seed=2, vocab_size=len(WORDS))
    whole = random_split(rows, [6])[0] if kind == "subset" else rows.to_iterable_dataset().map(lambda row: row)
    losses = [
        kd_loss(trainer_of("single-label", tmp_path, data, collator, LETTERS, teacher, per_device_train_batch_size=6))
        for data in (rows, whole)
    ]
    # A subset draws its own order; one batch is the whole of it.
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


@quiet_peft
def test_an_adapter_that_was_saved_and_loaded_is_the_same_teacher(tmp_path):
    config = LoraConfig(r=2, target_modules=["query"], init_lora_weights=False, task_type="SEQ_CLS")
    teacher = get_peft_model(tiny_model("single-label", 2, seed=2), config).eval()
    TeacherCache.build(tmp_path / "cache", teacher, tiny_rows("single-label"), data_collator=PadCollator())
    teacher.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny_model("single-label", 2, seed=2), tmp_path / "adapter")
    assert len(TeacherCache.open(tmp_path / "cache", loaded)) == 8


def test_texts_about_teachers_are_no_inputs_of_one(tmp_path):
    rows = Dataset.from_dict({"text": TEXTS}).map(lambda row: LETTERS(row["text"]), batched=True)
    rows = rows.add_column("teacher_answer", TEXTS)
    teacher = tiny_model("single-label", 2, vocab_size=len(LETTERS))
    assert len(TeacherCache.build(tmp_path, teacher, rows, processing_class=LETTERS)) == len(TEXTS)


@pytest.mark.parametrize(
    ("task", "divergence"), [("single-label", "cosine"), ("regression", "reverse_kl"), ("multi-label", "cosine")]
)
def test_what_a_later_stage_cannot_do_is_said_at_once(task, divergence, tmp_path):
    stages = [StageConfig(steps=1), StageConfig(divergence=divergence)]
    with pytest.raises(ValueError, match=f"^divergence='{divergence}' does not fit this model"):
        make_trainer(task, tmp_path, stages=stages)


def test_very_low_outputs_are_numbers_and_nan_is_none():
    low = torch.full((4, 3), torch.finfo(torch.float32).min)
    log = TermLog()
    log.check_finite({"logits": low, "nothing": low[:0]})
    log.raise_if_not_finite()
    for wrong in (float("nan"), float("-inf")):
        log = TermLog()
        log.check_finite({"logits": low.index_fill(1, torch.tensor([1]), wrong)})
        with pytest.raises(ValueError, match="hold NaN or infinity"):
            log.raise_if_not_finite()


@quiet_peft
def test_adapters_keep_the_card_of_trainer(tmp_path):
    config = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    trainer = make_trainer("single-label", tmp_path, student=get_peft_model(tiny_model("single-label", 1), config))
    trainer.create_model_card()
    assert "stock checkpoint" not in (tmp_path / "README.md").read_text()


def test_a_stream_has_no_epochs(tmp_path):
    rows = Dataset.from_list(tiny_rows("single-label")).to_iterable_dataset()
    stages = [StageConfig(epochs=0.5), StageConfig()]
    trainer = make_trainer("single-label", tmp_path, stages=stages, max_steps=4)
    trainer.train_dataset = rows
    with pytest.raises(ValueError, match=r"^The stages last \[0.5, None\] epochs, .*: give steps.$"):
        trainer.train()


@quiet_peft
def test_shares_of_terms_that_nothing_trained_leads_to(tmp_path):
    config = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    student = get_peft_model(tiny_model("single-label", 1), config)
    terms = [TermConfig("embedding"), TermConfig("hidden_mse")]
    trainer = make_trainer("single-label", tmp_path, student=student, terms=terms, log_gradient_shares=True)
    trainer.train()
    shares = {name: value for name, value in trainer.state.log_history[0].items() if name.endswith("_share")}
    assert shares["embedding_gradient_share"] == 0
    assert sum(shares.values()) == pytest.approx(1)


def test_steps_without_any_label_are_said(tmp_path, caplog):
    rows = [row | {"labels": -100} for row in tiny_rows("single-label")]
    make_trainer("single-label", tmp_path, rows=rows, alpha=0.0).train()
    assert "had nothing to learn from" in caplog.text
    caplog.clear()
    make_trainer("single-label", tmp_path, rows=rows, alpha=0.5).train()
    assert "had nothing to learn from" not in caplog.text
