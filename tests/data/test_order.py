import pytest
import torch

from gengap_dist.config import UsageError
from gengap_dist.data.order import Order


def test_every_epoch_visits_every_image_once_and_in_its_own_order():
    order = Order(num_samples=23, global_size=5, seed=0)
    epochs = [torch.cat([order.indices(step) for step in range(e * 5, e * 5 + 5)]) for e in range(3)]
    assert all(sorted(epoch.tolist()) == list(range(23)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 3
    assert [len(order.indices(step)) for step in range(5)] == [5, 5, 5, 5, 3]


def test_order_depends_on_seed_and_epoch_only():
    one, other = Order(50, 7, seed=3), Order(50, 10, seed=3)
    whole = [torch.cat([order.indices(s) for s in range(order.steps_per_epoch)]) for order in (one, other)]
    assert torch.equal(*whole)
    assert not torch.equal(Order(50, 7, seed=4).indices(0), one.indices(0))
    jumped = Order(50, 7, seed=3).indices(12)  # state is the step: nothing has to be replayed
    assert torch.equal(jumped, one.indices(12))


def test_a_batch_larger_than_the_set_is_refused():
    with pytest.raises(UsageError, match=r"batch.global_size \(24\) is larger than the training set of 23"):
        Order(23, 24, seed=0)
