"""Ranks from a real Ray cluster on this machine: its jobs submitted, stopped and resumed, its workers killed."""

import contextlib
import json
import re
import socket
import time
from pathlib import Path

import pytest
import torch

from gengap_dist.cli.train import command as train_command
from gengap_dist.compat.ray_job import JOB_VARIABLE
from gengap_dist.config.sections import LaunchConfig, RunConfig
from gengap_dist.distributed import launchers
from gengap_dist.distributed.launchers import ray
from gengap_dist.errors import UsageError
from gengap_dist.runs.run_folder import read_info, read_metrics
from gengap_dist.training import ENTRY_POINT
from tests.conftest import FULL, weights
from tests.ray_cluster import until

pytestmark = pytest.mark.processes

SMALL = [
    "--train.dtype",
    "float64",
    "--probe.num_samples",
    "64",
    "--probe.max_time_fraction",
    "null",
    "--train.num_evals",
    "4",
]
NO_MLFLOW = ["--mlflow.enabled", "false"]
ON_RAY = ["--launch.launcher", "ray", "--launch.num_processes", "2"]

FACTORY = """
import os, time
from gengap_dist.models import lenet5

def make(num_classes, in_channels):
    model = lenet5(num_classes=num_classes, in_channels=in_channels)
    num_steps = 0
    def hook(module, args):
        nonlocal num_steps
        num_steps += module.training
        while num_steps == 20 and os.path.exists({here!r} + "/wait"):
            time.sleep(0.05)
        if module.training and num_steps == 15 and os.environ["RANK"] == "1" and os.path.exists({here!r} + "/deadly"):
            os.remove({here!r} + "/deadly")
            os.kill(os.getpid(), 9)
    model.register_forward_pre_hook(hook)
    return model
"""


@pytest.fixture
def factory(tmp_path):
    """A LeNet-5 that waits in its 20th pass while there is a file `wait`, and dies on rank 1 of a file `deadly`."""
    (tmp_path / "factory.py").write_text(FACTORY.format(here=str(tmp_path)))
    return ["--model.name", "factory:make"]


def losses(out: Path) -> list[float]:
    return [line["train/loss"] for line in read_metrics(out) if "train/loss" in line]


@pytest.mark.full  # else: the next test submits a job; the one after compares numbers with ranks of this machine
def test_a_submitted_job_gives_the_result_of_one_process(cluster, tmp_path, gengap):
    words = [*SMALL, *NO_MLFLOW, "--train.steps", 40]
    assert gengap("train", *words, "--out", "one").returncode == 0
    done = cluster.submit(*words, "--launch.num_processes", 2, "--out", tmp_path / "ray", name=f"same-{tmp_path.name}")
    assert done.returncode == 0, done.stdout + done.stderr
    one, ray = (read_info(tmp_path / name) for name in ("one", "ray"))
    assert (one.launcher, one.world_size, ray.launcher, ray.world_size) == ("local", 1, "ray", 2)
    assert losses(tmp_path / "ray") == pytest.approx(losses(tmp_path / "one"), rel=1e-9)
    assert len(losses(tmp_path / "ray")) == 40
    for name in ("train_full/loss", "test/loss", "test/accuracy", "best_val/accuracy"):
        assert ray.result[name] == pytest.approx(one.result[name], rel=1e-9), name
    assert "test accuracy" in done.stdout
    assert "Traceback" not in done.stdout
    assert len(re.findall(r"^\(.*pid=", done.stdout, flags=re.MULTILINE)) < 5, done.stdout  # Ray keeps quiet
    assert not (tmp_path / "ray" / "ray").exists()


@pytest.mark.filterwarnings("default")  # what MLflow warns of is not ours to mend
def test_a_stopped_job_is_killed_everywhere_and_goes_on_as_the_same_run(cluster, tmp_path, factory, monkeypatch):
    from mlflow import MlflowClient

    out, store = tmp_path / "run", f"sqlite:///{tmp_path}/mlflow.db"
    words = [*SMALL, *factory, "--train.steps", 60, "--train.num_evals", 12, "--checkpoint.every_seconds", 0]
    words += ["--mlflow.tracking_uri", store, "--launch.num_processes", 2]
    (tmp_path / "wait").touch()
    name = f"stop-{tmp_path.name}"
    assert cluster.submit(*words, "--out", out, name=name, path=tmp_path, wait=False).returncode == 0
    sent = out / "mlflow.json"
    until(lambda: len(list(read_metrics(out))) > 8 and sent.exists() and "run_id" in sent.read_text())
    stopped = cluster.ray("job", "stop", name)
    assert stopped.returncode == 0, stopped.stderr
    assert read_info(out).status == "killed"
    first = json.loads((out / "mlflow.json").read_text())["run_id"]
    client = MlflowClient(tracking_uri=store)
    until(lambda: client.get_run(first).info.status == "KILLED")
    (tmp_path / "wait").unlink()
    trusted = ["--resume", "--out", out, *factory, "--mlflow.tracking_uri", store]
    if FULL:
        done = cluster.submit(*trusted, name=f"{name}-again", path=tmp_path)
        assert done.returncode == 0, done.stdout
    else:  # continued by another launcher
        monkeypatch.syspath_prepend(tmp_path)
        local = ["--launch.launcher", "local", "--launch.num_processes", "1"]
        assert train_command([*map(str, trusted), *local]) == 0
    assert read_info(out).status == "finished"
    assert json.loads((out / "mlflow.json").read_text())["run_id"] == first
    assert client.get_run(first).info.status == "FINISHED"
    history = client.get_metric_history(first, "train/loss")
    assert sorted(metric.step for metric in history) == list(range(1, 61))
    assert [line["step"] for line in read_metrics(out)] == list(range(61))
    assert len(read_info(out).resumed) == 1


