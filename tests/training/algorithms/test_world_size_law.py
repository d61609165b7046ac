"""The world-size law: whatever the algorithm and the norm, ranks and micro-batches change nothing.

Every row of ALGORITHMS is trained for an epoch with a ragged last step, augmentation on, in float64, on 1 and 2 real
ranks, in micro-batches of two sizes, and from 2 ranks through a kill to 3; with GENGAP_FULL=1 also on 1 in the other
micro-batches, and on 3 from the start. Losses, validation, weights and running statistics must agree to 1e-8.
"""

import json
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn

from gengap_dist.config.measures import Optimizer
from gengap_dist.config.sections import AlgorithmConfig, BatchConfig, DataConfig, ModelConfig, OptimConfig, TrainConfig
from gengap_dist.distributed.process_group import World
from gengap_dist.runs.run_folder import prepare_folder, read_info
from gengap_dist.training.trainer import run
from tests.conftest import FULL, config, cut_after, thinned, weights


def small(num_classes: int, in_channels: int) -> nn.Module:
    """Convolutions with batch norm, 1-d batch norm, dropout."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 3 * 3, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, num_classes),
    )  # fmt: skip


def nadam(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.NAdam(model.parameters(), lr=lr)


def ramp(*changes: tuple[float, int]) -> tuple[dict[str, float], ...]:
    return tuple({"at": at, "size": size} for at, size in changes)


BASE: dict[str, Any] = {
    "model__name": f"{__name__}:small",
    "data__image_size": 12,
    "data__augment": ("crop", "flip", "cutout"),
    "data__crop_padding": 2,
    "data__cutout_size": 4,
    "data__val_fraction": 0.05,
    "batch__global_size": 60,
    "batch__ghost_size": 10,
    "optim__lr": 0.05,
    "train__dtype": "float64",
    "train__epochs": 1,  # 23 steps, the last of 46 samples
    "train__num_evals": 3,
    "checkpoint__every_steps": 13,  # with no evaluation there, which would tidy up
    "checkpoint__keep": 9,
    "probe__enabled": False,
    "probe__diagnostics": ("noise_scale",),
}
MICRO = (10, 25)
ADAMW: dict[str, Any] = {"optim__name": "adamw", "optim__lr": 3e-3, "optim__weight_decay": 0.1}
SYNC: dict[str, Any] = {"model__norm": "sync", "batch__ghost_size": None}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "plain": {"optim__momentum": 0.0},
    "nesterov": {"optim__nesterov": True, "optim__weight_decay": 1e-3},
    "sync": SYNC,
    "group": {"model__norm": "group", "batch__ghost_size": None},
    "none": {"model__norm": "none", "batch__ghost_size": None},
    "adamw": ADAMW,
    "betas": {"optim__name": "adamw", "optim__lr": 3e-3, "optim__betas": (0.8, 0.95), "optim__eps": 1e-6},
    "lars": {"optim__name": "lars", "optim__lr": 2.0, "optim__weight_decay": 1e-3},
    "lamb": {"optim__name": "lamb", "optim__lr": 0.01, "optim__weight_decay": 1e-3},
    "muon": {"optim__name": "muon", "optim__adamw_lr": 3e-3, "optim__weight_decay": 0.1, "optim__nesterov": True},
    "own": {"optim__name": f"{__name__}:nadam", "optim__lr": 3e-3},
    "linear": {"optim__scaling": "linear", "optim__base_size": 30, "optim__warmup_epochs": 0.2},
    "sqrt": {"optim__scaling": "sqrt", "optim__base_size": 30},
    "legw": {"optim__scaling": "legw", "optim__base_size": 30, "optim__warmup_epochs": 0.2},
    "adam_sqrt": ADAMW | {"optim__scaling": "adam_sqrt", "optim__base_size": 30, "optim__lr": 3e-3},
    "half_life": ADAMW
    | {"optim__beta2_scaling": "half_life", "optim__weight_decay_scaling": "linear", "optim__base_size": 30},
    "step": {"optim__schedule": "step", "optim__momentum_correction": False},
    "cosine": {"optim__schedule": "cosine"},
    "polynomial": {"optim__schedule": "polynomial"},
    "wsd": {"optim__schedule": "wsd", "optim__decay_fraction": 0.6},
    "ramp": {  # 6 steps of 60, 15 of 120, 12 of 180: the kill is in the middle of it
        "batch__schedule": ramp((0, 60), (360, 120), (2000, 180)),
        "batch__schedule_lr_power": 0.6,
        "optim__momentum_correction": False,
        "train__epochs": 3,
    },
    "ramp_epochs": {
        "batch__schedule": ramp((0, 60), (0.7, 120)),
        "batch__schedule_unit": "epochs",
        "train__epochs": 2,
    },
    "ramp_steps": ADAMW
    | {
        "batch__schedule": ramp((0, 60), (9, 120)),
        "batch__schedule_unit": "steps",
        "batch__schedule_lr_power": 0.5,
        "train__steps": 20,
    },
    "mixed": {
        "data__augment": ("resized_crop", "flip", "rand_augment", "cutout", "mixup", "cutmix"),
        "algorithm__label_smoothing": 0.1,
    },
    "updates": {"train__length_unit": "updates", "optim__base_size": 40},
    "target": {"train__target_accuracy": 0.2, "train__stop_at_target": True},
    "clip": {"optim__clip_norm": 0.5},
    "label_smoothing": {"algorithm__label_smoothing": 0.1},
    "sam": {"algorithm__sam_rho": 0.05},
    "sam_sync": {"algorithm__sam_rho": 0.05} | SYNC,
    "gradient_penalty": {"algorithm__gradient_penalty": 0.05, "algorithm__penalty_size": 10},
    "rank_logdet": {"algorithm__rank_penalty": 0.01, "algorithm__rank_layers": ("5", "9")},
    "rank_spread": {
        "algorithm__rank_penalty": -0.01,
        "algorithm__rank_measure": "spread",
        "algorithm__rank_layers": ("5",),
        "algorithm__rank_images": 73,
    },
    "rank_trace": {"algorithm__rank_penalty": 0.1, "algorithm__rank_measure": "trace"},
    "rank_placebo": {
        "algorithm__rank_penalty": 0.1,
        "algorithm__rank_measure": "placebo",
        "algorithm__placebo_of": "logdet",
        "algorithm__rank_layers": ("5", "9"),
        "algorithm__rank_images": 73,
    },
    "rank_sync": {"algorithm__rank_penalty": 0.01, "algorithm__rank_layers": ("5", "9")} | SYNC,
    "ema": {"algorithm__weight_averaging": "ema"},
    "swa": {"algorithm__weight_averaging": "swa", "algorithm__average_start": 0.5},
    "swa_sync": {"algorithm__weight_averaging": "swa", "algorithm__average_start": 0.5} | SYNC,
    "post_local_sgd": {"algorithm__local_sgd": "post_local_sgd", "algorithm__workers": 3, "algorithm__local_steps": 4},
    "swap": {"algorithm__local_sgd": "swap", "algorithm__workers": 2},
}
# Rows of `make test-full`: what they add to another row is a number that each rank computes from step and settings
# (test_lr_schedule.py, test_optimizer.py), a part of `mixed`, or a case of parallel/strategies/test_contract.py.
IN_FULL = (
    *("sqrt", "legw", "adam_sqrt", "half_life", "step", "cosine", "polynomial", "betas", "updates"),
    *("plain", "nesterov", "lamb", "clip", "label_smoothing", "none", "rank_trace", "ramp_epochs", "ramp_steps"),
)


def train(world: World, settings: dict[str, Any], out: Path, resume: bool = False) -> None:
    if world.rank == 0:
        prepare_folder(out, "run.json", resume=resume)
    world.barrier()
    run(config(**settings), out, world=world, resume=resume)


def curves(out: Path) -> dict[str, list[float]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    names = ("train/loss", "train/accuracy", "train/grad_norm", "val/loss", "val/accuracy")
    names += ("train/rank_penalty", "train/rank_penalty_grad_norm")
    return {name: [row[name] for row in rows if name in row] for name in names}


def assert_same_runs(outs: list[Path]) -> list[float]:
    """All runs have the curves, weights, results and norm sizes of the first, whose training losses come back."""
    first, *others = [(curves(out), weights(out), read_info(out)) for out in outs]
    for curve, state, info in others:
        for key, values in curve.items():
            assert values == pytest.approx(first[0][key], abs=1e-8), key
        for key, value in state.items():
            if value.is_floating_point():
                torch.testing.assert_close(value, first[1][key], rtol=0, atol=1e-8, msg=lambda m, k=key: f"{k}: {m}")
        for key in ("test/accuracy", "test/loss", "best_val/accuracy"):
            assert info.result[key] == pytest.approx(first[2].result[key], abs=1e-8)
        assert info.norm_size == first[2].norm_size
    return first[0]["train/loss"]


@pytest.mark.parametrize(
    "name",
    thinned(
        ALGORITHMS,
        lambda name: name not in IN_FULL,
    ),
)
def test_ranks_and_micro_batches_change_nothing(crews, tmp_path, name):
    if name in ("lars", "lamb"):
        pytest.importorskip("timm", reason="timm is not installed")
    settings = BASE | ALGORITHMS[name]
    micro = (60, 64) if settings.get("model__norm") == "sync" else MICRO
    outs = []
    more = [(1, micro[1]), (3, micro[0])] if FULL else []
    for number, (size, micro_size) in enumerate([(1, micro[0]), (2, micro[1]), *more]):
        outs.append(tmp_path / str(number))
        crews[size](train, settings | {"batch__micro_size": micro_size}, outs[-1])
    outs.append(shutil.copytree(outs[1], tmp_path / "moved"))
    cut_after(outs[-1], 13)
    crews[3](train, settings | {"batch__micro_size": micro[1]}, outs[-1], True)
    losses = assert_same_runs(outs)
    assert len(losses) >= 20 or name == "target"
    assert losses[-1] < losses[0]  # it learns: a law of standing still is none


def test_local_norm_depends_on_the_cut_and_the_run_says_so(crews, tmp_path):
    sizes = []
    for size in (1, 2):
        settings = BASE | {"batch__ghost_size": None, "batch__micro_size": 60}
        crews[size](train, settings, tmp_path / str(size))
        sizes.append(read_info(tmp_path / str(size)).norm_size)
    assert sizes == [[60], [30]]
    a, b = (curves(tmp_path / str(size))["train/loss"] for size in (1, 2))
    assert max(abs(x - y) for x, y in zip(a, b, strict=True)) > 1e-3


def test_the_table_holds_every_algorithm():
    """Every choice of a setting that changes how a network trains is in some row."""
    rows = [BASE | row for row in ALGORITHMS.values()]
    choices = {
        "optim__schedule": OptimConfig, "optim__scaling": OptimConfig,
        "optim__beta2_scaling": OptimConfig, "optim__weight_decay_scaling": OptimConfig,
        "batch__schedule_unit": BatchConfig, "data__augment": DataConfig,
        "model__norm": ModelConfig, "train__length_unit": TrainConfig, "algorithm__local_sgd": AlgorithmConfig,
        "algorithm__weight_averaging": AlgorithmConfig, "algorithm__rank_measure": AlgorithmConfig,
    }  # fmt: skip
    for key, section in choices.items():
        field = section.model_fields[key.partition("__")[2]]
        known = {word for part in (field.annotation, *get_args(field.annotation)) for word in get_args(part)}
        words = {word for word in known if isinstance(word, str)} - {"local", field.default}
        words -= {"tokens"}  # in tests/training/tasks/test_language_modeling.py
        shown = {config(**row).norm if key == "model__norm" else row.get(key) for row in rows}
        shown |= {name for names in shown if isinstance(names, tuple) for name in names}
        assert words <= shown, (key, words - shown)
    assert {*get_args(Optimizer)} <= {row.get("optim__name", "sgd") for row in rows}
    for name, field in AlgorithmConfig.model_fields.items():
        if field.default is None or field.default == 0:
            assert any(f"algorithm__{name}" in row for row in rows), name
