"""Which GPUs the ranks of a Ray cluster take: those that Ray has set aside for them, and no others. On fake GPUs.

What these compute is what a CPU computes. How they are found, set aside, hidden and joined is as on a machine that has
GPUs.
"""

import contextlib
import json
import os
import tempfile
from pathlib import Path

import pytest

from gengap_dist.cli.train import command as train_command
from gengap_dist.config.sections import LaunchConfig
from gengap_dist.distributed.launchers.ray import resolve_device
from gengap_dist.errors import UsageError
from gengap_dist.runs.run_folder import read_info, read_metrics
from tests import fake_cuda
from tests.conftest import cut_after
from tests.ray_cluster import Cluster
from tests.study import tiny

pytestmark = pytest.mark.processes

SMALL = ["--train.dtype", "float64", "--probe.enabled", "false", "--mlflow.enabled", "false", "--train.steps", "4"]
SMALL += ["--model.name", "telling:make", "--checkpoint.every_steps", "2", "--checkpoint.keep", "9"]
TWO_ON_RAY = ["--launch.launcher", "ray", "--launch.num_processes", "2"]

TELLING = """
import json, os, ray, torch, torch.distributed as dist
from gengap_dist.data.data_spec import DataSpec
from gengap_dist.models import build

def make(num_classes, in_channels):
    if ray.is_initialized():
        context = ray.get_runtime_context()
        said = {{
            "set aside": context.get_assigned_resources(),
            "gpus": context.get_accelerator_ids()["GPU"],
            "seen": torch.cuda.device_count(),
            "current": torch.cuda.current_device() if torch.cuda.is_available() else None,
            "backend": dist.get_backend_config(),
        }}
        with open({here!r} + "/rank" + os.environ["RANK"], "a") as file:
            print(json.dumps(said), file=file)
    return build("mlp", DataSpec.images(num_classes, in_channels, 8), widths=(16,))
"""


@pytest.fixture
def telling(tmp_path: Path):
    """A network whose ranks write down what they have; `telling(rank)` is what those ranks said, one after another."""
    (tmp_path / "telling.py").write_text(TELLING.format(here=str(tmp_path)))
    return lambda rank: [json.loads(line) for line in (tmp_path / f"rank{rank}").read_text().splitlines()]


@pytest.fixture(scope="module")
def two_gpus() -> dict[str, str]:
    """Variables of a machine with two GPUs."""
    if reason := fake_cuda.missing():
        pytest.skip(reason)
    return fake_cuda.environment(2, mib=2000)


@pytest.fixture(scope="module")
def gpu_cluster(two_gpus):
    """A cluster of four CPUs and two GPUs."""
    pytest.importorskip("ray", reason="ray is not installed: pip install 'gengap_dist[ray]'")
    with tempfile.TemporaryDirectory(prefix="g", ignore_cleanup_errors=True) as folder:  # short, as sockets want it
        cluster = Cluster(Path(folder), num_gpus=2, more=two_gpus)
        yield cluster
        cluster.close()


def losses(out: Path) -> list[float]:
    return [line["train/loss"] for line in read_metrics(out) if "train/loss" in line]


@pytest.mark.full  # else: what auto stands for, and ranks for which no GPU is set aside, below
def test_auto_takes_a_gpu_for_each_rank_and_goes_on_without(gpu_cluster, tmp_path, telling, monkeypatch):
    words = [*SMALL, "--data.image_size", 8]
    done = gpu_cluster.train(*words, *TWO_ON_RAY, "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    info = read_info(tmp_path / "run")
    assert (info.device, info.strategy, info.world_size) == ("cuda", "ddp", 2)
    assert info.config["launch"]["device"] == "auto"  # what was asked for, also of who resumes it
    for rank in (0, 1):
        (said,) = telling(rank)
        assert said["set aside"] == {"CPU": 1.0, "GPU": 1.0}
        assert (said["gpus"], said["seen"], said["current"]) == ([str(rank)], 2, rank)
        assert "cpu:gloo,cuda:nccl" in said["backend"]

    monkeypatch.syspath_prepend(tmp_path)
    assert train_command([*map(str, words), "--launch.num_processes", "2", "--out", "cpu"]) == 0
    assert len(losses(tmp_path / "run")) == 4
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-12)

    cut_after(tmp_path / "run", 2)
    assert (
        train_command(["--resume", "--out", "run", "--model.name", "telling:make", "--launch.launcher", "local"]) == 0
    )
    info = read_info(tmp_path / "run")
    assert (info.device, info.status, len(info.resumed)) == ("cpu", "finished", 1)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-12)


