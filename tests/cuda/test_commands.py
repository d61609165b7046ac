"""Commands as users start them, on fake GPUs; and what a GPU that does not answer looks like."""

import importlib
import io
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gengap_dist.compat.float32_precision import training_float32
from gengap_dist.config.sections import LaunchConfig
from gengap_dist.distributed.process_group import World
from gengap_dist.distributed.worker_pool import environment_variables, free_port
from gengap_dist.runs.run_folder import prepare_folder, read_info
from tests import fake_cuda
from tests.conftest import config
from tests.conftest import train as train_here
from tests.cuda.scenarios import BASE, OFF, Settings
from tests.cuda.test_scenarios import difference, numbers
from tests.ranks import Crew

pytestmark = [pytest.mark.processes, pytest.mark.skipif(bool(fake_cuda.missing()), reason=str(fake_cuda.missing()))]

EXACT = 1e-7


def command(*words: object, num_gpus: int, cwd: Path) -> "subprocess.CompletedProcess[str]":
    env = os.environ | fake_cuda.environment(num_gpus)
    return subprocess.run(
        [sys.executable, "-m", *map(str, words)], env=env, cwd=cwd, capture_output=True, text=True, timeout=300
    )


def agree(gpu: Path, cpu: Path) -> None:
    got, want = numbers(gpu), numbers(cpu)
    assert got.keys() == want.keys()
    assert len(want) > 20
    assert max(difference(got[key], want[key]) for key in want) <= EXACT


