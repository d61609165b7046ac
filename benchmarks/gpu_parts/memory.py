"""Memory of a GPU: out-of-memory errors, and peak memory of runs against the prediction of `gengap plan`.

The errors are real: torch's allocator is limited to a share of the GPU memory, and refuses more as the driver would.
"""

import math
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from tables import table

from gengap_dist import models
from gengap_dist.data.data_spec import DataSpec
from gengap_dist.distributed.process_group import World
from gengap_dist.errors import UsageError
from gengap_dist.parallel.memory_model import saved_for_backward
from gengap_dist.preflight.batch_layout import Cluster
from gengap_dist.preflight.machine_constants import Constants
from gengap_dist.preflight.plan import make_plan
from gengap_dist.runs.run_folder import read_info
from gengap_dist.training.autotune.micro_batch import OTHER_BYTES, TEMPORARY
from gengap_dist.training.autotune.search import pass_seconds
from gengap_dist.training.autotune.synthetic_workload import SyntheticWorkload
from gengap_dist.training.tasks import Classification

from .items import Answer, Item, Part, places
from .runs import NO_PROBE, Settings, config, folder, train

MIB = 2**20
WHOLE: Settings = {**NO_PROBE, "batch.global_size": 1024, "train.steps": 2, "data.val_fraction": 0.1}
LENET5: Settings = {"model.name": "lenet5"}
VGG16: Settings = {"model.name": "vgg16", "batch.ghost_size": 32}
RESNET20: Settings = {"model.name": "resnet20", "batch.ghost_size": 32}
PEAKS: dict[str, Settings] = {
    "LeNet-5, 1,024": {**LENET5, "batch.micro_size": 1024},
    "LeNet-5, 128, with a probe": {**LENET5, "batch.micro_size": 128, "probe.enabled": True},
    "ResNet-56, 256": {"model.name": "resnet56", "batch.micro_size": 256},
    "ResNet-56, 256, bfloat16": {"model.name": "resnet56", "batch.micro_size": 256, "train.autocast": "bfloat16"},
    "ResNet-56, 256, recompute": {
        "model.name": "resnet56",
        "batch.micro_size": 256,
        "train.activation_checkpointing": True,
    },
    "VGG-16, 256": {"model.name": "vgg16", "batch.micro_size": 256},
    "VGG-16, 256, AdamW": {"model.name": "vgg16", "batch.micro_size": 256, "optim.name": "adamw", "optim.lr": 1e-3},
}


@contextmanager
def room_for(num_bytes: int, device: torch.device) -> Iterator[None]:
    """While open, this process may allocate `num_bytes` more of the GPU memory."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + num_bytes) / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


def saved_bytes(settings: Settings) -> int:
    """Bytes that a pass of the whole batch saves for its backward pass, as in `gengap plan`."""
    given = config({**WHOLE, **settings}, "cpu")
    spec = DataSpec.images(10, 1, given.data.image_size)
    model, task = models.from_config(given, spec, World()), Classification(spec)
    return saved_for_backward(given, model, spec, task.training_loss_sum, given.batch.global_size)[0]


def ooms() -> int:
    """Number of out-of-memory errors of torch's allocator in this process."""
    return torch.cuda.memory_stats().get("num_ooms", 0)


def passes(settings: Settings, share: float, world: World) -> Answer:
    """A pass that fits, a pass of the whole batch that does not, and one that fits, as tried by auto."""
    run_config = config({**WHOLE, **settings}, "cuda")
    spec = DataSpec.images(10, 1, run_config.data.image_size)
    model = models.from_config(run_config, spec, World()).to(world.device)
    limit_bytes, before, seconds_of = int(share * saved_bytes(settings)), ooms(), dict[str, float]()
    with room_for(limit_bytes, world.device):
        synthetic = SyntheticWorkload(run_config, model, Classification(spec), world.device)
        for name, size in {"before": 64, "whole": run_config.batch.global_size, "after": 64}.items():
            seconds_of[name] = pass_seconds(synthetic, size, 1, world)
        kept = torch.cuda.memory_allocated()
    fits = {name: seconds < math.inf for name, seconds in seconds_of.items()}
    good = fits == {"before": True, "whole": False, "after": True} and ooms() > before
    return {
        "good": good,
        "text": f"with {limit_bytes / MIB:.0f} MiB: " + ", ".join(f"{name} {_fit(fit)}" for name, fit in fits.items()),
        "fits": fits,
        "room_bytes": limit_bytes,
        "allocated_bytes_after": kept,
        "times_out_of_memory": ooms() - before,
    }


def _fit(fit: bool) -> str:
    return "fits" if fit else "does not fit"