def test_ranks_that_die_are_started_again_and_nothing_is_lost(cluster, tmp_path, factory, gengap):
    words = [*SMALL, *NO_MLFLOW, *factory, "--train.steps", 24, "--checkpoint.every_seconds", 0]
    whole = gengap("train", *words, "--launch.num_processes", 2, "--out", "whole")
    assert whole.returncode == 0, whole.stderr
    (tmp_path / "deadly").touch()
    done = cluster.train(*words, *ON_RAY, "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "deadly").exists()
    assert "2 rank(s) restarted from the last checkpoint" in done.stderr
    assert len(read_info(tmp_path / "run").resumed) == 1
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == list(range(25))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    for name, weight in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "run")[name], weight), name


def test_what_a_rank_raises_comes_out_of_the_driver(cluster, tmp_path, factory):
    done = cluster.train(*NO_MLFLOW, *ON_RAY, "--batch.global_size", 5000, "--out", "run", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "gengap train: batch.global_size (5000) is larger than the training set" in done.stderr
    assert "Traceback" not in done.stderr
    assert "restarted from" not in done.stderr
    assert not (tmp_path / "run").exists()
    if not FULL:
        return  # else: a rank that dies and is started again, above; one that is not, in cli/test_commands.py
    (tmp_path / "deadly").touch()
    words = [*SMALL, *NO_MLFLOW, *factory, *ON_RAY, "--train.steps", 24, "--launch.max_failures", 0]
    done = cluster.train(*words, "--out", "run", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "rank 1 died" in done.stderr
    assert read_info(tmp_path / "run").status == "failed"


@pytest.mark.full  # else: from 2 ranks to 1 where a node dies, in test_two_hosts.py
def test_as_many_ranks_as_there_is_room_for(cluster, tmp_path):
    """From 1 to 2 ranks, each of which takes the cluster's only slot."""
    words = [*SMALL, *NO_MLFLOW, "--launch.launcher", "ray", "--launch.max_processes", 2, "--train.steps", 4]
    words += ["--launch.resources_per_rank", '{"CPU": 1, "slot": 1}', "--out", "run"]
    done = cluster.train(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert read_info(tmp_path / "run").world_size == 1


@pytest.mark.full  # else: test_bad_devices.py has it of GPUs
def test_more_than_a_cluster_that_cannot_grow_has_is_refused(tmp_path, gengap):
    """The cluster is one that the driver starts for itself."""
    pytest.importorskip("ray")
    words = [*NO_MLFLOW, *ON_RAY, "--launch.ray_address", "local", "--launch.resources_per_rank", '{"slot": 1}']
    done = gengap("train", *words, "--out", "run")
    assert done.returncode == 2, done.stderr
    assert "its 1 node(s) hold 0 rank(s) of {'CPU': 1.0, 'slot': 1.0}, PACK: choose fewer" in done.stderr


@contextlib.contextmanager
def listener(*, answers: bool):
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        if answers:
            it.listen()
        yield f"127.0.0.1:{it.getsockname()[1]}"


@pytest.mark.parametrize("scheme", ["", "ray://"])
@pytest.mark.parametrize(("answers", "says"), [(False, "Connection refused"), (True, "no answer within {:g} s")])
def test_an_address_that_answers_nothing_is_refused_in_time(monkeypatch, scheme, answers, says):
    pytest.importorskip("ray")
    if not FULL:
        monkeypatch.setattr(ray, "CONNECT_TIMEOUT_SECONDS", 4.0)
    began = time.monotonic()
    with listener(answers=answers) as address, pytest.raises(UsageError) as error:
        ray.check_address(scheme + address)
    assert time.monotonic() - began < ray.CONNECT_TIMEOUT_SECONDS + 3
    for word in (
        scheme + address,
        says.format(ray.CONNECT_TIMEOUT_SECONDS),
        "ray status",
        "firewall",
        "6379",
        "10001",
        "RAY_AUTH_MODE",
        "token",
    ):
        assert word in str(error.value)


@pytest.mark.parametrize("address", ["nowhere", "host:port", "ray://host"])
def test_what_is_no_address_is_refused(address):
    with pytest.raises(UsageError, match="is not an address: give host:port or ray://host:port"):
        ray.check_address(address)


def test_who_asks_a_ray_cluster(monkeypatch):
    for name in (JOB_VARIABLE, "RAY_ADDRESS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    auto, on_ray, local = (LaunchConfig(launcher=name) for name in ("auto", "ray", "local"))
    kind = lambda config: type(launchers.choose(config, many_runs=False, entry_point=ENTRY_POINT)).__name__  # noqa: E731
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    assert [kind(config) for config in (auto, on_ray, local)] == [
        "InProcessLauncher",
        "RayLauncher",
        "InProcessLauncher",
    ]
    monkeypatch.setenv(JOB_VARIABLE, "{}")
    assert [kind(config) for config in (auto, on_ray, local)] == ["RayLauncher", "RayLauncher", "InProcessLauncher"]
    assert launchers.is_driver(auto)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("RANK", "1")
    assert (kind(auto), launchers.is_driver(auto)) == ("TorchrunLauncher", False)
    with pytest.raises(
        UsageError, match=r"launch.launcher \(ray\) starts ranks itself, but torchrun has already started some"
    ):
        launchers.choose(on_ray, many_runs=False, entry_point=ENTRY_POINT)


def test_a_folder_that_ray_deletes_is_refused(tmp_path):
    out = tmp_path / "runtime_resources" / "working_dir_files" / "runs"
    with pytest.raises(UsageError, match="deleted after the job"):
        ray.RayLauncher(ENTRY_POINT).run(RunConfig(), out, resume=False, progress=lambda *_: None)
