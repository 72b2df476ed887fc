import pytest
import torch

from hf_compress import StudentConfig, add_general_, make_student
from tests.modeling.tiny import MODEL_TYPES, tiny_model


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.named_parameters()}


def trained(model, seed: int = 1):
    """The model after a training that moved every weight by a multiple of 1/64, which floats add exactly."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            value += torch.randint(-8, 9, value.shape, generator=generator) / 64
    return model


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_student_of_the_pretrained_model_becomes_the_general_one(model_type):
    pretrained, config = tiny_model(model_type), StudentConfig(num_layers=2)
    untrained = make_student(pretrained, config)
    student, general = make_student(pretrained, config), trained(make_student(pretrained, config))
    body = {id(value) for value in student.base_model.parameters()}
    names = {name for name, value in student.named_parameters() if id(value) in body}
    before = weights(student)
    add_general_(student, untrained, untrained)
    assert all(torch.equal(value, before[name]) for name, value in weights(student).items())
    add_general_(student, general, untrained)
    for name, value in weights(student).items():
        expected = weights(general)[name] if name in names else before[name]
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)


def test_what_the_teacher_was_fine_tuned_to_stays():
    config = StudentConfig(num_layers=2)
    pretrained = tiny_model("bert").base_model
    teacher = tiny_model("bert")
    teacher.base_model.load_state_dict(pretrained.state_dict())
    trained(teacher, seed=2)
    student, cut = make_student(teacher, config), weights(make_student(teacher, config))
    untrained, general = make_student(pretrained, config), trained(make_student(pretrained, config))
    add_general_(student, general, untrained)
    learned = {f"bert.{name}": value - weights(untrained)[name] for name, value in weights(general).items()}
    for name, value in weights(student).items():
        torch.testing.assert_close(value, cut[name] + learned.get(name, 0), rtol=0, atol=1e-6)
    assert torch.equal(student.cls.predictions.bias, teacher.cls.predictions.bias)


def test_students_of_other_shapes_are_refused():
    teacher = tiny_model("bert")
    two, one = (make_student(teacher, StudentConfig(num_layers=number)) for number in (2, 1))
    narrow = make_student(teacher, StudentConfig(num_layers=2, intermediate_size=8))
    before = weights(two)
    for general, untrained, message in (
        (two, one, r"do not have the same layers: BertForMaskedLM \({'encoder': 2}\), .*{'encoder': 1}"),
        (one, one, "do not have the same layers"),
        (narrow, narrow, r"intermediate.dense.weight is \(\d+, \d+\) in the student, \(8, \d+\) in the general"),
        (tiny_model("t5"), tiny_model("t5"), "do not have the same layers"),
    ):
        with pytest.raises(ValueError, match=message):
            add_general_(two, general, untrained)
    assert all(torch.equal(value, before[name]) for name, value in weights(two).items())
