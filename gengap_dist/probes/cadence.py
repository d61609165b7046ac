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


def at_epochs(epochs: Iterable[float], steps_per_epoch: int) -> Cadence:
    """At the step that is nearest to each of `epochs`.

    >>> due = at_epochs([0.5, 2], steps_per_epoch=4)
    >>> [step for step in range(9) if due(step)]
    [2, 8]
    """
    steps = {round(epoch * steps_per_epoch) for epoch in epochs}
    return lambda step: step in steps


def either(*cadences: Cadence) -> Cadence:
    """Whenever any of them is due.

    >>> [step for step in range(13) if either(every(5), every(6))(step)]
    [5, 6, 10, 12]
    """
    return lambda step: any(due(step) for due in cadences)


def thinned(num_due: int, num_affordable: float) -> int:
    """Take every how many-th measurement, if `num_due` are to come and so many are affordable.

    >>> thinned(6, 6.5), thinned(6, 2.5), thinned(6, 0.0)
    (1, 3, 7)
    """
    affordable = math.floor(num_affordable)
    return num_due + 1 if affordable < 1 else max(1, -(-num_due // affordable))


def every(num: int) -> Cadence:
    """Every `num` steps, from step `num` on.

    >>> [step for step in range(9) if every(4)(step)]
    [4, 8]
    """
    return lambda step: step > 0 and step % num == 0
