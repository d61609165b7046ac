"""Compares the speed and memory of gengap_dist with its peers and a synthetic baseline: same training, in turns.

    python benchmarks/peers.py --data DIR [--only lenet5_512 mlp_4096] [--ranks 1 2] [--rounds 15]

In every round each candidate has a turn; the number of steps is what the synthetic baseline does in --seconds. Ratios
are computed within a round; if the 95% interval contains 1 or is wider than 20% of the median, only the interval is
shown. gengap_dist and its peers use separate ranks, because a run of gengap_dist configures malloc to keep freed memory
for the whole process. A turn starts when the loader processes are idle, and its first steps are not timed: they consume
batches that a loader has prefetched during other turns, and allocate memory that was freed after the previous turn.
Peak memory is that of the rank's process, without its loaders, with one candidate on new ranks.

Results are written to docs/benchmarks/peers.json by workload, and from there to docs/benchmarks.md, with a figure.
"""

import argparse
import ctypes
import os
import statistics
import sys
import time
from functools import cache, partial
from pathlib import Path
from typing import Any

import page
import paired_timing
import psutil
import torch
from baselines import WORKLOADS, Field, Turn, Workload, candidates, wait_until_idle
from rich.console import Console
from world_pool import WorldPool

from gengap_dist.data import datasets
from gengap_dist.distributed.process_group import World

MEMORY_OF = ("lenet5_8192", "mlp_4096", "resnet56_1024")
MEMORY_STEPS = 3
WARM_STEPS = 3


# -- on the ranks -----------------------------------------------------------------------------------------------------

TURNS: dict[str, Turn] = {}  # by candidate, in this rank


@cache
def training_data(name: str, data: Path) -> datasets.Splits:
    """The data of a workload; loaded once."""
    return datasets.load(WORKLOADS[name].settings(data).data)


def set_up(world: World, name: str, data: Path, who: str) -> float:
    """Create a candidate and run its first step; returns MiB of the training images."""
    if world.rank:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, for the lifetime of the rank
    workload, splits = WORKLOADS[name], training_data(name, data)
    given, work = Field(workload, splits, world, data), candidates(workload)[who].work
    TURNS[who] = Turn(lambda turn: work(given, turn))
    TURNS[who].steps(1)
    release_memory()
    return splits.train.inputs.nbytes / 2**20 if isinstance(splits.train.inputs, torch.Tensor) else 0.0


def take_turn(world: World, who: str, num_steps: int, untimed: int = 0) -> float:
    """Seconds of `num_steps`, after `untimed` steps, started when the loaders are idle."""
    wait_until_idle()
    if untimed:
        TURNS[who].steps(untimed)
    world.barrier()
    began = time.perf_counter()
    TURNS[who].steps(num_steps)
    world.barrier()
    took = time.perf_counter() - began
    release_memory()
    return took


def release_memory() -> None:
    """Return free memory to the system: all candidates together would exceed the memory."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def peak_mib(world: World) -> float:
    """Peak memory in MiB up to now, maximum over ranks. Collective."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    peaks = torch.zeros(world.size)
    peaks[world.rank] = int(line.split()[1]) / 1024
    return float(world.all_reduce(peaks).max())


def end_loaders(world: World) -> None:
    """Kill the loader processes, which would outlive the ranks."""
    for loader in psutil.Process().children():
        loader.kill()


# -- the rounds -------------------------------------------------------------------------------------------------------


def speeds(name: str, num_ranks: int, options: argparse.Namespace, kinds: dict[str, str]) -> tuple[Any, float]:
    """Images per second of every candidate in every round, and MiB of the training images."""
    workload = WORKLOADS[name]
    ours, theirs = WorldPool(num_ranks, "cpu"), WorldPool(num_ranks, "cpu")
    pools = {who: ours if kind == "ours" else theirs for who, kind in kinds.items()}
    data_mib = 0.0
    for who, pool in pools.items():
        print(f"  {who}", file=sys.stderr, flush=True)
        data_mib = pool(set_up, name, options.data, who)
    step_seconds = theirs(take_turn, "limit", WARM_STEPS) / WARM_STEPS
    num_steps = max(1, round(options.seconds / step_seconds))
    for who, pool in pools.items():
        pool(take_turn, who, min(WARM_STEPS, num_steps))

    def speed(who: str) -> float:
        return num_steps * workload.global_size / pools[who](take_turn, who, num_steps, workload.untimed)

    by_turn = paired_timing.in_turns({who: partial(speed, who) for who in pools}, options.rounds or workload.rounds)
    for pool in (ours, theirs):
        pool(end_loaders)
        pool.close()
    return by_turn, data_mib


def memory(name: str, num_ranks: int, options: argparse.Namespace, who: str) -> tuple[float, float]:
    """Peak MiB of a rank with this candidate only, after MEMORY_STEPS steps, and MiB of the training images."""
    pool = WorldPool(num_ranks, "cpu")
    data_mib = pool(set_up, name, options.data, who)
    pool(take_turn, who, MEMORY_STEPS)
    peak = pool(peak_mib)
    pool(end_loaders)
    pool.close()
    return peak, data_mib


def about(workload: Workload) -> dict[str, Any]:
    """Metadata of the results: title, machine, kinds of candidates, and missing packages."""
    by_name = candidates(workload)
    return {
        "title": workload.title,
        "machine": paired_timing.machine(),
        "kinds": {who: candidate.kind for who, candidate in by_name.items()},
        "missing": {who: candidate.package for who, candidate in by_name.items() if not candidate.installed},
    }


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with FashionMNIST, MNIST, cifar10-jpeg")
    parser.add_argument("--only", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS), help="some workloads")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, help="default: 15, fewer for slow workloads")
    parser.add_argument("--seconds", type=float, default=0.4, help="duration of a turn of the synthetic baseline")
    parser.add_argument("--speed", action=argparse.BooleanOptionalAction, default=True, help="images per second")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="peak memory")
    parser.add_argument("--out", type=Path, default=page.DOCS, help="folder of benchmarks.md")
    options = parser.parse_args()
    console = Console(stderr=True)
    os.environ["PYTHONWARNINGS"] = "ignore::UserWarning:multiprocessing.resource_tracker"  # ranks end by os._exit
    for name in options.only:
        results = about(WORKLOADS[name])
        for who, package in results["missing"].items():
            console.print(f"{who} is not installed and is left out: pip install {package}")
        kinds = {who: kind for who, kind in results["kinds"].items() if who not in results["missing"]}
        previous = page.read(options.out, "peers").get(name, {})  # results for other numbers of ranks, and memory
        if previous.get("machine") == results["machine"]:
            results = previous | results
        results.setdefault("images_per_second", {})
        for num_ranks in options.ranks if options.speed else ():
            console.print(f"{WORKLOADS[name].title}, {num_ranks} rank(s)")
            by_turn, results["data_mib"] = speeds(name, num_ranks, options, kinds)
            for who, values in by_turn.items():
                console.print(f"  {statistics.median(values):>10,.0f} images/s  {who}", highlight=False)
            results["images_per_second"][str(num_ranks)] = by_turn
        if options.memory and name in MEMORY_OF:
            console.print(f"{WORKLOADS[name].title}, memory")
            peaks = {who: memory(name, max(options.ranks), options, who) for who in kinds}
            results["peak_mib"] = {who: peak for who, (peak, _) in peaks.items()}
            results["data_mib"] = max(size for _, size in peaks.values())
        page.keep(options.out, "peers", {name: results})
        page.write(options.out)
    console.print(f"written: {options.out / 'benchmarks.md'}")


if __name__ == "__main__":
    main()
