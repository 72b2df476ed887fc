import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_compress import StudentConfig, make_student
from hf_compress.checkpoint.widths import write_widths_
from hf_compress.distillation.student import choose_layers
from hf_compress.modeling.blocks import count_layers, find_blocks, find_stacks
from hf_compress.modeling.surgery import keep_neurons_
from tests.modeling.tiny import MODEL_TYPES, auto_class, difference, predict, tiny_batch, tiny_model

RELOAD = """
import sys, torch
from transformers import AutoModelForSequenceClassification
folder = sys.argv[1]
inputs, expected = torch.load(folder + "/case.pt")
model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
with torch.no_grad():
    difference = (model(**inputs).logits - expected).abs().max().item()
assert not any(name.startswith("hf_compress") for name in sys.modules)
print(difference)
"""


@pytest.mark.parametrize(
    ("total", "number", "layers", "chosen"),
    [
        (6, 3, "spread", [1, 3, 5]),
        (12, 6, "spread", [1, 3, 5, 7, 9, 11]),
        (12, 4, "spread", [2, 5, 8, 11]),
        (7, 3, "spread", [1, 3, 6]),
        (6, 1, "spread", [5]),
        (6, 6, "spread", [0, 1, 2, 3, 4, 5]),
        (6, 2, "first", [0, 1]),
        (6, 2, "last", [4, 5]),
        (6, None, [0, 4], [0, 4]),
    ],
)
def test_choice_of_layers(total, number, layers, chosen):
    assert choose_layers(total, number, layers) == chosen


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_architecture_makes_a_student_that_stock_transformers_loads(model_type, tmp_path):
    teacher = tiny_model(model_type)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = make_student(teacher, StudentConfig(num_layers=2))
    assert type(student) is type(teacher)
    for stack in find_stacks(student):
        assert count_layers(student, stack) == 2
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    student.save_pretrained(tmp_path)
    assert "hf_compress" not in (tmp_path / "config.json").read_text()
    reloaded = auto_class(model_type).from_pretrained(tmp_path, attn_implementation="eager")
    inputs = tiny_batch(teacher)
    assert torch.equal(predict(student.eval(), inputs), predict(reloaded, inputs))


def test_a_first_layer_unlike_all_others_is_kept():
    assert choose_layers(22, 4, "spread", keep_first=True) == [0, 7, 14, 21]
    assert choose_layers(6, 3, "last", keep_first=True) == [0, 4, 5]
    assert choose_layers(6, 1, "spread", keep_first=True) == [0]
    teacher = tiny_model("modernbert")
    student = make_student(teacher, StudentConfig(num_layers=2))
    assert student.config.num_hidden_layers == 2


def test_a_student_of_a_frozen_teacher_can_learn():
    teacher = tiny_model("bert").requires_grad_(False)
    assert all(p.requires_grad for p in make_student(teacher, StudentConfig(num_layers=1)).parameters())
    assert not any(p.requires_grad for p in teacher.parameters())


def test_a_student_of_an_unevenly_pruned_teacher_keeps_the_widths(tmp_path):
    teacher = tiny_model("bert")
    for n, block in enumerate(find_blocks(teacher)):
        keep_neurons_(block.ffn, range(8 + n))
    write_widths_(teacher)
    student = make_student(teacher, StudentConfig(layers=[0, 2]))
    assert [block.ffn.width for block in find_blocks(student)] == [8, 10]
    student.save_pretrained(tmp_path)
    reloaded = auto_class("bert").from_pretrained(tmp_path, attn_implementation="eager")
    inputs = tiny_batch(teacher)
    assert torch.equal(predict(student, inputs), predict(reloaded, inputs))


def test_chosen_layers_and_everything_around_them_are_copied():
    teacher = tiny_model("bert", "BertForSequenceClassification")
    student = make_student(teacher, StudentConfig(layers=[0, 2]))
    old, new = teacher.state_dict(), student.state_dict()
    for position, source in enumerate([0, 2]):
        for name in [name for name in new if f"encoder.layer.{position}." in name]:
            assert torch.equal(new[name], old[name.replace(f"layer.{position}.", f"layer.{source}.")])
    outside = [name for name in new if "encoder.layer" not in name]
    assert {"bert.pooler.dense.weight", "classifier.weight", "bert.embeddings.word_embeddings.weight"} <= set(outside)
    assert all(torch.equal(new[name], old[name]) for name in outside)
    student.classifier.weight.data.zero_()
    assert teacher.classifier.weight.abs().max() > 0


