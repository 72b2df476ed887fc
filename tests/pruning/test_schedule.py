import pytest

from hf_compress.pruning.schedule import SHARES, cubic_share, linear_share, update_steps


@pytest.mark.parametrize("share", SHARES.values())
def test_every_schedule_ends_at_exactly_1_and_never_falls(share):
    shares = [share(i / 32) for i in range(33)]
    assert shares == sorted(shares)
    assert shares[-1] == 1


def test_cubic_is_the_equation_of_zhu_and_gupta():
    begin, interval, n, initial, final = 3, 5, 7, 0.0, 0.8
    for t in range(begin, begin + n * interval + 1, interval):
        expected = final + (initial - final) * (1 - (t - begin) / (n * interval)) ** 3
        assert cubic_share((t - begin) / (n * interval)) * final == pytest.approx(expected)
    assert linear_share(0.25) == 0.25


def test_updates_are_spread_evenly_and_are_over_before_the_end():
    assert update_steps(100, 0.2, 0.6, 4, "cubic") == [20, 30, 40, 50]
    assert update_steps(100, 0.2, 0.6, 4, "constant") == [20]
    assert update_steps(3, 0.0, 0.6, 8, "linear") == [0, 1]
    assert update_steps(3, 0.0, 0.6, 8, "linear", first=1) == [1]
    for max_steps in (1, 2, 5, 17, 1000):
        assert update_steps(max_steps, 0.0, 1.0, 32, "cubic")[-1] < max_steps
