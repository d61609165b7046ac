"""Ranks that wait too long say for whom; time is split into what it went to."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from gengap_dist.distributed.phase_timer import PHASES, PhaseTimer
from gengap_dist.distributed.stall_detector import StallDetector, detecting_stalls
from gengap_dist.runs.run_folder import prepare_folder, read_info, read_metrics
from gengap_dist.training.trainer import run
from tests.conftest import config, thinned, train
from tests.ranks import forked_ranks, on_ranks

pytestmark = pytest.mark.processes


def one_rank_lags(world, lagging, doing):
    with detecting_stalls(world, report_seconds=1.0):
        world.timer.step = 7
        if world.rank == lagging:
            with world.timer.phase(doing):
                time.sleep(4)
        return world.all_reduce(torch.ones(1), "sum of ones").item()


@pytest.mark.parametrize(("lagging", "doing"), thinned([(1, "data"), (0, "compute")], lambda lagging, _: lagging == 0))
def test_the_rank_that_is_waited_for_is_named(capfd, lagging, doing):
    assert on_ranks(3, one_rank_lags, lagging, doing) == [3.0, 3.0, 3.0]
    said = capfd.readouterr().err
    others = ", ".join(str(rank) for rank in range(3) if rank != lagging)
    assert said.count("gengap: after") == 1  # one rank speaks for all
    assert f"rank {others} waits in sum of ones (step 7) for rank {lagging} (" in said
    assert f"which has been in {doing} (step 7) for" in said


def waits_between_steps(world, run_config, out):
    found = []
    run(run_config, out, world=world, progress=lambda *_: found.append(world.timer.current.in_collective))
    return found


def test_a_rank_that_computes_is_not_said_to_wait(crews, tmp_path):
    """DDP's first pass, before any step, is over when it is over: a long evaluation would be called a hang else."""
    prepare_folder(tmp_path / "run", "run.json", resume=False)
    for found in crews[2](waits_between_steps, config(train__steps=3, probe__enabled=False), tmp_path / "run"):
        assert len(found) > 3
        assert not any(found)


def nobody_lags(world):
    with detecting_stalls(world, report_seconds=0.5):
        for _ in range(6):
            time.sleep(0.2)
            world.all_reduce(torch.ones(1))


def test_nobody_is_named_while_all_go_on(capfd):
    on_ranks(2, nobody_lags)
    assert "waits" not in capfd.readouterr().err


def test_a_store_that_no_longer_answers_does_not_hold_up_the_end():
    """The machine of rank 0, which holds the store, stands still: nothing is refused, nothing is answered."""
    with forked_ranks():
        _, (seconds, asks_still) = on_ranks(2, end_while_rank_0_stands_still)
    assert asks_still
    assert seconds < 20


def end_while_rank_0_stands_still(world):
    pid = world.broadcast_int(os.getpid())
    if world.rank == 0:
        world.barrier()
        os.kill(pid, signal.SIGSTOP)
        return None
    detector = StallDetector(world, report_seconds=0.2)
    world.barrier()
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.01)
    with world.timer.phase("communication", "barrier", collective=True):
        time.sleep(1.0)
    began = time.monotonic()
    detector.stop()
    out = time.monotonic() - began, detector._thread.is_alive()
    os.kill(pid, signal.SIGCONT)
    return out


SLEEP = 0.1  # long against what a step of the others takes on a busy machine


class Slow(torch.nn.Module):
    """Takes its time on rank 1."""

    def __init__(self, num_classes, in_channels):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(1024 * in_channels, num_classes))

    def forward(self, images):
        if self.training and torch.distributed.get_rank() == 1:
            time.sleep(SLEEP)
        return self.body(images)


def run_with_a_slow_rank(world, out):
    from gengap_dist.training.trainer import run

    settings = {
        "model__name": "tests.distributed.test_stall_detector:Slow",
        "train__steps": 10,
        "probe__enabled": False,
    }
    return run(config(**settings), out, world=world)


def test_the_slowest_rank_is_named_and_the_others_wait_for_it(crews, tmp_path):
    prepare_folder(tmp_path / "run", "run.json", resume=False)
    crews[3](run_with_a_slow_rank, tmp_path / "run")
    result = read_info(tmp_path / "run").result
    assert result["time/slowest_rank"] == 1
    assert result["time/slowest_over_mean"] > 1.1
    assert result["time/compute"] >= 10 * SLEEP / 3  # mean over ranks
    assert result["time/communication"] >= 10 * SLEEP * 2 / 3 * 0.3  # two of three wait for much of it
    split = [line for line in read_metrics(tmp_path / "run") if "time/compute" in line]
    assert sum(line["time/compute"] for line in split) == pytest.approx(result["time/compute"], rel=0.1, abs=0.01)
    assert all(line["time/slowest_rank"] == 1 for line in split if line["step"])


def test_one_rank_has_no_slowest_and_no_communication(tmp_path):
    result = train(tmp_path / "run", train__steps=5)
    times = {kind: result[f"time/{kind}"] for kind in PHASES}
    assert times["communication"] == 0
    assert times["compute"] > 0
    assert times["probe"] > 0
    assert "time/slowest_rank" not in result
    assert sum(times.values()) <= read_info(tmp_path / "run").seconds


def test_time_is_charged_once():
    where = PhaseTimer()
    began = time.perf_counter()
    with where.phase("compute"):
        time.sleep(0.05)
        with where.phase("data"):
            time.sleep(0.03)
        moment = where.now()
        time.sleep(0.04)
        where.charge_since(moment, "communication")
    total = time.perf_counter() - began
    seconds = dict(zip(PHASES, where.pop_seconds(), strict=True))
    assert seconds["compute"] >= 0.05
    assert seconds["data"] >= 0.03
    assert seconds["communication"] >= 0.04
    assert sum(seconds.values()) <= total
    assert sum(where.pop_seconds()) == 0
