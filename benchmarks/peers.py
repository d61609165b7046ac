"""gengap_dist beside its peers and beside the limit: the same work, in turns, on the same ranks.

    python benchmarks/peers.py --data DIR [--only lenet5_512 mlp_4096] [--ranks 1 2] [--rounds 15]

Every round gives each contestant a turn of as many steps as the limit takes --seconds for; ratios are taken within a
round, and one that the machine's noise covers is not printed. Between turns the loaders' processes come to rest, and
the first steps of a turn do not count: what a loader has read ahead in the others' time is used up by then. Memory is
the peak of a rank's own process (not of its loader's), each contestant alone on fresh ranks.

Figures go to docs/benchmarks/peers.json, workload by workload, and from there into docs/benchmarks.md with a picture.
"""

import argparse
import os
import statistics
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import contestants as field
import fair
import page
import psutil
import torch
from contestants import WORKLOADS, Field, Turn, contestants
from rich.console import Console

from gengap_dist.config import LaunchConfig
from gengap_dist.data import catalog
from gengap_dist.launchers.base import leave
from gengap_dist.launchers.local import free_port, rank_variables, threads_per_rank
from gengap_dist.world import World, connect

MEMORY_OF = ("lenet5_8192", "mlp_4096", "resnet56_1024")
MEMORY_STEPS = 3
WARM_STEPS = 3


def rank_main(pipe: Any, env: dict[str, str], options: argparse.Namespace, name: str, only: str | None) -> None:
    """One rank: set everybody up, then take turns; or `only` one contestant, for its memory."""
    os.environ.update(env)
    torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    sys.stderr = open(os.devnull, "w") if env["RANK"] != "0" else sys.stderr  # noqa: SIM115, for as long as it lives
    world = connect(LaunchConfig(device="cpu"))
    workload = WORKLOADS[name]
    splits = catalog.load(workload.settings(options.data).data)
    given = Field(workload, splits, world, options.data)
    chosen = {
        who: contestant
        for who, contestant in contestants(workload).items()
        if contestant.installed and (only is None or who == only)
    }
    turns = {}
    for who, contestant in chosen.items():  # one after the other: their setups are collective
        turns[who] = Turn(lambda turn, work=contestant.work: work(given, turn))
        turns[who].steps(1)
        if world.rank == 0 and not only:
            print(f"  {who}", file=sys.stderr, flush=True)
    found: Any
    if only:
        turns[only].steps(MEMORY_STEPS)
        peak = torch.zeros(world.size)
        peak[world.rank] = _peak_mib()
        found = float(world.sum(peak).max())
    else:
        found = take_turns(turns, workload, world, options)
    if world.rank == 0:
        pipe.send((found, splits.train.pixels.nbytes / 2**20 if isinstance(splits.train.pixels, torch.Tensor) else 0))
    world.barrier()
    for loader in psutil.Process().children():
        loader.kill()
    leave(0)


def take_turns(turns: dict[str, Turn], workload: field.Workload, world: World, options: argparse.Namespace) -> Any:
    """Images per second of every contestant in every round. Collective."""
    began = time.perf_counter()
    turns["limit"].steps(WARM_STEPS)
    each = (time.perf_counter() - began) / WARM_STEPS
    num_steps = world.agree(max(1, round(options.seconds / each)))
    for turn in turns.values():
        turn.steps(min(WARM_STEPS, num_steps))

    def speed(turn: Turn) -> float:
        _come_to_rest()
        if workload.untimed:
            turn.steps(workload.untimed)
        world.barrier()
        began = time.perf_counter()
        turn.steps(num_steps)
        world.barrier()
        return num_steps * workload.global_size / (time.perf_counter() - began)

    everybody = {who: lambda turn=turn: speed(turn) for who, turn in turns.items()}
    return fair.in_turns(everybody, options.rounds or workload.rounds)


def _come_to_rest() -> None:
    """Wait until the loaders' processes have read ahead what they may."""
    before = -1.0
    while (now := sum(sum(child.cpu_times()[:2]) for child in psutil.Process().children())) > before:
        before = now
        time.sleep(0.1)


def _peak_mib() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def on_ranks(num_ranks: int, options: argparse.Namespace, name: str, only: str | None = None) -> Any:
    """What rank 0 finds."""
    context, port = get_context("spawn"), free_port()
    here, there = context.Pipe()
    ranks = []
    for rank in range(num_ranks):
        env = rank_variables(rank, num_ranks, port) | threads_per_rank(num_ranks)
        ranks.append(context.Process(target=rank_main, args=(there, env, options, name, only)))
        ranks[-1].start()
    there.close()
    try:
        found = here.recv()
    except EOFError:
        raise SystemExit(f"{name} on {num_ranks} ranks failed: see above") from None
    for process in ranks:
        process.join()
    return found


def about(workload: field.Workload) -> dict[str, Any]:
    """What stands beside the figures, those who are not installed among it."""
    everybody = contestants(workload)
    return {
        "title": workload.title,
        "machine": fair.machine(),
        "kinds": {who: one.kind for who, one in everybody.items()},
        "missing": {who: one.package for who, one in everybody.items() if not one.installed},
    }


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds FashionMNIST, MNIST, cifar10-jpeg")
    parser.add_argument("--only", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS), help="some workloads")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, help="default: 15, of slow workloads 7 or 9")
    parser.add_argument("--seconds", type=float, default=0.4, help="that the limit takes for a turn")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="peak memory, too")
    parser.add_argument("--out", type=Path, default=page.DOCS, help="folder of benchmarks.md")
    options = parser.parse_args()
    console = Console(stderr=True)
    os.environ["PYTHONWARNINGS"] = "ignore::UserWarning:multiprocessing.resource_tracker"  # ranks end by os._exit
    for name in options.only:
        found = about(WORKLOADS[name])
        for who, package in found["missing"].items():
            console.print(f"{who} is not installed and does not take part: pip install {package}")
        before = page.read(options.out, "peers").get(name, {})  # of other numbers of ranks, and memory
        if before.get("machine") == found["machine"]:
            found = before | found
        found.setdefault("images_per_second", {})
        for num_ranks in options.ranks:
            console.print(f"{WORKLOADS[name].title}, {num_ranks} rank(s)")
            speeds, data_mib = on_ranks(num_ranks, options, name)
            for who, values in speeds.items():
                console.print(f"  {statistics.median(values):>10,.0f} images/s  {who}", highlight=False)
            found["images_per_second"][str(num_ranks)] = speeds
            found["data_mib"] = data_mib
        if options.memory and name in MEMORY_OF:
            console.print(f"{WORKLOADS[name].title}, memory")
            found["peak_mib"] = {
                who: on_ranks(max(options.ranks), options, name, who)[0]
                for who in found["kinds"].keys() - found["missing"].keys()
            }
        page.keep(options.out, "peers", {name: found})
        page.write(options.out)
    console.print(f"written: {options.out / 'benchmarks.md'}")


if __name__ == "__main__":
    main()
