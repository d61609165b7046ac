"""What checkpoints and probes cost a run, and what Ray costs a step.

    python benchmarks/overhead.py checkpoints        ResNet-56, saved every 50 steps beside training
    python benchmarks/overhead.py probes             LeNet-5 and ResNet-56 with the default cadence and budget
    python benchmarks/overhead.py ray [--rounds 3]   LeNet-5 on 2 ranks: torchrun and Ray Train, taking turns

The checkpoint's share is an upper bound: the time for which training stood still, plus all the time that the writing
thread took on the side, as if training had got nothing done meanwhile.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console

from gengap_dist.config.loading import nested, validate
from gengap_dist.config.sections import RunConfig
from gengap_dist.runs import checkpoint
from gengap_dist.runs.run_folder import prepare_folder, read_info, read_metrics
from gengap_dist.training.trainer import run

EVERY = 50


def checkpoints(console: Console) -> None:
    given = {
        "model.name": "resnet56",
        "batch.global_size": 128,
        "train.steps": 2 * EVERY,
        "train.num_evals": 1,
        "probe.enabled": False,
        "checkpoint.every_steps": EVERY,
        "checkpoint.every_seconds": 1e9,
        "mlflow.enabled": False,
    }
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        prepare_folder(out, "run.json", resume=False)
        result = run(validate(RunConfig, nested(given)), out)
        path = max(checkpoint.steps(out / "checkpoints").items())[1]
        states = {file.stem: checkpoint.load(file) for file in path.glob("*.pt")}
        size = sum(file.stat().st_size for file in path.iterdir()) / 2**20
        saver, times = checkpoint.CheckpointWriter(Path(folder) / "again", keep=2), []
        for number in range(10):
            began = time.perf_counter()
            saver.save(number, states, {})
            saver.wait()
            times.append(time.perf_counter() - began)
    steps = result["train_seconds"] / 2
    stood, aside = result["time/checkpoint"] / 2, statistics.median(times)
    console.print(f"{EVERY} steps of ResNet-56, batch 128: {steps:.1f} s")
    console.print(f"a checkpoint of {size:.1f} MiB: training stood still for {1000 * stood:.0f} ms")
    console.print(f"to copy, write and flush it takes {1000 * aside:.0f} ms on the side")
    console.print(f"at most {100 * (stood + aside) / steps:.2f}% of the run")


def probes(console: Console) -> None:
    runs = {"lenet5, 64": ("lenet5", 64, 4000), "resnet56, 128": ("resnet56", 128, 300)}
    for title, (model, global_size, steps) in runs.items():
        for budget in (0.05, None):
            given = {"model.name": model, "batch.global_size": global_size, "train.steps": steps}
            given |= {"probe.max_time_fraction": budget, "mlflow.enabled": False}
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "run"
                prepare_folder(out, "run.json", resume=False)
                result = run(validate(RunConfig, nested(given)), out)
                measured = sum("nc1" in line for line in read_metrics(out))
                seconds = read_info(out)["seconds"]
            console.print(
                f"{title}, {steps} steps, probe.max_time_fraction={budget}: {measured} measurements took "
                f"{result['probe_seconds']:.2f} of {seconds:.1f} s, {result['probe_seconds'] / seconds:.1%}; "
                f"left out {len(result['probe_left_out'])}"
            )


NUM_STEPS, BLOCK = 1280, 32  # a run notes the time with the metrics of 32 steps
RUN = [
    "--train.steps", str(NUM_STEPS), "--batch.global_size", "256", "--probe.enabled", "false", "--train.num_evals", "1",
    "--mlflow.enabled", "false", "--checkpoint.every_seconds", "1e9",
]  # fmt: skip


def one(launcher: str, out: Path) -> float:
    """Milliseconds a step under a launcher: the median over blocks but the first ten, when Ray still starts up."""
    python = [sys.executable, "-m"]
    torchrun = [*python, "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "gengap_dist.train"]
    ray = [*python, "gengap_dist.train", "--launch.launcher", "ray", "--launch.num_processes", "2"]
    command = [*(torchrun if launcher == "torchrun" else ray), *RUN, "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    clock = {line["step"]: line["seconds"] for line in read_metrics(out)}
    settled = [clock[step + BLOCK] - clock[step] for step in range(10 * BLOCK, NUM_STEPS - BLOCK, BLOCK)]
    return 1000 * statistics.median(settled) / BLOCK


def ray(console: Console, rounds: int) -> None:
    times: dict[str, list[float]] = {"torchrun": [], "ray": []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            for launcher in times:
                times[launcher].append(one(launcher, Path(folder) / f"{launcher}{number}"))
    ratios = [b / a for a, b in zip(*times.values(), strict=True)]
    for launcher, found in times.items():
        console.print(f"{launcher:9} {statistics.median(found):6.2f} ms a step ({min(found):.2f} to {max(found):.2f})")
    console.print(f"ray / torchrun {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["checkpoints", "probes", "ray"])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    console = Console(width=100)
    console.print(f"torch {torch.__version__}, {os.cpu_count()} cores")
    if options.what == "ray":
        ray(console, options.rounds)
    else:
        {"checkpoints": checkpoints, "probes": probes}[options.what](console)


if __name__ == "__main__":
    main()
