"""A packed study on fake GPUs: a GPU for each run, and the numbers of the CPU."""

import os
import subprocess

import psutil
import pytest

from gengap_dist.runs.run_folder import read_info
from tests import fake_cuda
from tests.ray_cluster import until
from tests.study import tiny

pytestmark = [pytest.mark.processes, pytest.mark.skipif(bool(fake_cuda.missing()), reason=str(fake_cuda.missing()))]

STUDY = {"seeds": [0, 1], "axes": {"batch.global_size": [64, 256]}}
SETTINGS = {"train": {"epochs": 30, "num_evals": 2, "dtype": "float64"}}


def visible_gpus(process: psutil.Process) -> set[str]:
    """CUDA_VISIBLE_DEVICES of the ranks that run now."""
    found = set()
    for child in process.children():
        try:
            if gpu := child.environ().get("CUDA_VISIBLE_DEVICES"):
                found.add(gpu)
        except psutil.Error:
            continue
    return found


@pytest.mark.full  # else: which GPUs ranks get in tests/study/test_ranks.py, runs on fake GPUs in test_scenarios.py
def test_each_run_has_a_gpu_of_its_own(tmp_path):
    config = tiny.write(tmp_path / "s.yaml", STUDY, **SETTINGS)
    environment = tiny.environment(**fake_cuda.environment(2), XDG_CACHE_HOME=str(tmp_path / "cache"))
    process = subprocess.Popen(
        tiny.command(config, tmp_path / "gpu"), cwd=tmp_path, env=os.environ | environment,
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    seen: set[str] = set()

    def both() -> bool:
        seen.update(visible_gpus(psutil.Process(process.pid)))
        return {"0", "1"} <= seen or process.poll() is not None

    until(both, 120)
    _, error = process.communicate(timeout=280)
    assert process.returncode == 0, error
    assert {"0", "1"} <= seen
    infos = [read_info(path.parent) for path in (tmp_path / "gpu").glob("runs/*/*/run.json")]
    assert [info.device for info in infos] == ["cuda"] * 4
    assert [info.world_size for info in infos] == [1] * 4
    on_cpu = tiny.start(config, tmp_path / "cpu", "--launch.device", "cpu")
    assert on_cpu.returncode == 0, on_cpu.stderr
    scores, others = tiny.scores(tmp_path / "gpu"), tiny.scores(tmp_path / "cpu")
    assert scores.keys() == others.keys()
    for folder in scores:
        assert scores[folder] == pytest.approx(others[folder], rel=1e-7), folder
