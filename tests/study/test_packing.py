"""Studies whose runs are executed side by side: the same numbers, whatever happens on the way."""

import json
import os
import random
import re
import signal
import subprocess
import time

import numpy as np
import psutil
import pytest

from gengap_dist.cli.plan import command as plan_command
from gengap_dist.config.loading import resolve
from gengap_dist.config.study import StudyConfig
from gengap_dist.distributed import cores
from gengap_dist.errors import UsageError
from gengap_dist.runs.run_folder import read_info
from gengap_dist.study import packing, ranks, runner
from gengap_dist.study.layouts import with_ranks
from gengap_dist.study.run_matrix import StudyCallback, planned_runs
from gengap_dist.study.schedule import Layout, Option, Resources
from gengap_dist.training import run_cost, trainer
from gengap_dist.training.run_cost import CostCache, RunCost, cost_key
from tests import slow_model
from tests.conftest import FULL, config
from tests.ray_cluster import until
from tests.study import tiny

NUM_MOMENTS = 5 if FULL else 1
STUDY = {
    "seeds": [0, 1],
    "baseline": "small",
    "arms": [
        {"name": "small", "set": {"batch.global_size": 50}},
        {"name": "large", "set": {"batch.global_size": 1001}},  # the last step of an epoch has other samples
        {"name": "normed", "set": {"batch.global_size": 100, "model.norm": "local"}},
    ],
}
SETTINGS = {
    "launch": {"num_processes": 2},
    "model": {"name": "mlp", "widths": [16], "norm": "none"},
    "train": {"epochs": 3, "num_evals": 3, "dtype": "float64"},
    "probe": {"num_samples": 64, "per_decade": 1, "max_time_fraction": None, "diagnostics": ["noise_scale"]},
}


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    """The same study packed, and one run after another on two ranks: config, the two folders, what the first said."""
    folder = tmp_path_factory.mktemp("packed")
    study = tiny.write(folder / "s.yaml", STUDY, **SETTINGS)
    said = tiny.start(study, folder / "packed", XDG_CACHE_HOME=str(folder / "cache"))
    assert said.returncode == 0, said.stderr
    one_by_one = tiny.start(study, folder / "one", "--study.concurrent", 1)
    assert one_by_one.returncode == 0, one_by_one.stderr
    return study, folder / "packed", folder / "one", said


@pytest.mark.processes
def test_a_run_packs_as_it_depends_on_its_ranks(studies):
    _, packed, one, _ = studies
    for folder in packed.glob("runs/*/seed*"):
        info, other = read_info(folder), read_info(one / folder.relative_to(packed))
        assert info.world_size == (2 if folder.parent.name == "normed" else 1)
        assert other.world_size == 2
        assert info.small_size == other.small_size  # the noise scale is measured with the same batches
        assert info.threads_per_rank == 1


@pytest.mark.processes
def test_numbers_do_not_depend_on_packing(studies):
    _, packed, one, _ = studies
    scores, others = tiny.scores(packed), tiny.scores(one)
    assert scores.keys() == others.keys()
    assert len(scores) == 6
    for folder in scores:
        assert scores[folder] == pytest.approx(others[folder], rel=1e-8), folder


@pytest.mark.processes
def test_packed_is_bitwise_what_a_run_alone_is(studies, tmp_path):
    """At the same ranks and threads: losses, metrics and spectra."""
    _, packed, _, _ = studies
    folder = packed / "runs" / "large" / "seed1"
    settings = config(**{}).model_validate(read_info(folder).config)
    trainer.run(settings, tmp_path / "alone")
    for name in ("train/loss", "train/grad_norm", "val/loss", "noise_scale"):
        lines = [[line.get(name) for line in map(json.loads, path.read_text().splitlines())]
                 for path in (folder / "metrics.jsonl", tmp_path / "alone" / "metrics.jsonl")]  # fmt: skip
        assert any(value is not None for value in lines[0]), name
        assert lines[0] == lines[1], name
    spectra = sorted(path.relative_to(folder) for path in folder.rglob("*.npz"))
    assert spectra
    for path in spectra:
        ours, alone = np.load(folder / path), np.load(tmp_path / "alone" / path)
        assert all(np.array_equal(ours[key], alone[key], equal_nan=ours[key].dtype.kind == "f") for key in ours.files)


