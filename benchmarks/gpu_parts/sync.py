"""Counts how often and where a step waits for the GPU, with torch's debug mode in real runs.

The mode (torch.cuda.set_sync_debug_mode) detects synchronous copies and values read by the host. It does not detect
waits for events, nor torch.cuda.synchronize.
"""

import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from tables import table

from gengap_dist.distributed.process_group import World

from .items import Answer, Item, Part, short
from .runs import NO_PROBE, Settings, folder, train

OURS = "ours"
OWNERS = {
    "torch/amp/grad_scaler.py": "GradScaler",
    "deepspeed/": "DeepSpeed",
}  # waits in these files belong to the named package
FIRST, NUM_STEPS, TOTAL = 4, 8, 20  # counted steps; a run waits for an event in each of them, which is not counted
BASE: Settings = {**NO_PROBE, "train.steps": TOTAL, "data.val_fraction": 0.0}

SETTINGS: dict[str, tuple[Settings, str]] = {  # settings, and the package that is needed
    "LeNet-5 as it comes": ({}, ""),
    "augmentation": ({"data.augment": ["crop", "flip", "cutout"]}, ""),
    "micro-batches, noise scale": ({"batch.micro_size": 24}, ""),
    "ResNet-20, ghost norm": ({"model.name": "resnet20", "batch.ghost_size": 16}, ""),
    "ResNet-20, sync norm": ({"model.name": "resnet20", "model.norm": "sync"}, ""),
    "AdamW, clipped": ({"optim.name": "adamw", "optim.lr": 1e-3, "optim.clip_norm": 0.5}, ""),
    "LARS": ({"optim.name": "lars"}, "timm"),
    "LAMB": ({"optim.name": "lamb", "optim.lr": 1e-3}, "timm"),
    "bfloat16, channels_last": ({"train.autocast": "bfloat16", "train.channels_last": True}, ""),
    "float16": ({"train.autocast": "float16"}, ""),
    "SAM": ({"algorithm.sam_rho": 0.05}, ""),
    "gradient penalty": ({"algorithm.gradient_penalty": 0.1, "algorithm.penalty_size": 16}, ""),
    "rank penalty": ({"algorithm.rank_penalty": 0.1}, ""),
    "EMA": ({"algorithm.weight_averaging": "ema"}, ""),
    "SWA": ({"algorithm.weight_averaging": "swa", "algorithm.average_start": 0.0}, ""),
    "post-local SGD": (
        {"algorithm.local_sgd": "post_local_sgd", "algorithm.workers": 2, "algorithm.local_start": 0.0},
        "",
    ),
    "dropout": ({"model.name": "c1"}, ""),
    "FSDP": ({"launch.strategy": "fsdp"}, ""),
    "ZeRO 1": ({"launch.strategy": "zero1"}, "deepspeed"),
    "ZeRO 3": ({"launch.strategy": "zero3"}, "deepspeed"),
}


class Waits:
    """Warnings of the debug mode, by owner and place."""

    def __init__(self) -> None:
        """No warnings yet."""
        self.by_owner: dict[str, Counter[str]] = {}

    def note(self, message: object, *_: object, **__: object) -> None:
        """Count a warning of the debug mode; replaces `warnings.showwarning`."""
        if "synchroniz" not in str(message):
            return
        stack = [frame for frame in traceback.extract_stack()[:-1] if frame.filename != warnings.__file__]
        frames = [f"{short(frame.filename)}:{frame.lineno} {frame.name}" for frame in stack]
        owners = [owner for frame in frames for path, owner in OWNERS.items() if path in frame]
        own_frames = [frame for frame in frames if frame.startswith("gengap_dist/")]
        innermost = frames[-1:] if frames[-1:] != own_frames[-1:] else []
        place = " < ".join([*innermost, *own_frames[-2:][::-1]])
        self.by_owner.setdefault(owners[0] if owners else OURS, Counter())[place] += 1

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While open, warnings are passed to `note`."""
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = self.note
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")


def control(world: World) -> Answer:
    """Check that the mode detects a known wait."""
    waits, number = Waits(), torch.ones((), device=world.device)
    with waits.listening():
        torch.cuda.set_sync_debug_mode("warn")
        number.item()
    seen = sum(sum(places.values()) for places in waits.by_owner.values())
    said = "is seen" if seen else "is not seen: the counts below mean nothing"
    return {"good": seen > 0, "text": f"one wait, made on purpose, {said}", "seen": seen}


def count(settings: Settings, world: World) -> Answer:
    """Count the waits in NUM_STEPS steps of a run."""
    waits = Waits()

    def progress(done: int, total: int, note: str) -> None:
        if total and done in (FIRST, FIRST + NUM_STEPS):
            torch.cuda.set_sync_debug_mode("warn" if done == FIRST else "default")

    with folder() as out, waits.listening():
        train({**BASE, **settings}, "cuda", out, progress=progress)
    each = {owner: sum(places.values()) / NUM_STEPS for owner, places in waits.by_owner.items()}
    ours = each.pop(OURS, 0.0)
    said = f"{ours:g} waits a step are ours" + "".join(f", {number:g} {owner}'s" for owner, number in each.items())
    return {
        "good": not ours,
        "text": said + "".join(f"; {place}" for place in [*waits.by_owner.get(OURS, {})][:2]),
        "per_step": {OURS: ours, **each},
        "allowed": {OURS: 0},
        "places": {owner: dict(places.most_common()) for owner, places in waits.by_owner.items()},
        "steps": NUM_STEPS,
    }


def write(answers: Mapping[str, Answer]) -> str:
    """A row for each configuration, with places."""
    rows = []
    for name, answer in answers.items():
        each = answer.get("per_step")
        if each is None:
            rows.append([name, "", "", answer["text"]])
            continue
        others = ", ".join(f"{number:g} {owner}" for owner, number in each.items() if owner != OURS)
        places = "; ".join(f"`{place}`" for place in answer["places"].get(OURS, {}))
        rows.append([name, f"{each[OURS]:g}", others, places])
    return table(["configuration", "ours a step (allowed: 0)", "of others", "where"], rows)


PART = Part(
    "Synchronizations",
    "Does a step wait for the GPU?",
    [
        Item("control", control, 5.0),
        *(Item(name, partial(count, given), 5.0, needs) for name, (given, needs) in SETTINGS.items()),
    ],
    write,
)
