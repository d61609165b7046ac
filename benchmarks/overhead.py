"""Measures the overhead of checkpoints and probes in a run, and of Ray, metrics and interventions in a step.

    python benchmarks/overhead.py checkpoints        ResNet-56, saved every 50 steps during training
    python benchmarks/overhead.py probes             LeNet-5 and ResNet-56 with the default interval and time limit
    python benchmarks/overhead.py ray [--rounds 3]   LeNet-5 on 2 ranks: torchrun and Ray Train, in turns
    python benchmarks/overhead.py metrics            LeNet-5 at 512 on 2 ranks: steps with and without metrics, in turns
    python benchmarks/overhead.py recording          LeNet-5: the probe set's loss in a measurement; runs with at_losses
    python benchmarks/overhead.py interventions      784-256-128-10: steps plain, with a rank penalty, with its placebo

The checkpoint's share is an upper bound: the time for which training is blocked, plus the whole time of the writing
thread, as if training made no progress meanwhile.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from gengap_dist.config.loading import nested, validate
from gengap_dist.config.sections import RunConfig
from gengap_dist.distributed.cores import available_cores
from gengap_dist.distributed.launchers import LocalLauncher
from gengap_dist.distributed.process_group import World, init_process_group
from gengap_dist.distributed.runtime_context import RuntimeContext
from gengap_dist.probes import measure
from gengap_dist.probes.activations import eval_context
from gengap_dist.runs import checkpoint
from gengap_dist.runs.run_folder import NullRecorder, prepare_folder, read_info, read_metrics
from gengap_dist.training.evaluation import BlockSums
from gengap_dist.training.observer import PROBE_BLOCK
from gengap_dist.training.resolved_run import resolve_run
from gengap_dist.training.trainer import Trainer, run

EVERY = 50


def checkpoints(console: Console) -> None:
    settings = {
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
        result = run(validate(RunConfig, nested(settings)), out)
        path = max(checkpoint.checkpoints_by_step(out / "checkpoints").items())[1]
        states = {file.stem: checkpoint.load(file) for file in path.glob("*.pt")}
        size = sum(file.stat().st_size for file in path.iterdir()) / 2**20
        writer, times = checkpoint.CheckpointWriter(Path(folder) / "again", keep=2), []
        for number in range(10):
            started = time.perf_counter()
            writer.save(number, states, {})
            writer.wait()
            times.append(time.perf_counter() - started)
    steps = result["train_seconds"] / 2
    blocked, in_background = result["time/checkpoint"] / 2, statistics.median(times)
    console.print(f"{EVERY} steps of ResNet-56, batch 128: {steps:.1f} s")
    console.print(f"a checkpoint of {size:.1f} MiB: training is blocked for {1000 * blocked:.0f} ms")
    console.print(f"copying, writing and flushing it takes {1000 * in_background:.0f} ms in the background")
    console.print(f"at most {100 * (blocked + in_background) / steps:.2f}% of the run")


def probes(console: Console) -> None:
    runs = {"lenet5, 64": ("lenet5", 64, 4000), "resnet56, 128": ("resnet56", 128, 300)}
    for title, (model, global_size, steps) in runs.items():
        for max_time_fraction in (0.05, None):
            settings = {"model.name": model, "batch.global_size": global_size, "train.steps": steps}
            settings |= {"probe.max_time_fraction": max_time_fraction, "mlflow.enabled": False}
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "run"
                prepare_folder(out, "run.json", resume=False)
                result = run(validate(RunConfig, nested(settings)), out)
                measured = sum("nc1" in line for line in read_metrics(out))
                seconds = read_info(out).seconds
            console.print(
                f"{title}, {steps} steps, probe.max_time_fraction={max_time_fraction}: {measured} measurements took "
                f"{result['probe_seconds']:.2f} of {seconds:.1f} s, {result['probe_seconds'] / seconds:.1%}; "
                f"skipped {len(result['probe_left_out'])}"
            )


NUM_PROBED = 1_024


def add_block(sums: BlockSums, targets: Sequence[torch.Tensor], number: int, outputs: torch.Tensor) -> None:
    sums.add(number * PROBE_BLOCK, outputs, targets[number])


def recording(console: Console, rounds: int) -> None:
    settings = {"probe.diagnostics": [], "mlflow.enabled": False}
    kinds = ("spectra", "and loss", "loss alone")
    with tempfile.TemporaryDirectory() as folder:
        config, context = validate(RunConfig, nested(settings)), RuntimeContext()
        resolved = resolve_run(config, Path(folder), World(), lambda *about: None, context)
        trainer = Trainer(resolved, World(), NullRecorder(), lambda *about: None, context)
        trainer.start(resume=False)
        model, train_set = trainer.model, resolved.splits.train
        inputs = resolved.preprocess(train_set.inputs[:NUM_PROBED]).split(PROBE_BLOCK)
        targets = train_set.targets[:NUM_PROBED].split(PROBE_BLOCK)
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(20 * rounds):
            for kind in kinds:
                began = time.process_time()
                sums = BlockSums(resolved.task, NUM_PROBED, PROBE_BLOCK, World())
                if kind == "loss alone":
                    with eval_context(model):
                        for number, block in enumerate(inputs):
                            add_block(sums, targets, number, model(block))
                else:
                    add = partial(add_block, sums, targets) if kind == "and loss" else None
                    measure(model, inputs, world=World(), on_outputs=add)
                if kind != "spectra":
                    sums.score()
                seconds[kind].append(time.process_time() - began)
        trainer.close()
    spectra = seconds["spectra"]
    for kind in kinds:
        ratios = [one / other for one, other in zip(seconds[kind], spectra, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        console.print(
            f"{kind}: {1000 * statistics.median(seconds[kind]):.1f} ms of the processor, {middle:.3f} of the spectra "
            f"(middle half {low:.3f} to {high:.3f})"
        )
    for max_time_fraction in (0.05, None):
        for _ in range(rounds):
            for losses in ("off", "auto"):
                with tempfile.TemporaryDirectory() as folder:
                    out = Path(folder) / "run"
                    prepare_folder(out, "run.json", resume=False)
                    given = {"probe.at_losses": losses, "probe.max_time_fraction": max_time_fraction}
                    began = time.process_time()
                    result = run(validate(RunConfig, nested({"mlflow.enabled": False} | given)), out)
                    took = time.process_time() - began
                    measured = sum("probe/loss" in line for line in read_metrics(out))
                console.print(
                    f"default run, max_time_fraction={max_time_fraction}, at_losses={losses}: {took:.2f} s of the "
                    f"processor, {measured} measurements took {result['probe_seconds']:.2f} s by the clock"
                )


NUM_STEPS, BLOCK = 1280, 32  # a run writes the time with the metrics of every 32 steps
RUN = [
    "--train.steps", str(NUM_STEPS), "--batch.global_size", "256", "--probe.enabled", "false", "--train.num_evals", "1",
    "--mlflow.enabled", "false", "--checkpoint.every_seconds", "1e9",
]  # fmt: skip


def one(launcher: str, out: Path) -> float:
    """Milliseconds per step with a launcher: median over blocks, without the first ten, in which Ray still starts."""
    python = [sys.executable, "-m"]
    torchrun = [*python, "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "gengap_dist.train"]
    ray = [*python, "gengap_dist.train", "--launch.launcher", "ray", "--launch.num_processes", "2"]
    command = [*(torchrun if launcher == "torchrun" else ray), *RUN, "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    seconds_at_step = {line["step"]: line["seconds"] for line in read_metrics(out)}
    block_seconds = [
        seconds_at_step[step + BLOCK] - seconds_at_step[step] for step in range(10 * BLOCK, NUM_STEPS - BLOCK, BLOCK)
    ]
    return 1000 * statistics.median(block_seconds) / BLOCK


def ray(console: Console, rounds: int) -> None:
    times: dict[str, list[float]] = {"torchrun": [], "ray": []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            for launcher in times:
                times[launcher].append(one(launcher, Path(folder) / f"{launcher}{number}"))
    ratios = [b / a for a, b in zip(*times.values(), strict=True)]
    for launcher, step_ms in times.items():
        console.print(
            f"{launcher:9} {statistics.median(step_ms):6.2f} ms per step ({min(step_ms):.2f} to {max(step_ms):.2f})"
        )
    console.print(f"ray / torchrun {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


def metrics_of_a_rank(config: RunConfig, out: Path, **options: Any) -> dict[str, Any]:
    """Seconds of blocks of steps on one rank, in turns with the sum of metrics over ranks and without it.

    Of each block those of the clock, and those that the processor computed for this rank, in all its threads.
    """
    context = RuntimeContext()
    world = init_process_group(config.launch.device, config.launch.timeout_seconds)
    resolved = resolve_run(config, out, world, options["progress"], context)
    trainer = Trainer(resolved, world, NullRecorder(), options["progress"], context)
    trainer.start(resume=False)
    trainer.model.train()
    metrics, seconds = trainer.step_metrics, ([], [])
    for number in range(config.train.steps // BLOCK if config.train.steps else 0):
        recorded = number % 2
        world.barrier()
        began, computed = time.perf_counter(), time.process_time()
        for _ in range(BLOCK):
            result = trainer.step()
            if recorded:
                metrics.add(trainer.state.step, result, preemption_requested=False)
                list(metrics.read(in_flight=1))
        list(metrics.read(in_flight=0))
        world.barrier()
        seconds[recorded].append((time.perf_counter() - began, time.process_time() - computed))
    trainer.close()
    return {"without": seconds[0], "with": seconds[1]}


def metrics(console: Console) -> None:
    settings = {"batch.global_size": 512, "train.steps": 40 * BLOCK, "probe.enabled": False, "train.num_evals": 1}
    launcher = LocalLauncher(2, "overhead:metrics_of_a_rank")
    try:
        with tempfile.TemporaryDirectory() as folder:
            config = validate(RunConfig, nested(settings | {"mlflow.enabled": False}))
            found = launcher.run(config, Path(folder), resume=False, progress=lambda *about: None)
    finally:
        launcher.close()
    pairs = list(zip(found["with"], found["without"], strict=True))[1:]  # the first is warm-up
    console.print(f"LeNet-5 at 512 on 2 ranks, {len(pairs)} pairs of blocks of {BLOCK} steps")
    for number, kind in enumerate(("by the clock", "of the processor")):
        step_ms = 1000 * statistics.median(without[number] for _, without in pairs) / BLOCK
        extra_ms = [1000 * (with_metrics[number] - without[number]) / BLOCK for with_metrics, without in pairs]
        low, middle, high = statistics.quantiles(extra_ms, n=4)
        console.print(
            f"{kind}: {step_ms:.2f} ms per step without metrics; they add {middle:+.3f} ms, {middle / step_ms:+.2%} "
            f"of a step (middle half {low / step_ms:+.2%} to {high / step_ms:+.2%})"
        )


PENALTY = {"algorithm.rank_penalty": 0.01, "algorithm.rank_images": 1024}
ARMS = {
    "plain": {},
    "rank penalty": PENALTY,
    "placebo": PENALTY | {"algorithm.rank_measure": "placebo", "algorithm.placebo_of": "logdet"},
}


def interventions(console: Console) -> None:
    """Processor time of single steps in one process, in turns."""
    world = init_process_group("cpu", 60)
    for global_size, micro_size in ((32, 128), (32, 1024), (647, 128), (647, 1024)):
        with ExitStack() as stack:
            trainers = {}
            for name, settings in ARMS.items():
                settings = settings | {"batch.global_size": global_size, "batch.micro_size": micro_size}
                settings |= {"model.name": "mlp", "model.widths": [256, 128], "model.norm": "none"}
                settings |= {"data.image_size": 28, "probe.enabled": False, "mlflow.enabled": False, "train.steps": 100}
                config = validate(RunConfig, nested(settings))
                out = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                resolved = resolve_run(config, out, world, lambda *about: None, RuntimeContext())
                trainers[name] = Trainer(resolved, world, NullRecorder(), lambda *about: None, RuntimeContext())
                stack.callback(trainers[name].close)
                trainers[name].start(resume=False)
                trainers[name].model.train()
            times = {name: [] for name in ARMS}
            for _ in range(40):
                for name, trainer in trainers.items():
                    began = time.process_time()
                    trainer.step()
                    times[name].append(time.process_time() - began)
        steady = {name: values[10:] for name, values in times.items()}
        for name, base in (("rank penalty", "plain"), ("placebo", "plain"), ("placebo", "rank penalty")):
            ratios = [a / b for a, b in zip(steady[name], steady[base], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            console.print(
                f"batch {global_size}, micro-batches of {micro_size}: {name} / {base} {middle:.2f} ({low:.2f} to "
                f"{high:.2f}); {1000 * statistics.median(steady[base]):.1f} and "
                f"{1000 * statistics.median(steady[name]):.1f} ms"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["checkpoints", "probes", "ray", "metrics", "recording", "interventions"])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    console = Console(width=100)
    console.print(f"torch {torch.__version__}, {available_cores().whole} cores")
    if options.what in ("ray", "recording"):
        {"ray": ray, "recording": recording}[options.what](console, options.rounds)
    else:
        measured = {
            "checkpoints": checkpoints,
            "probes": probes,
            "metrics": metrics,
            "interventions": interventions,
        }
        measured[options.what](console)


if __name__ == "__main__":
    main()
