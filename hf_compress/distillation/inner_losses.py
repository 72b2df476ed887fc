"""Formulas of what happens inside two models: functions of tensors that return one value per token or per row.

All of them compute in single precision, whatever the models run in, and are 0 for equal models, `contrastive`
excepted. The values at padding mean nothing: the caller masks them. What padding may not do is change the values of
real tokens, so formulas over keys take a mask of them.
"""

import math

import torch
import torch.nn.functional as F

from hf_compress.distillation import losses


def hidden_squared_error(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean over the width of the squared difference (TinyBERT, Jiao et al., 2020, arXiv:1909.10351, eq. 8 and 9).

    Args:
        student (`torch.Tensor` of shape `(..., width)`): Vectors of the student, projected to the teacher's width.
        teacher (`torch.Tensor` of shape `(..., width)`): Vectors of the teacher.

    Returns:
        `torch.Tensor` of shape `(...)`: One value per vector.
    """
    return (student.float() - teacher.float()).square().mean(-1)


def hidden_cosine(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """`1 - cos` of the angle between two vectors (DistilBERT, Sanh et al., 2019, arXiv:1910.01108, section 2).

    Args:
        student (`torch.Tensor` of shape `(..., width)`): Vectors of the student, projected to the teacher's width.
        teacher (`torch.Tensor` of shape `(..., width)`): Vectors of the teacher.

    Returns:
        `torch.Tensor` of shape `(...)`: One value per vector, from 0 to 2.
    """
    return losses.cosine_distance(student, teacher)


def normalized_squared_error(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """`|s/|s| - t/|t||^2` of two vectors (PKD, Sun et al., 2019, arXiv:1908.09355, eq. 7).

    Args:
        student (`torch.Tensor` of shape `(..., width)`): Vectors of the student, projected to the teacher's width.
        teacher (`torch.Tensor` of shape `(..., width)`): Vectors of the teacher; the paper's are the first token's.

    Returns:
        `torch.Tensor` of shape `(...)`: One value per vector, from 0 to 4: twice that of `hidden_cosine`.
    """
    return 2 * losses.cosine_distance(student, teacher)


def attention_scores(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """What an attention gives to its softmax, before any mask.

    Args:
        q (`torch.Tensor` of shape `(batch, heads, queries, head_dim)`): Queries.
        k (`torch.Tensor` of shape `(batch, key-value heads, keys, head_dim)`): Keys; where there are fewer of their
            heads, consecutive heads of queries share one (grouped-query attention).
        scale (`float`): Multiplies the products: `head_dim ** -0.5` in most models.

    Returns:
        `torch.Tensor` of shape `(batch, heads, queries, keys)`: Scores.
    """
    assert q.shape[1] % k.shape[1] == 0, (q.shape, k.shape)
    return _products(q, k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)) * scale


def attention_kl(
    student_scores: torch.Tensor, teacher_scores: torch.Tensor, key_mask: torch.Tensor, causal: bool = False
) -> torch.Tensor:
    """`KL(teacher || student)` of attention probabilities (MiniLM, Wang et al., 2020, arXiv:2002.10957, section 3.1).

    Heads are compared one by one. Where the models have different numbers of them, no head has a counterpart, and the
    mean over heads of the probabilities is compared instead.

    Args:
        student_scores (`torch.Tensor` of shape `(batch, heads, queries, keys)`): As `attention_scores` gives them.
        teacher_scores (`torch.Tensor` of shape `(batch, teacher heads, queries, keys)`): Likewise.
        key_mask (`torch.Tensor` of shape `(batch, keys)`): True where a key is real, False at padding.
        causal (`bool`, *optional*, defaults to `False`): Whether a query sees no later keys.

    Returns:
        `torch.Tensor` of shape `(batch, queries)`: The mean over heads in nats; 0 for a query that sees no key.
    """
    visible = _visible_keys(student_scores, key_mask, causal)
    if student_scores.shape[1] != teacher_scores.shape[1]:
        student_scores = _mean_log_probs(student_scores, visible)
        teacher_scores = _mean_log_probs(teacher_scores, visible)
    return losses.kl_divergence(student_scores, teacher_scores, class_mask=visible).mean(1)


def attention_squared_error(
    student_scores: torch.Tensor, teacher_scores: torch.Tensor, key_mask: torch.Tensor, causal: bool = False
) -> torch.Tensor:
    """Squared difference of the attention scores (TinyBERT, Jiao et al., 2020, arXiv:1909.10351, eq. 7).

    The paper found that scores teach better than probabilities. Heads are compared one by one; where the models have
    different numbers of them, the mean over heads of the scores is compared instead.

    Args:
        student_scores (`torch.Tensor` of shape `(batch, heads, queries, keys)`): As `attention_scores` gives them.
        teacher_scores (`torch.Tensor` of shape `(batch, teacher heads, queries, keys)`): Likewise.
        key_mask (`torch.Tensor` of shape `(batch, keys)`): True where a key is real, False at padding.
        causal (`bool`, *optional*, defaults to `False`): Whether a query sees no later keys.

    Returns:
        `torch.Tensor` of shape `(batch, queries)`: The mean over heads and visible keys; 0 for a query that sees none.
    """
    visible = _visible_keys(student_scores, key_mask, causal)
    if student_scores.shape[1] != teacher_scores.shape[1]:
        student_scores = student_scores.float().mean(1, keepdim=True)
        teacher_scores = teacher_scores.float().mean(1, keepdim=True)
    return losses.logit_squared_error(student_scores, teacher_scores, visible).mean(1)


def relation_divergence(
    student: torch.Tensor,
    teacher: torch.Tensor,
    num_relation_heads: int,
    key_mask: torch.Tensor,
    causal: bool = False,
) -> torch.Tensor:
    """`KL(teacher || student)` of self-attention relations (MiniLMv2, Wang et al., 2021, arXiv:2012.15828, eq. 4-6).

    Queries, keys or values of all heads are joined and split again into relation heads, whose number is free of the
    heads of either model. A relation is the softmax over tokens of the scaled products of these vectors with
    themselves.

    Args:
        student (`torch.Tensor` of shape `(batch, heads, length, head_dim)`): The student's q, k or v.
        teacher (`torch.Tensor` of shape `(batch, teacher heads, length, teacher head_dim)`): The teacher's.
        num_relation_heads (`int`): A divisor of heads x head_dim of both; the paper takes 48 for teachers of width 768
            and 64 for those of width 1024.
        key_mask (`torch.Tensor` of shape `(batch, length)`): True where a token is real, False at padding.
        causal (`bool`, *optional*, defaults to `False`): Whether a token sees no later ones.

    Returns:
        `torch.Tensor` of shape `(batch, length)`: The mean over relation heads in nats.

    Raises:
        ValueError: if the number of relation heads does not divide both widths.
    """
    widths = [tensor.shape[1] * tensor.shape[3] for tensor in (student, teacher)]
    if num_relation_heads < 1 or any(width % num_relation_heads for width in widths):
        raise ValueError(
            f"num_relation_heads={num_relation_heads} does not divide both the student's width {widths[0]} and the "
            f"teacher's {widths[1]}, so they cannot be split into that many: "
            f"give a divisor of {math.gcd(*widths)}."
        )
    return attention_kl(
        _relation_scores(student, num_relation_heads), _relation_scores(teacher, num_relation_heads), key_mask, causal
    )


def distance_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Huber loss of the distances between rows (RKD-D, Park et al., 2019, arXiv:1904.05068, section 3.2.1).

    Distances are divided by their mean over all pairs, so widths and scales of the models may differ. A row's value
    depends on which rows share its micro-batch.

    Args:
        student (`torch.Tensor` of shape `(batch, width)`): Vectors of the student.
        teacher (`torch.Tensor` of shape `(batch, teacher width)`): Vectors of the teacher.

    Returns:
        `torch.Tensor` of shape `(batch,)`: For each row the mean over its partners; 0 in a batch of one.
    """
    loss = F.huber_loss(_relative_distances(student), _relative_distances(teacher), reduction="none")
    return loss.sum(1) / max(len(loss) - 1, 1)


def angle_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Huber loss of the angles between rows (RKD-A, Park et al., 2019, arXiv:1904.05068, section 3.2.2).

    Compared are the cosines of the angles of all triangles, O(batch^3) of them. A row's value depends on which rows
    share its micro-batch.

    Args:
        student (`torch.Tensor` of shape `(batch, width)`): Vectors of the student.
        teacher (`torch.Tensor` of shape `(batch, teacher width)`): Vectors of the teacher.

    Returns:
        `torch.Tensor` of shape `(batch,)`: For each row the mean over the angles at it; 0 in a batch of one or two.
    """
    loss = F.huber_loss(_cosines(student), _cosines(teacher), reduction="none")
    size = len(loss)
    # A side forms no angle with itself. Sides of no length are zero in both, so they add nothing.
    loss = loss.masked_fill(torch.eye(size, dtype=torch.bool, device=loss.device), 0.0)
    return loss.sum((1, 2)) / max((size - 1) * (size - 2), 1)


def contrastive(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """InfoNCE: which row of the teacher belongs to a row of the student (CRD, Tian et al., 2020, arXiv:1910.10699).

    The negatives are the teacher's other rows of the micro-batch, not a memory of past ones as in the paper. A row's
    value thus depends on which rows share its micro-batch, and is not 0 for equal models: others remain likely.

    Args:
        student (`torch.Tensor` of shape `(batch, width)`): Vectors of the student, projected to the teacher's width.
        teacher (`torch.Tensor` of shape `(batch, width)`): Vectors of the teacher.
        temperature (`float`): > 0, divides the cosines.

    Returns:
        `torch.Tensor` of shape `(batch,)`: In nats; `log(batch)` where all rows look alike, 0 in a batch of one.
    """
    student, teacher = (F.normalize(rows.float(), dim=-1, eps=1e-8) for rows in (student, teacher))
    similarity = _products(student, teacher) / temperature
    return F.cross_entropy(similarity, torch.arange(len(similarity), device=similarity.device), reduction="none")


def _products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    # Autocast would multiply in half precision what was just converted to single.
    with torch.autocast(a.device.type, enabled=False):
        return a.float() @ b.float().transpose(-1, -2)


def _visible_keys(scores: torch.Tensor, key_mask: torch.Tensor, causal: bool) -> torch.Tensor:
    """Where a query may look, of shape `(batch, 1, 1 or queries, keys)`."""
    visible = key_mask.bool()[:, None, None, :]
    if not causal:
        return visible
    queries, keys = scores.shape[-2:]
    return visible & torch.ones(queries, keys, dtype=torch.bool, device=scores.device).tril(keys - queries)


def _mean_log_probs(scores: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Logarithm of the mean over heads of the attention probabilities, `(batch, 1, queries, keys)`."""
    scores = scores.float()
    log_probs = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).log_softmax(-1)
    return log_probs.logsumexp(1, keepdim=True) - math.log(scores.shape[1])


