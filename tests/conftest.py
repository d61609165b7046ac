"""What tests share: real ranks, real commands, real data where it is there."""

import os
import shutil
import signal
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from gengap_dist.config.loading import nested, validate
from gengap_dist.config.sections import RunConfig
from gengap_dist.distributed import worker_pool
from gengap_dist.distributed.launchers.local import LocalLauncher
from gengap_dist.runs import checkpoint
from gengap_dist.runs.run_folder import prepare_folder, read_info, write_info
from gengap_dist.training import ENTRY_POINT
from gengap_dist.training.trainer import run
from tests.few_figures import draw_few
from tests.ranks import Crews, Forking, standing, start_interpreter, start_module
from tests.ray_cluster import Cluster

ROOT = Path(__file__).parent.parent

os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="gengap-cache-")  # what was measured here before is nobody's

FULL = "GENGAP_FULL" in os.environ  # `make test-full`; tests choose their sizes by it: NUM_KILLS = 20 if FULL else 1

# A slow machine is no failure, and a change must not fail on another change's luck: CI draws the same cases every time.
settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if "CI" in os.environ else "default")

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's "&" has Ctrl-C ignored, here and in all we start


# What tests write is in memory where there is room: a database of MLflow waits for a disk in each of its transactions.
IN_MEMORY = Path("/dev/shm")
if IN_MEMORY.is_dir() and shutil.disk_usage(IN_MEMORY).free > 8 << 30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(IN_MEMORY))  # pytest's name for it


# Each worker takes one file at a time: the longest first, so that none of them is left alone with one at the end. Files
# that start a cluster of many processes are apart: two at once on two cores take many times as long as one by one.
LONGEST = [
    "tests/distributed/launchers/test_ray.py",
    "tests/parallel/strategies/test_contract.py",
    "tests/training/test_resume.py",
    "tests/tracking/test_studies.py",
    "tests/study/test_packing.py",
    "tests/cuda/test_scenarios.py",
    "tests/test_two_hosts.py",
    "tests/study/test_study.py",
    "tests/parallel/test_execution.py",
    "tests/training/algorithms/test_world_size_law.py",
    "tests/tracking/test_mlflow.py",
    "tests/cli/test_commands.py",
    "tests/study/test_ray_runner.py",
    "tests/preflight/test_doctor.py",
    "tests/training/test_trainer.py",
    "tests/training/tasks/test_language_modeling.py",
    "tests/test_gpu_benchmark.py",
    "tests/training/algorithms/test_odd_combinations.py",
    "tests/study/test_restart.py",
    "tests/distributed/launchers/test_ray_gpus.py",
    "tests/cuda/test_commands.py",
    "tests/preflight/test_plan.py",
    "tests/test_launch_scripts.py",
    "tests/test_kills.py",
    "tests/cli/test_compare.py",
    "tests/distributed/launchers/test_bad_devices.py",
]
STARTING = {"gengap", "new_gengap", "cluster", "pools", "crews"}  # fixtures that start processes


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at the markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if STARTING & {*getattr(item, "fixturenames", ())}:
            item.add_marker(pytest.mark.processes)
        if item.get_closest_marker("full") and not FULL:
            item.add_marker(pytest.mark.skip(reason="only in `make test-full`: GENGAP_FULL is not set"))
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.relative_to(ROOT).as_posix(), len(place)))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    given = session.config.option.basetemp is not None or os.environ.get("PYTEST_DEBUG_TEMPROOT") != str(IN_MEMORY)
    if exitstatus == 0 and not given:  # pytest would keep those of three runs, also where all is well
        shutil.rmtree(session.config._tmp_path_factory.getbasetemp(), ignore_errors=True)  # pyright: ignore


def thinned(table: Iterable[Any], kept: Callable[..., bool]) -> list[Any]:
    """Parameters of a test; those rows of `table` that are not `kept(*row)` run in `make test-full` only."""
    rows = [row if isinstance(row, tuple) else (row,) for row in table]
    return [pytest.param(*row, marks=() if kept(*row) else pytest.mark.full) for row in rows]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test works in a folder of its own, and no MLflow server of the user's is touched."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def few_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports of this process have a few figures."""
    draw_few(monkeypatch.setattr)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with MNIST/raw, FashionMNIST/raw and cifar10-jpeg."""
    folder = os.environ.get("GENGAP_DATA")
    if not folder:
        pytest.skip("GENGAP_DATA does not name a folder with the real data sets")
    return Path(folder)


def config(**settings: object) -> RunConfig:
    """A run config; `config(batch__global_size=8)`, without MLflow, measuring whatever the clock says."""
    given = {key.replace("__", "."): value for key, value in settings.items()}
    return validate(RunConfig, nested({"mlflow.enabled": False, "probe.max_time_fraction": None} | given))


def train(out: Path, *, resume: bool = False, **settings: object) -> dict[str, object]:
    """One run in this process."""
    prepare_folder(out, "run.json", resume=resume)
    return run(config(**settings), out, resume=resume)


def weights(out: Path) -> dict[str, torch.Tensor]:
    """What the last checkpoint of a run holds of its network."""
    return torch.load(
        max(checkpoint.checkpoints_by_step(out / "checkpoints").items())[1] / "model.pt", weights_only=True
    )


def cut_after(out: Path, step: int) -> None:
    """The folder as a kill some steps after `step` would have left it."""
    for later, path in checkpoint.checkpoints_by_step(out / "checkpoints").items():
        if later > step:
            shutil.rmtree(path)
    write_info(out, read_info(out).with_fields(status="running"))


@pytest.fixture(scope="module")
def pools(crews: Crews) -> Iterator[dict[int, LocalLauncher]]:
    """One, two and three ranks that stay."""
    crews.close()  # memory for these; who asks for them again gets new ones
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker_pool, "get_context", lambda method: Forking())
        with standing(lambda size: LocalLauncher(size, ENTRY_POINT), (1, 2, 3)) as pools:
            yield pools


@pytest.fixture(scope="session")
def crews() -> Iterator[Crews]:
    """Ranks that stay for all tests of this process: those on CPUs, in nobody's special environment."""
    with closing(Crews()) as crews:
        yield crews


Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def gengap(tmp_path: Path) -> Command:
    """`gengap("train", "--out", ...)`: a process of its own; see `start_module`."""
    return lambda *words, **env: start_module("gengap_dist", *words, cwd=tmp_path, env=os.environ | env)


@pytest.fixture
def new_gengap(tmp_path: Path) -> Command:
    """`gengap` in a new interpreter, as a user starts it."""
    return lambda *words, **env: start_interpreter("gengap_dist", *words, cwd=tmp_path, env=os.environ | env)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import mlflow

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what MLflow warns of is not ours to mend
        path = tmp_path_factory.mktemp("store") / "mlflow.db"
        mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def mlflow_db(empty_store: Path, tmp_path: Path) -> Path:
    """`tmp_path / "mlflow.db"`, an SQLite store with the tables that MLflow takes seconds to make."""
    return Path(shutil.copy(empty_store, tmp_path))


@pytest.fixture(scope="module")  # an idle cluster takes a tenth of a core
def cluster() -> Iterator[Cluster]:
    """A Ray cluster of four CPUs."""
    pytest.importorskip("ray", reason="ray is not installed: pip install 'gengap_dist[ray]'")
    # a path for sockets may hold 107 characters: pytest's own folders are too deep
    with tempfile.TemporaryDirectory(prefix="r", ignore_cleanup_errors=True) as folder:
        cluster = Cluster(Path(folder))
        yield cluster
        cluster.close()
