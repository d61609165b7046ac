"""Images per second of a 2-rank LeNet-5 on Fashion-MNIST, beside the usual way and beside the limit.

    python benchmarks/throughput.py --data DIR [--global_size 512] [--rounds 7]

The contestants take turns in one process group, on the same ranks, with the same threads:

  usual   torch DDP with DataLoader, DistributedSampler and torchvision transforms (pad, to tensor, normalise),
          zero_grad / forward / backward / step as the PyTorch tutorials write it, with and without a worker per rank
  gengap  this package's step on the real data: order, micro-batches, gradient norm, all metrics
  limit   DDP forward, backward and step on one resident random batch: no data, no metrics
  limit, real   the same on one resident batch of real images: ReLU and max pooling take their branches on pixels, so
          the content of a batch has a price of its own on a CPU

Every round times `--steps` steps of each. Figures are medians over rounds; ratios are taken within a round, so that a
machine whose speed drifts does not decide them. The spread is printed: where it covers a ratio's distance from 1, the
ratio says nothing.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from gengap_dist import models
from gengap_dist.batching import BatchPlan
from gengap_dist.config import BatchConfig, DataConfig, LaunchConfig, OptimConfig, RunConfig
from gengap_dist.data import catalog
from gengap_dist.data.order import Order
from gengap_dist.data.resident import Batches, Normalise
from gengap_dist.launchers.local import free_port, threads_per_rank
from gengap_dist.loop import Work, train_step
from gengap_dist.optim.build import build as build_optimizer
from gengap_dist.strategies import DDP
from gengap_dist.world import World, connect

Contestant = Callable[[int], None]


def fresh_model() -> nn.Module:
    """The same LeNet-5 for everybody."""
    torch.manual_seed(0)
    return models.build("lenet5", num_classes=10, in_channels=1)


def usual(world: World, global_size: int, root: Path, num_workers: int) -> Contestant:
    """The way the tutorials teach it."""
    from torchvision import datasets, transforms

    transform = transforms.Compose(
        [transforms.Pad(2), transforms.ToTensor(), transforms.Normalize((0.2860,), (0.3530,))]
    )
    data = datasets.FashionMNIST(str(root), train=True, transform=transform)
    sampler = DistributedSampler(data, num_replicas=world.size, rank=world.rank, shuffle=True)
    loader = DataLoader(
        data, global_size // world.size, sampler=sampler, num_workers=num_workers, persistent_workers=num_workers > 0
    )
    model = DistributedDataParallel(fresh_model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    criterion = nn.CrossEntropyLoss()

    def batches():
        epoch = 0
        while True:
            sampler.set_epoch(epoch)
            yield from loader
            epoch += 1

    stream = batches()

    def steps(number: int) -> None:
        for _ in range(number):
            images, labels = next(stream)
            optimizer.zero_grad()
            criterion(model(images), labels).backward()
            optimizer.step()

    return steps


def gengap(world: World, global_size: int, root: Path) -> Contestant:
    """This package, with its default micro_size."""
    splits = catalog.load(DataConfig(name="fashion_mnist", root=root, val_fraction=0.0))
    batches = Batches(splits.train, Normalise(splits, world.device, torch.float32), DataConfig(), seed=0)
    order = Order(len(splits.train), global_size, seed=0)
    strategy = DDP(RunConfig(), world)
    model = fresh_model()
    strategy.setup(model, partial(build_optimizer, OptimConfig()))
    spans = BatchPlan(global_size, world.size, BatchConfig().most_at_once).micro_batches(world.rank)
    done = 0

    def steps(number: int) -> None:
        nonlocal done
        means = []
        for _ in range(number):
            sums, _ = train_step(strategy, batches, Work(order.indices(done), order.epoch(done), spans))
            means.append(sums / global_size)
            done += 1
            if done % order.steps_per_epoch == order.steps_per_epoch - 1:
                done += 1  # only full steps, as the others do
        world.sum(torch.stack(means)).tolist()

    return steps


def limit(world: World, global_size: int, root: Path) -> Contestant:
    """One random batch that is already there."""
    return resident(torch.randn(global_size // world.size, 1, 32, 32))


def limit_real(world: World, global_size: int, root: Path) -> Contestant:
    """One batch of Fashion-MNIST that is already there."""
    splits = catalog.load(DataConfig(name="fashion_mnist", root=root))
    return resident(Normalise(splits, world.device, torch.float32)(splits.train.pixels[: global_size // world.size]))


def resident(images: Tensor) -> Contestant:
    """The bare DDP step on one batch, over and over."""
    labels = torch.randint(0, 10, (len(images),))
    model = DistributedDataParallel(fresh_model(), gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, fused=True)
    criterion = nn.CrossEntropyLoss()

    def steps(number: int) -> None:
        for _ in range(number):
            optimizer.zero_grad(set_to_none=False)
            criterion(model(images), labels).backward()
            optimizer.step()

    return steps


CONTESTANTS = {
    "usual, 1 worker": partial(usual, num_workers=1),
    "usual, no worker": partial(usual, num_workers=0),
    "gengap": gengap,
    "limit": limit,
    "limit, real": limit_real,
}


def rank_main(rank: int, options: argparse.Namespace, port: int) -> None:
    """One rank: set everybody up, then take turns."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(options.ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    world = connect(LaunchConfig(device="cpu"))
    teams = {name: make(world, options.global_size, options.data) for name, make in CONTESTANTS.items()}
    speeds: dict[str, list[float]] = {name: [] for name in teams}
    for steps in teams.values():
        steps(10)
    for number in range(options.rounds):
        first = number % len(teams)
        names = list(teams)[first:] + list(teams)[:first]
        for name in names:
            world.barrier()
            began = time.perf_counter()
            teams[name](options.steps)
            world.barrier()
            speeds[name].append(options.steps * options.global_size / (time.perf_counter() - began))
    if rank == 0:
        show(speeds, options)
    dist.destroy_process_group()


def show(speeds: dict[str, list[float]], options: argparse.Namespace) -> None:
    """The table."""
    table = Table(
        title=f"LeNet-5 x Fashion-MNIST, {options.ranks} ranks, global_size {options.global_size}, "
        f"{options.rounds} rounds of {options.steps} steps, torch {torch.__version__}, {os.cpu_count()} cores"
    )
    for head in ("", "images/s (median)", "min to max", "gengap / this (median)", "min to max"):
        table.add_column(head, justify="right")
    for name, values in speeds.items():
        ratios = [ours / theirs for ours, theirs in zip(speeds["gengap"], values, strict=True)]
        table.add_row(
            name,
            f"{statistics.median(values):,.0f}",
            f"{min(values):,.0f} to {max(values):,.0f}",
            f"{statistics.median(ratios):.2f}",
            f"{min(ratios):.2f} to {max(ratios):.2f}",
        )
    Console(width=120).print(table)


def main() -> None:
    """Parse and start the ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds FashionMNIST/raw")
    parser.add_argument("--global_size", type=int, default=512)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    os.environ |= threads_per_rank(options.ranks)
    mp.spawn(rank_main, (options, free_port()), nprocs=options.ranks)  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
