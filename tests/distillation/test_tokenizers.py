"""The teacher's own inputs: the same texts, the same words, wherever either tokenizer splits, cuts or pads them."""

import pickle

import pytest
import torch
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    ByT5Tokenizer,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
)

from hf_compress.distillation.tokenizers import (
    TeacherCollator,
    add_teacher_inputs,
    gather_positions,
    is_same_vocabulary,
)

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
STUDENT_PIECES = ["un", "##happy", "cat", "##s", "sleep", "in", "Paris", "."]
# One token for "unhappy", many for the name: both kinds of difference.
TEACHER_PIECES = ["x", "y", "unhappy", "cats", "sleep", "in", "P", "##ar", "##is", "."]

SENTENCES = [["unhappy", "cats", "sleep", "in", "Paris", "."], ["cats", "sleep"], ["Paris"]]
LABELS = [[0, 1, 2, 3, 4, 5], [1, 2], [4]]


def tokenizer_of(pieces, padding_side="right", pad_token="[PAD]"):
    ids = {piece: number for number, piece in enumerate([*SPECIAL, *pieces])}
    backend = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad_token,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        padding_side=padding_side,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def characters():
    """Byte-pair encoding without merges: every character is a token, and there are no special ones."""
    letters = sorted(set("".join(map("".join, SENTENCES))))
    backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate(["<pad>", *letters])}, []))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")


def student(**options):
    return tokenizer_of(STUDENT_PIECES, **options)


def teacher(**options):
    return tokenizer_of(TEACHER_PIECES, **options)


def tagged(tokenizer, max_length=64, **options):
    """Sentences as the student reads them, with a label at the first token of each word."""
    encoded = tokenizer(SENTENCES, is_split_into_words=True, truncation=True, max_length=max_length, **options)
    labels = []
    for row, sentence_labels in enumerate(LABELS):
        words = encoded.word_ids(row)
        labels.append(
            [
                -100 if word is None or word in words[:index] else sentence_labels[word]
                for index, word in enumerate(words)
            ]
        )
    return Dataset.from_dict({"words": SENTENCES, **encoded, "labels": labels})


def aligned(student_tokenizer, teacher_tokenizer, dataset=None, max_length=None):
    dataset = tagged(student_tokenizer) if dataset is None else dataset
    return add_teacher_inputs(
        dataset,
        teacher_tokenizer,
        max_length=max_length,
        student_tokenizer=student_tokenizer,
        words_column="words",
    )


def rows_of(dataset):
    return [{name: value for name, value in row.items() if name != "words"} for row in dataset]


# Whole texts


@pytest.mark.parametrize("columns", [("text",), ("text", "other")])
def test_the_teacher_gets_what_its_tokenizer_makes_of_the_texts(columns):
    texts = Dataset.from_dict({"text": [" ".join(words) for words in SENTENCES], "other": ["in Paris"] * 3})
    result = add_teacher_inputs(texts, teacher(), columns)
    expected = teacher()(*(texts[column][:] for column in columns))
    assert {name: result[f"teacher_{name}"][:] for name in expected} == dict(expected)
    assert set(result.column_names) == {"text", "other", *(f"teacher_{name}" for name in expected)}
    assert "teacher_token_type_ids" in result.column_names


def test_texts_are_cut_at_the_length_asked_for_or_at_the_tokenizers_own():
    texts = Dataset.from_dict({"text": [" ".join(words) for words in SENTENCES]})
    limited = teacher()
    limited.model_max_length = 6
    for result in (add_teacher_inputs(texts, teacher(), max_length=6), add_teacher_inputs(texts, limited)):
        assert [len(ids) for ids in result["teacher_input_ids"]] == [6, 4, 5]
    assert len(add_teacher_inputs(texts, teacher())[0]["teacher_input_ids"]) == 10


def test_the_tokenizers_stay_as_they_were():
    ours, theirs = student(), teacher()
    before = [tokenizer.backend_tokenizer.to_str() for tokenizer in (ours, theirs)]
    aligned(ours, theirs, tagged(student(), max_length=6), max_length=5)
    assert [tokenizer.backend_tokenizer.to_str() for tokenizer in (ours, theirs)] == before


