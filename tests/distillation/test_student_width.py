"""Students narrower than their teacher: the same checkpoint as ever, of the teacher's own values."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from hf_compress import StudentConfig, make_student
from hf_compress.checkpoint.widths import write_widths_
from hf_compress.modeling.blocks import count_layers, find_blocks, find_stacks
from hf_compress.modeling.projections import out_width
from hf_compress.modeling.surgery import keep_heads_, keep_neurons_
from tests.modeling.tiny import (
    DECODERS,
    FFN,
    HEADS,
    MODEL_TYPES,
    auto_class,
    difference,
    predict,
    tiny_batch,
    tiny_model,
)

HIDDEN, NARROW, NEURONS = 32, 24, 10
GROUPED = ("llama", "mistral", "qwen2", "qwen3")
# Their configs set the width of a head, so that the number of heads is free.
FREE_HEADS = ("t5", "vit", *GROUPED)
RMS_NORM = GROUPED


def reload(model: PreTrainedModel, model_type: str, folder: Path) -> tuple[PreTrainedModel, dict]:
    model.save_pretrained(folder)
    return auto_class(model_type).from_pretrained(folder, attn_implementation="eager", output_loading_info=True)


def narrow_config(model_type: str) -> StudentConfig:
    heads = {"num_heads": 4} if model_type in FREE_HEADS else {}
    return StudentConfig(num_layers=2, hidden_size=NARROW, intermediate_size=NEURONS, **heads)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("init", ["teacher", "random"])
def test_narrow_students_are_stock_checkpoints(model_type, init, tmp_path):
    teacher = tiny_model(model_type)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    config = narrow_config(model_type)
    config.init = init
    student = make_student(teacher, config)
    assert type(student) is type(teacher)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert student.config.hidden_size == NARROW
    heads = config.num_heads or 3
    for stack, layout in find_stacks(student).items():
        assert count_layers(student, stack) == 2
        assert (getattr(student.config, layout.ffn_width), getattr(student.config, layout.num_heads)) == (
            NEURONS,
            heads,
        )
        for block in find_blocks(student, stack):
            assert block.ffn.width == NEURONS
            assert {part.num_heads for part in block.attentions} == {heads}
    reloaded, info = reload(student, model_type, tmp_path)
    assert "hf_compress" not in (tmp_path / "config.json").read_text()
    assert not any(info.values()), info
    inputs = tiny_batch(teacher)
    assert difference(predict(student, inputs), predict(reloaded, inputs)) == 0.0
    if model_type in DECODERS:
        prompt = {"input_ids": inputs["input_ids"][:1], "max_new_tokens": 3, "do_sample": False, "num_beams": 1}
        assert torch.equal(student.generate(**prompt), reloaded.generate(**prompt))


def zero_outputs_(projection: nn.Module, indices: list[int]) -> None:
    axis = 0 if isinstance(projection, nn.Linear) else 1
    projection.weight.data.index_fill_(axis, torch.tensor(indices), 0.0)
    if projection.bias is not None:
        projection.bias.data[indices] = 0.0


def zero_inputs_(projection: nn.Module, indices: list[int]) -> None:
    axis = 1 if isinstance(projection, nn.Linear) else 0
    projection.weight.data.index_fill_(axis, torch.tensor(indices), 0.0)


def features(units: list[int], n_units: int, size: int) -> list[int]:
    """Indices of the features of some units in a projection of `size`, which holds all units one or more times."""
    parts = size // n_units
    return [index for index in range(size) if index // parts in units]


def silence_(model: PreTrainedModel, heads: list[int], neurons: list[int]) -> None:
    """Zero some heads (key-value groups with all their heads) and neurons of every block."""
    for block in find_blocks(model):
        zero_inputs_(block.ffn.output, neurons)
        for projection in block.ffn.inputs:
            zero_outputs_(projection, [index for index in range(out_width(projection)) if index % FFN in neurons])
        for part in block.attentions:
            width = part.num_heads * part.head_dim
            zero_inputs_(part.output, features(heads, part.num_groups, width))
            for projection in part.inputs:
                size = out_width(projection)
                thirds = 3 if part.is_fused else 1
                of_one = features(heads, part.num_groups, size // thirds)
                zero_outputs_(projection, [n * size // thirds + index for n in range(thirds) for index in of_one])


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_silent_heads_and_neurons_are_what_a_student_leaves_out(model_type):
    teacher = tiny_model(model_type)
    silent_neurons = [0, 3, 4, 11, 17, 23]
    silence_(teacher, [0, 2], silent_neurons)
    per_group = 2 if model_type in GROUPED else 1
    student = make_student(
        teacher, StudentConfig(num_heads=2 * per_group, intermediate_size=FFN - len(silent_neurons))
    )
    inputs = tiny_batch(teacher)
    assert difference(predict(teacher, inputs), predict(student, inputs)) <= 1e-5
    for block in find_blocks(student):
        assert block.ffn.width == FFN - len(silent_neurons)
        assert {part.num_heads for part in block.attentions} == {2 * per_group}


def hidden_vectors(model: PreTrainedModel, size: int) -> list[nn.Parameter]:
    """The weights of the norms over the hidden channels."""
    return [v for name, v in model.named_parameters() if v.shape == (size,) and name.endswith(".weight")]


@pytest.mark.parametrize("model_type", RMS_NORM)
def test_silent_channels_are_what_a_student_leaves_out(model_type):
    teacher = tiny_model(model_type, num_hidden_layers=2, intermediate_size=FFN)
    silent = torch.tensor([1, 2, 8, 13, 19, 20, 27, 31])
    blocks = find_blocks(teacher)
    writers = [block.ffn.output for block in blocks] + [block.attention.output for block in blocks]
    readers = [part for block in blocks for part in (*block.ffn.inputs, *block.attention.inputs)]
    for projection in writers:
        projection.weight.data[silent] = 0.0
    for projection in [*readers, teacher.model.embed_tokens, teacher.lm_head]:
        projection.weight.data[:, silent] = 0.0
    student = make_student(teacher, StudentConfig(hidden_size=HIDDEN - len(silent)))
    # The mean square is now over fewer channels, and larger for it.
    share = HIDDEN / NARROW
    with torch.no_grad():
        for weight in hidden_vectors(student, NARROW):
            weight *= share**0.5
    for module in student.modules():
        if "variance_epsilon" in vars(module) and module.weight.shape == (NARROW,):
            module.variance_epsilon *= share
    inputs = tiny_batch(teacher)
    expected = predict(teacher, inputs)
    assert difference(expected, predict(student, inputs)) <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_teachers_own_sizes_give_the_teacher(model_type):
    teacher = tiny_model(model_type)
    heads = find_blocks(teacher)[0].attention.num_heads
    student = make_student(teacher, StudentConfig(hidden_size=HIDDEN, intermediate_size=FFN, num_heads=heads))
    assert student.config.to_dict() == teacher.config.to_dict()
    assert student.state_dict().keys() == teacher.state_dict().keys()
    assert all(torch.equal(value, student.state_dict()[name]) for name, value in teacher.state_dict().items())
    assert student is not teacher


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_fewer_heads_alone_reload_with_or_without_the_plug_in(model_type, tmp_path):
    teacher = tiny_model(model_type)
    for init in ("teacher", "random"):
        student = make_student(teacher, StudentConfig(num_heads=2, init=init))
        reloaded, _ = reload(student, model_type, tmp_path / init)
        needs_plug_in = "hf_compress" in (tmp_path / init / "config.json").read_text()
        assert needs_plug_in == (model_type not in FREE_HEADS)
        inputs = tiny_batch(teacher)
        assert difference(predict(student, inputs), predict(reloaded, inputs)) == 0.0


def test_groups_of_heads_stay_in_proportion():
    student = make_student(tiny_model("llama"), StudentConfig(num_heads=4))
    config = student.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 6)
    assert student.model.layers[0].self_attn.k_proj.weight.shape == (12, HIDDEN)


def test_gpt2_without_a_number_of_neurons_keeps_them():
    student = make_student(tiny_model("gpt2", n_inner=None), StudentConfig(hidden_size=NARROW))
    assert student.config.n_inner == 4 * HIDDEN
    assert student.transformer.h[0].mlp.c_fc.weight.shape == (NARROW, 4 * HIDDEN)


def test_an_unevenly_pruned_teacher_gives_an_even_student(tmp_path):
    teacher = tiny_model("bert")
    for n, block in enumerate(find_blocks(teacher)):
        keep_neurons_(block.ffn, range(8 + n))
        keep_heads_(block.attention, range(2 + n % 2))
    write_widths_(teacher)
    with pytest.raises(ValueError, match=r"intermediate_size would be each of \[8, 9, 10\]. Give intermediate_size"):
        make_student(teacher, StudentConfig(hidden_size=16))
    student = make_student(teacher, StudentConfig(hidden_size=16, intermediate_size=8))
    reloaded, _ = reload(student, "bert", tmp_path)
    assert "hf_compress" not in (tmp_path / "config.json").read_text()
    inputs = tiny_batch(teacher)
    assert difference(predict(student, inputs), predict(reloaded, inputs)) == 0.0
    drawn = make_student(teacher, StudentConfig(num_layers=3, init="random"))
    assert [block.ffn.width for block in find_blocks(drawn)] == [8, 9, 10]
    assert [block.attention.num_heads for block in find_blocks(drawn)] == [2, 3, 2]


def test_random_weights_follow_the_seed_and_the_class():
    labels = {0: "bad", 1: "good", 2: "mixed"}
    teacher = tiny_model("bert", "BertForSequenceClassification", id2label=labels, label2id={"bad": 0}).half()
    config = StudentConfig(num_layers=2, init="random")
    students = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        students.append(make_student(teacher, config))
    first, again, other = students
    assert difference(predict(first.float(), tiny_batch(teacher)), predict(again.float(), tiny_batch(teacher))) == 0.0
    copied = make_student(teacher, StudentConfig(num_layers=2))
    for name, value in first.named_parameters():
        assert value.shape == copied.get_parameter(name).shape
        assert value.requires_grad
        if value.ndim > 1:
            assert not torch.equal(value, other.get_parameter(name).float()), name
            assert not torch.equal(value, copied.get_parameter(name).float()), name
    assert (first.bert.encoder.layer[0].output.dense.bias == 0).all()
    assert other.dtype == torch.float16
    assert not other.training
    assert other.config.id2label == labels
    assert other.classifier.weight.shape == (3, HIDDEN)


def test_all_layers_stay_where_no_number_is_given():
    student = make_student(tiny_model("bart"), StudentConfig(intermediate_size=NEURONS))
    assert (student.config.encoder_layers, student.config.decoder_layers) == (3, 3)
    student = make_student(tiny_model("bart"), StudentConfig(num_decoder_layers=1))
    assert (student.config.encoder_layers, student.config.decoder_layers) == (3, 1)
    student = make_student(tiny_model("bart"), StudentConfig(num_layers=2, decoder_layers="first"))
    assert (student.config.encoder_layers, student.config.decoder_layers) == (2, 2)
    assert make_student(tiny_model("bert"), StudentConfig(hidden_size=16)).config.num_hidden_layers == 3


def test_sizes_are_logged(caplog):
    with caplog.at_level("INFO", logger="hf_compress"):
        make_student(tiny_model("bert"), StudentConfig(hidden_size=16, intermediate_size=NEURONS))
    assert "Student hidden size: 16" in caplog.text
    assert "Student neurons: 10" in caplog.text


def test_wrapped_teachers_need_to_be_unwrapped_for_a_new_model():
    wrapped = nn.parallel.DataParallel(tiny_model("bert"))
    with pytest.raises(ValueError, match="wrapped in a DataParallel, but hidden_size=16"):
        make_student(wrapped, StudentConfig(hidden_size=16))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 0}, "hidden_size=0: a width is a whole number of at least 1"),
        ({"num_heads": -1}, "num_heads=-1: a width"),
        ({"intermediate_size": 9.5}, "intermediate_size=9.5: a width"),
        ({"hidden_size": 64}, "hidden_size=64 cannot be cut from a hidden size of 32"),
        ({"hidden_size": 20}, "hidden_size=20 is not a multiple of 8"),
        ({"hidden_size": 16, "num_heads": 3}, "num_heads=3 and hidden_size=16 contradict"),
        ({"num_heads": HEADS + 1}, "num_heads=5 cannot be cut from the encoder"),
        (
            {"intermediate_size": FFN + 1},
            "intermediate_size=25 cannot be cut from feed-forward networks of 24 neurons",
        ),
        ({"init": "zeros"}, "init='zeros' is unknown: give 'teacher' or 'random'"),
        ({"layers": "last", "hidden_size": 16}, "layers='last' needs num_layers"),
        ({"decoder_layers": "last"}, "decoder_layers='last' needs num_decoder_layers"),
        ({}, "needs num_layers"),
    ],
)
def test_impossible_widths_raise(settings, message):
    teacher = tiny_model("bert")
    before = copy.deepcopy(teacher.config.to_dict())
    with pytest.raises(ValueError, match=message):
        make_student(teacher, StudentConfig(**settings))
    assert teacher.config.to_dict() == before
