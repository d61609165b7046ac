"""Strong and weak scaling of a training step on this machine, the prediction of `gengap plan`, and a simulation.

    python benchmarks/scaling.py [--models lenet5 resnet56 vgg16] [--rounds 7] [--device cpu] [--out docs/benchmarks]

Groups of 1, 2, 4 and at most 8 ranks (up to the number of cores, or of GPUs if there are two) stay alive, with one
thread per rank, and take turns: one group computes, the others sleep. A step is `loop.train_step` on random images.

  strong  8 micro-batches of images in total, divided over the ranks
  weak    one micro-batch for each rank
  plan    the constants of `gengap plan --calibrate`, measured in the same rounds on two ranks, and its prediction

Results are medians over rounds, and ratios are computed within a round; if the 95% interval of a ratio contains 1 or is
wider than 20% of the median, only the interval is shown. The curve to 4,096 ranks comes from the model of `gengap plan`
only; its assumptions are printed in the figure.

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
from scaling_data import Measurements, Point, median_compute, median_link
from world_pool import WorldPool

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
from gengap_dist.training.step import Objective, StepBatch, train_step
from gengap_dist.training.tasks import Classification

LARGEST = 8  # ranks
MICRO_SIZES = {  # images in a micro-batch: on a CPU small ones fit the cache, and turns must be short
    "cpu": {"lenet5": 128, "resnet56": 16, "vgg16": 8},
    "cuda": {"lenet5": 1024, "resnet56": 256, "vgg16": 256},
}


# -- on the ranks -----------------------------------------------------------------------------------------------------


PREPARED: dict[str, tuple[Strategy, BatchLoader, Objective]] = {}  # by network, in this rank


def set_up(world: World, name: str, task: Task) -> None:
    """Build the network, its strategy and random images."""
    config, sizes, _ = task
    network = models.from_config(config, sizes.spec, World()).to(world.device)
    strategy = STRATEGIES[strategy_name(config, world.size)](config, world)
    strategy.setup(network.train(), partial(build_optimizer, config.optim))
    num_images = LARGEST * config.batch.max_micro_size
    PREPARED[name] = (
        strategy,
        synthetic_workload.random_batches(config, sizes.spec, num_images, world.device),
        Objective(Classification(sizes.spec)),
    )


def train(world: World, name: str, task: Task, global_size: int, num_steps: int) -> float:
    """Mean seconds of a step over `num_steps`."""
    strategy, batches, objective = PREPARED[name]
    spans = batch_plan_for(task.config, global_size, world.size).micro_batches(world.rank)
    step_batch = StepBatch(torch.randperm(global_size), 0, spans)
    synthetic_workload.synchronise(world)
    world.barrier()
    began = time.perf_counter()
    for _ in range(num_steps):
        train_step(strategy, batches, step_batch, objective)
    synthetic_workload.synchronise(world)
    world.barrier()
    return (time.perf_counter() - began) / num_steps


def time_compute(world: World, task: Task) -> ComputeConstants:
    """Compute constants, as measured by `gengap plan`."""
    return calibrate.time_compute(task.config, task.sizes, task.config.batch.max_micro_size, world)


def time_link(world: World) -> LinkConstants:
    """Link constants, as measured by `gengap plan`."""
    return calibrate.time_link(world)


# -- the rounds -------------------------------------------------------------------------------------------------------


def measure(names: Sequence[str], max_ranks: int, rounds: int, seconds: float, device: str) -> Measurements:
    """Run all rounds; returns the measurements."""
    tasks = {name: task(name, MICRO_SIZES[device][name], device) for name in names}
    pools = {size: WorldPool(size, device, 1) for size in (1, 2, 4, 8) if size <= max_ranks}
    candidates: dict[Any, Callable[[], Any]] = {"link": partial(pools[2], time_link)}
    for name, what in tasks.items():
        micro = what.config.batch.max_micro_size
        for pool in pools.values():
            pool(set_up, name, what)
        for mode in MODES:
            for size, pool in pools.items():
                point = Point(name, mode, size, LARGEST * micro if mode == "strong" else micro * size)
                pool(train, name, what, point.global_size, 2)  # the first steps are not timed
                once = pool(train, name, what, point.global_size, 1)
                num_steps = max(1, round(seconds / once))
                candidates[point] = partial(pool, train, name, what, point.global_size, num_steps)
        candidates[name, "alone"] = partial(pools[1], time_compute, what)
        candidates[name, "beside"] = partial(pools[2], time_compute, what)
    by_turn = paired_timing.in_turns(candidates, rounds)
    for pool in pools.values():
        pool.close()
    return Measurements(
        tasks,
        {point: values for point, values in by_turn.items() if isinstance(point, Point)},
        {name: by_turn[name, "beside"] for name in names},
        {name: by_turn[name, "alone"] for name in names},
        by_turn["link"],
    )


# -- output ----------------------------------------------------------------------------------------------------------


def show(measurements: Measurements, title: str, rounds: int) -> None:
    """Print the table of steps, and the constants."""
    console = Console(width=170)
    table = Table(title=f"{title}; one thread a rank, medians of {rounds} rounds (minimum to maximum)")
    for head in ("network", "scaling", "ranks", "images a step", "ms a step", "images/s", "efficiency", "plan: ms"):
        table.add_column(head, justify="left" if head in ("network", "scaling") else "right")
    table.add_column("plan / measured", justify="right")
    for point, taken in measurements.steps.items():
        seconds, predicted = (
            statistics.median(taken),
            statistics.median(measurements.predicted(point, measurements.beside)),
        )
        table.add_row(
            TITLES[point.model],
            point.mode,
            str(point.ranks),
            f"{point.global_size:,}",
            f"{seconds * 1e3:,.1f} ({min(taken) * 1e3:,.1f} to {max(taken) * 1e3:,.1f})",
            f"{point.global_size / seconds:,.0f}",
            str(measurements.efficiency(point)) if point.ranks > 1 else "",
            f"{predicted * 1e3:,.1f}",
            str(measurements.error(point)),
        )
    console.print(table)
    for line in remarks(measurements):
        console.print(line)


def remarks(measurements: Measurements) -> list[str]:
    """The constants, and the slowdown of compute by a second busy rank, one sentence each."""
    link = median_link(measurements.links)
    lines = [f"The link of two ranks: {link.alpha * 1e6:.0f} µs a message, {link.beta * 1e9:.2f} ns a byte."]
    for name in measurements.tasks:
        each, contention = median_compute(measurements.beside[name]), measurements.contention(name)
        line = f"{TITLES[name]}: {each.seconds_per_sample * 1e6:,.0f} µs per image with a second busy rank, which is "
        if not contention.is_conclusive:
            line += f"not significantly different from one rank alone: {contention}."
        else:
            line += f"{contention} times the time of one rank alone"
            line += (
                ": the ranks compete for memory bandwidth, which the model does not include."
                if contention.median > 1
                else "."
            )
        lines.append(line)
    return lines


def as_json(measurements: Measurements) -> dict[str, Any]:
    """All numbers of the rounds; a ratio with a non-empty `doubt` is inconclusive."""
    points = [
        point._asdict()
        | {"seconds": taken, "predicted_seconds": measurements.predicted(point, measurements.beside)}
        | {"predicted_over_measured": measurements.error(point)._asdict()}
        | {"predicted_from_one_alone_over_measured": measurements.error(point, measurements.alone)._asdict()}
        | {"efficiency": measurements.efficiency(point)._asdict()}
        for point, taken in measurements.steps.items()
    ]
    constants = {
        name: {
            "micro_size": what.config.batch.max_micro_size,
            "gradient_bytes": what.gradient_bytes,
            "beside_another_rank": [each.model_dump() for each in measurements.beside[name]],
            "alone": [each.model_dump() for each in measurements.alone[name]],
            "beside_over_alone": measurements.contention(name)._asdict(),
        }
        for name, what in measurements.tasks.items()
    }
    return {"points": points, "constants": constants, "link": [link.model_dump() for link in measurements.links]}


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=[*TITLES], default=[*TITLES])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="approximate duration of a turn")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there are two GPUs")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # also for the ranks
    torch.set_num_threads(1)
    num_gpus, machine = torch.cuda.device_count(), paired_timing.machine()
    device = options.device or ("cuda" if num_gpus > 1 else "cpu")
    max_ranks = min(LARGEST, num_gpus if device == "cuda" else machine["cores"])
    if max_ranks < 2:
        parser.error(f"scaling needs two ranks, and this machine has {max_ranks} on {device}: choose --device cpu")

    from scaling_figures import measured, save, simulated, simulation

    began, name, busy = time.monotonic(), paired_timing.machine_summary(machine), paired_timing.busy()
    load_note = (
        f"Other processes used {busy:.0%} of the cores: the results hold only under this load. " if busy > 0.1 else ""
    )
    if load_note:
        print(load_note)
    measurements = measure(options.models, max_ranks, options.rounds, options.seconds, device)
    show(measurements, name, options.rounds)
    computed = (
        {model: median_compute(measurements.beside[model]) for model in options.models} if device == "cpu" else {}
    )
    curves, assumptions = simulation(computed, measurements.tasks, median_link(measurements.links), name)
    options.out.mkdir(parents=True, exist_ok=True)
    caption = f"{name}; one thread a rank, {options.rounds} rounds. {load_note}"
    save(measured(measurements, caption + " ".join(remarks(measurements))), options.out / "scaling_measured.svg")
    save(simulated(curves, assumptions), options.out / "scaling_simulated.svg")
    results = {
        "machine": machine,
        "device": device,
        "rounds": options.rounds,
        "threads_per_rank": 1,
        "busy_before": busy,
    }
    results |= {"measured": as_json(measurements), "simulated": {"assumptions": assumptions, "curves": curves}}
    (options.out / "scaling.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"{time.monotonic() - began:.0f} s; figures and all numbers are in {options.out}")


if __name__ == "__main__":
    main()
