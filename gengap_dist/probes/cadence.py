"""When to measure: pure functions of the step, so that all ranks agree without communication."""

import math
from collections.abc import Callable, Iterable, Sequence

Cadence = Callable[[int], bool]


def log_spaced(per_decade: int) -> Cadence:
    """Step 0 and round(10^(k / per_decade)), k = 0, 1, ...

    >>> due = log_spaced(3)
    >>> [step for step in range(101) if due(step)]
    [0, 1, 2, 5, 10, 22, 46, 100]
    """

    def due(step: int) -> bool:
        if step == 0:
            return True
        near = round(per_decade * math.log10(step))
        return any(round(10 ** (k / per_decade)) == step for k in (near - 1, near, near + 1) if k >= 0)

    return due


def evenly(num: int, num_steps: int) -> Cadence:
    """`num` times in `num_steps` steps, including the last; every step if `num_steps` is smaller than `num`.

    >>> due = evenly(3, 10)
    >>> [step for step in range(11) if due(step)]
    [4, 7, 10]
    """

    def due(step: int) -> bool:
        return step > 0 and step * num // num_steps > (step - 1) * num // num_steps

    return due


def at_steps(steps: Iterable[int]) -> Cadence:
    """At the given steps.

    >>> due = at_steps([2, 8])
    >>> [step for step in range(9) if due(step)]
    [2, 8]
    """
    return frozenset(steps).__contains__


def spread(steps: Sequence[int], num: int) -> frozenset[int]:
    """At most `num` of increasing steps, evenly by their number in the list, with the first and the last.

    >>> sorted(spread([0, 1, 2, 5, 10, 22, 46, 100], 4)), sorted(spread([0, 7], 4))
    ([0, 2, 22, 100], [0, 7])
    """
    if len(steps) <= num:
        return frozenset(steps)
    return frozenset(steps[round(at * (len(steps) - 1) / (num - 1))] for at in range(num))


def any_of(*cadences: Cadence) -> Cadence:
    """At every step at which any of `cadences` is due.

    >>> [step for step in range(13) if any_of(every(5), every(6))(step)]
    [5, 6, 10, 12]
    """
    return lambda step: any(due(step) for due in cadences)


def should_skip(
    max_time_fraction: float,
    *,
    spent_seconds: float,
    seconds_each: float,
    other_seconds: float,
    num_remaining: int,
    num_skipped_in_a_row: int,
) -> bool:
    """Whether to skip a measurement that is due, to limit the fraction of time spent on measurements.

    If not all remaining measurements fit, only every second, third, ... is taken, up to the end of the run. The result
    depends on measured times: one rank decides for all ranks.

    Args:
        max_time_fraction: largest fraction of the run's time, probes included, that measurements may take.
        spent_seconds: seconds spent on measurements so far.
        seconds_each: seconds of one measurement.
        other_seconds: seconds of the whole run without measurements, estimated.
        num_remaining: measurements due from now on, including this one, but not the last, which is always taken.
        num_skipped_in_a_row: measurements skipped since the last one that was taken.

    >>> def skipped(num_remaining, in_a_row):  # 5% of 100 s allow 5 measurements of 1 s, including the last
    ...     times = dict(spent_seconds=0.0, seconds_each=1.0, other_seconds=95.0)
    ...     return should_skip(0.05, **times, num_remaining=num_remaining, num_skipped_in_a_row=in_a_row)
    >>> skipped(4, 0), skipped(8, 0), skipped(7, 1)
    (False, True, False)
    """
    if max_time_fraction >= 1:
        return False
    affordable = (
        math.floor(
            (max_time_fraction / (1 - max_time_fraction) * other_seconds - spent_seconds) / max(seconds_each, 1e-9)
            + 1e-9
        )
        - 1
    )
    return affordable < 1 or num_skipped_in_a_row + 1 < -(-num_remaining // affordable)


def every(num: int) -> Cadence:
    """Every `num` steps, starting at step `num`.

    >>> [step for step in range(9) if every(4)(step)]
    [4, 8]
    """
    return lambda step: step > 0 and step % num == 0