@pytest.mark.full  # else: one run, and what `auto` stands for where several are compared
def test_a_study_takes_one_kind_of_device_for_all(gpu_cluster, tmp_path, telling):
    """One arm asks for a GPU and for two CPUs, the other leaves it open; both run at once, with a GPU each."""
    arms = [
        {"name": "asks", "set": {"launch.device": "cuda", "launch.resources_per_rank": {"CPU": 2}}},
        {"name": "open"},
    ]
    study = {"baseline": "open", "seeds": [0], "arms": arms}
    still = {"model": {"name": "telling:make"}, "probe": {"enabled": False}, "train": {"steps": 4}}
    config = tiny.write(tmp_path / "s.yaml", study, launch={"launcher": "ray"}, **still)
    done = tiny.start(config, tmp_path / "out", **(gpu_cluster.env | {"RAY_ADDRESS": gpu_cluster.address}))
    assert done.returncode == 0, done.stderr
    infos = [read_info(tmp_path / f"out/runs/{arm}/seed0") for arm in ("asks", "open")]
    assert [(info.device, info.world_size) for info in infos] == [("cuda", 1), ("cuda", 1)]
    said = sorted(telling(0), key=lambda said: said["set aside"]["CPU"])
    assert [one["set aside"] for one in said] == [{"CPU": 1.0, "GPU": 1.0}, {"CPU": 2.0, "GPU": 1.0}]
    assert {tuple(one["gpus"]) for one in said} == {("0",), ("1",)}
    assert "launch.device" not in done.stderr


SHARING = """
import json, os, time, ray, torch
from pathlib import Path
from gengap_dist.data.data_spec import DataSpec
from gengap_dist.models import build

def make(num_classes, in_channels):
    here = Path(__file__).parent
    context = ray.get_runtime_context()
    said = {"set aside": context.get_assigned_resources(), "gpus": context.get_accelerator_ids()["GPU"]}
    said |= {"visible": os.environ["CUDA_VISIBLE_DEVICES"], "seen": torch.cuda.device_count(), "began": time.time()}
    with (here / f"group{os.getpid()}").open("a") as file:
        print(json.dumps(said), file=file)
    end = time.monotonic() + 120
    while len(list(here.glob("group*"))) < 4:
        assert time.monotonic() < end, "the others never came"
        time.sleep(0.1)
    return build("mlp", DataSpec.images(num_classes, in_channels, 8), widths=(16,))
"""


@pytest.fixture
def one_gpu(tmp_path_factory):
    """A cluster of eight CPUs and one GPU."""
    if reason := fake_cuda.missing():
        pytest.skip(reason)
    pytest.importorskip("ray", reason="ray is not installed: pip install 'gengap_dist[ray]'")
    folder = tmp_path_factory.getbasetemp().parent / f"o{os.getpid()}"  # short, as sockets want it
    folder.mkdir()
    with contextlib.closing(Cluster(folder, num_cpus=8, num_gpus=1, more=fake_cuda.environment(1, mib=2000))) as it:
        yield it


