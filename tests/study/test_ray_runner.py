"""A study side by side on a real Ray cluster: interrupted, started again, and compared with one run after another."""

import signal
import subprocess
from collections import Counter

import pytest

from gengap_dist.config.sections import LaunchConfig, RunConfig
from gengap_dist.distributed.launchers.ray import RunQueue
from gengap_dist.runs.run_folder import read_info
from tests.ray_cluster import until
from tests.study import tiny

pytestmark = pytest.mark.processes

MOODY = """
import time
from pathlib import Path
from gengap_dist.data.data_spec import DataSpec
from gengap_dist.models import build

def make(num_classes, in_channels):
    model = build("mlp", DataSpec.images(num_classes, in_channels, 8), widths=(16,))
    def hook(module, args):
        if not module.training or len(args[0]) == 2: return  # two samples are an inspection before the first step
        while Path(__file__).with_name("wait").exists(): time.sleep(0.05)
        raise ArithmeticError("no mood")
    model.register_forward_pre_hook(hook)
    return model
"""
STUDY = {
    "seeds": [0],
    "concurrent": 2,  # of three: one waits, and the others run beside it
    "arms": [{"name": "moody", "set": {"model.name": "moody:make"}}],
    "baseline": "b64",
    "axes": {"batch.global_size": [64, 512]},
}


@pytest.fixture(scope="module")
def both(cluster, tmp_path_factory):
    """Where the study ran one by one, and on Ray, interrupted by Ctrl-C; the processes."""
    folder = tmp_path_factory.mktemp("ray")
    (folder / "moody.py").write_text(MOODY)
    config = tiny.write(folder / "s.yaml", STUDY, launch={"max_failures": 0})
    alone = tiny.start(config, folder / "alone")
    env = cluster.env | {"RAY_ADDRESS": cluster.address}
    words = tiny.command(config, folder / "ray", "--launch.launcher", "ray")
    (folder / "wait").touch()  # so Ctrl-C finds a run under way
    first = subprocess.Popen(words, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until(lambda: any(tiny.ended(folder / "ray")) or first.poll() is not None)
    first.send_signal(signal.SIGINT)
    said, _ = first.communicate(timeout=60)
    before = tiny.ended(folder / "ray")
    (folder / "wait").unlink()
    assert not any(read_info(path.parent).status == "running" for path in folder.glob("ray/*/*/*/run.json"))
    second = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=280)
    return folder, alone, (first.returncode, said, before), second


def test_side_by_side_gives_the_numbers_of_one_by_one(both):
    folder, alone, _, second = both
    assert alone.returncode == second.returncode == 1, second.stderr
    assert tiny.table(folder / "ray") == tiny.table(folder / "alone")
    assert tiny.scores(folder / "ray") == tiny.scores(folder / "alone")
    assert all(read_info(path.parent).launcher == "ray" for path in folder.glob("ray/runs/*/*/run.json"))
    assert not list(folder.glob("ray/**/ray"))


def test_ctrl_c_ends_everything_and_the_next_start_goes_on(both):
    folder, _, (code, said, before), _ = both
    assert code == 130, said
    assert "Traceback" not in said
    assert before
    assert before.items() <= tiny.ended(folder / "ray").items()


def test_a_run_that_fails_does_not_stop_the_others(both):
    folder, alone, _, second = both
    for name, process in (("alone", alone), ("ray", second)):
        info = read_info(folder / name / "runs/moody/seed0")
        assert info.status == "failed"
        assert "ArithmeticError: no mood" in info.error
        assert "1 run(s) failed" in process.stderr


def test_ray_keeps_quiet(both):
    _, _, _, second = both
    assert "Trial " not in second.stdout + second.stderr
    assert "Traceback" not in second.stderr


def test_a_teller_hands_out_every_run_once_to_ranks_of_its_kind(tmp_path):
    small, large = (LaunchConfig(num_processes=number) for number in (1, 2))
    runs = [(RunConfig(launch=launch), tmp_path / str(i)) for i, launch in enumerate([small, large, small])]
    teller = RunQueue(runs)
    assert teller.begin("a", small) == 0
    assert teller.assign("a", small) == (0, 1)
    assert teller.begin("a", small) == 0  # its ranks were started again: they go on
    assert teller.assign("a", small) == (0, 2)
    assert teller.begin("b", small) == 2
    teller.end("a")
    assert teller.begin("a", small) == -1
    assert teller.assign("a", small) is None
    assert teller.assign("c", large) == (1, 0)
    assert [teller.run(number) for number in range(3)] == runs


def test_the_queue_keeps_the_order_and_forgets_groups_that_ended(tmp_path):
    small, large = (LaunchConfig(num_processes=number) for number in (1, 2))
    queue = RunQueue([(RunConfig(launch=launch), tmp_path / str(i)) for i, launch in enumerate([large, small] * 2)])
    assert [queue.assign(group, None) for group in "abc"] == [(0, 0), (1, 0), (2, 0)]
    assert [queue.begin("a", large), queue.begin("a", large)] == [0, 0]
    assert queue.retire("a") == (0, 2)
    assert queue.begin("a", large) == -1  # ranks that outlived the process that started them
    assert queue.assign("d", None, (0, 2)) == (0, 2)
    queue.end("b")
    queue.end("a")
    assert queue.begin("b", small) == 3
    queue.end("d")
    assert queue.retire("d") is None
    assert queue.assign("e", None) is None


