"""A profiled run is the same run, and says where its steps' time goes."""

import gzip
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from gengap_dist.config.sections import DataConfig
from gengap_dist.distributed.process_group import World
from gengap_dist.models.lenet5 import LeNet5
from gengap_dist.runs.run_folder import prepare_folder, read_info, read_metrics
from gengap_dist.training.profiler.profile import Profile, with_profiler_clock
from gengap_dist.training.profiler.summary import PARTS, ProfileSetting, RankProfile, summary
from gengap_dist.training.profiler.trace import Trace
from gengap_dist.training.trainer import run
from tests.conftest import FULL, config, cut_after, thinned, train, weights

SHORT: dict[str, Any] = {"train__steps": 20, "batch__global_size": 40, "probe__num_samples": 64, "profile": True}
SLEEP = 0.3  # far longer than a step, on a machine that is busy with other things, too


class Slow(LeNet5):
    """Rank 1 sleeps in its forward passes of training."""

    def forward(self, images: Tensor) -> Tensor:
        if self.training and os.environ["RANK"] == "1":
            time.sleep(SLEEP)
        return super().forward(images)


def slow(num_classes: int, in_channels: int) -> nn.Module:
    return Slow(num_classes, in_channels, image_size=32, activation="relu")


def names(out: Path, rank: int) -> set[str]:
    """Of what a rank's trace holds."""
    with gzip.open(out / "profile" / f"rank{rank}.json.gz", "rt") as file:
        return {event.get("name", "") for event in json.load(file)["traceEvents"]}


def said(out: Path) -> str:
    """The summary, which is of one screen and whose parts make up the step."""
    text = (out / "profile" / "summary.txt").read_text()
    lines = text.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 120
    for parts in rows(text).values():
        assert sum(parts[1:]) == pytest.approx(parts[0], abs=0.005 * len(parts) + 1e-9)
        assert parts[0] > 0
    return text


def rows(text: str) -> dict[str, list[float]]:
    """Rank to milliseconds of a step and of its parts."""
    table = text.partition("\nrank ")[2].partition("\ncommunication:")[0].splitlines()[1:]
    assert table
    cells = [[cell for cell in line.split() if not cell.endswith("%")] for line in table]
    return {rank: [float(cell) for cell in more] for rank, *more in cells}


def numbers(out: Path) -> list[dict[str, float]]:
    """What was recorded, but for what a clock said."""
    clocks = ("time/", "probe_seconds", "seconds")
    return [{k: v for k, v in line.items() if not k.startswith(clocks)} for line in read_metrics(out)]


@pytest.mark.parametrize(
    ("size", "more"),
    thinned(
        [(1, {}), (2, {"batch__micro_size": 8}), (2, {"launch__strategy": "fsdp"})],
        lambda size, more: more == {"batch__micro_size": 8},
    ),
)
def test_a_profiled_run_is_the_same_run(tmp_path, pools, size, more):
    for name, profile in (("plain", False), ("profiled", True)):
        prepare_folder(tmp_path / name, "run.json", resume=False)
        run_config = config(**SHORT | more | {"profile": profile})
        pools[size].run(run_config, tmp_path / name, resume=False, progress=lambda *_: None)
    plain, profiled = tmp_path / "plain", tmp_path / "profiled"
    assert numbers(plain) == numbers(profiled)
    assert all(torch.equal(value, weights(plain)[name]) for name, value in weights(profiled).items())
    assert not (plain / "profile").exists()
    for rank in range(size):
        found = names(profiled, rank)
        ours = {"forward", "backward", "optimizer", "data", "step 16", "step 20"}
        assert {f"gengap/{name}" for name in ours} <= found
        assert "aten::mkldnn_convolution" in found
    text = said(profiled)
    assert len(rows(text)) == size
    assert "steps 16 to 20): " in text  # with the profiler
    assert "aten::convolution_backward" in text
    assert {path.name for path in (profiled / "profile").iterdir()} == {
        "summary.txt",
        *(f"rank{rank}.json.gz" for rank in range(size)),
    }


@pytest.mark.parametrize("strategy", thinned(["ddp", "fsdp"], lambda name: name == "fsdp"))
def test_the_slow_rank_is_named(tmp_path, pools, strategy):
    prepare_folder(tmp_path / "run", "run.json", resume=False)
    more = {"model__name": "tests.training.test_profiler:slow", "train__steps": 6, "launch__strategy": strategy}
    pools[2].run(config(**SHORT | more), tmp_path / "run", resume=False, progress=lambda *_: None)
    text = said(tmp_path / "run")
    assert re.search(r"^rank 1 computes \d\.\d\dx as long as the mean of all ranks, most of it in forward", text, re.M)
    found = rows(text)
    forward, communication = 1 + PARTS.index("forward"), 1 + PARTS.index("communication")
    assert found["1"][forward] - found["0"][forward] > 0.5 * 1000 * SLEEP
    assert found["0"][communication] > 0.5 * 1000 * SLEEP
    assert "operators of rank 1" in text


def test_three_steps_and_one(tmp_path):
    train(tmp_path / "three", **{**SHORT, "train__steps": 3})
    assert "(step 2), " in said(tmp_path / "three")
    assert "gengap/step 3" in names(tmp_path / "three", 0)
    train(tmp_path / "one", **{**SHORT, "train__steps": 1})
    assert "mean of step 1" in said(tmp_path / "one")