# Words


def test_each_first_token_of_a_word_finds_that_of_the_teacher(caplog):
    dataset = aligned(student(), teacher())
    ours = student().convert_ids_to_tokens(dataset[0]["input_ids"])
    theirs = teacher().convert_ids_to_tokens(dataset[0]["teacher_input_ids"])
    assert ours == ["[CLS]", "un", "##happy", "cat", "##s", "sleep", "in", "Paris", ".", "[SEP]"]
    assert theirs == ["[CLS]", "unhappy", "cats", "sleep", "in", "P", "##ar", "##is", ".", "[SEP]"]
    assert dataset[0]["teacher_positions"] == [-1, 1, -1, 2, -1, 3, 4, 5, 8, -1]
    assert dataset["teacher_positions"][1:] == [[-1, 1, -1, 2, -1], [-1, 1, -1]]
    assert not caplog.text


def test_a_teacher_without_special_tokens_that_reads_characters():
    dataset = aligned(student(), characters())
    starts = [0, 7, 11, 16, 18, 23]
    assert dataset[0]["teacher_positions"] == [-1, starts[0], -1, starts[1], -1, *starts[2:], -1]


def test_the_same_tokenizer_finds_the_same_tokens():
    dataset = aligned(student(), student())
    for row in dataset:
        assert row["teacher_input_ids"] == row["input_ids"]
        firsts = [index if label != -100 else -1 for index, label in enumerate(row["labels"])]
        assert row["teacher_positions"] == firsts


def test_words_that_the_teachers_truncation_cut_off_have_no_token():
    # [CLS] unhappy cats sleep [SEP]
    dataset = aligned(student(), teacher(), max_length=5)
    assert dataset[0]["teacher_positions"] == [-1, 1, -1, 2, -1, 3, -1, -1, -1, -1]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("options", [{"max_length": 6}, {"max_length": 12, "padding": "max_length"}])
def test_what_the_student_reads_may_be_cut_or_padded(options, side):
    ours = student(padding_side=side)
    ours.truncation_side = side
    dataset = aligned(ours, teacher(), tagged(ours, **options))
    for row, sentence in zip(dataset, SENTENCES, strict=True):
        for index, position in enumerate(row["teacher_positions"]):
            assert (position >= 0) == (row["labels"][index] != -100)
            if position >= 0:
                word = sentence[row["labels"][index] - LABELS[SENTENCES.index(sentence)][0]]
                assert word.startswith(teacher().convert_ids_to_tokens(row["teacher_input_ids"][position]))


@pytest.mark.parametrize("add_prefix_space", [True, False])
def test_a_byte_level_tokenizer_that_glues_words_together_is_doubtful(add_prefix_space, caplog):
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    letters = sorted(pre_tokenizer.alphabet())
    backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizer
    dataset = aligned(student(), PreTrainedTokenizerFast(tokenizer_object=backend))
    space = int(add_prefix_space)
    assert dataset[1]["teacher_positions"] == [-1, 0, -1, 4 + space, -1]
    assert ("load it with add_prefix_space=True" in caplog.text) == (not add_prefix_space)


def test_rows_without_words():
    ours = student()
    encoded = ours([[], ["cats"]], is_split_into_words=True)
    dataset = aligned(ours, teacher(), Dataset.from_dict({"words": [[], ["cats"]], **encoded}))
    assert dataset["teacher_positions"][:] == [[-1, -1], [-1, 1, -1, -1]]


# Batches