@pytest.mark.full  # else: how many runs fit (doctests), the order of the queue (study/test_ray_runner.py)
def test_four_runs_on_one_gpu(one_gpu, tmp_path):
    """Six runs: four at once, each of which waits for the other three; the last two on ranks that are up already."""
    (tmp_path / "sharing.py").write_text(SHARING)
    study = {"baseline": "sb", "seeds": [*range(6)], "arms": [{"name": "sb"}]}
    launch = {"launcher": "ray", "resources_per_rank": {"GPU": 0.25}}
    still = {"model": {"name": "sharing:make"}, "probe": {"enabled": False}, "train": {"steps": 4}}
    config = tiny.write(tmp_path / "s.yaml", study, launch=launch, **still)
    done = tiny.start(config, tmp_path / "out", **(one_gpu.env | {"RAY_ADDRESS": one_gpu.address}))
    assert done.returncode == 0, done.stderr
    infos = [read_info(tmp_path / f"out/runs/sb/seed{seed}") for seed in range(6)]
    assert {(info.device, info.world_size, info.status) for info in infos} == {("cuda", 1, "finished")}
    groups = [[json.loads(line) for line in path.read_text().splitlines()] for path in tmp_path.glob("group*")]
    assert len(groups) == 4
    assert sum(map(len, groups)) == 6
    for said in (said for group in groups for said in group):
        assert said["set aside"] == {"CPU": 1.0, "GPU": 0.25}
        assert (said["gpus"], said["visible"], said["seen"]) == (["0"], "0", 1)
    assert max(infos[seed].started for seed in range(4)) <= min(infos[seed].started for seed in (4, 5))


@pytest.mark.full  # shorter: the tests above, on the same two GPUs
@pytest.mark.parametrize("hides", ["0", "1"])
def test_gpus_that_ray_does_not_have_are_left_alone(cluster, two_gpus, tmp_path, telling, hides):
    """Releases of Ray differ in whether they hide GPUs from ranks that have set none aside."""
    env = two_gpus | {"PYTHONPATH": f"{two_gpus['PYTHONPATH']}:{tmp_path}", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": hides}
    words = [*SMALL, "--data.image_size", 8, "--out", tmp_path / "run"]
    done = cluster.submit(*words, name=f"left-{hides}-{tmp_path.name}", **env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert read_info(tmp_path / "run").device == "cpu"
    (said,) = telling(0)
    assert said["set aside"] == {"CPU": 1.0}
    assert (said["seen"], said["current"]) == (0, None)


CPUS, GPUS = {"CPU": 8.0}, {"CPU": 8.0, "GPU": 2.0}


@pytest.mark.parametrize(
    ("nodes", "launches", "devices"),
    [
        ([CPUS], [{}], ["cpu"]),
        ([GPUS], [{"num_processes": 2}], ["cuda"]),
        ([GPUS], [{"num_processes": 3}], ["cpu"]),
        ([GPUS, GPUS], [{"num_processes": 3}], ["cuda"]),
        ([GPUS, GPUS], [{"num_processes": 3, "placement": "STRICT_PACK"}], ["cpu"]),
        ([GPUS, GPUS], [{"num_processes": 2, "max_processes": 9}], ["cuda"]),
        ([{"CPU": 0.0, "GPU": 2.0}, CPUS], [{}], ["cpu"]),  # GPUs of a head node without CPUs are nobody's
        ([GPUS], [{"resources_per_rank": {"CPU": 5.0}, "num_processes": 2}], ["cpu"]),
        ([], [{"resources_per_rank": {"GPU": 1.0}}, {}], ["cuda", "cpu"]),
        ([CPUS], [{"device": "cuda"}, {"device": "cpu"}], ["cuda", "cpu"]),
        ([GPUS], [{"num_processes": 1}, {"num_processes": 3}], ["cpu", "cpu"]),  # arms that are compared
    ],
)
def test_what_auto_stands_for(nodes, launches, devices, capsys):
    given = [LaunchConfig(**launch) for launch in launches]
    assert [launch.device for launch in resolve_device(given, nodes)] == devices
    warned = "launch.device (auto) is cpu" in capsys.readouterr().err
    assert warned == ("cpu" in devices and any("GPU" in node for node in nodes))


def test_gpus_set_aside_for_a_cpu_are_refused():
    launch = LaunchConfig(device="cpu", resources_per_rank={"GPU": 1.0})
    with pytest.raises(UsageError, match=r"launch.resources_per_rank .* reserves GPUs .*: leave GPU out, or"):
        resolve_device([launch], [GPUS])
