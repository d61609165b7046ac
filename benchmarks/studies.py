"""Compares whole studies, from command to last file: gengap_dist, shell loops over a plain script, and Ray Tune.

    python benchmarks/studies.py [--study lenet5] [--rounds 6] [--before CHECKOUT] [--out docs/benchmarks/studies.json]
    python benchmarks/studies.py --study mlp [--data DIR]

Studies: lenet5, that of benchmarks/lenet5_digits.yaml; mlp, two batch sizes x ten seeds of a multilayer
perceptron on digits, or on Fashion-MNIST in DIR. All contestants take turns; every run trains the same network on the
same images with the same optimizer, rate, batches and number of steps, and writes losses, validation at the same steps,
train and test accuracy, and the near-rank loss of the same layers, at the same steps on the same images. The plain
script also starts from the same weights and takes the images in the same order.

    packed, one by one, before    gengap study with its report, MLflow, checkpoints and other diagnostics; `before` is
                                  another checkout
    shell loop, xargs -P          rivals/plain_run.py, a process for each run: one after the other with torch's default
                                  threads, or as many as there are cores with one thread each; also without near-rank
                                  loss
    Ray Tune, Lightning           rivals/tune_lightning.py, one CPU a trial

Ratios are of runs per hour within a round, over `xargs -P` with near-rank loss. python benchmarks/page.py writes the
results into docs/benchmarks.md.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import paired_timing
import process_tree
import yaml
from page import STUDY_REFERENCE, study_columns
from rich.console import Console
from rich.table import Table

from gengap_dist.config.loading import load_yaml, merge, validate
from gengap_dist.config.sections import DataConfig, RunConfig
from gengap_dist.config.study import StudyConfig
from gengap_dist.data import datasets
from gengap_dist.data.sampler import EpochSampler
from gengap_dist.distributed.cores import available_cores
from gengap_dist.runs.run_folder import read_info, read_metrics
from gengap_dist.training.lr_schedule import Schedule, scaled_lr, warmup_steps

CHECKOUT = Path(__file__).parents[1]
RIVALS = Path(__file__).with_name("rivals")
NEAR_RANK_LOSS = "fc2/rel_1e-2"  # shown for every contestant, to see that all measure the same

MLP: dict[str, Any] = {
    "model": {"name": "mlp", "widths": [256, 256]},
    "batch": {"micro_size": 1024},  # batch norm over the whole batch, as in the plain script
    "train": {"steps": 300},
    "probe": {"max_time_fraction": None},
    "study": {
        "name": "mlp",
        "seeds": [*range(10)],
        "arms": [
            {"name": "sb64", "set": {"batch.global_size": 64}},
            {"name": "lb1024", "set": {"batch.global_size": 1024}},
        ],
    },
}


class RunResult(NamedTuple):
    """What a run found."""

    test_accuracy: float
    near_rank_loss: float | None
    """NEAR_RANK_LOSS after the last step; None: not measured."""


class Outcome(NamedTuple):
    """One turn of a contestant."""

    usage: process_tree.Usage
    results: dict[str, list[RunResult]]
    """By arm."""


class Contestant(NamedTuple):
    """One way to run a study."""

    command: Callable[[Path], Sequence[str]]
    """The command that writes its results to a new, empty folder."""
    read: Callable[[Path], Mapping[str, list[RunResult]]]
    """The results in that folder, by arm."""
    folder: Path
    """Where the command is run."""
    environment: Mapping[str, str]
    missing: str = ""
    """Why it cannot be run."""


# -- the studies ------------------------------------------------------------------------------------------------------


def study_tree(name: str, data: Path | None, *, quick: bool) -> dict[str, Any]:
    """The settings of a study; `quick`: of its first two arms and seeds, a few steps."""
    tree = load_yaml(Path(__file__).with_name("lenet5_digits.yaml")) if name == "lenet5" else MLP
    tree = merge(tree, {"probe": {"num_samples": 1024, "at_losses": []}})  # what the rivals do
    if data is not None:
        tree = merge(tree, {"data": {"name": "fashion_mnist", "root": str(data.resolve())}})
    if quick:
        study = tree["study"]
        few = {"seeds": study["seeds"][:2], "arms": study["arms"][:2]}
        tree = merge(tree, {"train": {"steps": 20}, "study": few})
    return tree


def plain_words(config: RunConfig, data: Path) -> list[str]:
    """The options of plain_run.py for a run, without --seed and --out.

    >>> config = validate(RunConfig, {"probe": {"num_samples": 9}})
    >>> " ".join(plain_words(config, Path("digits.npz")))  # doctest: +ELLIPSIS
    '--data digits.npz --network lenet5 --widths 512 ... --global_size 64 --lr 0.02 --momentum 0.9 --warmup_steps 0 ...'
    """
    assert (config.optim.name, config.optim.schedule, config.model.name in ("lenet5", "mlp")) == ("sgd", "constant", 1)
    size = config.batch.global_size
    sampler = EpochSampler(datasets.sizes(config.data).num_train, size, config.seed)
    steps_per_epoch = sampler.steps_per_epoch
    options: dict[str, object] = {
        "data": data,
        "network": config.model.name,
        "widths": " ".join(map(str, config.model.widths)),
        "global_size": size,
        "lr": scaled_lr(config.optim, size),
        "momentum": config.optim.momentum,
        "warmup_steps": warmup_steps(config.optim, global_size=size, steps_per_epoch=steps_per_epoch),
        "num_steps": Schedule.of(config, sampler).num_steps,
        "num_evals": config.train.num_evals,
        "num_probe_samples": max(size for size in config.probe.num_samples if size != "auto"),
    }
    return [word for name, value in options.items() for word in (f"--{name}", *str(value).split())]


def save_images(config: DataConfig, path: Path) -> None:
    """Write the images and labels of a data set for the rivals, which so read them faster than from their source."""
    arrays = datasets.LOADERS[config.name](config, lambda *_: None)
    np.savez(
        path,
        images=arrays.train_inputs.numpy(),
        labels=arrays.train_targets.numpy(),
        test_images=arrays.test_inputs.numpy(),
        test_labels=arrays.test_targets.numpy(),
    )


# -- the contestants --------------------------------------------------------------------------------------------------


def gengap(checkout: Path, config: Path, work: Path, words: Sequence[str]) -> Contestant:
    """`gengap study` of a checkout. All turns share a folder, in which MLflow's store is made before the first."""

    def command(out: Path) -> list[str]:
        return [sys.executable, "-m", "gengap_dist", "study", "--config", str(config), *words, "--out", str(out)]

    folder = work / checkout.resolve().as_posix().replace("/", "_")
    return Contestant(command, read_gengap, folder, environment(PYTHONPATH=str(checkout.resolve())))


