"""Whether two checkouts compute the same numbers: run it before and after a change that must not change any.

    python benchmarks/same_numbers.py --before CHECKOUT [--ranks 1 2] [--only NAME ...] [--old_keys]

Every row of CONFIGS trains for a few steps in float64 (float32 where DeepSpeed has no float64) by `gengap train` of
each checkout, on each number of ranks. Losses, metrics of every step and the weights of the last checkpoint must be
bitwise equal on one rank, and agree to 1e-12 (relative to the largest value) on more.
`--old_keys` gives the other checkout the names that settings had before (`config.loading.RENAMED`).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.progress import track

from gengap_dist.config.loading import RENAMED

HERE = Path(__file__).parent.parent
BASE = {
    "mlflow.enabled": "false", "train.steps": "12", "train.dtype": "float64", "batch.global_size": "60",
    "batch.micro_size": "10", "batch.ghost_size": "10", "checkpoint.every_steps": "6", "checkpoint.keep": "9",
    "train.num_evals": "3", "probe.enabled": "false", "probe.num_samples": "100", "model.name": "resnet20",
    "data.image_size": "16",
}  # fmt: skip
AUGMENT = {"data.augment": '["crop","flip","cutout"]', "data.crop_padding": "2", "data.cutout_size": "4"}
SYNC = {"model.norm": "sync", "batch.ghost_size": "null", "batch.micro_size": "64"}
ZERO = {"train.dtype": "float32"}
CONFIGS: dict[str, dict[str, str]] = {
    "default, probed": {"probe.enabled": "true", "probe.max_time_fraction": "null", "model.name": "lenet5",
                        "batch.ghost_size": "null", "data.image_size": "32"},
    "fsdp": {"launch.strategy": "fsdp"},
    "zero1": ZERO | {"launch.strategy": "zero1"},
    "zero2": ZERO | {"launch.strategy": "zero2", "algorithm.weight_averaging": "ema"},
    "zero3": ZERO | {"launch.strategy": "zero3"},
    "sync norm": SYNC,
    "sam, augmentation": {"algorithm.sam_rho": "0.05"} | AUGMENT,
    "gradient penalty": {"algorithm.gradient_penalty": "0.05", "algorithm.penalty_size": "10"},
    "rank penalty": {"algorithm.rank_penalty": "0.01", "algorithm.rank_layers": '["auto"]', "model.name": "lenet5",
                     "batch.ghost_size": "null", "data.image_size": "32"},
    "post-local SGD": {"algorithm.local_sgd": "post_local_sgd", "algorithm.workers": "3", "algorithm.local_steps": "2"},
    "SWA, AdamW": {"algorithm.weight_averaging": "swa", "optim.name": "adamw", "optim.lr": "0.003",
                            "model.name": "mlp", "batch.ghost_size": "null"},
    "resumed": AUGMENT,
}  # fmt: skip


def main() -> None:
    """Run both, compare, print a line for each; exit with 1 if any number differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="the other checkout")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of ranks")
    parser.add_argument("--only", nargs="+", choices=[*CONFIGS], default=[*CONFIGS], help="rows")
    parser.add_argument("--old_keys", action="store_true", help="translate settings for the other checkout")
    options = parser.parse_args()
    num_differing = 0
    with tempfile.TemporaryDirectory() as folder:
        todo = [(name, size) for name in options.only for size in options.ranks]
        for name, size in track(todo, description="runs"):
            outs = [Path(folder) / f"{which}{size}" for which in ("before", "after")]
            for checkout, out, old in zip((options.before, HERE), outs, (options.old_keys, False), strict=True):
                train(checkout, BASE | CONFIGS[name], size, out, old=old)
                if name == "resumed":
                    cut_after(out, 6)
                    train(checkout, BASE | CONFIGS[name], size, out, "--resume", old=old)
            largest, num_values = difference(*outs)
            same = largest == 0 if size == 1 else largest <= 1e-12
            num_differing += not same
            verdict = "" if same else "  DIFFERS"
            print(f"{name:22} {size} rank(s)  {num_values:7} values  {largest:.1e}{verdict}", flush=True)
            for out in outs:
                shutil.rmtree(out)
    sys.exit(1 if num_differing else 0)


def train(checkout: Path, settings: dict[str, str], num_ranks: int, out: Path, *words: str, old: bool) -> None:
    """`gengap train` of a checkout."""
    names = {new: name for name, new in RENAMED.items() if "." in name} if old else {}

    def key(name: str) -> str:
        return names.get(name) or (name.replace("algorithm.", "recipe.") if old else name)

    options = [word for name, value in settings.items() for word in (f"--{key(name)}", value)]
    command = [sys.executable, "-m", "gengap_dist", "train", *options, "--out", str(out), *words]
    env = os.environ | {"PYTHONPATH": str(checkout.resolve()), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command += ["--launch.num_processes", str(num_ranks)]
    done = subprocess.run(command, env=env, cwd=out.parent, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")


def cut_after(out: Path, step: int) -> None:
    """Leave the folder as a kill after `step` would have left it."""
    for path in (out / "checkpoints").iterdir():
        if path.is_dir() and int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    info = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(info | {"status": "running"}))


def difference(one: Path, other: Path) -> tuple[float, int]:
    """Largest difference of two runs' numbers, relative to the largest value of its kind, and how many there are."""
    pairs = [*zip(*(curves(out).items() for out in (one, other)), strict=True)]
    pairs += [*zip(*(weights(out).items() for out in (one, other)), strict=True)]
    largest, num_values = 0.0, 0
    for (name, a), (other_name, b) in pairs:
        assert name == other_name, (name, other_name)
        assert a.shape == b.shape, name
        scale = max(float(a.abs().max()), 1e-300)
        largest = max(largest, float((a.double() - b.double()).abs().max()) / scale)
        num_values += a.numel()
    return largest, num_values


def curves(out: Path) -> dict[str, torch.Tensor]:
    """Metrics by name, without those that are times."""
    values: dict[str, list[float]] = {}
    for line in (out / "metrics.jsonl").read_text().splitlines():
        for name, value in json.loads(line).items():
            if "seconds" not in name and not name.startswith("time/"):
                values.setdefault(name, []).append(float(value))
    return {name: torch.tensor(values[name], dtype=torch.float64) for name in sorted(values)}


def weights(out: Path) -> dict[str, torch.Tensor]:
    """Tensors of the last checkpoint that are not empty, by name."""
    path = max((out / "checkpoints").glob("step_*")) / "model.pt"
    state = torch.load(path, weights_only=True)
    return {name: value for name, value in sorted(state.items()) if value.numel()}


if __name__ == "__main__":
    main()
