"""A run that waits for a core says so, once."""

from types import SimpleNamespace
from unittest.mock import patch

import pytest

from gengap_dist.config.study import Arm, StudyConfig, StudySection
from gengap_dist.distributed import cpu_wait
from gengap_dist.distributed.cores import Threads
from gengap_dist.distributed.cpu_wait import CpuWait
from gengap_dist.distributed.runtime_context import RuntimeContext
from gengap_dist.distributed.worker_pool import Worker
from gengap_dist.study.core_wait import CoreWaitWarning
from gengap_dist.study.packing import Packer
from gengap_dist.study.run_matrix import StudyCallback, planned_runs
from gengap_dist.study.schedule import Layout, Option, Resources


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """Sets what the kernel says: nanoseconds running, nanoseconds waiting."""
    monkeypatch.setattr(cpu_wait, "SCHEDSTAT", tmp_path / "schedstat")
    monkeypatch.setattr(cpu_wait, "MIN_SECONDS", 0.0)

    def say(running: int, waiting: int) -> None:
        (tmp_path / "schedstat").write_text(f"{running} {waiting} 7\n")

    say(1_000, 500)
    return say


def test_a_run_that_waits_says_so_once_with_the_remedy(kernel, recwarn):
    wait = CpuWait(Threads(2, "machine"))
    kernel(2_000, 1_400)
    wait.warn_once()
    assert not recwarn.list  # 900 of 1,900 is less than half
    kernel(3_000, 4_400)
    wait.warn_once()
    (warning,) = recwarn.list
    said = str(warning.message)
    assert said.startswith("this run waits for a core 75% of the time, because other programs use the same cores")
    assert "2 threads per rank" in said
    assert said.endswith("start fewer programs at once, or set launch.threads_per_rank=1")
    kernel(3_000, 9_000)
    wait.warn_once()
    assert len(recwarn.list) == 1
    assert wait.share() == pytest.approx(8_500 / 10_500)


def test_advice_that_is_followed_already_is_not_given(kernel):
    told = []
    wait = CpuWait(Threads(1, "machine"), told.append)
    kernel(2_000, 9_500)
    wait.warn_once()
    assert [sentence.rpartition(": ")[2] for sentence in told] == ["start fewer programs at once"]
    assert "per rank" not in told[0]


def test_a_study_warns_of_the_first_run_that_waits_and_of_no_other(tmp_path):
    def run(*args, context, **settings):
        context.on_core_wait("this run waits")

    config = StudyConfig(study=StudySection(arms=(Arm(name="a"),), seeds=(0, 1)))
    told, warned, plan = [], [], planned_runs(config, tmp_path, {})
    worker = Worker(0, 1, SimpleNamespace(send=told.append), RuntimeContext())
    callback = CoreWaitWarning(StudyCallback(), warned.append)
    packer = Packer(plan, callback, [[Option(Layout(1, 1), 1, 1.0)]] * 2, Resources(2))
    for number in (0, 1):
        task = packer._start(number, packer.options[number][0])
        with patch("gengap_dist.distributed.launchers.local.load_entry_point", return_value=run):
            task.job(worker, *task.args)
        task.on_message(told[number][1])
    assert told == [("message", "this run waits")] * 2
    assert warned == ["a seed 0: this run waits"]


def test_without_the_kernels_count_nothing_is_said(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(cpu_wait, "SCHEDSTAT", tmp_path / "missing")
    monkeypatch.setattr(cpu_wait, "MIN_SECONDS", 0.0)
    wait = CpuWait(None)
    wait.warn_once()
    assert wait.share() is None
    assert not recwarn.list


@pytest.mark.skipif(not cpu_wait.SCHEDSTAT.exists(), reason="this kernel does not count waits")
def test_the_kernels_count_is_read():
    wait = CpuWait(None)
    sum(range(1_000_000))
    assert 0.0 <= (wait.share() or 0.0) <= 1.0