def read_gengap(out: Path) -> dict[str, list[RunResult]]:
    """The results of `gengap study`."""
    results: dict[str, list[RunResult]] = {}
    for path in sorted(out.glob("runs/*/*/run.json")):
        rows = [row for row in read_metrics(path.parent) if f"near_rank_loss/{NEAR_RANK_LOSS}" in row]
        last = rows[-1][f"near_rank_loss/{NEAR_RANK_LOSS}"] if rows else None
        result = read_info(path.parent).result or {}
        results.setdefault(path.parent.parent.name, []).append(RunResult(result["test/accuracy"], last))
    return results


def shell(lines: Callable[[Path], list[str]], runner: str, work: Path, **variables: str) -> Contestant:
    """One line for each run, in a file that is given to `runner`, a shell command."""

    def command(out: Path) -> list[str]:
        file = out / "runs.sh"
        file.write_text("".join(f"{line}\n" for line in lines(out)))
        return ["sh", "-c", f"{runner} {shlex.quote(str(file))}"]

    return Contestant(command, read_rival, work, environment(**variables))


def plain_lines(arms: Mapping[str, list[str]], seeds: Sequence[int], words: Sequence[str], out: Path) -> list[str]:
    """The command of every run of the plain script; makes the folders of the arms."""
    lines = []
    for arm, options in arms.items():
        (out / arm).mkdir()
        for seed in seeds:
            own = ["--seed", str(seed), "--out", str(out / arm / f"{seed}.json")]
            lines.append(shlex.join([sys.executable, str(RIVALS / "plain_run.py"), *options, *words, *own]))
    return lines