def test_encoder_and_decoder_are_chosen_apart():
    teacher = tiny_model("bart")
    student = make_student(teacher, StudentConfig(num_layers=2, decoder_layers=[1]))
    assert (student.config.encoder_layers, student.config.decoder_layers) == (2, 1)
    student = make_student(teacher, StudentConfig(num_layers=1, num_decoder_layers=2))
    assert (student.config.encoder_layers, student.config.decoder_layers) == (1, 2)


def test_reloads_exactly_in_a_fresh_process_without_the_plug_in(tmp_path):
    teacher = tiny_model("bert", "BertForSequenceClassification", attention="sdpa")
    student = make_student(teacher, StudentConfig(num_layers=2))
    inputs = tiny_batch(student)
    student.save_pretrained(tmp_path)
    torch.save((inputs, student(**inputs).logits.detach()), tmp_path / "case.pt")
    found = subprocess.run(
        [sys.executable, "-c", RELOAD, str(tmp_path)],
        check=True, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, cwd=Path.home(),
    )  # fmt: skip
    assert float(found.stdout.split()[-1]) == 0.0


def test_the_chosen_layers_are_logged(caplog):
    with caplog.at_level("INFO", logger="hf_compress"):
        make_student(tiny_model("bert"), StudentConfig(num_layers=1))
    assert "Student encoder: layers [2] of the teacher's 3." in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_layers": 4}, "num_layers=4 cannot be taken from a teacher of 3 layers"),
        ({"layers": [0, 3]}, r"layers=\[0, 3\] cannot be copied from a teacher of 3 layers"),
        ({"layers": [-1]}, r"layers=\[-1\] cannot be copied"),
        ({"layers": [1, 1]}, r"layers=\[1, 1\] names a layer twice"),
        ({"num_layers": 2, "layers": [1]}, r"num_layers=2 but layers=\[1\] names 1"),
        ({"num_layers": 0}, "num_layers=0: a student has at least 1 layer"),
        ({"layers": []}, r"layers=\[\]"),
        ({}, "needs num_layers"),
        ({"num_layers": 2, "layers": "middle"}, "layers='middle' is no rule"),
        ({"num_layers": 2, "num_decoder_layers": 1}, "num_decoder_layers=1 and decoder_layers=None are for an"),
        ({"num_layers": 2, "decoder_layers": [0]}, r"decoder_layers=\[0\] are for an encoder-decoder"),
        ({"layers": [0], "num_decoder_layers": 1}, "num_decoder_layers=1 does not say which layers"),
    ],
)
def test_impossible_students_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        make_student(tiny_model("bert"), StudentConfig(**settings))


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "modernbert"])
def test_a_new_student_keeps_tables_of_angles_in_float32(model_type, tmp_path):
    teacher = tiny_model(model_type).to(torch.bfloat16)
    teacher.save_pretrained(tmp_path / "teacher")
    teacher = auto_class(model_type).from_pretrained(tmp_path / "teacher", dtype=torch.bfloat16)
    student = make_student(teacher, StudentConfig(num_layers=1, init="random"))
    student.save_pretrained(tmp_path / "student")
    again = auto_class(model_type).from_pretrained(tmp_path / "student", dtype=torch.bfloat16)
    inputs = tiny_batch(student)
    assert {tensor.dtype for tensor in student.state_dict().values()} == {torch.bfloat16}
    assert difference(predict(again, inputs), predict(student, inputs)) == 0


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_kinds_of_layers_that_a_config_names_are_cut_with_them(model_type, tmp_path):
    teacher = tiny_model(model_type, layer_types=["full_attention"] * 3)
    student = make_student(teacher, StudentConfig(num_layers=2))
    student.save_pretrained(tmp_path)
    assert student.config.layer_types == ["full_attention"] * 2
