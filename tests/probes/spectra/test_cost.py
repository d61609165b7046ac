"""The seconds of a measurement by part, and those that are left, by a clock that the test moves."""

import pytest

from gengap_dist.probes.spectra.cost import MeasurementCost


def test_each_second_counts_for_the_innermost_part():
    clock = [100.0]
    cost = MeasurementCost(clock=lambda: clock[0])
    with cost.measured("forward"):
        clock[0] += 2
        with cost.measured("gram"):
            clock[0] += 3
            with cost.measured("gram", 1.0):
                clock[0] += 4
        with cost.measured(None):
            clock[0] += 5
        clock[0] += 6
    with cost.measured("decomposition"):
        clock[0] += 7
    assert cost.seconds() == {"forward": 8.0, "gram": 7.0, "decomposition": 7.0}


def test_what_is_left_follows_from_the_rate_of_each_part():
    seen, clock = [], [100.0]
    cost = MeasurementCost(lambda done, total: seen.append((done, total)), clock=lambda: clock[0])
    cost.plan("forward", 4.0)
    cost.plan("forward", 6.0)
    cost.plan("decomposition", 100.0, seconds_per_work=0.5)
    with cost.measured("forward", 2.0):
        clock[0] += 3
    assert seen == [(3.0, 3.0 + 8 * 1.5 + 50.0)]
    with cost.measured("decomposition", 50.0):
        clock[0] += 10  # faster than was measured before
    assert seen[1:] == [(13.0, 13.0 + 8 * 1.5 + 10.0)]


def test_seconds_count_if_a_pass_fails():
    clock = [100.0]
    cost = MeasurementCost(clock=lambda: clock[0])

    def fail() -> None:
        with cost.measured("forward", 1.0):
            clock[0] += 2
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fail()
    assert cost.seconds()["forward"] == 2.0