def tune(arms: Mapping[str, list[str]], seeds: Sequence[int], python: str, work: Path) -> Contestant:
    """Ray Tune with Lightning, in an environment that has both."""
    packages = ("torch", "ray", "lightning")
    code = f"from importlib.util import find_spec\nprint(*(name for name in {packages} if not find_spec(name)))"
    lacking = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    file = work / "arms.json"
    file.write_text(json.dumps(arms))

    def command(out: Path) -> list[str]:
        for arm in arms:
            (out / arm).mkdir()
        words = [
            "--arms",
            str(file),
            "--seeds",
            *map(str, seeds),
            "--num_cpus",
            str(available_cores().whole),
            "--out",
            str(out),
        ]
        return [python, str(RIVALS / "tune_lightning.py"), *words]

    missing = f"not installed: {', '.join(lacking)}" if lacking else ""
    return Contestant(command, read_rival, work, environment(), missing)


def read_rival(out: Path) -> dict[str, list[RunResult]]:
    """The results of plain_run.py and tune_lightning.py."""
    results: dict[str, list[RunResult]] = {}
    for path in sorted(out.glob("*/*.json"), key=lambda path: (path.parent.name, len(path.name), path.name)):
        run = json.loads(path.read_text())
        if "near_rank_loss" not in run:  # a file of Ray
            continue
        last = run["near_rank_loss"].get(str(run["num_steps"]), {}).get(NEAR_RANK_LOSS)
        results.setdefault(path.parent.name, []).append(RunResult(run["test"]["accuracy"], last))
    return results


def environment(**variables: str) -> dict[str, str]:
    """The variables of a contestant: without numbers of threads, then `variables`."""
    unset = {"OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYTHONPATH"}
    return {name: value for name, value in os.environ.items() if name not in unset} | variables


def contestants(options: argparse.Namespace, work: Path) -> dict[str, Contestant]:
    """All contestants, by name."""
    tree = study_tree(options.study, options.data, quick=options.quick)
    config = validate(StudyConfig, tree)
    seeds, images, file = config.study.seeds, work / "images.npz", work / "study.yaml"
    file.write_text(yaml.safe_dump(tree))
    save_images(config.data, images)
    arms = {arm.name: plain_words(config.run_config(arm, seed=0), images) for arm in config.arms}
    packed = ("--study.concurrent", options.concurrent)
    older = work / "before.yaml"  # for a checkout without measurements at losses
    older.write_text(yaml.safe_dump(tree | {"probe": {k: v for k, v in tree["probe"].items() if k != "at_losses"}}))
    before = gengap(options.before or CHECKOUT, older, work, ())
    lines, fewer_lines = (partial(plain_lines, arms, seeds, words) for words in ((), ("--no_probes",)))
    xargs = f"xargs -d '\\n' -n 1 -P {available_cores().whole} sh -c <"
    return {
        "gengap study, packed": gengap(CHECKOUT, file, work, packed),
        "gengap study, one by one": gengap(CHECKOUT, file, work, ("--study.concurrent", "1")),
        "gengap study, before": before._replace(missing="" if options.before else "no --before CHECKOUT"),
        "shell loop": shell(lines, "sh -e", work),
        STUDY_REFERENCE: shell(lines, xargs, work, OMP_NUM_THREADS="1"),
        "shell loop, no near-rank loss": shell(fewer_lines, "sh -e", work),
        f"{STUDY_REFERENCE}, no near-rank loss": shell(fewer_lines, xargs, work, OMP_NUM_THREADS="1"),
        "Ray Tune, Lightning": tune(arms, seeds, options.lightning_python, work),
    }


# -- the rounds -------------------------------------------------------------------------------------------------------


def warm_up(contestant: Contestant) -> None:
    """Make MLflow's store in the folder of a contestant of ours, and fill the page cache."""
    contestant.folder.mkdir(exist_ok=True)
    if contestant.read is read_gengap:
        command = [sys.executable, "-m", "gengap_dist", "train", "--train.steps", "1", "--out", "warm_up"]
        if not (contestant.folder / "warm_up").exists():
            process_tree.measure(command, contestant.folder, contestant.environment, contestant.folder / "warm_up.log")


