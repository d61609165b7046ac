"""What happens where a GPU's memory ends: on a fake GPU of few MiB."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gengap_dist.config.sections import LaunchConfig
from gengap_dist.distributed.process_group import World
from gengap_dist.distributed.worker_pool import environment_variables, free_port
from gengap_dist.errors import UsageError
from gengap_dist.runs.run_folder import prepare_folder, read_info
from tests import fake_cuda
from tests.conftest import ROOT, config, thinned
from tests.cuda.scenarios import BASE, OFF, Settings
from tests.cuda.test_scenarios import numbers
from tests.ranks import Crew

pytestmark = [pytest.mark.processes, pytest.mark.skipif(bool(fake_cuda.missing()), reason=str(fake_cuda.missing()))]

MIB = 200


@pytest.fixture(scope="module")
def gpu() -> Iterator[Crew]:
    """One rank with a fake GPU of 200 MiB."""
    with (
        environment_variables(fake_cuda.environment(1, mib=MIB)),
        closing(Crew(1, LaunchConfig(device="cuda"))) as crew,
    ):
        yield crew


def trained(world: World, settings: Settings, out: Path) -> str:
    """A run; what it was refused for, or nothing."""
    from gengap_dist.training.trainer import run

    prepare_folder(out, "run.json", resume=False)
    try:
        run(config(**settings), out, world=world)
    except UsageError as error:
        return str(error)
    return ""


def curvature(world: World) -> tuple[list[float], int]:
    """Hessian eigenvalues of 250,000 parameters, and the most MiB that it took of the GPU."""
    from gengap_dist.probes.hessian import hessian_eigenvalues

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(500, 500), nn.Tanh(), nn.Linear(500, 3)).to(world.device)
    batches = [(torch.randn(40, 500, device=world.device), torch.arange(40, device=world.device) % 3)]
    torch.cuda.reset_peak_memory_stats()
    found = hessian_eigenvalues(
        model, batches, torch.nn.CrossEntropyLoss(reduction="sum"), world=world, num=2, tolerance=1e-9, max_steps=120
    )
    return found, torch.cuda.max_memory_allocated() >> 20


def test_lanczos_keeps_its_basis_out_of_the_gpu(gpu):
    """120 vectors of 252,003 float64 are 231 MiB, more than the GPU has."""
    ((found, most),) = gpu(curvature)
    assert len(found) == 2
    assert found[0] > found[1]
    assert most < 80


def test_images_that_do_not_fit_are_kept_on_the_host(gpu, tmp_path):
    """1,797 digits of 256 x 256 are 112 MiB: more than half of what is free."""
    settings = (
        BASE | OFF | {"data__image_size": 256, "train__steps": 2, "data__augment": ("flip",), "launch__device": "cuda"}
    )
    settings |= {"model__name": f"{__name__}:coarse"}
    assert gpu(trained, settings, tmp_path / "auto") == [""]
    assert gpu(trained, settings | {"data__device": "cpu"}, tmp_path / "cpu") == [""]
    assert numbers(tmp_path / "auto") == numbers(tmp_path / "cpu")


def test_images_that_are_to_fit_and_do_not_are_refused_before_they_are_copied(gpu, tmp_path):
    settings = BASE | OFF | {"data__image_size": 384, "data__device": "cuda", "launch__device": "cuda"}
    (said,) = gpu(trained, settings, tmp_path / "run")
    assert said.startswith("data.device (cuda) keeps the 0.247 GiB of digits in the memory of every GPU, and Fake")
    assert said.endswith("choose data.device=auto, or cpu")


def coarse(num_classes: int, in_channels: int) -> nn.Module:
    return nn.Sequential(nn.AvgPool2d(32), nn.Flatten(), nn.Linear(64 * in_channels, num_classes))


def hungry(num_classes: int, in_channels: int) -> nn.Module:
    """Saves 0.6 MiB an image for its backward pass, of which an evaluation holds a twelfth at a time."""
    layers: list[nn.Module] = [nn.Conv2d(in_channels, 32, 3, padding=1), nn.ReLU()]
    for _ in range(9):
        layers += [nn.Conv2d(32, 32, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AvgPool2d(16), nn.Flatten(), nn.Linear(32, num_classes))


def test_auto_finds_a_micro_size_that_fits(gpu, tmp_path):
    settings = BASE | OFF | {"model__name": f"{__name__}:hungry", "data__image_size": 16, "train__steps": 1}
    settings |= {"launch__device": "cuda", "batch__global_size": 512, "batch__micro_size": "auto"}
    assert gpu(trained, settings, tmp_path / "run") == [""]
    assert 1 <= read_info(tmp_path / "run").micro_size <= 256


GPU = r"\(Fake H100 \(no GPU\), 0\.195 GiB\)"
REMEDIES = (
    "batch.micro_size (or auto)",
    "train.activation_checkpointing=true",
    "launch.strategy=fsdp or zero3",
    "data.device=cpu",
)
HUNGRY: Settings = {"batch__global_size": 1024, "batch__micro_size": 1024, "data__image_size": 16}
CUDNN = "GET was unable to find an engine to execute this computation"


class Greedy(nn.Module):
    """Takes 300 MiB where it is told to: in `start`, `training`, `evaluation` or nowhere, on some ranks."""

    def __init__(self, where: str, ranks: str = "01") -> None:
        super().__init__()
        self.where, self.ranks, self.act = where, ranks, nn.ReLU()
        self.layer = nn.Sequential(nn.Flatten(), nn.Linear(144, 24), nn.ReLU(), nn.Linear(24, 10))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [n, 10]."""
        now = "start" if len(images) == 2 else "training" if self.training else "evaluation"
        if self.where == now and os.environ["RANK"] in self.ranks:
            torch.empty(300 << 20, dtype=torch.uint8, device=images.device)
        return self.layer(images)


