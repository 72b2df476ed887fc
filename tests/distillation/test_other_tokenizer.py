"""Teachers of another tokenizer: each model reads its own tokens, and words meet words."""

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
)

from hf_compress import (
    DistillationArguments,
    DistillationTrainer,
    TeacherCache,
    TeacherCollator,
    TermConfig,
    add_teacher_inputs,
)
from hf_compress.distillation import losses
from tests.distillation.tiny import tiny_model

TEXTS = ["ab cab b", "c", "abc bca cab a", "b a", "cc bb", "a b c a b"]


def tokenizer_of(*pieces: str, side: str = "right") -> PreTrainedTokenizerFast:
    """Splits words into the longest of these pieces, or into letters."""
    vocabulary = {name: n for n, name in enumerate(["[PAD]", "[UNK]", *pieces])}
    for letter in "abc":
        for piece in (letter, f"##{letter}"):
            vocabulary.setdefault(piece, len(vocabulary))
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", padding_side=side,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


LETTERS, WORDS = tokenizer_of(), tokenizer_of("ab", "cab", "##ca", "##bc")


def trainer_of(task, folder, rows, collator, tokenizer, teacher, cache=None, **settings) -> DistillationTrainer:
    args = DistillationArguments(
        str(folder), report_to="none", use_cpu=True, max_steps=1, logging_steps=1, save_strategy="no", alpha=1.0,
        teacher_check_rows=0, disable_tqdm=True, train_sampling_strategy="sequential", **settings,
    )  # fmt: skip
    return DistillationTrainer(
        tiny_model(task, 1, seed=1, vocab_size=len(tokenizer)), args, teacher=teacher, teacher_cache=cache,
        train_dataset=rows, data_collator=collator, processing_class=tokenizer,
    )  # fmt: skip


def kd_loss(trainer: DistillationTrainer) -> float:
    trainer.train()
    return trainer.state.log_history[0]["kd_loss"]


def classified() -> Dataset:
    rows = Dataset.from_dict({"text": TEXTS, "labels": [0, 1, 2, 0, 1, 2]})
    return rows.map(lambda row: LETTERS(row["text"]))


def test_each_model_reads_its_own_tokens(tmp_path):
    teacher = tiny_model("single-label", 2, seed=2, vocab_size=len(WORDS)).eval()
    rows = add_teacher_inputs(classified(), WORDS)
    collator = TeacherCollator(DataCollatorWithPadding(LETTERS), WORDS)
    trainer = trainer_of("single-label", tmp_path, rows, collator, LETTERS, teacher, per_device_train_batch_size=6)
    with torch.no_grad():
        ours = trainer.model(**LETTERS(TEXTS, padding=True, return_tensors="pt")).logits
        theirs = teacher(**WORDS(TEXTS, padding=True, return_tensors="pt")).logits
    assert kd_loss(trainer) == pytest.approx(losses.kl_divergence(ours, theirs, 2.0).mean().item(), rel=1e-5)
    with pytest.raises(ValueError, match="may not read the same input_ids"):
        trainer_of("single-label", tmp_path, classified(), None, LETTERS, teacher)


def test_a_tokenizer_of_its_own_that_is_the_same_changes_nothing(tmp_path):
    teacher = tiny_model("single-label", 2, seed=2, vocab_size=len(LETTERS))
    plain = trainer_of("single-label", tmp_path, classified(), DataCollatorWithPadding(LETTERS), LETTERS, teacher)
    collator = TeacherCollator(DataCollatorWithPadding(LETTERS), LETTERS)
    own = trainer_of("single-label", tmp_path, add_teacher_inputs(classified(), LETTERS), collator, LETTERS, teacher)
    assert kd_loss(own) == pytest.approx(kd_loss(plain), rel=1e-6)


def test_answers_of_another_tokenizer_are_cached(tmp_path):
    teacher = tiny_model("single-label", 2, seed=2, vocab_size=len(WORDS))
    rows = add_teacher_inputs(classified(), WORDS)
    collator = TeacherCollator(DataCollatorWithPadding(LETTERS), WORDS)
    cache = TeacherCache.build(tmp_path / "cache", teacher, rows.remove_columns("text"), data_collator=collator)
    online, cached = (
        trainer_of("single-label", tmp_path, rows, collator, LETTERS, teacher, cache=held) for held in (None, cache)
    )
    assert kd_loss(online) == pytest.approx(kd_loss(cached), rel=1e-6)