@pytest.mark.parametrize("teacher_side", ["right", "left"])
@pytest.mark.parametrize("student_side", ["right", "left"])
def test_a_batch_pads_each_side_by_its_own_tokenizer(student_side, teacher_side):
    ours, theirs = student(padding_side=student_side), teacher(padding_side=teacher_side)
    rows = rows_of(aligned(ours, theirs))
    batch = TeacherCollator(DataCollatorForTokenClassification(ours, pad_to_multiple_of=8), theirs)(rows)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["teacher_positions"].shape == (3, 16)
    assert batch["teacher_input_ids"].shape == batch["teacher_attention_mask"].shape == (3, 10)
    assert torch.equal(batch["teacher_attention_mask"] == 0, batch["teacher_input_ids"] == theirs.pad_token_id)
    assert (batch["teacher_attention_mask"][2].argmin() == 0) == (teacher_side == "left")
    # Each labelled token, and no other, finds the teacher's token of the same word.
    assert torch.equal(batch["teacher_positions"] >= 0, batch["labels"] != -100)
    one_hot = torch.nn.functional.one_hot(batch["teacher_input_ids"], len(theirs)).float()
    found = gather_positions(one_hot, batch["teacher_positions"])
    assert torch.equal(found.sum(-1), (batch["labels"] != -100).float())
    tokens = [
        theirs.convert_ids_to_tokens(found[row][batch["labels"][row] != -100].argmax(-1).tolist()) for row in range(3)
    ]
    assert tokens == [["unhappy", "cats", "sleep", "in", "P", "."], ["cats", "sleep"], ["P"]]


def test_positions_by_hand_on_both_padding_sides():
    rows = [
        {"input_ids": [2, 8, 3], "teacher_input_ids": [2, 7, 7, 3], "teacher_positions": [-1, 1, -1]},
        {"input_ids": [2, 8, 9, 8, 3], "teacher_input_ids": [2, 3], "teacher_positions": [-1, 0, -1, 1, -1]},
    ]
    expected = {
        ("right", "right"): [[-1, 1, -1, -1, -1], [-1, 0, -1, 1, -1]],
        ("left", "right"): [[-1, -1, -1, 1, -1], [-1, 0, -1, 1, -1]],
        ("right", "left"): [[-1, 1, -1, -1, -1], [-1, 2, -1, 3, -1]],
        ("left", "left"): [[-1, -1, -1, 1, -1], [-1, 2, -1, 3, -1]],
    }
    for (ours, theirs), positions in expected.items():
        collate = TeacherCollator(DataCollatorWithPadding(student(padding_side=ours)), teacher(padding_side=theirs))
        assert collate(rows)["teacher_positions"].tolist() == positions
    assert rows[0]["teacher_positions"] == [-1, 1, -1], "rows stay as they were"


def test_texts_have_no_positions_and_rows_without_a_teacher_none_of_its_columns():
    texts = Dataset.from_dict({"text": ["cats sleep", "cats in Paris ."]})
    rows = list(texts.map(lambda batch: student()(batch["text"]), batched=True, remove_columns="text"))
    plain = DataCollatorWithPadding(student())
    collate = TeacherCollator(plain, teacher())
    assert collate(rows).keys() == plain(rows).keys()
    own = list(add_teacher_inputs(texts, teacher()).remove_columns("text"))
    batch = collate([row | more for row, more in zip(rows, own, strict=True)])
    assert batch.keys() == plain(rows).keys() | own[0].keys()
    assert torch.equal(batch["input_ids"], plain(rows)["input_ids"])
    assert batch["teacher_token_type_ids"].shape == batch["teacher_input_ids"].shape == (2, 8)


def test_a_collator_can_be_sent_to_another_process():
    ours, theirs = student(), teacher()
    rows = rows_of(aligned(ours, theirs))
    collate = TeacherCollator(DataCollatorForTokenClassification(ours), theirs)
    batch, copied = collate(rows), pickle.loads(pickle.dumps(collate))(rows)
    assert batch.keys() == copied.keys()
    assert all(torch.equal(batch[name], copied[name]) for name in batch)


def test_gathered_logits_and_their_gradients():
    logits = torch.randn(2, 3, 4, requires_grad=True)
    positions = torch.tensor([[2, -1, 0, 2, -1], [-1, -1, -1, 1, 0]])
    found = gather_positions(logits, positions)
    assert found.shape == (2, 5, 4)
    for row in range(2):
        for index, position in enumerate(positions[row].tolist()):
            expected = logits[row, position] if position >= 0 else torch.zeros(4)
            assert torch.equal(found[row, index], expected)
    found.sum().backward()
    assert logits.grad[..., 0].tolist() == [[1, 0, 2], [1, 1, 0]]
    # What is not read does not matter, even where it is no number.
    poisoned = torch.full((2, 3, 4), torch.nan)
    assert gather_positions(poisoned, torch.full((2, 5), -1)).abs().sum() == 0