def greedy_at_the_start(num_classes: int, in_channels: int) -> nn.Module:
    return Greedy("start")


def greedy_in_training(num_classes: int, in_channels: int) -> nn.Module:
    return Greedy("training")


def greedy_in_evaluation(num_classes: int, in_channels: int) -> nn.Module:
    return Greedy("evaluation")


def greedy_on_rank_1(num_classes: int, in_channels: int) -> nn.Module:
    return Greedy("training", ranks="1")


def giant(num_classes: int, in_channels: int) -> nn.Module:
    """230 MiB of parameters."""
    return nn.Sequential(nn.Flatten(), nn.Linear(144, 400_000), nn.ReLU(), nn.Linear(400_000, num_classes))


class Unsupported(Greedy):
    """What cuDNN says to a pass, which may be memory or not."""

    def forward(self, images: Tensor) -> Tensor:
        """Nothing."""
        if self.training and type(images) is Tensor:  # and not one of those that only have a shape
            raise RuntimeError(CUDNN)
        return super().forward(images)


def unsupported(num_classes: int, in_channels: int) -> nn.Module:
    return Unsupported("nowhere")


class Buggy(Greedy):
    """Fails in training, for another reason."""

    def forward(self, images: Tensor) -> Tensor:
        """Nothing."""
        if self.training:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return super().forward(images)


def buggy(num_classes: int, in_channels: int) -> nn.Module:
    return Buggy("nowhere")


@pytest.mark.parametrize(
    ("model", "more", "doing", "words"),
    [
        ("giant", {}, r"starting \(step \d; ", "CUDA out of memory"),
        ("hungry", HUNGRY, r"forward and backward \(step 1; ", "CUDA out"),
        ("greedy_at_the_start", {}, r"starting \(step \d; ", "CUDA out of memory. Tried to allocate 300.00 MiB"),
        ("greedy_in_training", {}, r"forward and backward \(step 1; ", "CUDA out of memory. Tried to allocate 300"),
        ("greedy_in_evaluation", {}, r"evaluation \(step \d; ", "CUDA out of memory. Tried to allocate 300.00 MiB"),
        ("greedy_in_evaluation", {"probe__enabled": True, "data__val_fraction": 0.0}, r"probe \(step \d; ", "CUDA out"),
        ("unsupported", {}, r"forward and backward \(step 1; ", CUDNN),
    ],
)
def test_a_run_that_does_not_fit_says_so_in_a_sentence(gpu, tmp_path, model, more, doing, words):
    settings = BASE | OFF | {"model__name": f"{__name__}:{model}", "train__steps": 1, "launch__device": "cuda"} | more
    (said,) = gpu(trained, settings, tmp_path / "run")
    assert re.match(rf"rank 0 ran out of the memory of its GPU {GPU} in {doing}{re.escape(words)}", said), said
    assert all(remedy in said.rpartition("): ")[2] for remedy in REMEDIES)
    assert "\n" not in said


