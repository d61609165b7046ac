"""Every CUDA path, on fake GPUs: a run there records the numbers that a run on the CPU records.

All scenarios of one number of ranks run in one started set of processes; what is compared is every number of
metrics.jsonl but times.
"""

import json
import math
import os
from collections.abc import Iterator
from contextlib import ExitStack, closing, nullcontext
from pathlib import Path

import pytest
import torch

from gengap_dist.distributed.launchers.local import LocalLauncher
from gengap_dist.distributed.worker_pool import environment_variables
from gengap_dist.runs.run_folder import prepare_folder, read_info
from gengap_dist.training import ENTRY_POINT
from tests import fake_cuda
from tests.conftest import config, cut_after, thinned
from tests.cuda.scenarios import BASE, SCENARIOS, SHORT, Scenario, Settings
from tests.ranks import forked_ranks

Numbers = dict[tuple[int, str], float]
TIMES = ("seconds", "time/", "probe_seconds")
NEEDS = {"zero": "deepspeed", "lars": "timm", "lamb": "timm"}

pytestmark = [pytest.mark.processes, pytest.mark.skipif(bool(fake_cuda.missing()), reason=str(fake_cuda.missing()))]


@pytest.fixture(scope="module")
def ranks() -> Iterator[dict[tuple[str, int], LocalLauncher]]:
    """One and two ranks that stay, with GPUs and without."""
    with ExitStack() as stack:
        yield {
            (device, size): stack.enter_context(closing(LocalLauncher(size, ENTRY_POINT)))
            for device in ("cuda", "cpu")
            for size in (1, 2)
        }


def train(pool: LocalLauncher, device: str, settings: Settings, out: Path, *, resume: bool = False) -> None:
    """A run; its ranks, if they have to be started, have what they need."""
    prepare_folder(out, "run.json", resume=resume)
    given = config(**(BASE | settings | {"launch__device": device}))
    there = fake_cuda.environment(pool.num_processes) if device == "cuda" else {"DS_ACCELERATOR": "cpu"}
    with environment_variables(there), forked_ranks() if device == "cpu" else nullcontext():
        pool.run(given, out, resume=resume, progress=lambda done, total, note: None)


def numbers(out: Path) -> Numbers:
    """All of metrics.jsonl, by step and name."""
    found: Numbers = {}
    for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()):
        found |= {(row["step"], key): float(value) for key, value in row.items() if not key.startswith(TIMES)}
    return found


def difference(a: float, b: float) -> float:
    """Relative, of numbers that are not tiny."""
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    return abs(a - b) / max(abs(b), 1e-6) if math.isfinite(a + b) else math.inf


def tabulate(**row: object) -> None:
    """Keep a row for the tables of docs/gpu.md, if somebody wants them; see table.py."""
    if path := os.environ.get("GENGAP_CUDA_TABLE"):
        with Path(path).open("a") as file:
            file.write(json.dumps({"torch": torch.__version__.partition("+")[0]} | row) + "\n")


@pytest.mark.parametrize("name", thinned(SCENARIOS, lambda name: name in SHORT))
def test_a_gpu_records_what_a_cpu_records(ranks, tmp_path, name):
    scenario: Scenario = SCENARIOS[name]
    for word, package in NEEDS.items():
        if word in str(scenario.settings):
            pytest.importorskip(package, reason=f"{package} is not installed")
    gpus, cpus = (ranks[device, scenario.num_ranks] for device in ("cuda", "cpu"))
    gpu, cpu = tmp_path / "gpu", tmp_path / "cpu"
    if scenario.begun_on:
        train(ranks[scenario.begun_on, scenario.num_ranks], scenario.begun_on, scenario.settings, gpu)
        cut_after(gpu, 4)
    train(gpus, "cuda", scenario.settings, gpu, resume=bool(scenario.begun_on))
    chosen = {"batch__micro_size": read_info(gpu).micro_size}  # auto chooses by speed, which is not compared here
    auto = scenario.settings.get("batch__micro_size") == "auto"
    train(cpus, "cpu", scenario.settings | scenario.twin | (chosen if auto else {}), cpu)
    assert read_info(gpu).device == "cuda"
    assert read_info(cpu).device == "cpu"
    got, want = numbers(gpu), numbers(cpu)
    assert got.keys() == want.keys()
    compared = [key for key in want if scenario.only in key[1]]
    assert len(compared) > 5
    worst = max(compared, key=lambda key: difference(got[key], want[key]))
    report = f"{worst}: {got[worst]} on the GPU, {want[worst]} on the CPU"
    tabulate(name=name, worst=difference(got[worst], want[worst]), where=worst, numbers=len(compared))
    assert difference(got[worst], want[worst]) <= scenario.tolerance, report