def _relation_scores(vectors: torch.Tensor, num_relation_heads: int) -> torch.Tensor:
    heads = vectors.transpose(1, 2).flatten(2).unflatten(-1, (num_relation_heads, -1)).transpose(1, 2)
    return attention_scores(heads, heads, heads.shape[-1] ** -0.5)


def _sides(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Differences `[i, j]` of row j to row i and their squared lengths; exactly zero for equal rows."""
    rows = rows.float()
    differences = rows[None, :, :] - rows[:, None, :]
    return differences, differences.square().sum(-1)


def _relative_distances(rows: torch.Tensor) -> torch.Tensor:
    _, squares = _sides(rows)
    # The gradient of a square root at 0 is infinite; where two rows coincide, it is to be 0.
    distances = squares.where(squares > 0, 1.0).sqrt().where(squares > 0, 0.0)
    mean = distances.sum() / max(len(rows) * (len(rows) - 1), 1)
    return distances / mean.clamp(min=1e-12)


def _cosines(rows: torch.Tensor) -> torch.Tensor:
    """Cosines `[i, j, k]` of the angles at row i between the sides to rows j and k."""
    differences, squares = _sides(rows)
    directions = differences / squares.where(squares > 0, 1.0).sqrt().unsqueeze(-1)
    return _products(directions, directions)