def test_another_error_stays_what_it_is(gpu, tmp_path):
    settings = BASE | OFF | {"model__name": f"{__name__}:buggy", "train__steps": 1, "launch__device": "cuda"}
    with pytest.raises(AssertionError, match="RuntimeError: CUDA error: an illegal memory access"):
        gpu(trained, settings, tmp_path / "run")


def test_auto_passes_on_what_the_library_said(gpu, tmp_path):
    settings = BASE | OFF | {"model__name": f"{__name__}:unsupported", "batch__micro_size": "auto"}
    (said,) = gpu(trained, settings | {"launch__device": "cuda"}, tmp_path / "run")
    assert said.startswith(
        f"batch.micro_size (auto) ran out of memory in a pass of 1 ({CUDNN}): set train.activation_checkpointing"
    )


@pytest.mark.parametrize(
    ("launcher", "model"),
    thinned(
        [("local", "greedy_in_training"), ("torchrun", "greedy_on_rank_1")], lambda launcher, _: launcher == "torchrun"
    ),
)
def test_a_command_says_it_once(tmp_path, launcher, model):
    """Whether both ranks run out of memory or one does, while the other is in the middle of a step."""
    start = ["-m", "gengap_dist.train", "--launch.num_processes", "2"]
    if launcher == "torchrun":
        start = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
        start += ["-m", "gengap_dist.train"]
    given = ["--model.name", f"{__name__}:{model}", "--data.image_size", "12", "--data.crop_padding", "2"]
    given += ["--mlflow.enabled", "false", "--probe.enabled", "false", "--train.steps", "2", "--launch.device", "cuda"]
    done = subprocess.run(
        [sys.executable, *start, *given, "--out", str(tmp_path / "run")],
        env=os.environ | fake_cuda.environment(2, mib=MIB),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == (1 if launcher == "torchrun" else 2), done.stderr  # torchrun has but one code
    assert "exitcode  : 2" in done.stderr or launcher == "local"
    assert done.stderr.count("ran out of the memory of its GPU") == 1, done.stderr
    ours = [line for line in done.stderr.splitlines() if line.startswith("gengap train")]
    assert len(ours) == 1, done.stderr
    assert "rank 1" in done.stderr or launcher == "local"


def recording(world: World) -> bool:
    """Whether allocations leave a trace."""
    before = len(torch.cuda.memory._snapshot()["device_traces"][0])
    torch.empty(3 << 20, dtype=torch.uint8, device=world.device)
    return len(torch.cuda.memory._snapshot()["device_traces"][0]) > before


@pytest.mark.parametrize(("wanted", "model"), [(True, "greedy_in_training"), (True, "plain"), (False, "giant")])
def test_a_snapshot_of_memory_is_written_where_it_runs_out(gpu, tmp_path, wanted, model):
    where = "tests.cuda.scenarios" if model == "plain" else __name__
    settings = BASE | OFF | {"model__name": f"{where}:{model}", "train__steps": 1, "launch__device": "cuda"}
    (said,) = gpu(trained, settings | {"launch__memory_snapshot": wanted}, tmp_path / "run")
    assert ("ran out of the memory" in said) == (model != "plain")
    if wanted and model != "plain":
        (written,) = (tmp_path / "run/memory").iterdir()
        assert written.name == "rank0.pickle"
        text = written.read_bytes()  # never loaded: a pickle runs what it likes
        assert all(word in text for word in (b"segments", b"oom", b"test_memory.py", b"forward"))
    else:
        assert not (tmp_path / "run/memory").exists()
    assert gpu(recording) == [False]
