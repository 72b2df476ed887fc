import math

import pytest
import torch
import torch.nn.functional as F

from hf_compress.distillation import inner_losses

BATCH, LENGTH = 2, 5
KEY_MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kl(student, teacher, key_mask, causal):
    return inner_losses.attention_kl(scores_of(student), scores_of(teacher), key_mask, causal)


def mse(student, teacher, key_mask, causal):
    return inner_losses.attention_squared_error(scores_of(student), scores_of(teacher), key_mask, causal)


def relations(student, teacher, key_mask, causal):
    return inner_losses.relation_divergence(student, teacher, 2, key_mask, causal)


def scores_of(heads):
    """Scores of an attention whose keys are not its queries, and all of whose heads have keys of their own."""
    return inner_losses.attention_scores(heads, heads.flip(-1), heads.shape[-1] ** -0.5)


OVER_KEYS = [kl, mse, relations]
OF_VECTORS = [
    inner_losses.hidden_squared_error,
    inner_losses.hidden_cosine,
    inner_losses.normalized_squared_error,
    inner_losses.distance_loss,
    inner_losses.angle_loss,
]


@pytest.mark.parametrize("formula", OF_VECTORS)
def test_equal_vectors_pay_nothing(formula):
    student = random(4, 6).requires_grad_()
    loss = formula(student, student.detach().clone())
    loss.sum().backward()
    assert loss.shape == (4,)
    assert loss.abs().max() == 0
    assert student.grad.abs().max() <= 1e-6


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("formula", OVER_KEYS)
def test_equal_heads_pay_nothing(formula, causal):
    student = random(BATCH, 4, LENGTH, 3).requires_grad_()
    loss = formula(student, student.detach().clone(), KEY_MASK, causal)
    loss.sum().backward()
    assert loss.shape == (BATCH, LENGTH)
    assert loss.abs().max() == 0
    assert student.grad.abs().max() <= 1e-6


