"""Strong and weak scaling of our own step on this machine, what `gengap plan` predicts of it, and a simulated curve.

    python benchmarks/scaling.py [--models lenet5 resnet56 vgg16] [--rounds 7] [--device cpu] [--out docs/benchmarks]

Groups of 1, 2, 4 and at most 8 ranks (as many as there are cores, or GPUs if there are two) are up all the time, one
thread for each rank, and take turns: one computes, the others sleep. A step is `loop.train_step` on random images.

  strong  8 micro-batches of images in all, however many ranks share them
  weak    one micro-batch for each rank
  plan    the constants of `gengap plan --calibrate`, found in the same rounds by two ranks at once, and its prediction

Figures are medians over rounds, and every ratio is taken within a round; one that the noise covers is not printed. The
curve to 4,096 ranks is plan's model alone: its assumptions stand on the picture.

Writes scaling_measured.svg, scaling_simulated.svg and scaling.json into --out.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import paired_timing
import torch
from predicted import MODES, TITLES, Task, task
from rich.console import Console
from rich.table import Table
from scaling_data import Found, Point, middle, middle_link
from worker_pool import WorkerPool

from gengap_dist import models
from gengap_dist.data.batch_loader import BatchLoader
from gengap_dist.distributed.process_group import World
from gengap_dist.parallel.strategies import STRATEGIES, Strategy
from gengap_dist.preflight import calibrate
from gengap_dist.preflight.machine_constants import ComputeConstants, LinkConstants
from gengap_dist.training.algorithms.base import batch_plan_for
from gengap_dist.training.autotune import synthetic_workload
from gengap_dist.training.checks import strategy_name
from gengap_dist.training.optimizer import build_optimizer as build_optimizer
from gengap_dist.training.step import StepBatch, train_step

LARGEST = 8  # ranks
MICRO_SIZES = {  # images in a micro-batch: on a CPU small ones fit the cache, and turns must be short
    "cpu": {"lenet5": 128, "resnet56": 16, "vgg16": 8},
    "cuda": {"lenet5": 1024, "resnet56": 256, "vgg16": 256},
}


# -- what ranks do ----------------------------------------------------------------------------------------------------


READY: dict[str, tuple[Strategy, BatchLoader]] = {}  # by network, in this rank


def get_ready(world: World, name: str, what: Task) -> None:
    """Build the network, its strategy and random images."""
    config, sizes, _ = what
    network = models.from_config(config, sizes.num_classes, sizes.in_channels, World()).to(world.device)
    strategy = STRATEGIES[strategy_name(config, world.size)](config, world)
    strategy.setup(network.train(), partial(build_optimizer, config.optim))
    number = LARGEST * config.batch.max_micro_size
    READY[name] = (
        strategy,
        synthetic_workload.random_batches(config, sizes.in_channels, sizes.num_classes, number, world.device),
    )


def train(world: World, name: str, what: Task, global_size: int, num_steps: int) -> float:
    """Seconds of a step, the mean of `num_steps`."""
    strategy, batches = READY[name]
    spans = batch_plan_for(what.config, global_size, world.size).micro_batches(world.rank)
    work = StepBatch(torch.randperm(global_size), 0, spans)
    synthetic_workload.synchronise(world)
    world.barrier()
    began = time.perf_counter()
    for _ in range(num_steps):
        train_step(strategy, batches, work)
    synthetic_workload.synchronise(world)
    world.barrier()
    return (time.perf_counter() - began) / num_steps


def time_compute(world: World, what: Task) -> ComputeConstants:
    """Plan's constants of computing."""
    return calibrate.time_compute(what.config, what.sizes, what.config.batch.max_micro_size, world)


def time_link(world: World) -> LinkConstants:
    """Plan's constants of the link."""
    return calibrate.time_link(world)


# -- the rounds -------------------------------------------------------------------------------------------------------


def measure(names: Sequence[str], most: int, rounds: int, seconds: float, device: str) -> Found:
    """Everybody's turns."""
    tasks = {name: task(name, MICRO_SIZES[device][name], device) for name in names}
    pools = {size: WorkerPool(size, device) for size in (1, 2, 4, 8) if size <= most}
    candidates: dict[Any, Callable[[], Any]] = {"link": partial(pools[2], time_link)}
    for name, what in tasks.items():
        micro = what.config.batch.max_micro_size
        for pool in pools.values():
            pool(get_ready, name, what)
        for mode in MODES:
            for size, pool in pools.items():
                point = Point(name, mode, size, LARGEST * micro if mode == "strong" else micro * size)
                pool(train, name, what, point.global_size, 2)  # nobody's first steps count
                once = pool(train, name, what, point.global_size, 1)
                num_steps = max(1, round(seconds / once))
                candidates[point] = partial(pool, train, name, what, point.global_size, num_steps)
        candidates[name, "alone"] = partial(pools[1], time_compute, what)
        candidates[name, "beside"] = partial(pools[2], time_compute, what)
    by_turn = paired_timing.in_turns(candidates, rounds)
    for pool in pools.values():
        pool.leave()
    return Found(
        tasks,
        {point: values for point, values in by_turn.items() if isinstance(point, Point)},
        {name: by_turn[name, "beside"] for name in names},
        {name: by_turn[name, "alone"] for name in names},
        by_turn["link"],
    )