def test_same_vocabulary():
    assert is_same_vocabulary(student(), student(padding_side="left"))
    assert not is_same_vocabulary(student(), teacher())
    assert not is_same_vocabulary(student(), tokenizer_of(STUDENT_PIECES[::-1]))
    more = student()
    more.add_tokens(["dog"])
    assert not is_same_vocabulary(student(), more)


# What cannot work


def test_data_that_no_teacher_can_read():
    texts = Dataset.from_dict({"text": ["cats", None], "number": [1, 2]})
    with pytest.raises(TypeError, match="DatasetDict, .*add_teacher_inputs"):
        add_teacher_inputs(DatasetDict(train=texts), teacher())
    with pytest.raises(ValueError, match="no column 'sentence', only text, number: name one"):
        add_teacher_inputs(texts, teacher(), ("sentence",))
    with pytest.raises(TypeError, match="'number' holds Value.*name a column of strings"):
        add_teacher_inputs(texts, teacher(), ("number",))
    with pytest.raises(ValueError, match="'text' holds None in row 1"):
        add_teacher_inputs(texts, teacher())
    with pytest.raises(ValueError, match="already has the columns .*remove_columns"):
        add_teacher_inputs(add_teacher_inputs(texts.select([0]), teacher()), teacher())


def test_words_that_cannot_be_matched():
    dataset = tagged(student())
    options = {"student_tokenizer": student(), "words_column": "words"}
    with pytest.raises(ValueError, match="no student_tokenizer.*give the tokenizer"):
        add_teacher_inputs(dataset, teacher(), words_column="words")
    with pytest.raises(ValueError, match="no column 'tokens'"):
        add_teacher_inputs(dataset, teacher(), **{**options, "words_column": "tokens"})
    with pytest.raises(TypeError, match="'labels' holds .*list of strings per row"):
        add_teacher_inputs(dataset, teacher(), **{**options, "words_column": "labels"})
    with pytest.raises(ValueError, match="no input_ids of the student.*tokenize the words"):
        add_teacher_inputs(dataset.remove_columns("input_ids"), teacher(), **options)
    with pytest.raises(ValueError, match="input_ids of row 0 are not what the student's tokenizer makes"):
        add_teacher_inputs(dataset, teacher(), **{**options, "student_tokenizer": teacher()})


@pytest.mark.parametrize(
    ("ours", "theirs", "whose"), [(student, ByT5Tokenizer, "teacher"), (ByT5Tokenizer, teacher, "student")]
)
def test_a_tokenizer_that_cannot_tell_words(ours, theirs, whose):
    with pytest.raises(ValueError, match=f"The {whose}'s tokenizer is a ByT5Tokenizer.*load it as a fast one"):
        add_teacher_inputs(tagged(student()), theirs(), student_tokenizer=ours(), words_column="words")
    texts = Dataset.from_dict({"text": ["cats"]})
    assert add_teacher_inputs(texts, ByT5Tokenizer())["teacher_input_ids"][:] == [ByT5Tokenizer()("cats")["input_ids"]]


def test_a_teachers_tokenizer_that_cannot_pad():
    with pytest.raises(ValueError, match="no pad token.*teacher_tokenizer.pad_token ="):
        TeacherCollator(DataCollatorWithPadding(student()), teacher(pad_token=None))


def test_rows_that_cannot_be_one_batch():
    rows = rows_of(aligned(student(), teacher()))
    collate = TeacherCollator(DataCollatorForTokenClassification(student()), teacher())
    without = [{name: value for name, value in row.items() if not name.startswith("teacher_")} for row in rows]
    with pytest.raises(ValueError, match="make them with add_teacher_inputs for the whole data set"):
        collate([rows[0], without[1]])
    with pytest.raises(ValueError, match="with teacher_input_ids"):
        collate([row | {"teacher_positions": [-1]} for row in without])

    def cutting(rows):
        return {"input_ids": torch.tensor([row["input_ids"][:3] for row in rows])}

    with pytest.raises(ValueError, match="cannot be matched.*a collator that pads and changes no ids"):
        TeacherCollator(cutting, teacher())(rows)
