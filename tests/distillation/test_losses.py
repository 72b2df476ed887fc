import math

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


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_reverse_kl_swaps_the_models(logits, temperature):
    student, teacher = logits
    found = losses.reverse_kl_divergence(student, teacher, temperature)
    torch.testing.assert_close(found, losses.kl_divergence(teacher, student, temperature))
    found = losses.bernoulli_reverse_kl_divergence(student, teacher, temperature)
    torch.testing.assert_close(found, losses.bernoulli_kl_divergence(teacher, student, temperature))


def mixture_divergence(student, teacher, beta):
    """The generalised Jensen-Shannon divergence by its definition, of probabilities."""
    mixture = beta * teacher + (1 - beta) * student
    of_teacher = (teacher * (teacher / mixture).log()).sum(-1)
    of_student = (student * (student / mixture).log()).sum(-1)
    return beta * of_teacher + (1 - beta) * of_student


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_jensen_shannon_is_that_of_its_definition(logits, temperature, beta):
    student = logits[0].requires_grad_()
    probs = [(x.double() / temperature).softmax(-1) for x in (student, logits[1])]
    expected = temperature**2 * mixture_divergence(*probs, beta)
    found = losses.jensen_shannon(student, logits[1], temperature, beta=beta)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(x.sum(), student)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_bernoulli_jensen_shannon_is_the_mean_over_labels(logits, beta):
    probs = [(x.double() / 3).sigmoid() for x in logits]
    expected = mixture_divergence(*(torch.stack([p, 1 - p], -1) for p in probs), beta).mean(-1)
    found = losses.bernoulli_jensen_shannon(*logits, 3.0, beta)
    torch.testing.assert_close(found, 9 * expected.float(), rtol=1e-5, atol=1e-6)


def test_jensen_shannon_is_symmetric_and_bounded(logits):
    student, teacher = (20 * x for x in logits)
    found = losses.jensen_shannon(student, teacher)
    torch.testing.assert_close(found, losses.jensen_shannon(teacher, student))
    torch.testing.assert_close(
        losses.jensen_shannon(student, teacher, beta=0.2), losses.jensen_shannon(teacher, student, beta=0.8)
    )
    assert found.max() <= math.log(2) + 1e-6


def test_jensen_shannon_tends_to_either_divergence(logits):
    found = losses.jensen_shannon(*logits, beta=1e-4) / 1e-4
    torch.testing.assert_close(found, losses.kl_divergence(*logits), rtol=5e-2, atol=1e-3)
    found = losses.jensen_shannon(*logits, beta=1 - 1e-4) / 1e-4
    torch.testing.assert_close(found, losses.reverse_kl_divergence(*logits), rtol=5e-2, atol=1e-3)


@pytest.mark.parametrize(
    "pair",
    [
        (losses.kl_divergence, losses.soft_cross_entropy),
        (losses.bernoulli_kl_divergence, losses.bernoulli_soft_cross_entropy),
    ],
)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_cross_entropy_is_the_divergence_plus_the_entropy_of_the_teacher(logits, temperature, pair):
    divergence, cross_entropy = pair
    student = logits[0].requires_grad_()
    teacher = logits[1]
    values = [f(student, teacher, temperature) for f in (divergence, cross_entropy)]
    entropy = cross_entropy(teacher, teacher, temperature)
    torch.testing.assert_close(values[1], values[0] + entropy, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(value.sum(), student)[0] for value in values]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_soft_cross_entropy_is_that_of_torch(logits):
    expected = F.cross_entropy(logits[0], logits[1].softmax(-1), reduction="none")
    torch.testing.assert_close(losses.soft_cross_entropy(*logits), expected)


def test_certain_labels_still_differ():
    # A softmax over (z, 0) in single precision would round both to the same certainty, and the gradient to 0.
    student, teacher = torch.tensor([[19.0]], requires_grad=True), torch.tensor([[20.0]])
    exact = student.detach().double().requires_grad_()
    expected = reference_kl(Bernoulli(logits=teacher.double()), Bernoulli(logits=exact)).sum()
    found = losses.bernoulli_kl_divergence(student, teacher).sum()
    gradients = torch.autograd.grad(found, student)[0], torch.autograd.grad(expected, exact)[0].float()
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_top_k_with_all_classes_is_the_divergence(logits, temperature):
    student = logits[0].requires_grad_()
    log_probs, indices = (logits[1] / temperature).log_softmax(-1).topk(5)
    found = losses.top_k_divergence(student, indices, log_probs, temperature)
    expected = losses.kl_divergence(student, logits[1], temperature)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(value.sum(), student)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_top_k_compares_the_known_classes_and_the_rest_as_one(logits, temperature):
    student = logits[0].requires_grad_()
    log_probs, indices = (logits[1] / temperature).log_softmax(-1).topk(2)
    found = losses.top_k_divergence(student, indices.int(), log_probs, temperature)

    def buckets(logits):
        probs = (logits.double() / temperature).softmax(-1).gather(-1, indices)
        return torch.cat([probs, 1 - probs.sum(-1, keepdim=True)], -1)

    expected = temperature**2 * reference_kl(Categorical(buckets(logits[1])), Categorical(buckets(student)))
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(found.sum(), student)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), student)[0], rtol=1e-5, atol=1e-6)
    assert (found <= losses.kl_divergence(student, logits[1], temperature) + 1e-6).all()
    # The classes of the rest share their gradient in the student's own proportions.
    probs, rest = (student / temperature).softmax(-1), torch.ones(6, 5, dtype=torch.bool).scatter(-1, indices, False)
    ratio = buckets(logits[1])[:, -1:] / buckets(student)[:, -1:]
    shared = temperature * probs * (1 - ratio).float()
    torch.testing.assert_close(gradient[rest], shared[rest], rtol=1e-4, atol=1e-6)