def auto_survives(settings: Settings, share: float, world: World) -> Answer:
    """`batch.micro_size=auto`, and training, with only a `share` of the memory of the whole batch."""
    room, before = int(share * saved_bytes(settings)), ooms()
    with room_for(room, world.device), folder() as out:
        train({**WHOLE, **settings, "batch.micro_size": "auto"}, "cuda", out)
        info = read_info(out)
    size, rates = info.micro_size, (info.micro_size_auto or {}).get("images_per_second", {})
    return {
        "good": True,
        "text": f"with {room / MIB:.0f} MiB it found {size}, and trained; {', '.join(map(str, rates))} fit, "
        f"and {ooms() - before} tries ran out of memory",
        "room_bytes": room,
        "size": size,
        "images_per_second": rates,
        "times_out_of_memory": ooms() - before,
    }


def one_error_message(settings: Settings, share: float, world: World) -> Answer:
    """A batch.micro_size that is too large gives an error message without traceback, and the process can continue."""
    room = int(share * saved_bytes(settings))
    answer: Answer = {"good": False, "text": f"{room / MIB:.0f} MiB were enough: nothing is known"}
    with room_for(room, world.device), folder() as out:
        try:
            train({**WHOLE, **settings, "batch.micro_size": WHOLE["batch.global_size"]}, "cuda", out)
        except UsageError as error:
            answer = {"good": True, "text": str(error)}
        except RuntimeError as error:
            said = f"no sentence of ours: {type(error).__name__}: {error}"[:200]
            answer = {"good": False, "text": said, "at": places(traceback.extract_tb(error.__traceback__))}
    with folder() as out:
        train({**WHOLE, **settings, "batch.micro_size": 64}, "cuda", out)
    return answer | {"room_bytes": room}


def peak(settings: Settings, world: World) -> Answer:
    """Peak memory of a run against the plan.

    The limit is the rule of `batch.micro_size=auto`: permanent memory, and TEMPORARY times what a pass saves.
    """
    given = {**WHOLE, **settings}
    plan = make_plan(config(given, "cuda"), Cluster(1, 1), Constants()).memory
    assert plan is not None
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with folder() as out:
        train(given, "cuda", out)
    taken = torch.cuda.max_memory_allocated() - before
    most = plan.total + (TEMPORARY - 1) * plan.activations + OTHER_BYTES
    ratio = taken / plan.total
    return {
        "good": taken <= most,
        "text": f"took {taken / MIB:,.0f} MiB, plan says {plan.total / MIB:,.0f} ({ratio:.2f} times), "
        f"auto allows {most / MIB:,.0f}",
        "bytes": taken,
        "reserved_bytes": torch.cuda.max_memory_reserved(),
        "planned_bytes": plan.total,
        "planned": {name: getattr(plan, name) for name in ("activations", "probe", "data", "optimizer_state")},
        "allowed_bytes": most,
    }


def write(answers: Mapping[str, Answer]) -> str:
    """Sentences about out-of-memory errors, and a table of peaks."""

    def mib(answer: Mapping[str, Any], name: str) -> str:
        return f"{answer[name] / MIB:,.0f}" if name in answer else ""

    said = [f"- {name}: {'' if answer['good'] else '**not as it should be**, '}{answer['text']}" for name, answer in
            answers.items() if "planned_bytes" not in answer]  # fmt: skip
    rows = [
        [
            name,
            mib(answer, "bytes"),
            mib(answer, "planned_bytes"),
            f"{answer['bytes'] / answer['planned_bytes']:.2f}",
            mib(answer, "allowed_bytes"),
        ]
        for name, answer in answers.items()
        if "planned_bytes" in answer
    ]
    head = ["run, images a pass", "peak, MiB", "plan, MiB", "peak over plan", "what auto allows, MiB"]
    return "\n\n".join(filter(None, ["\n".join(said), table(head, rows) if rows else ""]))


PART = Part(
    "Memory",
    "Does it survive running out of memory, and is the plan's prediction right?",
    [
        Item("a pass that does not fit, ResNet-20", partial(passes, RESNET20, 0.6), 10.0),
        Item("auto, ResNet-20, ghost norm", partial(auto_survives, RESNET20, 0.6), 20.0),
        Item("auto, VGG-16, ghost norm", partial(auto_survives, VGG16, 0.6), 30.0),
        Item("too large a micro_size, LeNet-5", partial(one_error_message, LENET5, 1.3), 5.0),
        Item("too large a micro_size, ResNet-20", partial(one_error_message, RESNET20, 0.6), 10.0),
        *(Item(f"peak, {name}", partial(peak, given), 15.0) for name, given in PEAKS.items()),
    ],
    write,
)
