"""torch.compile on a GPU: equal results, time of the first step, recompilations, and speed-up."""

import statistics
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import paired_timing
from tables import table

from gengap_dist.distributed.process_group import World

from .correctness import Judged, compare
from .items import Answer, Item, Part
from .racing import WAYS, Way, field, ours, race, task
from .runs import NO_PROBE, Settings, folder, numbers, train


class Case(NamedTuple):
    """A configuration to compile."""

    model: str
    way: str
    settings: Settings = {}
    tolerance: float = 1e-3
    judged: Judged = "losses and gradient norms"
    global_size: int = 1024


SEVERAL: Settings = {"batch.ghost_size": 40, "batch.micro_size": 384}  # of 1,000: passes of 360, 320 and 320
CASES: dict[str, Case] = {
    "LeNet-5, fp32": Case("lenet5", "fp32"),
    "ResNet-20, ghost norm, bf16, two micro-batch sizes": Case("resnet20", "bf16", SEVERAL, 5e-2, global_size=1000),
    "ResNet-20, ghost norm, fp32, two micro-batch sizes": Case("resnet20", "fp32", SEVERAL, 5e-2, global_size=1000),
    "ResNet-56, bf16 NHWC": Case("resnet56", "bf16 NHWC", {}, 5e-2),
    "ResNet-56, TF32": Case("resnet56", "TF32", {}, 5e-2),
    "VGG-16, bf16": Case("vgg16", "bf16", {}, 5e-2),
}
STEPS = 4


def graphs() -> int:
    """Graphs that torch has compiled in this process."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def agree(case: Case, world: World) -> Answer:
    """Compare a compiled run with an uncompiled one, on digits, and count the graphs of the first and later steps."""
    way = WAYS[case.way]
    settings = {**NO_PROBE, **way.settings, "model.name": case.model, "train.steps": STEPS}
    settings |= {"batch.global_size": case.global_size, "batch.micro_size": case.global_size, **case.settings}
    counted: dict[int, int] = {}

    def progress(done: int, total: int, note: str) -> None:
        counted[done] = graphs()

    device = world.device.type
    with folder() as out:
        train({**settings, "train.compile": True}, device, out, progress=progress)
        compiled_numbers = numbers(out)
    with folder() as out:
        train(settings, device, out)
        reference = numbers(out)
    answer = compare(compiled_numbers, reference, case.tolerance, case.judged)
    return answer | {"graphs": counted[1], "recompiled": counted[STEPS] - counted[1]}


def compiled(case: Case, world: World) -> Answer:
    """Agreement, recompilations, time of the first step and speed-up."""
    answer, way, workload = agree(case, world), WAYS[case.way], task(case.model, case.global_size)
    setup = field(world, workload, way)

    def racing(way: Way) -> dict[str, object]:
        return {**case.settings, **way.settings}

    racers = {
        "as it is": ours(setup, way, **racing(way)),
        "compiled": ours(setup, way, **racing(way.compiled())),
    }
    race_answer = race(world, case.global_size, racers)
    answer |= race_answer
    answer["good"] = bool(
        answer["good"] and not answer["recompiled"] and answer["graphs"] and not race_answer["failed"]
    )
    if not race_answer["failed"]:
        gain = paired_timing.ratio(*(race_answer["images_per_second"][who] for who in ("compiled", "as it is")))
        first = race_answer["first_step_seconds"]["compiled"]
        answer["text"] += f"; first step {first:.1f} s, {gain} times as fast"
    answer["text"] += f"; {answer['graphs']} graphs, {answer['recompiled']} compiled after the first step"
    return answer


def write(answers: Mapping[str, Answer]) -> str:
    """A row for each configuration."""
    rows = []
    for name, answer in answers.items():
        row = [name, "yes" if answer["good"] else "**no**", f"{float(answer['worst']['difference']):.2g}"]
        row += [str(answer["graphs"]), str(answer["recompiled"])]
        speeds = answer["images_per_second"]
        if answer["failed"]:
            row += ["; ".join(f"{who} {failed['text']}" for who, failed in answer["failed"].items()), "", ""]
        else:
            row.append(f"{answer['first_step_seconds']['compiled']:.1f}")
            row.append(f"{statistics.median(speeds['compiled']):,.0f}")
            row.append(str(paired_timing.ratio(speeds["compiled"], speeds["as it is"])))
        rows.append(row)
    head = ["configuration", "as it should be", "worst difference", "graphs", "compiled later", "first step, s"]
    return table([*head, "images/s", "over uncompiled"], rows)


PART = Part(
    "Compilation",
    "Does torch.compile work, and what does it gain?",
    [Item(name, partial(compiled, case), 90.0, alone=True) for name, case in CASES.items()],
    write,
)
