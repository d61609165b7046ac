"""When to measure: pure functions of the step, so that all ranks agree without talking."""

import math
from collections.abc import Callable, Iterable

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
    """`num` times over `num_steps` steps, the last step included; every step if there are fewer.

    >>> due = evenly(3, 10)
    >>> [step for step in range(11) if due(step)]
    [4, 7, 10]
    """

    def due(step: int) -> bool:
        return step > 0 and step * num // num_steps > (step - 1) * num // num_steps

    return due


def at_steps(steps: Iterable[int]) -> Cadence:
    """At these steps.

    >>> due = at([2, 8])
    >>> [step for step in range(9) if due(step)]
    [2, 8]
    """
    return frozenset(steps).__contains__


def any_of(*cadences: Cadence) -> Cadence:
    """Whenever any of them is due.

    >>> [step for step in range(13) if either(every(5), every(6))(step)]
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
    """Whether to leave out a measurement that is due, so that all together keep to a share of the run's time.

    If not all that are to come are affordable, every second, third, ... of them is taken: the cadence is stretched, not
    cut off. Not a pure function of the step, as it looks at clocks: one rank decides for all.

    Args:
        budget: largest share of the whole run's time, probes included, that they may take.
        spent: seconds that measurements took so far.
        each: seconds that one takes.
        rest_of_run: seconds that everything else will have taken when the run ends.
        num_to_come: measurements that are due from now on, this one included, but for the last, which is always taken.
        left_out_in_a_row: how many were left out since the last that was taken.

    >>> def left_out(num_to_come, in_a_row):  # 5% of 100 s pay for 5 measurements of 1 s, one of them the last
    ...     facts = dict(spent=0.0, each=1.0, rest_of_run=95.0)
    ...     return exceeds(0.05, **facts, num_to_come=num_to_come, left_out_in_a_row=in_a_row)
    >>> left_out(4, 0), left_out(8, 0), left_out(7, 1)
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
    """Every `num` steps, from step `num` on.

    >>> [step for step in range(9) if every(4)(step)]
    [4, 8]
    """
    return lambda step: step > 0 and step % num == 0
