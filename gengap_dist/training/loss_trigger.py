"""Finds the steps at which the training loss first falls below each of several values. No clock, no ranks.

It is told the sums of every step over all ranks, which are known one step later: what it finds in step k is due after
step k + 1, whenever the sums of step k are read. So it depends on the sums only.
"""

import math
from collections import deque
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, final

WINDOW_SIZE = 2_048  # samples of the running mean, the same for all batch sizes
NUM_AUTO, FIRST_AUTO, LAST_AUTO = 22, 2.0, 1e-4


def loss_grid(given: Sequence[float | Literal["auto"]]) -> tuple[float, ...]:
    """The values of probe.at_losses in descending order, without repetition.

    auto: a geometric grid from 2, which is below the loss of an untrained classifier of ten classes, to 1e-4. Runs that
    are trained to the end stop between .03 and .0002. Two neighbours differ by a factor of 1.60 (.47 in the logarithm),
    not much more than the range of .35 over which arms are compared at equal losses.

    >>> [round(loss, 5) for loss in loss_grid(["auto"])][:3], loss_grid(["auto"])[-1], loss_grid([0.1, 1, 0.1])
    ([2.0, 1.24801, 0.77877], 0.0001, (1, 0.1))
    """
    ratio = (LAST_AUTO / FIRST_AUTO) ** (1 / (NUM_AUTO - 1))
    grid = [*(FIRST_AUTO * ratio**k for k in range(NUM_AUTO - 1)), LAST_AUTO]
    losses = [loss for each in given for loss in (grid if each == "auto" else [each])]
    return tuple(sorted(set(losses), reverse=True))


class StepLoss(NamedTuple):
    """The loss of one step over all ranks."""

    size: int
    """Samples."""
    loss_sum: float
    num_targets: float
    """That the loss is summed over: as many as samples, unless the task says otherwise."""


def window_mean(steps: Sequence[StepLoss], window_size: int = WINDOW_SIZE) -> float | None:
    """The mean loss over the last `window_size` samples of `steps`, rounded once; None if there are not so many.

    Of the first of `steps` only as many samples count as the window has room for, so the window is the same for all
    batch sizes; the others must fit. Of a single step that is larger it is the mean loss.

    >>> window_mean([StepLoss(4, 80.0, 4), StepLoss(4, 8.0, 4)], window_size=6)
    8.0
    >>> window_mean([StepLoss(4, 4.0, 4)], window_size=6)
    """
    free = window_size - sum(step.size for step in steps[1:])
    if not steps or steps[0].size < free:
        return None
    share = free / steps[0].size
    loss = math.fsum([share * steps[0].loss_sum, *(step.loss_sum for step in steps[1:])])
    return loss / max(1.0, math.fsum([share * steps[0].num_targets, *(step.num_targets for step in steps[1:])]))


@final
class LossTrigger:
    """Remembers the losses of the last steps, and which values the mean has been below."""

    def __init__(self, losses: Sequence[float], window_size: int = WINDOW_SIZE) -> None:
        """For `losses` in descending order; no step is known yet."""
        self.losses, self.window_size = losses, window_size
        self._num_reached = 0
        self._steps: deque[StepLoss] = deque()  # those with a share in the window, oldest first
        self._size = 0
        self._due: set[int] = set()

    @property
    def num_remaining(self) -> int:
        """Number of values that the mean has not been below yet."""
        return len(self.losses) - self._num_reached

    def due(self, step: int) -> bool:
        """Whether the mean first fell below a value with the loss of the step before `step`, by what is known."""
        return step in self._due

    def add(self, step: int, loss: StepLoss) -> None:
        """The loss of step number `step`, from 1. All steps are added once, in order."""
        self._due = {other for other in self._due if other >= step}
        if not self.num_remaining or not loss.size:
            return
        self._steps.append(loss)
        self._size += loss.size
        while self._size - self._steps[0].size >= self.window_size:
            self._size -= self._steps.popleft().size
        mean = window_mean([*self._steps], self.window_size)
        if mean is None or not mean < self.losses[self._num_reached]:
            return
        self._num_reached = sum(mean < other for other in self.losses)
        self._due.add(step + 1)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the values."""
        return {
            "num_reached": self._num_reached,
            "steps": [tuple(loss) for loss in self._steps],
            "due": sorted(self._due),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`; an empty one is that of a run of an earlier version: the window begins to fill."""
        self._num_reached = state.get("num_reached", 0)
        self._steps = deque(StepLoss(*loss) for loss in state.get("steps", ()))
        self._size = sum(loss.size for loss in self._steps)
        self._due = set(state.get("due", ()))
