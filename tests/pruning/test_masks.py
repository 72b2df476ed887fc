"""Masks: exact counts for every scope and pattern, scores from their formulas, shares that keep their mean."""

import pytest
import torch

from hf_compress.pruning.masks import (
    InputMeans,
    Selection,
    blind_scores,
    global_shares,
    lowest,
    outlier_ratio,
    owl_shares,
    pool,
    square_sums,
    wanda_scores,
)

SPARSITIES = (0.0, 0.1, 0.333, 0.5, 0.7, 0.99, 1.0)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("scores", [draw(12, 20).abs(), torch.ones(12, 20), draw(12, 20).abs().round()])
def test_counts_are_exact_with_ties_too(sparsity, scores):
    of_layer = Selection(sparsity).mask(scores)
    assert of_layer.sum() == round(sparsity * 240)
    of_rows = Selection(sparsity, is_by_row=True).mask(scores)
    assert (of_rows.sum(1) == round(sparsity * 20)).all()
    shares = global_shares({"a": scores, "b": scores[:5, :7]}, sparsity)
    assert round(shares["a"] * 240) + round(shares["b"] * 35) == round(sparsity * 275)
    for mask in (of_layer, of_rows):
        assert not mask.any() or mask.all() or scores[mask].mean() <= scores[~mask].mean()


def test_the_lowest_go_and_among_equals_the_first():
    scores = torch.tensor([[3.0, 1, 1, 1, 0], [2, 2, 2, 2, 2]])
    assert lowest(scores, 3).int().tolist() == [[0, 1, 1, 0, 1], [1, 1, 1, 0, 0]]
    mask = Selection(0.5).mask(torch.arange(10.0).reshape(2, 5).flip(1))
    assert mask.int().tolist() == [[1] * 5, [0] * 5]


def test_rows_are_compared_in_themselves_and_layers_with_each_other():
    scores = torch.tensor([[1.0, 2, 3, 4], [10, 20, 30, 40]])
    assert Selection(0.5, is_by_row=True).mask(scores).int().tolist() == [[1, 1, 0, 0]] * 2
    assert global_shares({"low": scores[:1], "high": scores[1:]}, 0.5) == {"low": 1.0, "high": 0.0}


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4), (3, 5), (4, 4)])
@pytest.mark.parametrize("scores", [draw(6, 40).abs(), torch.zeros(6, 40)])
def test_n_of_each_m_inputs_stay(n, m, scores):
    mask = Selection(1 - n / m, group=(n, m)).mask(scores)
    assert (mask.reshape(-1, m).sum(1) == m - n).all()
    kept = scores.reshape(-1, m).masked_fill(mask.reshape(-1, m), 0).sum(1)
    assert torch.allclose(kept, scores.reshape(-1, m).sort(descending=True).values[:, :n].sum(1))


@pytest.mark.parametrize("block", [(4, 1), (1, 4), (2, 5), (12, 20)])
@pytest.mark.parametrize("is_by_row", [False, True])
def test_blocks_go_as_a_whole(block, is_by_row):
    scores = draw(12, 20).abs()
    mask = Selection(0.5, is_by_row, block=block).mask(scores)
    blocks = pool(mask.float(), block)
    rows, columns = block
    assert set(blocks.unique().tolist()) <= {0.0, float(rows * columns)}
    expected = round(0.5 * 20 / columns) * (12 // rows) if is_by_row else round(0.5 * 240 / (rows * columns))
    assert (blocks > 0).sum() == expected


def test_blocks_are_weighed_by_sum_and_by_norm():
    weight = torch.tensor([[3.0, 0, 2, 2]])
    half = Selection(0.5, block=(1, 2))
    assert half.mask(blind_scores(weight, "l1")).int().tolist() == [[1, 1, 0, 0]]
    assert half.mask(blind_scores(weight, "l2")).int().tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize("selection", [Selection(0.37), Selection(0.37, True), Selection(0.37, False, None, (2, 2))])
def test_slices_of_columns_add_up_to_the_whole(selection):
    scores = draw(6, 20)
    parts = [selection.mask(scores[:, start : start + 6], start) for start in range(0, 20, 6)]
    together, whole = torch.cat(parts, 1), selection.mask(scores)
    assert together.sum() == whole.sum()
    assert not selection.is_by_row or (together.sum(1) == whole.sum(1)).all()


def test_rounds_take_the_same_share_of_what_is_left():
    shares = [Selection(0.875).after(step / 3).sparsity for step in (1, 2, 3)]
    assert shares == pytest.approx([0.5, 0.75, 0.875])
    assert Selection(0.7).after(1) == Selection(0.7)
    assert [Selection(0.5, group=(2, 8)).after(step / 2).group for step in (1, 2)] == [(4, 8), (2, 8)]


def test_wanda_is_weight_times_norm():
    weight, inputs = draw(4, 6), draw(50, 6, seed=1)
    mask = torch.arange(50) % 3 > 0
    means = InputMeans(square_sums)
    for part in torch.arange(50).split(20):
        means.add(inputs[part], mask[part])
    assert means.n_tokens == mask.sum()
    expected = weight.abs() * inputs[mask].norm(dim=0) / mask.sum().sqrt()
    assert torch.allclose(wanda_scores(weight, means.mean), expected)


def test_random_scores_are_drawn_by_the_generator_and_zeros_go_first():
    weight = draw(20, 30)
    weight[:, ::3] = 0
    first, again, other = (blind_scores(weight, "random", torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert Selection(0.5).mask(first)[weight == 0].all()


def test_outliers_are_counted_against_the_mean_of_the_block():
    scores = [torch.tensor([[1.0, 1, 1, 1]]), torch.tensor([[1.0, 1, 1, 13]])]
    assert outlier_ratio(scores, 5.0) == pytest.approx(1 / 8)
    assert outlier_ratio(scores, 6.0) == 0.0


@pytest.mark.parametrize("sparsity", [0.02, 0.5, 0.97])
def test_owl_gives_more_to_blocks_with_outliers_and_keeps_the_mean(sparsity):
    ratios, sizes = [0.01, 0.03, 0.02, 0.0], [100, 100, 300, 50]
    shares = owl_shares(ratios, sizes, sparsity, 0.08)
    assert sum(share * size for share, size in zip(shares, sizes, strict=True)) == pytest.approx(sparsity * 550)
    assert sorted(range(4), key=lambda i: shares[i]) == [1, 2, 0, 3]
    assert 0 <= min(shares)
    assert max(shares) <= 1
    if sparsity == 0.5:
        assert max(shares) - min(shares) == pytest.approx(0.16)
    assert owl_shares([0.1, 0.1], [1, 1], sparsity, 0.08) == [sparsity, sparsity]
