"""Runs that are trained on fake GPUs and on the CPU; see test_scenarios.py. Settings are for `tests.conftest.config`.

A name that ends in " x2" is a run on 2 ranks. Precision is float32, as users have it: the fake GPU's kernels are the
CPU's, so numbers that went the same way are the same.
"""

from typing import Any, NamedTuple

from torch import Tensor, nn

EXACT = 1e-7  # largest relative difference between a GPU run's numbers and the CPU's

Settings = dict[str, Any]


class Scenario(NamedTuple):
    """One comparison."""

    settings: Settings
    num_ranks: int = 1
    tolerance: float = EXACT
    because: str = ""
    """Why the tolerance is not EXACT."""
    twin: Settings = {}
    """What the run on the CPU has instead."""
    only: str = ""
    """What the name of a number must hold to be compared."""
    begun_on: str = ""
    """Device of the first half, which is then resumed on GPUs; the twin is never interrupted."""


def plain(num_classes: int, in_channels: int) -> nn.Module:
    """Linear layers only."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(144 * in_channels, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(),
        nn.Linear(16, num_classes),
    )  # fmt: skip


class Tokens(nn.Module):
    """Four tokens a picture, one layer of attention."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(in_channels, 16, 6, stride=6)
        self.block = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
        self.act = nn.GELU()
        self.head = nn.Linear(16, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [n, num_classes]."""
        return self.head(self.act(self.block(self.patch(images).flatten(2).transpose(1, 2))).mean(1))


def tokens(num_classes: int, in_channels: int) -> nn.Module:
    return Tokens(num_classes, in_channels)


BASE: Settings = {
    "model__name": f"{__name__}:plain",
    "data__image_size": 12,
    "data__crop_padding": 2,
    "data__cutout_size": 4,
    "data__val_fraction": 0.05,
    "batch__global_size": 60,
    "optim__lr": 0.05,
    "train__steps": 6,
    "train__num_evals": 2,
    "probe__num_samples": (100,),
    "probe__every": 3,
    "probe__per_decade": None,
}
OFF: Settings = {"probe__enabled": False}
SMALL: Settings = {
    "model__name": "tests.training.algorithms.test_world_size_law:small",
    "batch__ghost_size": 10,
}  # batch norm, dropout
LENET: Settings = {"model__name": "lenet5", "data__image_size": 32}
SYNC: Settings = SMALL | {"model__norm": "sync", "batch__ghost_size": None, "batch__micro_size": 64}
RAGGED: Settings = {"batch__global_size": 50, "train__steps": 32}  # an epoch is 28 steps, the last of 15 images
ONE_LEFT: Settings = {"batch__global_size": 52, "train__steps": 27, "probe__every": None}  # the last of 1 image
DIAGNOSTICS = ("noise_scale", "norms", "weights", "neural_collapse", "hessian", "keskar")
AUGMENTED: Settings = {"data__augment": ("crop", "flip", "cutout")}
ADAMW: Settings = {"optim__name": "adamw", "optim__lr": 3e-3, "optim__weight_decay": 0.1}
BF16: Settings = {"train__autocast": "bfloat16"}
FP16: Settings = {"train__autocast": "float16"}
LOCAL: Settings = {"algorithm__local_start": 0.34}
POST_LOCAL: Settings = LOCAL | {
    "algorithm__local_sgd": "post_local_sgd",
    "algorithm__workers": 3,
    "algorithm__local_steps": 2,
}
SWAP: Settings = LOCAL | SMALL | {"algorithm__local_sgd": "swap", "algorithm__workers": 2}
TOKENS: Settings = {  # attention has another kernel on a CPU, which rounds otherwise in float32
    "model__name": f"{__name__}:tokens",
    "probe__views": ("token", "pool", "flatten"),
    "train__dtype": "float64",
}
LAMB: Settings = {"optim__name": "lamb", "optim__lr": 0.01, "train__dtype": "float64"}  # timm sums its norms otherwise
SAVED: Settings = {"checkpoint__every_steps": 4, "checkpoint__keep": 9}

IN_FLOAT32: Any = {
    "twin": {"train__autocast": None},
    "tolerance": 1e-3,
    "because": "CPUs have no float16: the twin is float32, and what is compared are losses (accuracies are counts)",
    "only": "/loss",
}

ALONE: dict[str, Scenario] = {
    "lenet5 as it comes": Scenario(LENET | {"train__steps": 4, "batch__global_size": 64, "probe__num_samples": (200,)}),
    "resnet20, ghost": Scenario(
        {
            "model__name": "resnet20",
            "data__image_size": 16,
            "batch__ghost_size": 16,
            "batch__global_size": 32,
            "train__steps": 2,
            "probe__num_samples": (32,),
            "probe__every": None,
        }
    ),
    "all views, own batch, two sizes": Scenario(
        LENET
        | {
            "probe__views": ("channel", "pool", "flatten"),
            "probe__own_batch": True,
            "probe__num_samples": (64, 128),
            "train__steps": 3,
        }
    ),
    "tokens": Scenario(TOKENS),
    "tsqr, float64": Scenario({"probe__method": "tsqr", "train__dtype": "float64"}),
    "every diagnostic": Scenario({"probe__diagnostics": DIAGNOSTICS, "probe__every": None, "train__steps": 3}),
    "probe in little memory": Scenario(
        LENET | {"probe__views": ("flatten",), "probe__memory_mib": 4, "train__steps": 2}
    ),
    "augmentation": Scenario(OFF | AUGMENTED),
    "mixed images": Scenario(
        OFF | {"data__augment": ("resized_crop", "flip", "rand_augment", "cutout", "mixup", "cutmix")}
    ),
    "images kept on the host, augmented": Scenario(
        OFF | RAGGED | AUGMENTED | {"data__device": "cpu", "batch__micro_size": 20, "algorithm__sam_rho": 0.05},
        twin={"data__device": "auto"},
    ),
    "shuffled labels": Scenario(OFF | {"data__shuffle_labels": True}),
    "micro-batches, noise scale": Scenario(OFF | {"batch__micro_size": 25}),
    "a ragged epoch": Scenario(OFF | RAGGED),
    "adamw, clipped": Scenario(OFF | ADAMW | {"optim__clip_norm": 0.5}),
    "lars": Scenario(OFF | {"optim__name": "lars", "optim__lr": 2.0, "optim__weight_decay": 1e-3}),
    "lamb": Scenario(OFF | LAMB),
    "nesterov, warm-up, cosine": Scenario(
        OFF
        | {
            "optim__nesterov": True,
            "optim__warmup_epochs": 0.1,
            "optim__schedule": "cosine",
            "optim__weight_decay": 1e-3,
        }
    ),
    "a growing batch": Scenario(
        OFF
        | {
            "train__steps": None,
            "train__epochs": 3,
            "batch__schedule_unit": "epochs",
            "batch__schedule": [{"at": 0, "size": 60}, {"at": 0.8, "size": 120}, {"at": 2, "size": 240}],
            "batch__schedule_lr_power": 0.5,
        }
    ),
    "stop at a target": Scenario(
        OFF | {"train__target_accuracy": 0.1, "train__stop_at_target": True, "train__steps": 20}
    ),
    "divergence": Scenario(OFF | {"optim__lr": 1e30}),
    "float64": Scenario(SMALL | {"train__dtype": "float64"}),
    "bfloat16": Scenario(BF16),
    "float16": Scenario(OFF | FP16, **IN_FLOAT32),
    "float16, adamw": Scenario(OFF | FP16 | ADAMW, **IN_FLOAT32),
    "float16, sam, clipped": Scenario(OFF | FP16 | {"algorithm__sam_rho": 0.05, "optim__clip_norm": 1.0}, **IN_FLOAT32),
    "channels_last": Scenario(SMALL | {"train__channels_last": True}),
    "channels_last=auto, micro_size=auto": Scenario(
        OFF | SMALL | {"train__dtype": "float64", "train__channels_last": "auto", "batch__micro_size": "auto"},
    ),
    "deterministic": Scenario(SMALL | {"train__deterministic": True}),
    "local norm": Scenario(OFF | SMALL | {"batch__ghost_size": None}),
    "ghost norm": Scenario(OFF | SMALL | {"batch__micro_size": 25}),
    "sync norm": Scenario(OFF | SYNC),
    "group norm": Scenario(OFF | SMALL | {"model__norm": "group", "batch__ghost_size": None}),
    "no norm": Scenario(OFF | SMALL | {"model__norm": "none", "batch__ghost_size": None}),
    "activation_checkpointing": Scenario(
        OFF
        | LENET
        | {
            "model__name": "resnet20",
            "data__image_size": 16,
            "batch__ghost_size": 16,
            "batch__global_size": 32,
            "train__steps": 2,
            "train__activation_checkpointing": True,
        }
    ),
    "label smoothing": Scenario(OFF | {"algorithm__label_smoothing": 0.1}),
    "sam": Scenario(OFF | SMALL | {"algorithm__sam_rho": 0.05}),
    "gradient penalty": Scenario(OFF | {"algorithm__gradient_penalty": 0.05, "algorithm__penalty_size": 10}),
    "rank penalty, logdet": Scenario(OFF | {"algorithm__rank_penalty": 0.02}),
    "rank penalty, spread, bfloat16": Scenario(
        OFF | BF16 | {"algorithm__rank_penalty": 0.02, "algorithm__rank_measure": "spread"}
    ),
    "ema": Scenario(OFF | SMALL | {"algorithm__weight_averaging": "ema"}),
    "swa": Scenario(OFF | SMALL | {"algorithm__weight_averaging": "swa", "algorithm__average_start": 0.34}),
    "post-local sgd": Scenario(OFF | POST_LOCAL),
    "swap": Scenario(OFF | SWAP),
    "fsdp on one rank": Scenario({"launch__strategy": "fsdp"}),
    "zero1 on one rank": Scenario(OFF | {"launch__strategy": "zero1"}),
    "profile": Scenario(OFF | {"profile": True, "train__steps": 9}),
    "begun and resumed": Scenario(SMALL | SAVED, begun_on="cuda"),
    "begun on the CPU": Scenario(SMALL | SAVED | ADAMW, begun_on="cpu"),
}

TOGETHER: dict[str, Scenario] = {
    name: scenario._replace(num_ranks=2)
    for name, scenario in {
        "lenet5 as it comes": Scenario(LENET | {"train__steps": 3, "batch__global_size": 64}),
        "all views": Scenario(LENET | {"probe__views": ("channel", "pool", "flatten"), "train__steps": 2}),
        "tokens": Scenario(TOKENS),
        "tsqr, float64": Scenario({"probe__method": "tsqr", "train__dtype": "float64"}),
        "tsqr, all views": Scenario(
            LENET
            | {
                "probe__method": "tsqr",
                "probe__views": ("channel", "flatten"),
                "probe__num_samples": (64,),
                "train__steps": 2,
            }
        ),
        "every diagnostic": Scenario({"probe__diagnostics": DIAGNOSTICS, "probe__every": None, "train__steps": 3}),
        "a ragged epoch, augmented": Scenario(OFF | RAGGED | AUGMENTED),
        "a step of one image": Scenario(OFF | ONE_LEFT),
        "images kept on the host": Scenario(
            ONE_LEFT | {"data__device": "cpu", "batch__micro_size": 11}, twin={"data__device": "auto"}
        ),
        "micro-batches": Scenario(OFF | {"batch__micro_size": 11}),
        "adamw, clipped": Scenario(OFF | ADAMW | {"optim__clip_norm": 0.5}),
        "lars": Scenario(OFF | {"optim__name": "lars", "optim__lr": 2.0}),
        "lamb": Scenario(OFF | LAMB),
        "bfloat16": Scenario(BF16),
        "float16": Scenario(OFF | FP16, **IN_FLOAT32),
        "channels_last": Scenario(OFF | SMALL | {"train__channels_last": True}),
        "micro_size=auto": Scenario(
            OFF | SMALL | {"train__dtype": "float64", "batch__micro_size": "auto"},
        ),
        "local norm": Scenario(SMALL | {"batch__ghost_size": None}),
        "ghost norm": Scenario(SMALL),
        "sync norm": Scenario(SYNC),
        "sync norm, bfloat16": Scenario(OFF | SYNC | BF16),
        "sync norm, bfloat16, a rank without images": Scenario(OFF | SYNC | BF16 | ONE_LEFT),
        "group norm": Scenario(OFF | SMALL | {"model__norm": "group", "batch__ghost_size": None}),
        "recompute, sync norm": Scenario(OFF | SYNC | {"train__activation_checkpointing": True}),
        "sam, sync norm": Scenario(OFF | SYNC | {"algorithm__sam_rho": 0.05}),
        "gradient penalty": Scenario(OFF | {"algorithm__gradient_penalty": 0.05, "algorithm__penalty_size": 10}),
        "rank penalty": Scenario(OFF | SMALL | {"algorithm__rank_penalty": 0.02, "algorithm__rank_layers": ("5", "9")}),
        "ema": Scenario(OFF | SMALL | {"algorithm__weight_averaging": "ema"}),
        "swa, sync norm": Scenario(
            OFF | SYNC | {"algorithm__weight_averaging": "swa", "algorithm__average_start": 0.34}
        ),
        "post-local sgd": Scenario(POST_LOCAL),
        "swap": Scenario(OFF | SWAP),
        "fsdp": Scenario({"launch__strategy": "fsdp"}),
        "fsdp, adamw, ghost": Scenario(OFF | SMALL | ADAMW | {"launch__strategy": "fsdp"}),
        "fsdp, sam, ragged": Scenario(OFF | RAGGED | {"launch__strategy": "fsdp", "algorithm__sam_rho": 0.05}),
        "fsdp, bfloat16": Scenario(OFF | BF16 | {"launch__strategy": "fsdp"}),
        "zero0": Scenario(OFF | {"launch__strategy": "zero0"}),
        "zero1, adamw": Scenario(ADAMW | {"launch__strategy": "zero1"}),
        "zero2, ghost, ragged": Scenario(OFF | RAGGED | SMALL | {"launch__strategy": "zero2"}),
        "zero2, bfloat16": Scenario(OFF | BF16 | {"launch__strategy": "zero2"}),
        "zero3": Scenario({"launch__strategy": "zero3"}),
        "zero3, adamw, clipped": Scenario(OFF | ADAMW | {"launch__strategy": "zero3", "optim__clip_norm": 0.5}),
        "profile": Scenario(OFF | {"profile": True, "train__steps": 9}),
        "begun and resumed": Scenario(SMALL | SAVED, begun_on="cuda"),
        "begun on the CPU, zero1": Scenario(OFF | SAVED | ADAMW | {"launch__strategy": "zero1"}, begun_on="cpu"),
    }.items()
}

SCENARIOS: dict[str, Scenario] = ALONE | {f"{name} x2": scenario for name, scenario in TOGETHER.items()}

# `make test` runs these, which hold each kind of scenario at least once; with GENGAP_FULL=1 all run.
SHORT = {
    "all views, own batch, two sizes",
    "tokens",
    "probe in little memory",
    "images kept on the host, augmented",
    "stop at a target",
    "divergence",
    "float16, sam, clipped",
    "channels_last=auto, micro_size=auto",
    "swa",
    "fsdp on one rank",
    "begun on the CPU",
    "lenet5 as it comes x2",
    "tsqr, all views x2",
    "every diagnostic x2",
    "a ragged epoch, augmented x2",
    "a step of one image x2",
    "lars x2",
    "float16 x2",
    "sync norm, bfloat16, a rank without images x2",
    "recompute, sync norm x2",
    "gradient penalty x2",
    "rank penalty x2",
    "post-local sgd x2",
    "swap x2",
    "fsdp, sam, ragged x2",
    "zero2, ghost, ragged x2",
    "zero3, adamw, clipped x2",
    "begun and resumed x2",
}
