"""When pruning happens in a training, and how much of it is done by then. Formulas on numbers."""

from typing import Literal

Schedule = Literal["constant", "linear", "cubic"]


def constant_share(progress: float) -> float:
    """All at once.

    Args:
        progress (`float`): t, how much of the time for pruning is over, from 0 to 1.

    Returns:
        `float`: 1, whatever t is.
    """
    return 1.0


def linear_share(progress: float) -> float:
    """The same amount each time.

    Args:
        progress (`float`): t, how much of the time for pruning is over, from 0 to 1.

    Returns:
        `float`: s_t / s_f = t.
    """
    return progress


def cubic_share(progress: float) -> float:
    """Fast at first, while there is much to spare, and slow at the end.

    s_t = s_f + (s_i - s_f) (1 - t)^3, here with nothing gone at the start, s_i = 0; Zhu and Gupta, "To Prune, or Not
    to Prune: Exploring the Efficacy of Pruning for Model Compression" (2017), equation 1.

    Args:
        progress (`float`): t, how much of the time for pruning is over, from 0 to 1.

    Returns:
        `float`: s_t / s_f = 1 - (1 - t)^3.
    """
    return 1 - (1 - progress) ** 3


# What share of all that is to go is gone, by the progress of the pruning; each ends at exactly 1.
SHARES = {"constant": constant_share, "linear": linear_share, "cubic": cubic_share}


def update_steps(
    max_steps: int, begin: float, end: float, n_updates: int, schedule: Schedule, first: int = 0
) -> list[int]:
    """The steps of a training before which something is pruned.

    Args:
        max_steps (`int`): Of the training.
        begin (`float`): Share of the training before the first update.
        end (`float`): Share of the training before which the last update is.
        n_updates (`int`): How many updates, evenly spread; a short training has fewer, `"constant"` has one.
        schedule (`str`): `"constant"`, `"linear"` or `"cubic"`.
        first (`int`, *optional*, defaults to 0): No update is before this step.

    Returns:
        `list[int]`: Rising.
    """
    start, length = begin * max_steps, (end - begin) * max_steps
    count = 1 if schedule == "constant" else n_updates
    return sorted({max(first, int(start + length * i / count)) for i in range(count)})
