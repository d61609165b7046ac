"""Images per second on one GPU: this package, plain torch, Lightning and the bare step; and linear algebra.

The images are random, of CIFAR-10's shape. gengap_dist reads them from memory like any data set; torch and Lightning
decode them with PIL in loader processes, as in their tutorials; the bare step has one resident micro-batch on the GPU.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import paired_timing
import torch
from baselines import lightning, torch_ddp
from tables import table

from gengap_dist import models
from gengap_dist.config.loading import nested, validate
from gengap_dist.config.sections import RunConfig
from gengap_dist.data.data_spec import DataSpec
from gengap_dist.distributed.cores import available_cores
from gengap_dist.distributed.process_group import World
from gengap_dist.probes import measure
from gengap_dist.training.autotune.synthetic_workload import synchronise

from .items import Answer, Item, Part
from .racing import WAYS, Racer, bare, field, largest_that_fits, ours, race, task

TITLES = {"resnet56": "ResNet-56", "lenet5": "LeNet-5", "vgg16": "VGG-16"}
THEIRS = {"TF32": "32-true", "bf16": "bf16-mixed"}  # precisions of torch and Lightning; the value is Lightning's name
MAX_WORKERS = 8  # of a loader
AHEAD = 0.9  # share of a step: with less host time, the host waits for the GPU


def _workers() -> int:
    return max(1, min(MAX_WORKERS, available_cores().whole - 1))


def race_of(model: str, global_size: int, with_lightning: bool, world: World) -> Answer:
    """All candidates, in all ways except compiled."""
    workload, racers = task(model, global_size), dict[str, Racer]()
    for name, way in WAYS.items():
        given = field(world, workload, way)
        racers[f"ours, {name}"] = ours(given, way)
        racers[f"bare step, {name}"] = bare(given, way)
        if name in THEIRS:
            racers[f"torch, {name}"] = Racer(partial(torch_ddp, given, workers=_workers()), way.tf32)
        if name in THEIRS and with_lightning:
            trainer = partial(lightning, given, workers=_workers(), precision=THEIRS[name])
            racers[f"Lightning, {name}"] = Racer(trainer, way.tf32)
    if model == "lenet5":  # which has no batch norm: a micro-batch may be of any size
        way = WAYS["bf16"]
        racers["ours, bf16, micro_size=auto"] = ours(field(world, workload, way), way, **{"batch.micro_size": "auto"})
    absent = [] if with_lightning else ["Lightning"]
    return _with_text(race(world, global_size, racers), world, model, global_size, "bf16") | {"absent": absent}


def race_compiled(model: str, global_size: int, world: World) -> Answer:
    """Compiled and uncompiled."""
    workload, way = task(model, global_size), WAYS["bf16 NHWC"]
    given, compiled = field(world, workload, way), field(world, workload, way.compiled())
    racers = {
        "ours, bf16 NHWC": ours(given, way),
        "ours, compiled": ours(compiled, way.compiled()),
        "bare step, compiled": bare(compiled, way.compiled()),
    }
    return _with_text(race(world, global_size, racers), world, model, global_size, "compiled")


def _with_text(race_answer: Answer, world: World, model: str, global_size: int, way: str) -> Answer:
    """`race_answer`, with a line of text about one way."""
    speeds = race_answer["images_per_second"]
    own, baseline = speeds.get(f"ours, {way}"), speeds.get(f"bare step, {way}")
    text = f"ours, {way}: failed" if own is None else f"ours, {way}: {statistics.median(own):,.0f} images/s"
    text += f", {paired_timing.ratio(own, baseline)} of the bare step" if own and baseline else ""
    failed = race_answer["failed"]
    text += f"; failed: {', '.join(failed)}" if failed else ""
    good = not any(who.startswith("ours") for who in failed)
    micro_size = largest_that_fits(world, model, global_size)
    return {"good": good, "text": text, "global_size": global_size, "micro_size": micro_size, **race_answer}


# -- linear algebra ---------------------------------------------------------------------------------------------------

SYMMETRIC = (16, 64, 256, 512, 1024, 2048)  # eigenvalues of a D x D or N x N matrix: channels, units, probe images
WEIGHTS = ((6, 25), (16, 144), (64, 576), (512, 512), (512, 4608))  # singular values of a layer's weight
AGREE = 1e-10  # of the largest value


def linear_algebra(world: World) -> Answer:
    """Eigenvalues and singular values in float64, on the GPU and on the CPU: speed and agreement."""
    generator = torch.Generator().manual_seed(0)
    rows: list[dict[str, Any]] = []
    for size in SYMMETRIC:
        factor = torch.randn(size, size, dtype=torch.float64, generator=generator)
        rows.append(_both(f"eigvalsh {size}", torch.linalg.eigvalsh, factor @ factor.T, world))
    for shape in WEIGHTS:
        weight = torch.randn(shape, dtype=torch.float64, generator=generator)
        rows.append(_both(f"svdvals {shape[0]} x {shape[1]}", torch.linalg.svdvals, weight, world))
    faster = [row["what"] for row in rows if row["gpu_ms"] < row["cpu_ms"]]
    wrong = [row["what"] for row in rows if row["difference"] > AGREE]
    text = f"faster on the GPU: {', '.join(faster) or 'nothing'}"
    return {
        "good": not wrong,
        "text": text + (f"; different values: {', '.join(wrong)}" if wrong else ""),
        "rows": rows,
    }


def _both(what: str, solve: Callable[[torch.Tensor], torch.Tensor], matrix: torch.Tensor, world: World) -> Answer:
    there = matrix.to(world.device)
    gpu, cpu = _median(partial(solve, there), world), _median(partial(solve, matrix), World())
    values = solve(matrix)
    difference = float((solve(there).cpu() - values).abs().max() / values.abs().max())
    return {"what": what, "gpu_ms": 1000 * gpu, "cpu_ms": 1000 * cpu, "difference": difference}


def _median(job: Callable[[], object], world: World, times: int = 5) -> float:
    """Seconds of a job: median of `times` repetitions, after a warm-up."""
    took: list[float] = []
    for _ in range(times + 1):
        synchronise(world)
        began = time.perf_counter()
        job()
        synchronise(world)
        took.append(time.perf_counter() - began)
    return statistics.median(took[1:])


PROBES = {
    "LeNet-5, channel and pool": ("lenet5", ("channel", "pool")),
    "ResNet-56, channel and pool": ("resnet56", ("channel", "pool")),
    "ResNet-56, flatten": ("resnet56", ("flatten",)),
    "VGG-16, flatten": ("vgg16", ("flatten",)),
}


def probe(model: str, views: tuple[str, ...], num_images: int, world: World) -> Answer:
    """Seconds of one near-rank-loss measurement of an untrained network, all layers."""
    network = models.from_config(
        validate(RunConfig, nested({"model.name": model})), DataSpec.images(10, 3), World()
    ).to(world.device)
    generator = torch.Generator().manual_seed(0)
    batches = torch.randn(num_images, 3, 32, 32, generator=generator).to(world.device).split(128)
    took = _median(partial(measure, network, batches, views=views, world=world), world, times=3)
    return {"good": True, "text": f"{took:.3f} s for {num_images:,} images", "took": took, "num_images": num_images}


# -- the part ---------------------------------------------------------------------------------------------------------


def items(with_lightning: bool) -> list[Item]:
    """All items, the most informative first."""

    def race_item(model: str, size: int, seconds: float) -> Item:
        job = partial(race_of, model, size, with_lightning)
        return Item(f"{TITLES[model]}, {size:,}", job, seconds, alone=True)

    def compiled(model: str) -> Item:
        return Item(f"{TITLES[model]}, 1,024, compiled", partial(race_compiled, model, 1024), 120.0, alone=True)

    return [
        race_item("resnet56", 1024, 90.0),
        race_item("lenet5", 1024, 60.0),
        Item("linear algebra", linear_algebra, 20.0),
        *(Item(f"probe, {name}", partial(probe, *what, 1024), 15.0) for name, what in PROBES.items()),
        race_item("vgg16", 1024, 90.0),
        compiled("resnet56"),
        race_item("resnet56", 16_384, 180.0),
        race_item("lenet5", 16_384, 120.0),
        race_item("vgg16", 16_384, 180.0),
        compiled("vgg16"),
        compiled("lenet5"),
    ]


def write(answers: Mapping[str, Answer]) -> str:
    """A table for each race, and for linear algebra."""
    blocks: list[str] = []
    for name, answer in answers.items():
        if "images_per_second" in answer:
            size, micro = answer["global_size"], answer["micro_size"]
            rounds = max(map(len, answer["images_per_second"].values()), default=0)
            blocks.append(f"**{name}**: {size // micro} micro-batches of {micro:,} a step, {rounds} rounds")
            blocks += [f"{who} was not installed there." for who in answer.get("absent", ())]
            blocks.append(speeds(answer))
        elif "rows" in answer:
            rows = [[row["what"], *(f"{row[key]:.2f}" for key in ("gpu_ms", "cpu_ms"))] for row in answer["rows"]]
            blocks += [f"**{name}**, float64", table(["", "GPU, ms", "CPU, ms"], rows)]
        else:
            blocks.append(f"**{name}**: {answer['text']}")
    return "\n\n".join(blocks)


def speeds(answer: Answer) -> str:
    """Speed of each candidate, ratios over the bare step and torch in the same way, and whether the host is ahead."""
    by_candidate, rows = answer["images_per_second"], []
    for name, values in by_candidate.items():
        way = name.partition(", ")[2].removesuffix(", micro_size=auto")
        references = [by_candidate.get(f"{reference}, {way}") for reference in ("bare step", "torch")]
        ratios = [
            str(paired_timing.ratio(values, reference)) if reference and reference is not values else ""
            for reference in references
        ]
        low, high = paired_timing.interval(values)
        host, step = answer["host_ms"][name], answer["step_ms"][name]
        times = [f"{step:.2f}", f"{host:.2f}", "yes" if host < AHEAD * step else "no"]
        rows.append([name, f"{statistics.median(values):,.0f} ({low:,.0f} to {high:,.0f})", *ratios, *times])
    rows += [[name, failed["text"], "", "", "", "", ""] for name, failed in answer["failed"].items()]
    head = ["", "images/s", "over the bare step", "over torch", "ms a step", "ms of the host", "host is ahead"]
    return table(head, rows)


LIGHTNING = not Item("", linear_algebra, 0.0, "lightning").missing
PART = Part("Speed", "How fast is a step, beside others and beside the bare one?", items(LIGHTNING), write)