def test_only_texts_as_a_whole_are_compared_inside(tmp_path):
    teacher = tiny_model("single-label", 2, seed=2, vocab_size=len(WORDS))
    rows = add_teacher_inputs(classified(), WORDS)
    collator = TeacherCollator(DataCollatorWithPadding(LETTERS), WORDS)
    terms = [TermConfig("pkd", layers=[(1, 2)]), TermConfig("distance"), TermConfig("contrastive")]
    trainer = trainer_of("single-label", tmp_path, rows, collator, LETTERS, teacher, terms=terms)
    trainer.train()
    assert all(trainer.state.log_history[0][term.kind] > 0 for term in terms)
    terms = [TermConfig("hidden_mse")]
    # Also where padding makes both of one length.
    long = rows.map(
        lambda row: {
            name: [0] * (20 - len(row[name])) + row[name]
            for name in ("input_ids", "attention_mask", "teacher_input_ids", "teacher_attention_mask")
        }
    )
    for each in (rows, long):
        with pytest.raises(ValueError, match="teacher_input_ids, which are other tokens: take pkd"):
            trainer_of("single-label", tmp_path, each, collator, LETTERS, teacher, terms=terms).train()


@pytest.mark.parametrize("task", ["masked-lm", "causal-lm"])
def test_language_models_need_the_same_tokenizer(task, tmp_path):
    teacher = tiny_model(task, 2, seed=2, vocab_size=len(WORDS))
    rows = add_teacher_inputs(classified().remove_columns("labels"), WORDS)
    collator = TeacherCollator(DataCollatorForTokenClassification(LETTERS), WORDS)
    labelled = rows.add_column("labels", rows["input_ids"][:])
    with pytest.raises(ValueError, match="a language model predicts tokens, which another tokenizer cuts"):
        trainer_of(task, tmp_path, labelled, collator, LETTERS, teacher).train()
    plain = classified()
    with pytest.raises(ValueError, match="give a teacher with the student's tokenizer"):
        trainer_of(task, tmp_path, plain, None, LETTERS, teacher)


def test_one_teacher_alone_reads_its_own_tokens(tmp_path):
    rows = add_teacher_inputs(classified(), WORDS)
    teachers = [tiny_model("single-label", 2, seed=2, vocab_size=len(one)) for one in (LETTERS, WORDS)]
    collator = TeacherCollator(DataCollatorWithPadding(LETTERS), WORDS)
    with pytest.raises(ValueError, match="teacher_input_ids, which all 2 teachers would read"):
        trainer_of("single-label", tmp_path, rows, collator, LETTERS, teachers)


def labelled_words(tokenizer) -> Dataset:
    words = [text.split() for text in TEXTS]
    encoded = tokenizer(words, is_split_into_words=True)
    labels = []
    for number in range(len(words)):
        ids = encoded.word_ids(number)
        labels.append([w % 5 if w != (ids[i - 1] if i else None) else -100 for i, w in enumerate(ids)])
    return Dataset.from_dict({"words": words, **encoded, "labels": labels})


@pytest.mark.parametrize("side", ["right", "left"])
def test_words_meet_words(side, tmp_path):
    student_tokenizer, teacher_tokenizer = tokenizer_of(side=side), tokenizer_of("ab", "cab", "##ca", side=side)
    teacher = tiny_model("token-classification", 2, seed=2, vocab_size=len(teacher_tokenizer)).eval()
    rows = add_teacher_inputs(
        labelled_words(student_tokenizer), teacher_tokenizer, student_tokenizer=student_tokenizer, words_column="words"
    )
    collator = TeacherCollator(DataCollatorForTokenClassification(student_tokenizer), teacher_tokenizer)
    trainer = trainer_of(
        "token-classification", tmp_path, rows, collator, student_tokenizer, teacher, per_device_train_batch_size=6
    )
    words, sides = [text.split() for text in TEXTS], []
    for model, tokenizer in ((trainer.model, student_tokenizer), (teacher, teacher_tokenizer)):
        encoded = tokenizer(words, is_split_into_words=True, padding=True, return_tensors="pt")
        with torch.no_grad():
            logits = model(**encoded).logits
        first = [[encoded.word_ids(n).index(word) for word in range(len(each))] for n, each in enumerate(words)]
        sides.append(torch.cat([logits[n, places] for n, places in enumerate(first)]))
    assert kd_loss(trainer) == pytest.approx(losses.kl_divergence(*sides, 2.0).mean().item(), rel=1e-4)


def test_answers_to_questions_need_the_same_tokenizer(tmp_path):
    teacher = tiny_model("question-answering", 2, seed=2, vocab_size=len(WORDS))
    rows = classified().remove_columns("labels")
    rows = rows.add_column("start_positions", [0] * 6).add_column("end_positions", [0] * 6)
    collator = TeacherCollator(DataCollatorWithPadding(LETTERS), WORDS)
    with pytest.raises(ValueError, match="answers are positions in a text"):
        trainer_of("question-answering", tmp_path, add_teacher_inputs(rows, WORDS), collator, LETTERS, teacher).train()
