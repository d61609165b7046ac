"""Compares speeds on one GPU: candidates take turns, as in `peers.py`; the GPU is synchronized around each timing."""

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import paired_timing
import torch
from baselines import Field, Mode, Turn, Workload, gengap, synthetic_baseline, wait_until_idle

from gengap_dist import models
from gengap_dist.compat.float32_precision import training_float32
from gengap_dist.data import datasets
from gengap_dist.distributed.process_group import World
from gengap_dist.training.autotune.available_memory import available_memory
from gengap_dist.training.autotune.micro_batch import pass_bytes_function
from gengap_dist.training.autotune.synthetic_workload import synchronise
from gengap_dist.training.tasks import Classification

from .items import Answer, failure
from .runs import Settings

NUM_IMAGES, NUM_TEST, NUM_CLASSES, SIDE = 16_384, 100, 10, 32
ROUNDS, TURN_SECONDS, UNTIMED, HOST_TURNS = 6, 0.3, 2, 5
MEMORY_SHARE = 0.5  # of the GPU memory for one pass; memory freed by other candidates may be fragmented


class Racer(NamedTuple):
    """A candidate."""

    work: Callable[[Turn], None]
    tf32: bool = False
    """Whether its turns use TF32 for float32 matrix products."""


class Way(NamedTuple):
    """A precision and memory format: as settings of gengap_dist, and as a mode of the peers."""

    settings: Settings = {}
    mode: Mode = Mode()
    tf32: bool = False

    def compiled(self) -> "Way":
        """The same with torch.compile."""
        return Way({**self.settings, "train.compile": True}, self.mode._replace(compile=True), self.tf32)


BF16: Settings = {"train.autocast": "bfloat16"}
WAYS: dict[str, Way] = {
    "fp32": Way(),
    "TF32": Way({"train.tf32": True}, tf32=True),
    "bf16": Way(BF16, Mode(torch.bfloat16)),
    "bf16 NHWC": Way({**BF16, "train.channels_last": True}, Mode(torch.bfloat16, channels_last=True)),
}


@cache
def images() -> Path:
    """A folder of random images with the shape of CIFAR-10, created once for all processes of a command."""
    folder = Path(tempfile.gettempdir()) / "images"
    if folder.is_dir():
        return folder
    part, generator = Path(tempfile.mkdtemp()), torch.Generator().manual_seed(0)
    for split, number in (("train", NUM_IMAGES), ("test", NUM_TEST)):
        pixels = torch.randint(256, (number, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator).numpy()
        for label in range(NUM_CLASSES):
            (part / split / str(label)).mkdir(parents=True)
        for at, image in enumerate(pixels):
            path = part / split / str(at % NUM_CLASSES) / f"{at}.ppm"
            path.write_bytes(b"P6 %d %d 255\n" % (SIDE, SIDE) + image.tobytes())
    return part.rename(folder)


def task(model: str, global_size: int) -> Workload:
    """A network on those images; batch-norm groups are micro-batches for all candidates."""
    return Workload(f"{model}, {global_size:,}", model, {"name": "imagefolder"}, "", global_size, True, lr=1e-3)


def field(world: World, workload: Workload, way: Way) -> Field:
    """The inputs of the candidates of one way; micro-batches are the largest that fit in float32."""
    parts = workload.global_size // largest_that_fits(world, workload.model, workload.global_size)
    return Field(workload, _splits(), world, images(), parts, way.mode)


@cache
def _splits() -> datasets.Splits:
    return datasets.load(task("lenet5", 64).settings(images()).data)


@cache
def largest_that_fits(world: World, model_name: str, global_size: int) -> int:
    """Images per pass: the whole batch, halved until its memory fits."""
    config, splits = task(model_name, global_size).settings(images()), _splits()
    model = models.from_config(config, splits.spec, World())
    num_bytes, free = (
        pass_bytes_function(config, model, Classification(splits.spec)),
        MEMORY_SHARE * available_memory(world.device, 1),
    )
    size = global_size
    while num_bytes(size) > free and size % 2 == 0:
        size //= 2
    return size


def ours(given: Field, way: Way, **more: Any) -> Racer:
    """A complete run of this package."""
    return Racer(partial(gengap, given, **{**way.settings, **more}), way.tf32)


def bare(given: Field, way: Way) -> Racer:
    """The step on one resident micro-batch."""
    return Racer(partial(synthetic_baseline, given), way.tf32)


def race(world: World, global_size: int, racers: Mapping[str, Racer], rounds: int = ROUNDS) -> Answer:
    """Images per second of each candidate by round; milliseconds of a step and of the host alone; first-step seconds.

    A candidate that fails is left out and reported.
    """
    turns: dict[str, Turn] = {}
    failed: dict[str, Answer] = {}
    first: dict[str, float] = {}
    each: dict[str, float] = {}
    for who, racer in racers.items():
        turns[who] = Turn(racer.work)
        try:
            first[who] = _seconds(world, racer, turns[who], 1)[1]
            each[who] = min(_seconds(world, racer, turns[who], 1)[1] for _ in range(UNTIMED))
        except RuntimeError as error:
            failed[who] = failure(error.__cause__ or error)
            del turns[who]
        torch.cuda.empty_cache()

    def images_per_second(who: str) -> float:
        wait_until_idle()
        _seconds(world, racers[who], turns[who], UNTIMED)
        num_steps = max(1, round(TURN_SECONDS / each[who]))
        took = _seconds(world, racers[who], turns[who], num_steps)[1]
        torch.cuda.empty_cache()
        return num_steps * global_size / took

    speeds = paired_timing.in_turns({who: partial(images_per_second, who) for who in turns}, rounds)
    host = {who: _host(world, racers[who], turns[who]) for who in turns}
    return {
        "images_per_second": speeds,
        "step_ms": {who: 1000 * global_size / statistics.median(speeds[who]) for who in turns},
        "host_ms": {who: 1000 * seconds for who, seconds in host.items()},
        "first_step_seconds": {who: first[who] for who in turns},
        "failed": failed,
    }


def _seconds(world: World, racer: Racer, turn: Turn, num_steps: int) -> tuple[float, float]:
    """Seconds until the host has issued `num_steps` steps, and until the GPU has finished them."""
    with training_float32(world.device, tf32=racer.tf32):
        synchronise(world)
        began = time.perf_counter()
        turn.steps(num_steps)
        begun = time.perf_counter() - began
        synchronise(world)
        return begun, time.perf_counter() - began


def _host(world: World, racer: Racer, turn: Turn) -> float:
    """Median seconds of the host for one step, with an idle GPU."""
    wait_until_idle()
    _seconds(world, racer, turn, UNTIMED)
    return statistics.median(_seconds(world, racer, turn, 1)[0] for _ in range(HOST_TURNS))
