import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Bernoulli, Categorical
from torch.distributions import kl_divergence as reference_kl

from hf_compress.distillation import losses


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return [3 * torch.randn(6, 5, generator=generator) for _ in range(2)]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 8.0])
def test_kl_is_the_divergence_of_the_softened_distributions(logits, temperature):
    student, teacher = logits
    expected = reference_kl(Categorical(logits=teacher / temperature), Categorical(logits=student / temperature))
    found = losses.kl_divergence(student, teacher, temperature)
    torch.testing.assert_close(found, temperature**2 * expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_bernoulli_kl_is_the_mean_over_labels(logits, temperature):
    student, teacher = logits
    expected = reference_kl(Bernoulli(logits=teacher / temperature), Bernoulli(logits=student / temperature)).mean(-1)
    found = losses.bernoulli_kl_divergence(student, teacher, temperature)
    torch.testing.assert_close(found, temperature**2 * expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("divergence", [losses.kl_divergence, losses.bernoulli_kl_divergence, losses.squared_error])
def test_equal_models_pay_nothing(logits, divergence):
    student = logits[0].requires_grad_()
    loss = divergence(student, logits[0].detach())
    assert loss.abs().max() == 0
    loss.sum().backward()
    assert student.grad.abs().max() <= 1e-7


def test_a_constant_added_to_the_logits_changes_nothing(logits):
    student, _ = logits
    assert losses.kl_divergence(student, student + 7.0).abs().max() <= 1e-5


def test_temperature_keeps_the_size_of_the_gradient():
    # Logits much smaller than T: the gradient is (student - teacher) / classes whatever T is (Hinton et al., eq. 4).
    student = torch.tensor([[0.1, -0.1, 0.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, 0.1, -0.1]])
    for temperature in (10.0, 20.0, 40.0):
        (gradient,) = torch.autograd.grad(losses.kl_divergence(student, teacher, temperature).sum(), student)
        torch.testing.assert_close(gradient, (student - teacher).detach() / 3, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 100.0])
def test_forbidden_classes_are_as_if_absent(logits, temperature):
    student, teacher = (x.clone().requires_grad_() for x in logits)
    allowed = torch.tensor([True, True, False, True, False]).expand(6, 5)
    masked = losses.kl_divergence(student, teacher.detach(), temperature, allowed)
    without = losses.kl_divergence(student[:, [0, 1, 3]], teacher[:, [0, 1, 3]].detach(), temperature)
    torch.testing.assert_close(masked, without)
    (gradient,) = torch.autograd.grad(masked.sum(), student)
    (expected,) = torch.autograd.grad(without.sum(), student)
    torch.testing.assert_close(gradient, expected)
    assert gradient[:, [2, 4]].abs().max() == 0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_that_of_torch(logits, smoothing):
    labels = torch.tensor([0, 4, losses.IGNORED, 2, 1, losses.IGNORED])
    expected = F.cross_entropy(logits[0], labels, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(losses.cross_entropy(logits[0], labels, smoothing), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_over_allowed_classes_only(logits, smoothing):
    allowed = torch.tensor([True, True, False, True, False]).expand(6, 5)
    labels = torch.tensor([0, 1, 3, 1, 0, losses.IGNORED])
    narrow = torch.tensor([0, 1, 2, 1, 0, losses.IGNORED])
    expected = F.cross_entropy(logits[0][:, [0, 1, 3]], narrow, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(losses.cross_entropy(logits[0], labels, smoothing, allowed), expected)


def test_half_precision_logits_are_compared_in_single_precision(logits):
    student, teacher = (x.bfloat16() for x in logits)
    found = losses.kl_divergence(student, teacher)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, losses.kl_divergence(student.float(), teacher.float()))


def test_average_counts_only_what_is_unmasked():
    values = torch.tensor([1.0, float("nan"), 3.0])
    mask = torch.tensor([True, False, True])
    assert losses.average(values, torch.tensor(4), mask) == 1.0


def test_average_of_nothing_is_zero():
    values, mask = torch.ones(3, requires_grad=True), torch.zeros(3, dtype=torch.bool)
    loss = losses.average(values, torch.tensor(0), mask)
    loss.backward()
    assert loss == 0
    assert values.grad.abs().max() == 0