def test_the_plan_of_a_study_says_when_it_would_end(tmp_path, monkeypatch, capsys):
    """From costs that are known; `normed` needs its two ranks, and so the whole of this machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(cores, "available_cores", lambda: cores.Cores(2, "machine"))
    for module in (packing, ranks):
        monkeypatch.setattr(module, "available_cores", lambda: cores.Cores(2, "machine"))
    study = tiny.write(tmp_path / "s.yaml", STUDY, **SETTINGS)
    assert plan_command(["--config", str(study), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["seconds"] is None  # nothing is known yet
    costs = {}
    for planned in planned_runs(resolve(StudyConfig, [study], {}), tmp_path, {}):
        cost = COST.model_copy(update={"depends_on_ranks": planned.arm == "normed"})
        for layout in (Layout(1, 1), Layout(2, 1)):
            costs[cost_key(with_ranks(planned.config, layout.ranks), "cpu", *layout)] = cost
    CostCache(lambda text: None).add(costs)
    assert plan_command(["--config", str(study), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert {run["run"].split()[0]: run["ranks"] for run in plan["schedule"]} == {"small": 1, "large": 1, "normed": 2}
    assert len(plan["schedule"]) == 6
    assert plan["seconds"] == 2 * COST.seconds + 2 * COST.seconds  # two pairs, then two that need both cores
    assert set(plan["arms"]) == {"small", "large", "normed"}
    assert plan_command(["--config", str(study)]) == 0
    assert "schedule of the runs" in capsys.readouterr().out


CHECKPOINTS = "runs/*/*/checkpoints/*"


WORDS = ["--study.concurrent", 2, "--launch.num_processes", 1, "--model.name", slow_model.NAME]
WORDS += ["--train.epochs", 12] if FULL else []  # for random moments


def started(study, out, **env):
    command, pipes = tiny.command(study, out, *WORDS), {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=out.parent, env=tiny.environment(**env), text=True, **pipes)


def ended(process, timeout=240):
    """Exit code and stderr."""
    _, error = process.communicate(timeout=timeout)
    return process.returncode, error


def running(out):
    return [path.parent for path in out.glob("runs/*/*/run.json") if read_info(path.parent).status == "running"]


@pytest.fixture(scope="module")
def undisturbed(studies, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    done = tiny.start(studies[0], out, *WORDS)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.processes
@pytest.mark.parametrize(
    "who",
    [pytest.param("the driver", marks=pytest.mark.full), "a run", "Ctrl-C"],  # else: test_restart.py kills a driver
)
def test_a_kill_at_any_moment_loses_nothing(studies, undisturbed, tmp_path, who):
    for number in range(NUM_MOMENTS):
        out = tmp_path / str(number) / "out"
        out.parent.mkdir()
        process = started(studies[0], out, **({} if FULL else slow_model.slow_after(out, CHECKPOINTS)))
        if not FULL:
            until(lambda: process.poll() is not None or (len(running(out)) == 2 and any(out.glob(CHECKPOINTS))))  # noqa: B023
            assert process.poll() is None, ended(process)
        else:
            time.sleep(random.Random(f"{who}{number}").uniform(2, 12))
        processes = [
            child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())
        ]
        if who == "a run":
            if not processes:
                process.kill()
                ended(process)
                continue
            processes[0].kill()
            out.with_name("fast").touch()  # the others come to their end
        else:
            process.send_signal(signal.SIGKILL if who == "the driver" else signal.SIGINT)
        code, error = ended(process)
        if who == "a run":
            assert code == 1, error
            assert "died with exit code -9" in error
        elif who == "Ctrl-C" and not (FULL and code == 0):  # by then all may have ended
            assert code == 75, error
            assert not running(out)  # every run has saved, and says so
        until(lambda: not any(rank.is_running() and rank.status() != "zombie" for rank in processes))  # noqa: B023
        before = tiny.ended(out)
        again = tiny.start(studies[0], out, *WORDS)
        assert again.returncode == 0, again.stderr
        assert before.items() <= tiny.ended(out).items()  # what was finished is not run again
        assert tiny.scores(out) == tiny.scores(undisturbed)


@pytest.mark.processes
def test_the_forecast_is_shown(studies):
    said = studies[3].stderr
    assert re.search(r"about [\d.]+ (s|min) left for all runs", said) or said.count("finished") == 6


# -- what is refused, and what is measured again -----------------------------------------------------------------------


def study_config(tmp_path, **more):
    return resolve(StudyConfig, [tiny.write(tmp_path / "s.yaml", STUDY | more, **SETTINGS)], {})


@pytest.mark.parametrize(("concurrent", "largest"), [(4096, "1, or auto"), (2, "1, or auto")])
def test_more_runs_at_once_than_cores_are_refused(tmp_path, monkeypatch, concurrent, largest):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2})
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    with pytest.raises(UsageError, match=rf"study.concurrent \({concurrent}\).*may use 3 \(affinity\).*{largest}"):
        runner.prepare(study_config(tmp_path, concurrent=concurrent), tmp_path, lambda text: None)
    runner.prepare(study_config(tmp_path, concurrent=1), tmp_path, lambda text: None)


def test_runs_side_by_side_under_torchrun_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with pytest.raises(UsageError, match=r"study.concurrent \(2\) is not possible on the ranks of torchrun"):
        runner.check_concurrent(study_config(tmp_path, concurrent=2))


@pytest.mark.parametrize("wrong", [0, -1, "many", 1.5])
def test_a_number_or_auto(tmp_path, wrong):
    with pytest.raises(UsageError, match=r"study.concurrent"):
        study_config(tmp_path, concurrent=wrong)


def test_a_run_that_needs_more_memory_than_there_is(tmp_path):
    plan = planned_runs(study_config(tmp_path), tmp_path, {})
    options = [[Option(Layout(1, 1), 1, 1.0, memory=2**31)] for _ in plan]
    packing.check_memory(plan, options, Resources(2, memory=2**32))
    with pytest.raises(UsageError, match=r"arm small needs 2.0 GiB of memory, and 1.0 GiB are free"):
        packing.check_memory(plan, options, Resources(2, memory=2**30))


COST = RunCost(
    step_seconds=0.5, validation_seconds=1, probe_seconds=2, num_steps=10, num_validations=3, num_probes=2,
    end_seconds=1, memory_bytes=2**20, cpu_wait_share=0, depends_on_ranks=False,
)  # fmt: skip


def test_the_time_left_counts_the_runs_of_later_phases(tmp_path):
    """The runs of the seeds come after the trials of study.tune and the searches of study.match."""
    study = study_config(tmp_path)
    plan = planned_runs(study, tmp_path, {})[:3]
    options = [[Option(Layout(1, 1), 1, seconds)] for seconds in (4.0, 3.0, 1.0)]
    later = [("large", [Option(Layout(1, 1), 1, 10.0), Option(Layout(2, 1), 2, 6.0)])] * 3
    packer = packing.Packer(plan, StudyCallback(), options, Resources(2))
    assert packer.seconds_left() == 4.0  # 4; 3 and 1
    packer = packing.Packer(plan, StudyCallback(), options, Resources(2), later)
    assert packer.seconds_left() == 4.0 + 20.0
    unknown = [("large", [Option(Layout(1, 1), 1, 0.0)])]
    assert packing.Packer(plan, StudyCallback(), options, Resources(2), unknown).seconds_left() is None


def test_seconds_of_a_run():
    assert COST.seconds == 10 * 0.5 + 3 * 1 + 2 * 2 + 1


@pytest.fixture
def cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "gengap_dist" / "run_costs.json"


def test_a_cache_that_is_damaged_or_of_another_machine_is_measured_again(cache_home, monkeypatch):
    warnings: list[str] = []
    CostCache(warnings.append).add({"a": COST})
    assert CostCache(warnings.append).found == {"a": COST}
    assert warnings == []
    monkeypatch.setattr(run_cost, "this_machine", lambda: {"processor": "another", "cores": "9"})
    assert CostCache(warnings.append).found == {}
    assert "another machine (processor was" in warnings.pop()
    for text in ("{", "[]", '{"found": {"a": {"seconds": "x"}}}', "\0"):
        cache_home.write_text(text)
        cache = CostCache(warnings.append)
        assert cache.found == {}
        (warning,) = warnings
        assert "the costs of runs are measured again, and it is overwritten" in warning
        warnings.clear()
    cache.add({"b": COST})
    assert CostCache(warnings.append).found == {"b": COST}


def test_a_cache_folder_that_cannot_be_written(cache_home):
    cache_home.parent.parent.joinpath("gengap_dist").write_text("a file where the folder should be")
    warnings: list[str] = []
    CostCache(warnings.append).add({"a": COST})
    assert "cannot be written" in warnings[-1]


def test_the_key_of_a_cost_leaves_out_what_costs_nothing():
    keys = {cost_key(config(seed=seed, mlflow__enabled=not seed), "cpu", 1, 1) for seed in (0, 1)}
    assert len(keys) == 1
    keys |= {cost_key(config(batch__global_size=size), "cpu", 1, 1) for size in (8, 16)}
    keys |= {cost_key(config(), "cpu", ranks, threads) for ranks, threads in ((1, 1), (2, 1), (1, 2))}
    assert len(keys) == 5