TELLING = """
import os
from gengap_dist.data.data_spec import DataSpec
from gengap_dist.models import build

PIDS = {pids!r}
DEADLY = {deadly!r}

def make(num_classes, in_channels):
    model = build("mlp", DataSpec.images(num_classes, in_channels, 8), widths=(16,))
    rank = os.environ["RANK"]
    with open(PIDS + rank, "a") as file:
        file.write(f"{{os.getpid()}}\\n")
    with open(PIDS + rank) as file:
        number = len(file.readlines())
    num_steps = 0
    def hook(module, args):
        nonlocal num_steps
        num_steps += module.training
        if num_steps == 12 and rank == "1" and number in DEADLY:
            os.kill(os.getpid(), 9)
    model.register_forward_pre_hook(hook)
    return model
"""


def telling(folder, num_seeds, deadly=(), **launch):
    """A study on 2 ranks that write down who makes a network; rank 1 dies in passes of those in `deadly` (from 1)."""
    (folder / "telling.py").write_text(TELLING.format(pids=str(folder / "pids"), deadly=deadly))
    study = {"baseline": "sb", "concurrent": 1, "seeds": [*range(num_seeds)], "arms": [{"name": "sb"}]}
    launch = {"launcher": "ray", "num_processes": 2, **launch}
    return tiny.write(folder / "s.yaml", study, model={"name": "telling:make"}, launch=launch)


def starts(folder) -> list[int]:
    """How many networks each start of both ranks has made."""
    pids = [(folder / f"pids{rank}").read_text().split() for rank in (0, 1)]
    return [*Counter(zip(*pids, strict=True)).values()]


@pytest.mark.full  # else: `both` with its numbers, and test_startup.py for ranks of this machine
def test_ranks_stay_up_from_run_to_run(cluster, tmp_path):
    config = telling(tmp_path, 4)
    done = tiny.start(config, tmp_path / "out", **(cluster.env | {"RAY_ADDRESS": cluster.address}))
    assert done.returncode == 0, done.stderr
    assert starts(tmp_path) == [4]
    alone = tiny.start(config, tmp_path / "alone", "--launch.launcher", "local")
    assert alone.returncode == 0, alone.stderr
    assert tiny.scores(tmp_path / "out") == tiny.scores(tmp_path / "alone")
    assert len(tiny.scores(tmp_path / "out")) == 4


@pytest.mark.full  # else: the queue counts the attempts of each run, above; a rank that dies, in launchers/test_ray.py
def test_a_run_pays_for_its_own_failures_only(cluster, tmp_path):
    """One failure is allowed: two runs fail once each, and Ray Train's own count is of both."""
    config = telling(tmp_path, 3, deadly=(1, 3), max_failures=1)
    done = tiny.start(config, tmp_path / "out", **(cluster.env | {"RAY_ADDRESS": cluster.address}))
    assert done.returncode == 0, done.stderr
    assert "2 rank(s) restarted from the last checkpoint" in done.stderr
    assert starts(tmp_path) == [1, 2, 2]
    resumed = [len(read_info(tmp_path / f"out/runs/sb/seed{seed}").resumed) for seed in range(3)]
    assert resumed == [1, 1, 0]


ORPHANS = """
import os, psutil
from pathlib import Path
from gengap_dist.data.data_spec import DataSpec
from gengap_dist.models import build

def make(num_classes, in_channels):
    model = build("mlp", DataSpec.images(num_classes, in_channels, 8), widths=(16,))
    num_steps = 0
    def hook(module, args):
        nonlocal num_steps
        num_steps += module.training
        if num_steps == 12 and Path(__file__).with_name("deadly").exists():
            Path(__file__).with_name("deadly").unlink()
            siblings = psutil.Process(os.getppid()).children()
            (starter,) = (process for process in siblings if process.cmdline()[0].startswith("ray::_fit"))
            starter.kill()
    model.register_forward_pre_hook(hook)
    return model
"""


@pytest.mark.full  # else: what the queue says to ranks that outlive who started them, above
@pytest.mark.parametrize(("max_failures", "code"), [(1, 0), (0, 1)])
def test_who_starts_the_ranks_is_killed(cluster, tmp_path, max_failures, code):
    (tmp_path / "orphans.py").write_text(ORPHANS)
    (tmp_path / "deadly").touch()
    study = {"baseline": "sb", "concurrent": 1, "seeds": [0, 1], "arms": [{"name": "sb"}]}
    launch = {"launcher": "ray", "max_failures": max_failures}
    config = tiny.write(tmp_path / "s.yaml", study, model={"name": "orphans:make"}, launch=launch)
    done = tiny.start(config, tmp_path / "out", **(cluster.env | {"RAY_ADDRESS": cluster.address}))
    assert done.returncode == code, done.stderr
    assert not (tmp_path / "deadly").exists()
    assert "Traceback" not in done.stderr
    first, second = (read_info(tmp_path / f"out/runs/sb/seed{seed}") for seed in (0, 1))
    assert (first.status, len(first.resumed)) == (("finished", 1) if max_failures else ("failed", 0))
    assert (second.status, len(second.resumed)) == ("finished", 0)
    if not max_failures:
        assert "the process that started the ranks died" in first.error
