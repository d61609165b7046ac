"""Which pools the ranks of a study are, and which GPUs they see."""

import pytest

from gengap_dist.study import ranks
from gengap_dist.study.ranks import Ranks
from gengap_dist.study.schedule import Layout


class Pool:
    """Stands for a pool; no process is started."""

    def __init__(self, num_ranks, threads, environment) -> None:
        self.num_ranks, self.threads, self.environment, self.state = num_ranks, threads, environment, "open"

    def close(self, *, kill: bool = False) -> None:
        self.state = "killed" if kill else "closed"


@pytest.fixture(autouse=True)
def pools(monkeypatch):
    monkeypatch.setattr(ranks, "WorkerPool", Pool)


def gpus(pool) -> str:
    return pool.environment["CUDA_VISIBLE_DEVICES"]


def test_busy_pools_never_share_a_gpu():
    of_study = Ranks(8, ["2", "3", "5"])
    one, two = of_study.take(Layout(1, 2)), of_study.take(Layout(2, 2))
    assert (gpus(one), gpus(two)) == ("2", "3,5")
    of_study.give_back(two)
    three = of_study.take(Layout(1, 2))  # of another layout: the idle pool gives up its GPUs
    assert gpus(three) == "3"
    assert two.state == "closed"
    of_study.give_back(one)
    assert of_study.take(Layout(1, 2)) is one  # the same GPU, and torch is imported already
    of_study.kill(three)
    assert three.state == "killed"
    assert gpus(of_study.take(Layout(2, 2))) == "3,5"
    of_study.close()
    assert one.state == "killed"  # it was busy


def test_pools_on_cores_stay_while_there_is_room():
    of_study = Ranks(2)
    one, other = of_study.take(Layout(1, 1)), of_study.take(Layout(1, 1))
    assert one.environment == {}
    of_study.give_back(one)
    assert of_study.take(Layout(1, 1)) is one
    of_study.give_back(one)
    of_study.give_back(other)
    both = of_study.take(Layout(2, 1))
    assert (one.state, other.state, both.state) == ("closed", "closed", "open")
