import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gengap_dist.data.sampler import EpochSampler
from gengap_dist.errors import UsageError


def epochs(order: EpochSampler, num: int) -> list[list[torch.Tensor]]:
    """The steps of each epoch."""
    out = [[] for _ in range(num)]
    for step in range(order.num_steps(num)):
        out[order.epoch(step)].append(order.indices(step))
    return out


def test_every_epoch_visits_every_image_once_and_in_its_own_order():
    whole = [torch.cat(steps) for steps in epochs(EpochSampler(num_samples=23, global_size=5, seed=0), 3)]
    assert all(sorted(epoch.tolist()) == list(range(23)) for epoch in whole)
    assert len({tuple(epoch.tolist()) for epoch in whole}) == 3
    assert [len(EpochSampler(23, 5, seed=0).indices(step)) for step in range(5)] == [5, 5, 5, 5, 3]


def test_order_depends_on_seed_and_epoch_only():
    one, other, grown = (
        EpochSampler(50, 7, seed=3),
        EpochSampler(50, 10, seed=3),
        EpochSampler(50, 7, seed=3, size_schedule=[(1, 21)]),
    )
    whole = [[torch.cat(steps).tolist() for steps in epochs(order, 3)] for order in (one, other, grown)]
    assert whole[0] == whole[1] == whole[2]
    assert not torch.equal(EpochSampler(50, 7, seed=4).indices(0), one.indices(0))
    jumped = EpochSampler(50, 7, seed=3).indices(12)  # state is the step: nothing has to be replayed
    assert torch.equal(jumped, one.indices(12))


@pytest.mark.parametrize(
    ("num_samples", "size", "seed", "digest"),
    [(1000, 64, 3, "62811da6bdaa9209"), (23, 5, 0, "0bcdd3d83daec3f0"), (97, 97, 11, "86940c74c2ace9c0")],
)
def test_the_order_that_results_were_published_with(num_samples, size, seed, digest):
    order, found = EpochSampler(num_samples, size, seed), hashlib.sha256()
    for step in range(40):
        found.update(f"{order.epoch(step)} {order.indices(step).tolist()}\n".encode())
    assert found.hexdigest()[:16] == digest


@given(
    num_samples=st.integers(40, 300),
    size=st.integers(1, 5),
    starts=st.lists(st.integers(1, 6), unique=True, max_size=3).map(sorted),
    factor=st.integers(2, 3),
)
def test_a_batch_that_grows(num_samples, size, starts, factor):
    grown = [(start, size * factor**k) for k, start in enumerate(starts, 1)]
    if any(one > num_samples for _, one in grown):
        return
    order, step = EpochSampler(num_samples, size, seed=1, size_schedule=grown), 0
    for epoch, steps in enumerate(epochs(order, 8)):
        want = max([size, *(one for start, one in grown if start <= epoch)])
        assert order.step_at(epoch) == order.num_steps(epoch) == step
        assert order.epochs_done(step) == epoch
        assert sorted(torch.cat(steps).tolist()) == list(range(num_samples))
        done = 0
        for indices in steps:
            assert (order.epoch(step), order.phase(step).size) == (epoch, want)
            assert len(indices) == min(want, num_samples - done)
            assert order.epochs_done(step) == pytest.approx(epoch + done / num_samples)
            done, step = done + len(indices), step + 1


def test_step_at_is_the_nearest_step():
    order = EpochSampler(100, 10, seed=0, size_schedule=[(2, 50)])
    assert [order.step_at(epoch) for epoch in (0, 0.26, 1.04, 1.9, 2, 2.4, 10)] == [0, 3, 10, 19, 20, 21, 36]


def test_workers_have_orders_of_their_own():
    orders = [EpochSampler(50, 10, seed=3), *(EpochSampler(50, 10, seed=3, worker=worker) for worker in range(3))]
    whole = [tuple(torch.cat(steps).tolist()) for order in orders for steps in epochs(order, 2)]
    assert len(set(whole)) == 8
    assert all(sorted(epoch) == list(range(50)) for epoch in whole)


@given(
    num_samples=st.integers(20, 90),
    sizes=st.lists(st.integers(1, 20), unique=True, min_size=2, max_size=4).map(sorted),
    gaps=st.lists(st.integers(1, 120), min_size=3, max_size=3),
    unit=st.sampled_from(["samples", "steps", "epochs", "tokens"]),
)
def test_a_batch_that_grows_anywhere(num_samples, sizes, gaps, unit):
    """Against a walk through the run: the size changes before the first step before which so much was done."""
    ats = [sum(gaps[: k + 1]) / (num_samples if unit == "epochs" else 1) for k in range(len(sizes) - 1)]
    changes = [*zip(ats, sizes[1:], strict=True)]
    walk, (epoch, position), current, refused = [], (0, 0), 0, False
    for step in range(400):
        samples = epoch * num_samples + position
        done = {"samples": samples, "steps": step, "epochs": samples / num_samples, "tokens": 7 * samples}[unit]
        due = sum(at <= done + 1e-9 for at in ats)
        refused |= due > current + 1
        current = due
        walk.append((epoch, position, min(sizes[current], num_samples - position)))
        position += walk[-1][2]
        if position == num_samples:
            epoch, position = epoch + 1, 0
    if refused:
        with pytest.raises(UsageError, match=r"batch.schedule \(.*\) begins with the same step as"):
            EpochSampler(num_samples, sizes[0], 1, size_schedule=changes, schedule_unit=unit, sample_tokens=7)
        return
    order = EpochSampler(num_samples, sizes[0], 1, size_schedule=changes, schedule_unit=unit, sample_tokens=7)
    plain = EpochSampler(num_samples, num_samples, 1)
    for step, (epoch, position, size) in enumerate(walk):
        assert order.epoch(step) == epoch
        assert torch.equal(order.indices(step), plain.indices(epoch)[position : position + size])
        assert order.epochs_done(step) == epoch + position / num_samples
        if position == 0:
            assert order.num_steps(epoch) == step
        tokens = 7 * (epoch * num_samples + position)
        assert [order.num_steps_of_tokens(tokens + more) for more in (0, 1)] == [step, step + 1]
    assert {size for _, _, size in walk} <= order.sizes()
    if walk[-1][0] > order.phases[-1].epoch + 1:
        assert {size for _, _, size in walk} == order.sizes()


def test_a_batch_larger_than_the_set_is_refused():
    with pytest.raises(UsageError, match=r"batch.global_size \(24\) is larger than the training set of 23"):
        EpochSampler(23, 24, seed=0)
    says = r"batch.schedule \(40 at 3 epochs\) is larger than the training set of 23 samples: choose at most 23"
    with pytest.raises(UsageError, match=says):
        EpochSampler(23, 4, seed=0, size_schedule=[(1, 8), (3, 40)])
