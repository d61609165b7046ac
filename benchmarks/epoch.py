"""Times an epoch of ResNet-56 on CIFAR-10 with augmentation, against the same steps on one resident random batch.

    python benchmarks/epoch.py --data DIR [--jpeg] [--steps 0] [--block 8]

Both run every step of the epoch, in turns of `--block` steps on the same threads, with the same network, optimizer and
micro-batches of 128:

  gengap    this package's step: sampling, images, crop and flip, schedule, gradient norm, sums of losses and of correct
            predictions
  baseline  forward, cross-entropy, backward and optimizer step on one batch of random numbers

Prints the ratio of the summed times, and the median and spread of the ratios of single turns.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch.nn.functional import cross_entropy

from gengap_dist import models
from gengap_dist.config.loading import nested, validate
from gengap_dist.config.sections import RunConfig
from gengap_dist.data import datasets
from gengap_dist.data.batch_loader import BatchLoader, Preprocess
from gengap_dist.data.sampler import EpochSampler
from gengap_dist.distributed.process_group import World
from gengap_dist.parallel.strategies import Single
from gengap_dist.training.algorithms.base import AlgorithmSetup, TrainingAlgorithm
from gengap_dist.training.lr_schedule import Schedule
from gengap_dist.training.optimizer import build_optimizer as build_optimizer
from gengap_dist.training.tasks import Classification


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10")
    parser.add_argument("--jpeg", action="store_true", help="the folder has train/CLASS/*.jpg and test/CLASS/*.jpg")
    parser.add_argument("--steps", type=int, default=0, help="number of steps; 0 for the whole epoch")
    parser.add_argument("--block", type=int, default=8, help="steps per turn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    settings = {
        "data": {"name": "imagefolder" if args.jpeg else "cifar10", "root": args.data, "augment": ["crop", "flip"]},
        "model": {"name": "resnet56"},
        "batch": {"global_size": 128},
        "optim": {"lr": 0.1, "weight_decay": 1e-4, "schedule": "cosine", "warmup_epochs": 0.1},
        "train": {"epochs": 1},
    }
    config, world, console = validate(RunConfig, nested(settings)), World(), Console()
    began = time.perf_counter()
    splits = datasets.load(config.data)
    console.print(f"{len(splits.train):,} training images read in {time.perf_counter() - began:.1f} s")
    sampler = EpochSampler(len(splits.train), config.batch.global_size, config.seed)
    schedule = Schedule.of(config, sampler)

    def new_strategy() -> Single:
        torch.manual_seed(0)
        strategy = Single(config, world)
        model = models.from_config(config, splits.spec, world).train()
        strategy.setup(model, lambda model: build_optimizer(config.optim, model))
        return strategy

    strategy = new_strategy()
    loader = BatchLoader(splits.train, Preprocess(splits.pixels, world.device, torch.float32), config.data, config.seed)
    task = Classification(splits.spec)
    algorithm = TrainingAlgorithm(AlgorithmSetup(config, task, strategy, loader, sampler, schedule.num_steps))
    baseline_strategy = new_strategy()
    images, labels = torch.randn(128, 3, 32, 32), torch.randint(10, (128,))

    def gengap(step: int) -> None:
        algorithm.step(step, schedule.lr(step), schedule.momentum(step))

    def synthetic_baseline(step: int) -> None:
        size = len(sampler.indices(step))  # the last step of the epoch is smaller, for both
        baseline_strategy.optimizer.zero_grad()
        cross_entropy(baseline_strategy.model(images[:size]), labels[:size]).backward()
        baseline_strategy.optimizer.step()

    for warm in (gengap, synthetic_baseline):
        warm(0)
    num_steps = args.steps or sampler.steps_per_epoch
    turns: list[tuple[float, float]] = []
    for number, start in enumerate(track(range(0, num_steps, args.block), console=console, transient=True)):
        seconds = {}
        for candidate in (gengap, synthetic_baseline) if number % 2 else (synthetic_baseline, gengap):
            began = time.perf_counter()
            for step in range(start, min(start + args.block, num_steps)):
                candidate(step)
            seconds[candidate] = time.perf_counter() - began
        turns.append((seconds[gengap], seconds[synthetic_baseline]))
    gengap_seconds, baseline_seconds = (sum(column) for column in zip(*turns, strict=True))
    ratios = sorted(own / baseline for own, baseline in turns)
    low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    console.print(
        f"{num_steps} steps of 128, {args.threads} thread(s): gengap {gengap_seconds:.1f} s, "
        f"synthetic baseline {baseline_seconds:.1f} s; ratio of the "
        f"sums {gengap_seconds / baseline_seconds:.3f}; of {len(turns)} turns median {statistics.median(ratios):.3f}, "
        f"middle half {low:.3f} to {high:.3f}"
    )


if __name__ == "__main__":
    main()