@pytest.mark.full  # else: two ranks in test_scenarios.py, torchrun in test_memory.py
def test_torchrun(tmp_path):
    """Two ranks on two GPUs are one rank on the CPU, in float64."""
    given = ["--mlflow.enabled", "false", "--train.steps", 3, "--train.dtype", "float64", "--probe.num_samples", 100]
    run = [
        "torch.distributed.run",
        "--nproc-per-node",
        2,
        "--master-port",
        free_port(),
        "-m",
        "gengap_dist.train",
        *given,
    ]
    done = command(*run, "--out", tmp_path / "gpu", num_gpus=2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    info = read_info(tmp_path / "gpu")
    assert (info.device, info.world_size, info.strategy) == ("cuda", 2, "ddp")
    train_here(
        tmp_path / "cpu", train__steps=3, train__dtype="float64", probe__num_samples=100, probe__max_time_fraction=0.05
    )
    got, want = numbers(tmp_path / "gpu"), numbers(tmp_path / "cpu")
    losses = [key for key in want if key[1] in ("train/loss", "test/loss", "val/loss", "train/grad_norm")]
    assert len(losses) > 5
    assert max(difference(got[key], want[key]) for key in losses) <= EXACT


def test_probe_of_a_run_made_elsewhere(tmp_path, gengap):
    """A run that was made on GPUs is measured where there is none, and the other way round."""
    model = {"model__name": "mlp", "model__widths": (24, 16), "seed": 3}
    train_here(tmp_path / "run", **(BASE | OFF | model | {"train__steps": 2, "launch__device": "cpu"}))
    measured = [
        "--model",
        tmp_path / "run",
        "--probe.num_samples",
        100,
        "--probe.diagnostics",
        "norms,weights",
        "--out",
    ]
    done = command("gengap_dist", "probe", *measured, tmp_path / "gpu", num_gpus=1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert read_info(tmp_path / "gpu").device == "cuda"
    made = (tmp_path / "run/config.yaml").read_text()
    (tmp_path / "run/config.yaml").write_text(made.replace("device: cpu", "device: cuda"))
    done = gengap("probe", *measured, tmp_path / "cpu")
    assert done.returncode == 0, done.stderr
    agree(tmp_path / "gpu", tmp_path / "cpu")


def test_doctor(tmp_path):
    wanted = ["--launch.device", "cuda", "--launch.num_processes", 2, "--mlflow.enabled", "false"]
    done = command("gengap_dist", "doctor", *wanted, num_gpus=2, cwd=tmp_path)
    assert "2 x Fake H100" in done.stdout
    assert "nccl" in done.stdout
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def crew() -> Iterator[Crew]:
    """Two ranks with a fake GPU each."""
    with environment_variables(fake_cuda.environment(2)), closing(Crew(2, LaunchConfig(device="cuda"))) as crew:
        yield crew


def stuck(world: World, settings: Settings, out: Path) -> str:
    """What a rank says of a run in which the GPUs take 3 s to do the first step."""
    from gengap_dist.training.trainer import run

    counting: Any = importlib.import_module("fake_cuda.counting")
    note, trained, waited = counting.note, [], []

    def slow(kind: str) -> None:
        if trained and not waited and "(read)" in counting.place():  # of step metrics
            waited.append(time.sleep(3))
        note(kind)

    if world.rank == 0:
        prepare_folder(out, "run.json", resume=False)
    world.barrier()
    counting.note = slow
    try:
        with redirect_stderr(io.StringIO()) as said:
            run(config(**settings), out, world=world, progress=lambda done, *_: trained.append(done) if done else None)
    finally:
        counting.note = note
    return said.getvalue()


def test_a_gpu_that_does_not_answer_is_seen_by_the_watchdog(crew, tmp_path):
    """The CPU waits for the GPU in one place, which counts as waiting for the other ranks."""
    settings = BASE | OFF | {"train__steps": 3, "launch__device": "cuda", "launch__stall_report_seconds": 0.8}
    said = "".join(crew(stuck, settings, tmp_path / "run"))
    assert said.count("all ranks wait in metrics of a step (step ") == 1


def trained_and_resumed(world: World, settings: Settings, out: Path) -> list[dict[str, Any]]:
    """The results of a run, and of the same run started again when it had ended."""
    from gengap_dist.training.trainer import run

    if world.rank == 0:
        prepare_folder(out, "run.json", resume=False)
    world.barrier()
    return [run(config(**settings), out, world=world, resume=resume) for resume in (False, True)]


def test_the_best_weights_of_a_resumed_run_are_where_it_computes(crew, tmp_path):
    """The run has nothing left to train, and evaluates the best weights that its checkpoint holds."""
    target = {"train__target_accuracy": 0.01, "train__stop_at_target": True, "launch__device": "cuda"}
    first, again = crew(trained_and_resumed, BASE | OFF | target, tmp_path / "run")[0]
    assert again["best_val_step"] == first["best_val_step"] < 6
    for name in ("test_at_best_val/accuracy", "test/loss"):
        assert again[name] == first[name]


def switches(world: World, settings: Settings, out: Path) -> tuple[list[Any], ...]:
    """How float32 is multiplied: before, in and after a run."""
    from gengap_dist.training.trainer import run

    def now() -> list[Any]:
        cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        return [cuda.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, cudnn.allow_tf32]

    if world.rank == 0:
        prepare_folder(out, "run.json", resume=False)
    world.barrier()
    before, inside = now(), []
    run(config(**settings), out, world=world, progress=lambda *_: inside.append(now()))
    assert all(found == inside[0] for found in inside)
    return before, inside[-1], now()


@pytest.mark.parametrize(("tf32", "wanted"), [(False, ["ieee"] * 3 + [False]), (True, ["tf32"] * 3 + [True])])
def test_gpus_round_float32_only_if_they_are_asked_to(crew, tmp_path, tf32, wanted):
    settings = BASE | OFF | {"train__steps": 2, "train__tf32": tf32, "launch__device": "cuda"}
    for before, inside, after in crew(switches, settings, tmp_path / "run"):
        assert inside == wanted
        assert before == after
    assert read_info(tmp_path / "run").config["train"]["tf32"] is tf32


def test_a_cpu_keeps_its_switches():
    with training_float32(torch.device("cpu"), tf32=False):
        assert torch.backends.cudnn.conv.fp32_precision != "ieee"


class Uneven(nn.Module):
    """Holds 100 MiB more on rank 1, for a moment in each pass."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Flatten(), nn.Linear(144, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [n, num_classes]."""
        if os.environ["RANK"] == "1":
            torch.empty(100 << 20, dtype=torch.uint8, device=images.device)
        return self.layer(images)


def uneven(num_classes: int, in_channels: int) -> nn.Module:
    return Uneven(num_classes)


def peaks(world: World, settings: Settings, out: Path) -> list[float]:
    """What a run's record says of each GPU's memory."""
    from gengap_dist.training.trainer import run

    if world.rank == 0:
        prepare_folder(out, "run.json", resume=False)
    world.barrier()
    result = run(config(**settings), out, world=world)
    assert result["memory_peak_gib"] == read_info(out).result["memory_peak_gib"]
    return result["memory_peak_gib"]


def test_the_record_knows_the_peak_of_each_gpu(crew, tmp_path):
    """Of one run, though its processes have made others before."""
    settings = BASE | OFF | {"train__steps": 2, "launch__device": "cuda"}
    (first, second), other = crew(peaks, settings | {"model__name": f"{__name__}:uneven"}, tmp_path / "uneven")
    assert other == [first, second]
    assert 0 < first < 0.05
    assert 0.098 <= second < 0.15
    assert max(crew(peaks, settings, tmp_path / "even")[0]) < 0.05
    train_here(tmp_path / "cpu", **(settings | {"launch__device": "cpu"}))
    assert "memory_peak_gib" not in read_info(tmp_path / "cpu").result