def test_top_k_of_a_teacher_without_rest(logits):
    # Rounded log-probabilities may sum to more than 1, and the least may be rounded to nothing.
    student = torch.tensor([[200.0, 0.0, 0.0, -10.0]], requires_grad=True)
    log_probs = torch.tensor([[1e-3, -float("inf")]])
    loss = losses.top_k_divergence(student, torch.tensor([[1, 2]]), log_probs)
    loss.sum().backward()
    torch.testing.assert_close(loss, torch.tensor([200.2]), rtol=1e-3, atol=0)
    assert student.grad.isfinite().all()


def test_top_k_keeps_the_digits_of_a_small_rest():
    # The student's rest has a mass of about 2e-13, which 1 - sum would give as 0.
    student = torch.tensor([[30.0, 0.0, 0.0]], requires_grad=True)
    log_probs = torch.tensor([[0.5]]).log()
    loss = losses.top_k_divergence(student, torch.tensor([[0]]), log_probs)
    expected = -math.log(2) + 0.5 * (30 - math.log(2))
    torch.testing.assert_close(loss, torch.tensor([expected]))
    loss.sum().backward()
    torch.testing.assert_close(student.grad, torch.tensor([[0.5, -0.25, -0.25]]))


def test_logit_squared_error_is_the_mean_over_allowed_classes(logits):
    student, teacher = logits
    expected = F.mse_loss(student, teacher, reduction="none")
    torch.testing.assert_close(losses.logit_squared_error(student, teacher), expected.mean(-1))
    allowed = torch.tensor([True, True, False, True, False]).expand(6, 5)
    teacher = teacher.masked_fill(~allowed, float("inf"))
    found = losses.logit_squared_error(student, teacher, allowed)
    torch.testing.assert_close(found, expected[:, [0, 1, 3]].mean(-1))


def test_cosine_distance_is_that_of_torch_and_free_of_lengths(logits):
    student, teacher = logits
    expected = 1 - F.cosine_similarity(student.double(), teacher.double(), dim=-1).float()
    torch.testing.assert_close(losses.cosine_distance(student, teacher), expected)
    torch.testing.assert_close(losses.cosine_distance(7 * student, teacher / 3), expected)
    torch.testing.assert_close(losses.cosine_distance(student, -student), torch.full((6,), 2.0))


@pytest.mark.parametrize(
    "divergence",
    [
        losses.kl_divergence,
        losses.reverse_kl_divergence,
        losses.jensen_shannon,
        losses.logit_squared_error,
        losses.bernoulli_kl_divergence,
        losses.bernoulli_reverse_kl_divergence,
        losses.bernoulli_jensen_shannon,
        losses.cosine_distance,
        losses.squared_error,
    ],
)
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


@pytest.mark.parametrize(
    "divergence",
    [losses.kl_divergence, losses.reverse_kl_divergence, losses.jensen_shannon, losses.soft_cross_entropy],
)
@pytest.mark.parametrize("temperature", [0.1, 1.0, 100.0])
def test_forbidden_classes_are_as_if_absent(logits, temperature, divergence):
    student, teacher = (x.clone().requires_grad_() for x in logits)
    allowed = torch.tensor([True, True, False, True, False]).expand(6, 5)
    masked = divergence(student, teacher.detach(), temperature, allowed)
    without = divergence(student[:, [0, 1, 3]], teacher[:, [0, 1, 3]].detach(), temperature)
    torch.testing.assert_close(masked, without)
    (gradient,) = torch.autograd.grad(masked.sum(), student)
    (expected,) = torch.autograd.grad(without.sum(), student)
    torch.testing.assert_close(gradient, expected)
    assert gradient[:, [2, 4]].abs().max() == 0


@pytest.mark.parametrize(
    "divergence",
    [losses.kl_divergence, losses.reverse_kl_divergence, losses.jensen_shannon, losses.soft_cross_entropy],
)
def test_an_item_without_classes_pays_nothing(logits, divergence):
    student = logits[0].requires_grad_()
    loss = divergence(student, logits[1], 2.0, torch.zeros(6, 5, dtype=torch.bool))
    loss.sum().backward()
    assert loss.abs().max() == 0
    assert student.grad.abs().max() == 0


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
    for divergence in (
        losses.kl_divergence,
        losses.reverse_kl_divergence,
        losses.jensen_shannon,
        losses.soft_cross_entropy,
        losses.logit_squared_error,
        losses.bernoulli_jensen_shannon,
        losses.cosine_distance,
    ):
        found = divergence(student, teacher)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, divergence(student.float(), teacher.float()))


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