def test_a_run_that_ends_within_the_window_tells_what_it_has(tmp_path):
    """As one does whose target is met there."""
    world = with_profiler_clock(World())
    profile = Profile(tmp_path, world, config(), "single", has_untimed_collectives=False)
    for step in range(1, 9):
        world.timer.step = step
        profile.begin(21 - step)
        with world.timer.span("forward"):
            time.sleep(0.01)
        profile.end()
    profile.finish()
    text = said(tmp_path)
    assert "mean of steps 6 to 8" in text
    assert "operators" not in text
    step, _, forward, *_ = rows(text)["0"]
    assert 10 <= forward <= step


def test_a_resumed_run_profiles_again(tmp_path):
    out = tmp_path / "run"
    more: dict[str, Any] = {**SHORT, "train__steps": 8, "checkpoint__every_steps": 4}
    train(out, resume=False, **more | {"profile": False})
    cut_after(out, 4)
    train(out, resume=True, **more)
    assert "(steps 7 to 8)" in said(out)


def test_a_folder_that_cannot_be_written_loses_the_profile_and_not_the_run(tmp_path):
    out = tmp_path / "run"
    prepare_folder(out, "run.json", resume=False)

    def block(done: int, total: int, note: str) -> None:
        if done == 1:
            (out / "profile").write_text("in the way")

    with pytest.warns(UserWarning, match=r"profile could not be written .* \(rank 0: File exists, and 1 more\)"):
        run(config(**SHORT | {"train__steps": 3}), out, progress=block)
    assert read_info(out).status == "finished"


def event(name: str, start: float, end: float, *, on: str = "CPU", **more: Any) -> FunctionEvent:
    """As torch's profiler makes one on a GPU; microseconds."""
    kind = getattr(DeviceType, on)
    return FunctionEvent(1, name, thread=1, start_us=start, end_us=end, use_device="cuda", device_type=kind, **more)


def on_a_gpu(step: int, begin: float, late: float) -> list[FunctionEvent]:
    """A step of 100 us on the host, whose kernels begin `late` us after it does, with their ranges on both."""
    gpu = begin + late
    name, region = f"gengap/step {step}", "Torch-Compiled Region: 0/0"
    linear, compiled = event("aten::mm", begin + 10, begin + 20), event(region, begin + 30, begin + 60)
    compiled.is_user_annotation = True
    linear.append_kernel("gemm", 0, 40.0)
    compiled.append_kernel("triton_relu", 0, 5.0)
    compiled.append_kernel(region, 0, 70.0)  # torch links the copy of a range as it does a kernel
    return [
        event(name, begin, begin + 100, is_user_annotation=True),
        linear,
        compiled,
        event("gemm", gpu, gpu + 40, on="CUDA"),
        event("triton_relu", gpu + 105, gpu + 110, on="CUDA"),
        event(region, gpu + 40, gpu + 110, on="CUDA", is_user_annotation=True),
        event(name, gpu, gpu + 110, on="CUDA", is_user_annotation=True),
    ]


@pytest.mark.parametrize("late", [20.0, 250.0])
def test_a_gpu_names_ranges_a_second_time(late):
    """Steps are counted on the host; kernels count for who launched them, though they ran after the step."""
    trace = Trace(on_a_gpu(1, 0.0, late) + on_a_gpu(2, 500.0, late))
    assert trace.num_steps == 2
    assert trace.operators() == [("aten::mm", 1.0, 0.04), ("Torch-Compiled Region: 0/0", 1.0, 0.005)]


def test_what_a_gpu_does_is_no_meeting_of_the_host():
    ranges = [("step 1", 0, 100, "CPU"), ("step 1", 90, 400, "CUDA")]
    ranges += [("backward", 10, 50, "CPU"), ("backward", 95, 300, "CUDA")]
    named = [event(f"gengap/{name}", *when, on=on, is_user_annotation=True) for name, *when, on in ranges]
    meets = [event("gloo:all_reduce", 20, 40, is_async=True), event("nccl", 110, 200, on="CUDA", is_async=True)]
    assert Trace(named + meets).exposed_communication("backward") == pytest.approx(0.02)


def test_many_ranks_are_folded():
    parts = dict.fromkeys(PARTS, 1.0)
    told = [
        RankProfile(r, [6.0 + r] * 3, [9.0], parts | {"forward": 1.0 + r}, 6.0 + r, [("a" * 200, 1.0, 2.0)], None)
        for r in range(64)
    ]
    text = summary(told, ProfileSetting(6, 9, "cuda", "ddp", has_untimed_collectives=False, data=DataConfig()))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 120
    assert len(lines) < 25
    cells = {line.split()[0]: line.split()[1:] for line in filter(None, lines)}
    assert cells["min"][:3] == ["6.00", "1.00", "1.00"]
    assert cells["median"][:3] == ["37.50", "1.00", "32.50"]
    assert cells["max"][2] == "64.00"
    assert any(line.startswith("slowest: 63") for line in lines)
    assert "rank 63 computes 1.84x" in text


def test_flag(gengap, tmp_path):
    words = ["--mlflow.enabled", "false", "--train.steps", "3", "--probe.num_samples", "32"]
    done = gengap("train", "--profile", *words, "--launch.num_processes", 2 if FULL else 1, "--out", "run")
    assert done.returncode == 0, done.stderr
    assert said(tmp_path / "run") in done.stdout
    assert str(tmp_path / "run" / "profile") in done.stdout
    assert "profile: true" in (tmp_path / "run" / "config.yaml").read_text()
    assert "profiler" not in done.stderr.lower()  # kineto would say that it begins and ends
