"""When the loss first falls below a value: the window, the steps, and that nothing else decides."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gengap_dist.training.loss_trigger import LossTrigger, StepLoss, loss_grid, window_mean

STEPS = st.lists(st.tuples(st.integers(1, 9), st.floats(0.0, 3.0)), min_size=1, max_size=40)
"""Sizes and mean losses."""
VALUES = st.lists(st.floats(0.05, 2.5), min_size=1, max_size=6).map(loss_grid)


def as_losses(steps):
    return [StepLoss(size, size * mean, float(size)) for size, mean in steps]


def mean_of_images(steps, window_size):
    """The mean of the last `window_size` images, each with the mean loss of its step; None if there are fewer."""
    images = [mean for size, mean in reversed(steps) for _ in range(size)][:window_size]
    return math.fsum(images) / window_size if len(images) == window_size else None


@given(STEPS, st.integers(1, 20))
def test_the_window_is_that_of_images(steps, window_size):
    trigger = LossTrigger([1e-9], window_size)
    for number, loss in enumerate(as_losses(steps), 1):
        trigger.add(number, loss)
    expected = mean_of_images(steps, window_size)
    if trigger.num_remaining:  # else it was reached, and no more is kept
        found = window_mean([StepLoss(*loss) for loss in trigger.state_dict()["steps"]], window_size)
        assert found == (None if expected is None else pytest.approx(expected, rel=1e-12, abs=1e-12))


def due_steps(steps, losses, window_size):
    trigger = LossTrigger(losses, window_size)
    due = []
    for number, loss in enumerate(as_losses(steps), 1):
        trigger.add(number, loss)
        due += [number + 1] if trigger.due(number + 1) else []
    return due


@given(STEPS, VALUES, st.integers(1, 20))
def test_each_value_asks_once_when_the_mean_first_falls_below_it(steps, losses, window_size):
    remaining, expected = list(losses), []
    for number in range(1, len(steps) + 1):
        mean = mean_of_images(steps[:number], window_size)
        if mean is None:
            continue
        if any(abs(mean - loss) < 1e-9 for loss in losses):
            return  # equal up to the rounding of two sums
        below = [loss for loss in remaining if mean < loss]
        remaining = [loss for loss in remaining if loss not in below]
        expected += [number + 1] if below else []  # several at once ask for one measurement
    assert due_steps(steps, losses, window_size) == expected


@given(STEPS, VALUES, st.integers(1, 20), st.sets(st.integers(1, 40)), st.integers(0, 40))
def test_when_the_sums_are_read_and_where_a_run_is_resumed_decide_nothing(steps, losses, window_size, early, cut):
    """The loop of the trainer: after step k the sums of step k are read if something is due, else those of k - 1."""
    trigger, in_flight, measured = LossTrigger(losses, window_size), [], []
    for number, loss in enumerate(as_losses(steps), 1):
        in_flight.append((number, loss))
        while len(in_flight) > (0 if number in early or number == cut else 1):
            trigger.add(*in_flight.pop(0))
        if trigger.due(number):
            while in_flight:
                trigger.add(*in_flight.pop(0))
            measured.append(number)
        if number == cut:  # saved and restored
            state = trigger.state_dict()
            trigger = LossTrigger(losses, window_size)
            trigger.load_state_dict(state)
    assert measured == [step for step in due_steps(steps, losses, window_size) if step <= len(steps)]


def test_the_size_of_the_batch_moves_no_crossing_by_more_than_a_step():
    """A loss that falls from image to image: batches of 1 to 4,096 cross at the same image, to within one batch."""
    images = [2.5 * math.exp(-at / 4000) for at in range(40_960)]
    crossed = {}
    for size in (1, 32, 512, 4096):
        parts = [images[at : at + size] for at in range(0, len(images), size)]
        trigger = LossTrigger(loss_grid([1.0, 0.1]))
        steps = []
        for number, part in enumerate(parts, 1):
            trigger.add(number, StepLoss(size, math.fsum(part), size))
            steps += [number] if trigger.due(number + 1) else []
        crossed[size] = [number * size for number in steps]
    assert len(crossed[1]) == 2
    for size, at in crossed.items():
        assert all(
            0 <= found - exact <= max(size, size - 2048 + size) for found, exact in zip(at, crossed[1], strict=True)
        )


def test_nothing_is_due_before_the_window_is_full():
    trigger = LossTrigger([1.0], window_size=10)
    for number in (1, 2):
        trigger.add(number, StepLoss(4, 0.0, 4.0))
        assert not trigger.due(number + 1)
    trigger.add(3, StepLoss(4, 0.0, 4.0))
    assert trigger.due(4)
    assert not trigger.due(3)


def test_a_state_of_an_earlier_version_and_a_loss_that_is_no_number():
    trigger = LossTrigger([1.0], window_size=2)
    trigger.load_state_dict({})
    trigger.add(1, StepLoss(2, math.nan, 2.0))
    assert not trigger.due(2)
    trigger.add(2, StepLoss(2, 1.0, 2.0))
    assert trigger.due(3)


def test_the_grid():
    grid = loss_grid(["auto"])
    assert (len(grid), grid[0], grid[-1]) == (22, 2.0, 1e-4)
    ratios = [low / high for high, low in pairwise(grid)]
    assert max(ratios) == pytest.approx(min(ratios))
    assert loss_grid(["auto", 0.5])[3] == 0.5
    assert loss_grid([]) == ()
