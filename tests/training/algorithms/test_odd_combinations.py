"""Odd combinations of algorithms under the world-size law; see test_law."""

import shutil
from typing import Any

import pytest
from torch import Tensor, nn

from tests.conftest import FULL, cut_after, thinned
from tests.training.algorithms.test_world_size_law import BASE, SYNC, assert_same_runs, ramp, train


class Shared(nn.Module):
    """One batch norm and one dropout that are used twice."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(in_channels, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.norm, self.relu, self.dropout = nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.3)
        self.hidden, self.head = nn.Linear(6, 12), nn.Linear(12, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.dropout(self.relu(self.norm(self.first(x))))
        h = self.dropout(self.relu(self.norm(self.second(h)))) + h
        return self.head(self.relu(self.hidden(h.mean((2, 3)))))


def shared(num_classes: int, in_channels: int) -> nn.Module:
    return Shared(num_classes, in_channels)


GROW: dict[str, Any] = {
    "batch__schedule": ramp((0, 60), (1, 120), (2, 240)), "batch__schedule_unit": "epochs", "train__epochs": 3
}  # fmt: skip
EMA, SWA = {"algorithm__weight_averaging": "ema"}, {"algorithm__weight_averaging": "swa"}
SAM, RANK, AUTO = {"algorithm__sam_rho": 0.05}, {"algorithm__rank_penalty": 0.02}, {"algorithm__rank_layers": ("auto",)}
LOCAL = {
    "algorithm__local_sgd": "post_local_sgd",
    "algorithm__workers": 3,
    "algorithm__local_steps": 3,
    "algorithm__local_start": 0.4,
}
SWAP = {"algorithm__local_sgd": "swap", "algorithm__workers": 3, "algorithm__local_start": 0.4}
LAMB = {"optim__name": "lamb", "optim__lr": 0.01}
LARS = {"optim__name": "lars", "optim__lr": 2.0}
OF_TWO_USES = {"model__name": f"{__name__}:shared"}
ODD: dict[str, dict[str, Any]] = {
    "lamb_ghost_ema_smooth_grow_cutout":
        LAMB | {"optim__weight_decay": 1e-2, "algorithm__label_smoothing": 0.1} | EMA | GROW,
    "sam_clip_sync_swa": SAM | {"optim__clip_norm": 0.3} | SWA | {"algorithm__average_start": 0.3} | SYNC,
    "sam_clip_grow_adamw": {
        "algorithm__sam_rho": 0.1, "optim__clip_norm": 0.5, "optim__name": "adamw", "optim__lr": 3e-3,
        "optim__weight_decay": 0.1,
    } | GROW,
    "postlocal_3_workers": LOCAL | {
        "algorithm__local_steps": 5, "algorithm__local_start": 0.3, "optim__clip_norm": 0.5,
        "algorithm__label_smoothing": 0.1, "optim__nesterov": True,
    },
    "postlocal_sam": LOCAL | {"algorithm__local_steps": 1, "algorithm__local_start": 0.2} | SAM,
    "postlocal_rank": LOCAL | {
        "algorithm__workers": 2, "algorithm__rank_penalty": 0.01, "algorithm__rank_layers": ("5", "9")
    },
    "postlocal_lamb": LOCAL | {"algorithm__workers": 6} | LAMB,
    "postlocal_gradpen": LOCAL | {"algorithm__gradient_penalty": 0.05, "algorithm__penalty_size": 10},
    "rank_swa": RANK | {"algorithm__rank_layers": ("2", "9")} | SWA | {"algorithm__average_start": 0.4},
    "rank_ema_sync_clip": RANK | AUTO | EMA | {"algorithm__ema_decay": 0.9, "optim__clip_norm": 0.5} | SYNC,
    "rank_sam": RANK | AUTO | SAM,
    "rank_group_shuffle": RANK | AUTO | {
        "algorithm__rank_measure": "spread", "model__norm": "group", "batch__ghost_size": None,
        "data__shuffle_labels": True,
    },
    "swap_cosine_uncorrected": SWAP | {
        "optim__schedule": "cosine", "optim__momentum_correction": False, "optim__scaling": "sqrt",
        "optim__base_size": 20, "optim__warmup_epochs": 0.2,
    },
    "swap_lars": SWAP | {"algorithm__workers": 2} | LARS | {"optim__weight_decay": 1e-3},
    "swap_rank_dropout": SWAP | {"algorithm__rank_penalty": 0.01, "algorithm__rank_layers": ("9",)},
    "lars_uncorrected_step_ema": LARS | {"optim__schedule": "step", "optim__momentum_correction": False} | EMA,
    "gradpen_ema_clip_wd": {
        "algorithm__gradient_penalty": 0.05, "algorithm__penalty_size": 20, "optim__clip_norm": 0.4,
        "optim__weight_decay": 1e-3,
    } | EMA,
    "legw_updates_target_swa": {
        "optim__scaling": "legw", "optim__base_size": 30, "optim__warmup_epochs": 0.1, "train__length_unit": "updates"
    } | SWA,
    "shared_ghost_rank": OF_TWO_USES | {"algorithm__rank_penalty": 0.01} | AUTO,
    "shared_sync_sam_ema": OF_TWO_USES | SAM | EMA | SYNC,
    "shared_swap": OF_TWO_USES | {"algorithm__local_sgd": "swap", "algorithm__workers": 2},
    "shared_postlocal_swa_none": OF_TWO_USES | {
        "algorithm__local_sgd": "post_local_sgd", "algorithm__workers": 3, "model__norm": "none",
        "batch__ghost_size": None,
    },
}  # fmt: skip


def micro_sizes(name: str, settings: dict[str, Any]) -> tuple[int, int]:
    """Two micro-batch sizes that the combination allows: whole ghost groups, and sync norm's whole steps."""
    if settings.get("model__norm") == "sync":
        return (60, 64)
    return (20, 45) if name == "gradpen_ema_clip_wd" else (10, 25)


FEW = {  # with every algorithm, norm and network of these
    "sam_clip_grow_adamw", "postlocal_3_workers", "postlocal_rank", "rank_ema_sync_clip", "swap_lars",
    "gradpen_ema_clip_wd", "shared_sync_sam_ema", "shared_swap", "legw_updates_target_swa",
}  # fmt: skip


@pytest.mark.parametrize("name", thinned(ODD, lambda name: name in FEW))
def test_ranks_micro_batches_and_kills_change_nothing(crews, tmp_path, name):
    if "lars" in name or "lamb" in name:
        pytest.importorskip("timm", reason="timm is not installed")
    settings = BASE | ODD[name]
    small, large = micro_sizes(name, settings)
    outs = []
    more = [(1, large), (3, small)] if FULL else []
    for number, (size, micro_size) in enumerate([(1, small), (2, large), *more]):
        outs.append(tmp_path / str(number))
        crews[size](train, settings | {"batch__micro_size": micro_size}, outs[-1])
    for of, after in ((1, 3), (3, 1), (2, 2)) if FULL else ((1, 3),):  # which run is killed, and ranks after that
        outs.append(shutil.copytree(outs[of], tmp_path / f"moved{of}"))
        cut_after(outs[-1], 13)
        crews[after](train, settings | {"batch__micro_size": large}, outs[-1], True)
    losses = assert_same_runs(outs)
    assert losses[-1] != losses[0]  # LARS without momentum correction has a higher one