@pytest.mark.parametrize("n_student", [2, 4])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("formula", OVER_KEYS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_real_token(formula, causal, n_student, side):
    student, teacher = random(BATCH, n_student, LENGTH, 3).requires_grad_(), random(BATCH, 4, LENGTH, 3, seed=1)
    mask = KEY_MASK if side == "right" else KEY_MASK.flip(1)
    extra = (0, 3) if side == "right" else (3, 0)
    padded = [F.pad(x, (0, 0, *extra), value=float(7 + i)) for i, x in enumerate((student, teacher))]
    expected = formula(student, teacher, mask, causal)
    padded_mask = F.pad(mask, extra, value=False)
    found = formula(*padded, padded_mask, causal)
    torch.testing.assert_close(found[padded_mask], expected[mask])
    gradients = [torch.autograd.grad(x.sum(), student)[0] for x in (found[padded_mask], expected[mask])]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
    assert found.isfinite().all()
    # What stands in the padding does not matter either, nor do later tokens to a causal model.
    other = [x.clone().detach() for x in (student, teacher)]
    for x in other:
        x.transpose(1, 2)[~mask] = 100.0
    torch.testing.assert_close(formula(*other, mask, causal)[mask], expected[mask])
    if causal and side == "right":
        torch.testing.assert_close(
            formula(*(x[:, :, :2] for x in (student, teacher)), mask[:, :2], True), expected[:, :2]
        )


@pytest.mark.parametrize("causal", [False, True])
def test_attention_kl_is_that_of_the_probabilities(causal):
    scores = [3 * random(BATCH, 4, LENGTH, LENGTH, seed=seed) for seed in (0, 1)]
    hidden = ~KEY_MASK[:, None, None, :].expand(-1, 4, LENGTH, -1)
    if causal:
        hidden = hidden | torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    student, teacher = (x.double().masked_fill(hidden, -math.inf).softmax(-1) for x in scores)
    terms = teacher * (teacher.clamp(min=1e-30) / student.clamp(min=1e-30)).log()
    found = inner_losses.attention_kl(*scores, KEY_MASK, causal)
    torch.testing.assert_close(found, terms.sum(-1).mean(1).float(), rtol=1e-5, atol=1e-6)


def test_attention_of_other_numbers_of_heads_is_compared_as_the_mean_of_heads():
    student, teacher = random(BATCH, 2, LENGTH, LENGTH), random(BATCH, 4, LENGTH, LENGTH, seed=1)
    mask = KEY_MASK[:, None, None, :]
    means = [x.masked_fill(~mask, -math.inf).softmax(-1).mean(1) for x in (student, teacher)]
    expected = (means[1] * (means[1].clamp(min=1e-30) / means[0].clamp(min=1e-30)).log()).sum(-1)
    torch.testing.assert_close(inner_losses.attention_kl(student, teacher, KEY_MASK), expected)
    squares = (student.mean(1) - teacher.mean(1)).square() * mask[:, 0]
    found = inner_losses.attention_squared_error(student, teacher, KEY_MASK)
    torch.testing.assert_close(found, squares.sum(-1) / KEY_MASK.sum(-1, keepdim=True))


@pytest.mark.parametrize("formula", [kl, mse])
def test_a_repeated_head_changes_nothing_where_heads_are_averaged(formula):
    teacher = random(BATCH, 2, LENGTH, 3)
    student = teacher.repeat(1, 3, 1, 1).requires_grad_()
    loss = formula(student, teacher, KEY_MASK, False)
    loss.sum().backward()
    assert loss.abs().max() <= 1e-6
    assert student.grad.abs().max() <= 1e-6


def test_attention_squared_error_is_the_mean_over_real_keys():
    student, teacher = random(BATCH, 4, LENGTH, LENGTH), random(BATCH, 4, LENGTH, LENGTH, seed=1)
    found = inner_losses.attention_squared_error(student, teacher, KEY_MASK)
    torch.testing.assert_close(found[0], (student - teacher)[0].square().mean((0, 2)))
    torch.testing.assert_close(found[1], (student - teacher)[1, :, :, :3].square().mean((0, 2)))


def test_scores_are_those_of_torch_attention_with_shared_keys():
    q, k, v = random(BATCH, 6, 4, 8), random(BATCH, 2, LENGTH, 8, seed=1), random(BATCH, 2, LENGTH, 8, seed=2)
    probs = inner_losses.attention_scores(q, k, 0.3).softmax(-1)
    expected = F.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(probs @ v.repeat_interleave(3, 1), expected)


def test_relations_do_not_depend_on_how_heads_were_cut():
    teacher = random(BATCH, 2, LENGTH, 6)
    student = teacher.transpose(1, 2).reshape(BATCH, LENGTH, 4, 3).transpose(1, 2)
    assert inner_losses.relation_divergence(student, teacher, 3, KEY_MASK).abs().max() == 0


def test_relations_of_models_of_other_widths():
    student, teacher = random(BATCH, 2, LENGTH, 3), random(BATCH, 4, LENGTH, 4, seed=1)
    found = inner_losses.relation_divergence(student, teacher, 1, KEY_MASK)
    joined = [x.transpose(1, 2).flatten(2) for x in (student, teacher)]
    logs = [(x @ x.mT / x.shape[-1] ** 0.5)[0].log_softmax(-1) for x in joined]
    torch.testing.assert_close(found[0], F.kl_div(*logs, reduction="none", log_target=True).sum(-1))


@pytest.mark.parametrize("number", [0, 3, 4, 5])
def test_relation_heads_must_divide_both_widths(number):
    with pytest.raises(ValueError, match="student's width 6 and the teacher's 16.*give a divisor of 2"):
        inner_losses.relation_divergence(random(1, 2, 4, 3), random(1, 4, 4, 4), number, torch.ones(1, 4).bool())


def test_squared_error_of_normalized_vectors_is_twice_the_cosine_distance():
    student, teacher = random(4, 6), random(4, 6, seed=1)
    expected = (F.normalize(student, dim=-1) - F.normalize(teacher, dim=-1)).square().sum(-1)
    torch.testing.assert_close(inner_losses.normalized_squared_error(student, teacher), expected)
    torch.testing.assert_close(2 * inner_losses.hidden_cosine(student, teacher), expected)


def test_distances_are_compared_pair_by_pair():
    student, teacher = random(4, 6), random(4, 9, seed=1)
    distances = [torch.cdist(x.double(), x.double()) for x in (student, teacher)]
    relative = [x / (x.sum() / 12) for x in distances]
    expected = F.huber_loss(*relative, reduction="none").sum(1) / 3
    torch.testing.assert_close(inner_losses.distance_loss(student, teacher), expected.float())


def test_angles_are_compared_triangle_by_triangle():
    student, teacher = random(4, 6), random(4, 9, seed=1)
    expected = torch.zeros(4)
    for i in range(4):
        others = [row for row in range(4) if row != i]
        pairs = [(j, k) for j in others for k in others if j != k]
        for j, k in pairs:
            cosines = [F.cosine_similarity(x[j] - x[i], x[k] - x[i], dim=0) for x in (student, teacher)]
            expected[i] += F.huber_loss(*cosines) / len(pairs)
    torch.testing.assert_close(inner_losses.angle_loss(student, teacher), expected)


@pytest.mark.parametrize("formula", [inner_losses.distance_loss, inner_losses.angle_loss])
def test_relations_of_rows_keep_under_rotation_and_scale(formula):
    teacher = random(5, 6)
    rotation = torch.linalg.qr(random(6, 6, seed=1)).Q
    assert formula(3 * teacher @ rotation + 1, teacher).abs().max() <= 1e-6


@pytest.mark.parametrize("formula", [inner_losses.distance_loss, inner_losses.angle_loss])
@pytest.mark.parametrize("rows", [[0, 0, 1, 2], [0, 0, 0, 0], [0], [0, 1]])
def test_gradients_are_finite_where_rows_coincide(formula, rows):
    student = random(3, 6)[rows].requires_grad_()
    loss = formula(student, random(len(rows), 6, seed=1))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert student.grad.isfinite().all()
    if len(rows) == 1:
        assert loss.tolist() == [0.0]


def test_contrastive_finds_the_own_row():
    student, teacher = random(4, 6), random(4, 6, seed=1)
    similarity = F.cosine_similarity(student[:, None], teacher[None], dim=-1)
    expected = -(similarity / 0.1).log_softmax(-1).diag()
    torch.testing.assert_close(inner_losses.contrastive(student, teacher, 0.1), expected)
    assert inner_losses.contrastive(teacher, teacher, 0.01).max() <= 1e-6
    same = inner_losses.contrastive(student, teacher[:1].expand(4, -1), 0.1)
    torch.testing.assert_close(same, torch.full((4,), math.log(4)))
    assert inner_losses.contrastive(student[:1], teacher[:1], 0.1).tolist() == [0.0]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_compared_in_single_precision(dtype, autocast):
    heads = [random(BATCH, 4, LENGTH, 3, seed=seed).to(dtype) for seed in (0, 1)]
    rows = [x[0, 0] for x in heads]
    formulas = [(formula, (*heads, KEY_MASK, False)) for formula in OVER_KEYS]
    formulas += [(formula, rows) for formula in OF_VECTORS] + [(inner_losses.contrastive, (*rows, 0.1))]
    for formula, inputs in formulas:
        expected = formula(*(x.float() if torch.is_tensor(x) and x.dtype == dtype else x for x in inputs))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = formula(*inputs)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected)
