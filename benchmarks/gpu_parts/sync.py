"""How often a step waits for the GPU, and where: torch's own debug mode counts, inside of real runs.

The mode (torch.cuda.set_sync_debug_mode) sees copies that wait and numbers that the host asks for. It does not see
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
OWNERS = {"torch/amp/grad_scaler.py": "GradScaler", "deepspeed/": "DeepSpeed"}  # whose waits are theirs
FIRST, NUM_STEPS, TOTAL = 4, 8, 20  # steps that are counted; a run looks at its sums after 32, and at its end
BASE: Settings = {**NO_PROBE, "train.steps": TOTAL, "data.val_fraction": 0.0}

SETTINGS: dict[str, tuple[Settings, str]] = {  # and the package that is needed
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
    """What the debug mode warns of, by owner and place."""

    def __init__(self) -> None:
        """None yet."""
        self.by_owner: dict[str, Counter[str]] = {}

    def note(self, message: object, *_: object, **__: object) -> None:
        """Take a warning, if it is one of the mode's; in place of `warnings.showwarning`."""
        if "synchroniz" not in str(message):
            return
        stack = [frame for frame in traceback.extract_stack()[:-1] if frame.filename != warnings.__file__]
        frames = [f"{short(frame.filename)}:{frame.lineno} {frame.name}" for frame in stack]
        theirs = [owner for frame in frames for path, owner in OWNERS.items() if path in frame]
        mine = [frame for frame in frames if frame.startswith("gengap_dist/")]
        inner = frames[-1:] if frames[-1:] != mine[-1:] else []
        place = " < ".join([*inner, *mine[-2:][::-1]])
        self.by_owner.setdefault(theirs[0] if theirs else OURS, Counter())[place] += 1

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While open, warnings come here."""
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = self.note
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")


def control(world: World) -> Answer:
    """Whether the mode sees a wait that is there."""
    waits, number = Waits(), torch.ones((), device=world.device)
    with waits.listening():
        torch.cuda.set_sync_debug_mode("warn")
        number.item()
    seen = sum(sum(places.values()) for places in waits.by_owner.values())
    said = "is seen" if seen else "is not seen: the counts below mean nothing"
    return {"good": seen > 0, "text": f"one wait, made on purpose, {said}", "seen": seen}


def count(settings: Settings, world: World) -> Answer:
    """Waits of NUM_STEPS whole steps of a run."""
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
