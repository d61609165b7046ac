"""Compares results of a GPU with those of a CPU: short runs of many configurations, each with a reference run.

All metrics of metrics.jsonl except times are compared. The metrics that decide depend on the precision:

  float64    every number, counts among them, to 1e-8: this detects a wrong sum or a missing sample
  float32    losses, norms and measures of spectra, but not counts (accuracies, ranks, near-rank loss), which are
             discontinuous, nor the smallest singular values, which are rounding errors; for deep networks with batch
             norm, where rounding errors grow with every step, only losses and gradient norms
  bfloat16, float16, TF32
             losses and gradient norms, against the same run in float32 on the same GPU, because no CPU has the same
             rounding

Runs that must be bitwise equal (repeated or resumed) are compared by metrics and by weights.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from tables import table
from torch import Tensor

from gengap_dist.distributed.process_group import World
from gengap_dist.runs import checkpoint
from gengap_dist.runs.run_folder import read_info

from .items import Answer, Item, Part
from .runs import NO_PROBE, Numbers, Settings, folder, numbers, recorded, train

Judged = Literal["every number", "smooth numbers", "losses and gradient norms"]
COUNTS = ("near_rank_", "numerical_rank", "dead_units", "pca_", "srank_", "accuracy", "train_test_gap")
EDGES = ("sigma_min", "condition_number")
SMALLEST = 1e-6  # in float32: a difference is relative to at least this; in float64 to much less
SMALLEST_IN_FLOAT64 = 1e-12


class Check(NamedTuple):
    """One comparison; its tolerance is the largest relative difference."""

    settings: Settings
    tolerance: float = 1e-3
    judged: Judged = "smooth numbers"
    reference: Settings = {}
    """Settings that the reference run has instead."""
    reference_device: str = "cpu"
    needs: str = ""
    seconds: float = 5.0


def _in_float64(settings: Settings, **more: Any) -> Check:
    return Check({**settings, "train.dtype": "float64"}, **{"tolerance": 1e-8, "judged": "every number", **more})


def _rounded(settings: Settings, tolerance: float, reference: Settings) -> Check:
    return Check({**NO_PROBE, **settings}, tolerance, "losses and gradient norms", reference, "cuda")


MLP: Settings = {"model.name": "mlp", "model.widths": [48, 32]}
GHOST: Settings = {**MLP, "batch.ghost_size": 16}
SMALL_RESNET: Settings = {"model.name": "resnet20", "data.image_size": 16}
ADAMW: Settings = {"optim.name": "adamw", "optim.lr": 1e-3, "optim.weight_decay": 0.1}
EVERY_DIAGNOSTIC: Settings = {
    "probe.diagnostics": ["noise_scale", "norms", "weights", "neural_collapse", "hessian", "keskar"]
}
IN_FLOAT32: Settings = {"train.autocast": None}
SINGLE: Settings = {"launch.strategy": "single"}

CHECKS: dict[str, Check] = {
    "LeNet-5 as it comes": Check({"probe.per_decade": 3}),
    "LeNet-5, float64": _in_float64({}),
    "ResNet-20, ghost norm, float64": _in_float64({**SMALL_RESNET, "batch.ghost_size": 32}, seconds=20.0),
    "ResNet-20": Check(SMALL_RESNET, 5e-2, "losses and gradient norms", seconds=10.0),
    "VGG-16": Check(
        {**NO_PROBE, "model.name": "vgg16", "train.steps": 2}, 5e-2, "losses and gradient norms", seconds=30.0
    ),
    "F1, ghost norm": Check({"model.name": "f1", "batch.ghost_size": 32}),
    "C1, dropout": Check({"model.name": "c1"}),
    "attention": Check({"model.name": "gpu_parts.networks:Attention", "probe.views": ["token", "pool", "flatten"]}),
    "all views, own batch, two sample sizes": Check(
        {"probe.views": ["channel", "pool", "flatten"], "probe.own_batch": True, "probe.num_samples": [64, 128]}
    ),
    "TSQR, float64": _in_float64({"probe.method": "tsqr", "probe.views": ["channel", "pool", "flatten"]}),
    "every diagnostic, float64": _in_float64({**MLP, "model.norm": "none", **EVERY_DIAGNOSTIC}, tolerance=1e-6),
    "every diagnostic": Check({**MLP, "model.norm": "none", **EVERY_DIAGNOSTIC}),
    "augmentation, float64": _in_float64({**NO_PROBE, "data.augment": ["crop", "flip", "cutout"]}),
    "local norm, micro-batches, float64": _in_float64({**MLP, "batch.micro_size": 24}),
    "ghost norm, micro-batches, float64": _in_float64({**GHOST, "batch.micro_size": 24}),
    "sync norm, float64": _in_float64({**MLP, "model.norm": "sync"}),
    "group norm, float64": _in_float64({**SMALL_RESNET, **NO_PROBE, "model.norm": "group"}, seconds=20.0),
    "no norm, float64": _in_float64({**MLP, "model.norm": "none"}),
    "SGD, Nesterov, warm-up, cosine, float64": _in_float64(
        {
            "optim.nesterov": True,
            "optim.warmup_epochs": 0.1,
            "optim.schedule": "cosine",
            "optim.weight_decay": 1e-3,
        }
    ),
    "AdamW, clipped, float64": _in_float64({**ADAMW, "optim.clip_norm": 0.5}),
    "LARS, float64": _in_float64({"optim.name": "lars", "optim.lr": 2.0, "optim.weight_decay": 1e-3}, needs="timm"),
    "LAMB, float64": _in_float64({"optim.name": "lamb", "optim.lr": 0.01}, needs="timm"),
    "label smoothing, float64": _in_float64({**NO_PROBE, "algorithm.label_smoothing": 0.1}),
    "SAM, float64": _in_float64({**NO_PROBE, **GHOST, "algorithm.sam_rho": 0.05}),
    "gradient penalty, float64": _in_float64(
        {**NO_PROBE, "algorithm.gradient_penalty": 0.05, "algorithm.penalty_size": 16}, tolerance=1e-6
    ),
    "rank penalty, logdet, float64": _in_float64({**NO_PROBE, "algorithm.rank_penalty": 0.02}, tolerance=1e-6),
    "rank penalty, spread, bfloat16": _rounded(
        {"algorithm.rank_penalty": 0.02, "algorithm.rank_measure": "spread", "train.autocast": "bfloat16"},
        1e-1,
        IN_FLOAT32,
    ),
    "EMA, float64": _in_float64({**GHOST, "algorithm.weight_averaging": "ema"}),
    "SWA, float64": _in_float64({**GHOST, "algorithm.weight_averaging": "swa", "algorithm.average_start": 0.25}),
    "post-local SGD, float64": _in_float64(
        {
            **NO_PROBE,
            "algorithm.local_sgd": "post_local_sgd",
            "algorithm.workers": 2,
            "algorithm.local_steps": 1,
            "algorithm.local_start": 0.25,
        }
    ),
    "SWAP, float64": _in_float64(
        {**NO_PROBE, **GHOST, "algorithm.local_sgd": "swap", "algorithm.workers": 2, "algorithm.local_start": 0.25}
    ),
    "recompute, float64": _in_float64(
        {**NO_PROBE, **SMALL_RESNET, "batch.ghost_size": 32, "train.activation_checkpointing": True}, seconds=20.0
    ),
    "channels_last": Check({"train.channels_last": True}),
    "micro_size=auto, channels_last=auto": Check(
        {**NO_PROBE, "batch.micro_size": "auto", "train.channels_last": "auto"},
        reference={"batch.micro_size": 64, "train.channels_last": False},
        seconds=20.0,
    ),
    "bfloat16": _rounded({"train.autocast": "bfloat16"}, 5e-2, IN_FLOAT32),
    "float16": _rounded({"train.autocast": "float16"}, 2e-2, IN_FLOAT32),
    "float16, SAM, clipped": _rounded(
        {"train.autocast": "float16", "algorithm.sam_rho": 0.05, "optim.clip_norm": 1.0}, 2e-2, IN_FLOAT32
    ),
    "TF32": _rounded({"train.tf32": True}, 2e-2, {"train.tf32": False}),
    "FSDP, float64": _in_float64({"launch.strategy": "fsdp"}, reference=SINGLE, seconds=10.0),
    **{
        f"ZeRO {stage}": Check(
            {**ADAMW, "launch.strategy": f"zero{stage}"}, reference=SINGLE, needs="deepspeed", seconds=15
        )
        for stage in range(4)
    },
    "profile": Check({**NO_PROBE, "profile": True, "train.steps": 14}, seconds=20.0),
}


# -- reference run ----------------------------------------------------------------------------------------------------


def compare_with_reference(check: Check, world: World) -> Answer:
    """Compare a configuration on the GPU with its reference run."""
    measured = recorded(check.settings, "cuda")
    return compare(
        measured, recorded({**check.settings, **check.reference}, check.reference_device), check.tolerance, check.judged
    )


def compare(measured: Numbers, reference: Numbers, tolerance: float, judged: Judged) -> Answer:
    """The largest difference of the judged metrics, and of all metrics; not good if a metric is missing on one side."""
    smallest = SMALLEST_IN_FLOAT64 if judged == "every number" else SMALLEST
    only = sorted(str(key) for key in measured.keys() ^ reference.keys())
    differences = {
        key: difference(measured[key], reference[key], smallest) for key in measured.keys() & reference.keys()
    }
    judged_differences = {key: value for key, value in differences.items() if _is_judged(key[1], judged)}

    def worst(some: Mapping[tuple[int, str], float]) -> dict[str, Any] | None:
        if not some:
            return None
        key = max(some, key=lambda key: some[key])
        told = {"difference": some[key], "gpu": measured[key], "twin": reference[key]}
        return {name: value if math.isfinite(value) else str(value) for name, value in told.items()} | {
            "step": key[0],
            "name": key[1],
        }

    largest = max(judged_differences.values(), default=math.inf)
    good = largest <= tolerance and not only
    text = f"{len(judged_differences)} of {len(differences)} numbers judged ({judged}), "
    text += f"worst {_place(worst(judged_differences))}"
    text += "" if largest <= tolerance else f", more than {tolerance:g}"
    text += f"; {len(only)} numbers are on one side only, such as {only[0]}" if only else ""
    return {
        "good": good,
        "text": text,
        "tolerance": tolerance,
        "judged": judged,
        "num_judged": len(judged_differences),
        "num_numbers": len(differences),
        "worst": worst(judged_differences),
        "worst_of_all": worst(differences),
        "on_one_side": only[:10],
    }


def _is_judged(name: str, judged: Judged) -> bool:
    if judged == "losses and gradient norms":
        return name.endswith(("/loss", "/grad_norm"))
    if judged == "smooth numbers":
        return not any(word in name for word in COUNTS) and not name.startswith(EDGES)
    return True


def difference(a: float, b: float, smallest: float) -> float:
    """Difference relative to the larger of the two, or to `smallest`.

    >>> difference(1.0, 1.5, 1e-6), difference(0.0, 1e-9, 1e-6), difference(math.nan, 1.0, 1e-6)
    (0.3333333333333333, 0.001, inf)
    """
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    if not math.isfinite(a - b):
        return math.inf
    return abs(a - b) / max(abs(a), abs(b), smallest)


def _place(worst: Mapping[str, Any] | None) -> str:
    if worst is None:
        return "nowhere"
    return f"{float(worst['difference']):.2g} at {worst['name']}, step {worst['step']}"


# -- bitwise ----------------------------------------------------------------------------------------------------------

State = tuple[Numbers, dict[str, Tensor]]
LONGER: Settings = {**SMALL_RESNET, "batch.ghost_size": 32, "train.steps": 12, "checkpoint.every_steps": 6}


def _state(out: Path) -> State:
    newest = max(checkpoint.checkpoints_by_step(out / "checkpoints").items())[1]
    return numbers(out), checkpoint.load(newest / "model.pt")


def _whole(settings: Settings, device: str) -> State:
    with folder() as out:
        train(settings, device, out)
        return _state(out)


def _in_two(settings: Settings, first: str, device: str) -> State:
    """A run stopped after half of its steps on `first`, and resumed on `device`."""
    with folder() as out:
        train(settings, first, out, until=settings["train.steps"] // 2)
        assert read_info(out).status == "preempted"
        train(settings, device, out, resume=True)
        return _state(out)


def _bits(a: State, b: State, *, needed: bool) -> Answer:
    different = [str(key) for key in a[0].keys() | b[0].keys() if a[0].get(key) != b[0].get(key)]
    weights = [name for name in a[1] if not torch.equal(a[1][name].cpu(), b[1][name].cpu())]
    same = not (different or weights)
    said = f"{len(different)} of {len(a[0])} numbers and {len(weights)} of {len(a[1])} tensors differ"
    return {
        "good": same or not needed,
        "text": "equal, bit by bit" if same else said + ("" if needed else " (which is no fault: nothing promises it)"),
        "equal": same,
        "numbers_that_differ": sorted(different)[:10],
        "tensors_that_differ": weights[:10],
    }


def twice(settings: Settings, needed: bool, world: World) -> Answer:
    """Two runs of one configuration on the GPU; equality is required only if `needed`."""
    return _bits(_whole(settings, "cuda"), _whole(settings, "cuda"), needed=needed)


def resumed(settings: Settings, world: World) -> Answer:
    """Compare a run stopped and resumed on the GPU with an uninterrupted one."""
    return _bits(_in_two(settings, "cuda", "cuda"), _whole(settings, "cuda"), needed=True)


def begun_on_cpu(settings: Settings, world: World) -> Answer:
    """Compare a run started on the CPU and resumed on the GPU with a run on the CPU."""
    resumed_state, reference = _in_two(settings, "cpu", "cuda"), _whole(settings, "cpu")
    return compare(resumed_state[0], reference[0], 1e-8, "every number")


DETERMINISTIC: Settings = {**LONGER, "train.deterministic": True}
BITS: dict[str, Callable[[World], Answer]] = {
    "two runs, deterministic": partial(twice, DETERMINISTIC, True),
    "two runs, deterministic, channels_last": partial(twice, {**DETERMINISTIC, "train.channels_last": True}, True),
    "two runs, as it comes": partial(twice, LONGER, False),
    "stopped and resumed, deterministic": partial(resumed, DETERMINISTIC),
    "begun on the CPU, float64": partial(
        begun_on_cpu, {**GHOST, **ADAMW, "train.dtype": "float64", "train.steps": 8, "checkpoint.every_steps": 4}
    ),
}


# -- the part ---------------------------------------------------------------------------------------------------------


def items() -> list[Item]:
    """All items, the most informative first."""
    comparisons = [Item(name, partial(compare_with_reference, c), c.seconds, c.needs) for name, c in CHECKS.items()]
    return comparisons + [Item(name, job, 15.0) for name, job in BITS.items()]


def write(answers: Mapping[str, Answer]) -> str:
    """A row for each configuration."""
    rows = []
    for name, answer in answers.items():
        worst = answer.get("worst")
        told = [_place(worst), f"{answer['tolerance']:g}", answer["judged"]] if worst else [answer["text"], "", ""]
        rows.append([name, "yes" if answer["good"] else "**no**", *told])
    return table(["configuration", "as it should be", "worst relative difference", "tolerance", "judged"], rows)


PART = Part("Correctness", "Does the GPU compute what the CPU computes?", items(), write)
