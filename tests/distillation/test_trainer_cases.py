"""Distillation where two features meet: caches, adapters, stages, compiled models, rows without labels."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_compress import StageConfig, TeacherCache, TermConfig
from hf_compress.distillation.cache_keys import fingerprint
from tests.distillation import tiny
from tests.distillation.test_scale import LargestLogits
from tests.distillation.tiny import (
    Dataset,
    GradientRecorder,
    PadCollator,
    make_trainer,
    relative_difference,
    step_gradients,
    tiny_model,
    tiny_rows,
)


def gpt2(layers=2, seed=2):
    set_seed(seed)
    sizes = {"n_embd": 16, "n_head": 2, "n_layer": layers, "n_inner": 24, "vocab_size": 50, "n_positions": 32}
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "initializer_range": 0.3}
    return GPT2ForSequenceClassification(GPT2Config(**sizes, **quiet, num_labels=3, pad_token_id=0))


@pytest.mark.parametrize("teacher", [tiny_model("single-label", 2, seed=2), gpt2()], ids=["bert", "gpt2"])
def test_answers_that_depend_on_padding_are_not_cached(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "PADDING_SIDE", "left")
    with pytest.raises(ValueError, match="padded on the left, and .* counts positions from there"):
        TeacherCache.build(tmp_path, teacher, tiny_rows("single-label"), data_collator=PadCollator())


def test_words_without_any_label_learn_from_the_teacher(tmp_path):
    rows = tiny_rows("token-classification")
    bare = [{name: value for name, value in row.items() if name != "labels"} for row in rows]
    unlabelled = [row | {"labels": [-100] * len(row["labels"])} for row in rows]
    gradients = [
        step_gradients("token-classification", tmp_path, 8, 1, alpha=1.0, rows=some)
        for some in (bare, unlabelled, rows[:4] + unlabelled[4:], rows[:4])
    ]
    assert relative_difference(gradients[0], gradients[1]) < 1e-6
    assert relative_difference(gradients[2], gradients[3]) > 0.01


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft reads it
def test_another_adapter_is_another_teacher(tmp_path):
    config = LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False, task_type="SEQ_CLS")
    teacher = get_peft_model(tiny_model("single-label", 2, seed=2), config)
    teacher.add_adapter("other", config)
    first = fingerprint(teacher)
    TeacherCache.build(tmp_path / "cache", teacher, tiny_rows("single-label"), data_collator=PadCollator())
    with teacher.disable_adapter():
        assert fingerprint(teacher) != first
    assert fingerprint(teacher) == first
    teacher.set_adapter("other")
    with pytest.raises(ValueError, match="is of another teacher"):
        TeacherCache.open(tmp_path / "cache", teacher)


def test_a_compiled_student_notices_the_terms_of_later_stages_and_trainings(tmp_path):
    rows = [row | {"input_ids": (row["input_ids"] * 4)[:12]} for row in tiny_rows("single-label")]
    rows = [row | {"attention_mask": [1] * 12} for row in rows]
    one, other = ([TermConfig("hidden_mse", layers=[pair])] for pair in ((1, 1), (2, 3)))
    # One after the other, since what one training compiled is there in the next.
    for terms in ([[]], [one], [[], other], [one, other], [other, []]):
        found = []
        for compiled in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
            recorder = GradientRecorder()
            stages = [StageConfig(steps=1, alpha=0.5, terms=some) for some in terms]
            make_trainer(
                "single-label",
                tmp_path,
                student=tiny_model("single-label", 2, seed=1),
                teacher=tiny_model("single-label", 4, seed=2),
                rows=rows,
                callbacks=[recorder],
                stages=stages,
                max_steps=len(stages),
                per_device_train_batch_size=8,
                **compiled,
            ).train()
            found.append(recorder.steps)
        assert len(found[0]) == len(found[1]) == len(stages)
        for plain, compiled in zip(*found, strict=True):
            compiled = {name.removeprefix("_orig_mod."): value for name, value in compiled.items()}
            assert relative_difference(plain, compiled) < 1e-5


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_what_all_logits_have_in_common_hides_nothing(offset, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "PADDING_SIDE", "left")
    set_seed(2)
    sizes = {"n_embd": 16, "n_head": 2, "n_layer": 2, "vocab_size": 50, "n_positions": 32, "initializer_range": 0.3}
    teacher = GPT2LMHeadModel(GPT2Config(**sizes, pad_token_id=0, tie_word_embeddings=False))
    # The last channel says the same in every class.
    teacher.lm_head.weight.data[:, -1] = offset
    teacher.transformer.ln_f.weight.data[-1], teacher.transformer.ln_f.bias.data[-1] = 0.0, 1.0
    with pytest.raises(ValueError, match="padded on the left"):
        TeacherCache.build(tmp_path, teacher, tiny_rows("causal-lm"), data_collator=PadCollator())


def test_few_texts_are_asked_about_to_see_whether_padding_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "PADDING_SIDE", "left")
    teacher, sizes = tiny_model("causal-lm", 2, seed=2), []
    teacher.register_forward_pre_hook(lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True)
    rows = tiny_rows("causal-lm")
    for _ in range(2):
        TeacherCache.build(tmp_path, teacher, rows, data_collator=PadCollator(), batch_size=2)
    assert max(sizes) == 2


def test_empty_texts_are_no_padding(tmp_path):
    rows = tiny_rows("causal-lm")
    rows[2] |= {"input_ids": [], "attention_mask": [], "labels": []}
    teacher = tiny_model("causal-lm", 2, seed=2)
    assert len(TeacherCache.build(tmp_path, teacher, rows, data_collator=PadCollator())) == len(rows)


def test_the_check_of_the_teacher_asks_in_batches_and_chunks_of_the_training(tmp_path):
    models = [tiny_model("causal-lm", 1, seed=seed, vocab_size=997) for seed in (1, 2)]
    settings = {"logits_chunk": 5, "per_device_train_batch_size": 1, "teacher_check_rows": 8}
    trainer = make_trainer("causal-lm", tmp_path, student=models[0], teacher=models[1], **settings)
    trainer._head_is_checked = True
    with LargestLogits() as largest:
        trainer.train()
    assert largest.rows <= 5


@pytest.mark.parametrize(("kind", "least"), [("distance", 2), ("contrastive", 2), ("angle", 3)])
def test_terms_between_texts_need_some(kind, least, tmp_path):
    settings = {"terms": [TermConfig(kind)], "gradient_accumulation_steps": 4}
    with pytest.raises(
        ValueError, match=f"compares the texts of a batch .* set per_device_train_batch_size to {least}"
    ):
        make_trainer("single-label", tmp_path, per_device_train_batch_size=least - 1, **settings)
    make_trainer("single-label", tmp_path, per_device_train_batch_size=least, **settings)


def test_a_cached_teacher_decodes_from_the_tokens_of_the_student(tmp_path):
    teacher = tiny_model("seq2seq", 2, seed=2, decoder_start_token_id=3)
    cache = TeacherCache.build(tmp_path / "cache", teacher, tiny_rows("seq2seq"), data_collator=PadCollator())
    with pytest.raises(ValueError, match=r"decoded from the tokens \{'decoder_start_token_id': 3"):
        make_trainer("seq2seq", tmp_path, teacher=teacher, cache=cache)


def test_a_teacher_that_was_trained_in_bfloat16_answers_in_its_own_dtype(tmp_path):
    rows, teacher = tiny_rows("single-label"), tiny_model("single-label", 2, seed=2)
    common = {"use_cpu": True, "max_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    args = TrainingArguments(str(tmp_path), bf16=True, **common)
    Trainer(teacher, args, train_dataset=Dataset.from_list(rows), data_collator=PadCollator()).train()
    fresh = tiny_model("single-label", 2, seed=2)
    fresh.load_state_dict(teacher.state_dict())
    answers = [
        TeacherCache.build(tmp_path / str(number), model, rows, data_collator=PadCollator()).look_up(
            PadCollator()(rows)
        )
        for number, model in enumerate((teacher, fresh))
    ]
    assert all(torch.equal(answers[0][name], value) for name, value in answers[1].items())
    gradients = [step_gradients("single-label", tmp_path, 8, 1, alpha=1.0, teacher=one) for one in (teacher, fresh)]
    assert relative_difference(*gradients) == 0
    assert "_original_forward" in vars(teacher)


@pytest.mark.parametrize("task", ["regression", "multi-label"])
def test_labels_that_are_no_single_class_are_not_smoothed(task, tmp_path):
    with pytest.raises(ValueError, match="label_smoothing_factor=0.5 spreads one label over all classes"):
        make_trainer(task, tmp_path, label_smoothing_factor=0.5)