def take_turn(contestant: Contestant, num_runs: int, work: Path) -> Outcome:
    """Run the whole study.

    Raises:
        RuntimeError: if the command fails, or results are missing.
    """
    with tempfile.TemporaryDirectory(dir=work) as folder:
        out = Path(folder) / "out"
        out.mkdir()
        command = contestant.command(out)
        usage = process_tree.measure(command, contestant.folder, contestant.environment, Path(folder) / "log")
        results = dict(contestant.read(out))
    if (found := sum(map(len, results.values()))) != num_runs:
        raise RuntimeError(f"{shlex.join(command)} has {found} results for {num_runs} runs")
    return Outcome(usage, results)


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What is written about a contestant: usage in every round, and the results of the last round by arm."""
    usage = {field: [getattr(outcome.usage, field) for outcome in outcomes] for field in process_tree.Usage._fields}
    results = outcomes[-1].results
    return usage | {
        field: {arm: [getattr(run, field) for run in runs] for arm, runs in results.items()}
        for field in RunResult._fields
    }


def arm_tables(results: Mapping[str, Any]) -> Table:
    """Test accuracy by contestant and arm: mean and standard deviation over seeds, in percent."""
    arms = list(next(iter(results["contestants"].values()))["test_accuracy"])
    table = Table("test accuracy, %", *arms, title="mean and standard deviation over seeds, last round")
    for name, found in results["contestants"].items():
        values = [[100 * value for value in found["test_accuracy"][arm]] for arm in arms]
        table.add_row(name, *(f"{statistics.mean(each):.1f} ± {statistics.pstdev(each):.1f}" for each in values))
    return table


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=["lenet5", "mlp"], default="lenet5")
    parser.add_argument("--data", type=Path, help="mlp: train on FashionMNIST in this folder, not on digits")
    parser.add_argument("--rounds", type=int, default=3, help=f"ratios need {paired_timing.MIN_ROUNDS}")
    parser.add_argument("--only", nargs="+", help="some contestants: words in their names, such as packed xargs")
    parser.add_argument("--before", type=Path, help="another checkout of this project")
    parser.add_argument("--concurrent", default="auto", help="study.concurrent of the packed study")
    parser.add_argument("--lightning_python", default=sys.executable, help="a Python with torch, ray and lightning")
    parser.add_argument("--quick", action="store_true", help="two arms, two seeds, 20 steps: whether all of it works")
    parser.add_argument("--out", type=Path, help="write the results to this JSON file, beside those of other studies")
    options = parser.parse_args()
    if options.data and options.study == "lenet5":
        parser.error("--data is for --study mlp")
    machine, busy = paired_timing.machine(), paired_timing.busy()
    console = Console(width=140, highlight=False)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        known = contestants(options, work)
        chosen = {
            name: contestant
            for name, contestant in known.items()
            if name == STUDY_REFERENCE or not options.only or any(word in name for word in options.only)
        }
        present = {name: contestant for name, contestant in chosen.items() if not contestant.missing}
        config = validate(StudyConfig, load_yaml(work / "study.yaml"))
        num_runs = len(config.arms) * len(config.study.seeds)
        for contestant in present.values():
            warm_up(contestant)
        outcomes = paired_timing.in_turns(
            {name: partial(take_turn, contestant, num_runs, work) for name, contestant in present.items()},
            options.rounds,
        )
    results = {
        "title": f"{options.study}: {len(config.arms)} arms x {len(config.study.seeds)} seeds of {config.model.name} "
        f"on {config.data.name}{', shortened' if options.quick else ''}",
        "machine": machine,
        "busy": busy,
        "num_runs": num_runs,
        "missing": {name: contestant.missing for name, contestant in chosen.items() if contestant.missing},
        "contestants": {name: summary(each) for name, each in outcomes.items()},
    }
    head, *rows = study_columns(results)
    table = Table(*head, title=f"{results['title']}; {options.rounds} rounds")
    for row in rows:
        table.add_row(*row)
    console.print(table, arm_tables(results), f"Machine: {paired_timing.machine_summary(machine)}.")
    if busy > 0.1:
        console.print(f"Other processes used {busy:.0%} of the cores before the first round: do not use these times.")
    if options.out:
        before = json.loads(options.out.read_text()) if options.out.exists() else {}
        options.out.write_text(json.dumps(before | {options.study: results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