# -- what they mean ---------------------------------------------------------------------------------------------------


def show(found: Found, title: str, rounds: int) -> None:
    """Print the table, and what lies behind it."""
    console = Console(width=170)
    table = Table(title=f"{title}; one thread a rank, medians of {rounds} rounds (least to most)")
    for head in ("network", "scaling", "ranks", "images a step", "ms a step", "images/s", "efficiency", "plan: ms"):
        table.add_column(head, justify="left" if head in ("network", "scaling") else "right")
    table.add_column("plan / measured", justify="right")
    for point, taken in found.steps.items():
        seconds, said = statistics.median(taken), statistics.median(found.predicted(point, found.beside))
        table.add_row(
            TITLES[point.model],
            point.mode,
            str(point.ranks),
            f"{point.global_size:,}",
            f"{seconds * 1e3:,.1f} ({min(taken) * 1e3:,.1f} to {max(taken) * 1e3:,.1f})",
            f"{point.global_size / seconds:,.0f}",
            str(found.efficiency(point)) if point.ranks > 1 else "",
            f"{said * 1e3:,.1f}",
            str(found.error(point)),
        )
    console.print(table)
    for line in remarks(found):
        console.print(line)


def remarks(found: Found) -> list[str]:
    """What the constants were, and what two ranks take from each other before they say a word."""
    link = middle_link(found.links)
    lines = [f"The link of two ranks: {link.alpha * 1e6:.0f} µs a message, {link.beta * 1e9:.2f} ns a byte."]
    for name in found.tasks:
        each, crowding = middle(found.beside[name]), found.crowding(name)
        line = f"{TITLES[name]}: {each.seconds_per_sample * 1e6:,.0f} µs an image beside a second busy rank, which is "
        if not crowding.told:
            line += f"not to be told from what it takes alone: {crowding}."
        else:
            line += f"{crowding} times what it takes alone"
            line += ": they compete for memory, which plan's model does not know." if crowding.median > 1 else "."
        lines.append(line)
    return lines


def as_json(found: Found) -> dict[str, Any]:
    """All numbers of the rounds; a ratio whose doubt is not empty is not to be quoted."""
    points = [
        point._asdict()
        | {"seconds": taken, "predicted_seconds": found.predicted(point, found.beside)}
        | {"predicted_over_measured": found.error(point)._asdict()}
        | {"predicted_from_one_alone_over_measured": found.error(point, found.alone)._asdict()}
        | {"efficiency": found.efficiency(point)._asdict()}
        for point, taken in found.steps.items()
    ]
    constants = {
        name: {
            "micro_size": what.config.batch.max_micro_size,
            "gradient_bytes": what.gradient_bytes,
            "beside_another_rank": [each.model_dump() for each in found.beside[name]],
            "alone": [each.model_dump() for each in found.alone[name]],
            "beside_over_alone": found.crowding(name)._asdict(),
        }
        for name, what in found.tasks.items()
    }
    return {"points": points, "constants": constants, "link": [link.model_dump() for link in found.links]}


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=[*TITLES], default=[*TITLES])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a turn, more or less")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there are two GPUs")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # the ranks' too
    torch.set_num_threads(1)
    num_gpus, machine = torch.cuda.device_count(), paired_timing.machine()
    device = options.device or ("cuda" if num_gpus > 1 else "cpu")
    most = min(LARGEST, num_gpus if device == "cuda" else machine["cores"])
    if most < 2:
        parser.error(f"scaling needs two ranks, and this machine has room for {most} on {device}: choose --device cpu")

    from scaling_figures import measured, save, simulated, simulation

    began, name, busy = time.monotonic(), paired_timing.in_words(machine), paired_timing.busy()
    beside = f"Others kept {busy:.0%} of the cores busy: the figures hold beside them only. " if busy > 0.1 else ""
    if beside:
        print(beside)
    found = measure(options.models, most, options.rounds, options.seconds, device)
    show(found, name, options.rounds)
    computed = {model: middle(found.beside[model]) for model in options.models} if device == "cpu" else {}
    curves, assumptions = simulation(computed, found.tasks, middle_link(found.links), name)
    options.out.mkdir(parents=True, exist_ok=True)
    said = f"{name}; one thread a rank, {options.rounds} rounds. {beside}"
    save(measured(found, said + " ".join(remarks(found))), options.out / "scaling_measured.svg")
    save(simulated(curves, assumptions), options.out / "scaling_simulated.svg")
    told = {"machine": machine, "device": device, "rounds": options.rounds, "threads_per_rank": 1, "busy_before": busy}
    told |= {"measured": as_json(found), "simulated": {"assumptions": assumptions, "curves": curves}}
    (options.out / "scaling.json").write_text(json.dumps(told, indent=1) + "\n")
    print(f"{time.monotonic() - began:.0f} s; pictures and all numbers are in {options.out}")


if __name__ == "__main__":
    main()
