"""Weights and temperatures that change while a student is trained."""

import math
from typing import Literal, get_args

Schedule = Literal["constant", "linear", "cosine"]


def scheduled(start: float, end: float | None, schedule: Schedule, progress: float) -> float:
    """The value of a setting at a point of the training.

    Args:
        start (`float`): Value at the beginning.
        end (`float`, *optional*): Value at the end; unused for `"constant"`.
        schedule (`str`): `"constant"`, `"linear"`, or `"cosine"`: half a wave, slow at both ends.
        progress (`float`): Share of the training that is done; what lies outside [0, 1] counts as the nearer end.

    Returns:
        `float`: Exactly `start` at 0 and exactly `end` at 1.
    """
    if schedule == "constant":
        return start
    progress = min(max(progress, 0.0), 1.0)
    share = progress if schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2
    return (1 - share) * start + share * end


def check_schedule(name: str, end: float | None, schedule: str) -> None:
    """Holds that a setting which changes says what it changes to, and one that does not says nothing.

    Args:
        name (`str`): The setting, for the message.
        end (`float`, *optional*): Value at the end of the training.
        schedule (`str`): How it gets there.

    Raises:
        ValueError: if there is no such schedule, or only one of the two is given.
    """
    if schedule not in get_args(Schedule):
        raise ValueError(
            f"The {name} cannot follow the schedule {schedule!r}: give one of {list(get_args(Schedule))}."
        )
    if schedule == "constant" and end is not None:
        raise ValueError(
            f'The {name} has the end value {end}, but its schedule is "constant", which never gets there: '
            'set the schedule to "linear" or "cosine", or leave the end value out.'
        )
    if schedule != "constant" and end is None:
        raise ValueError(
            f"The {name} has the schedule {schedule!r}, but no end value to go to: "
            'give the end value, or set the schedule to "constant".'
        )
