import pytest

from hf_compress.distillation.schedules import check_schedule, scheduled


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_schedule_goes_from_start_to_end_and_stays_there(schedule):
    values = [scheduled(0.1, 0.7, schedule, progress) for progress in (-1.0, 0.0, 0.25, 0.5, 0.75, 1.0, 2.0)]
    assert values[:2] == [0.1, 0.1]
    assert values[-2:] == [0.7, 0.7]
    assert values == sorted(values)
    assert values[3] == pytest.approx(0.4)
    # Half-way symmetric.
    assert values[2] + values[4] == pytest.approx(0.8)


def test_linear_is_even_and_cosine_is_slow_at_the_ends():
    assert scheduled(8.0, 0.0, "linear", 0.25) == 6.0
    assert scheduled(8.0, 0.0, "cosine", 0.25) == pytest.approx(4 + 4 * 0.5**0.5)


def test_a_constant_does_not_change():
    assert [scheduled(2.0, None, "constant", progress) for progress in (0.0, 0.3, 1.0)] == [2.0] * 3


@pytest.mark.parametrize(
    ("end", "schedule", "message"),
    [
        (1.0, "constant", "temperature has the end value 1.0, but its schedule is .constant."),
        (None, "linear", "temperature has the schedule 'linear', but no end value"),
        (None, "cosine", "give the end value"),
        (1.0, "step", "give one of"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(end, schedule, message):
    with pytest.raises(ValueError, match=message):
        check_schedule("temperature", end, schedule)


@pytest.mark.parametrize(("end", "schedule"), [(None, "constant"), (0.0, "linear"), (1.0, "cosine")])
def test_schedules_that_make_sense_pass(end, schedule):
    check_schedule("weight", end, schedule)
