"""What all ranks measured, as text of one screen: at most 40 lines of 120 characters."""

from statistics import fmean, median
from typing import NamedTuple

from gengap_dist.config.sections import DataConfig

PARTS: tuple[str, ...] = ("data", "forward", "backward", "communication", "optimizer", "rest")
WIDTH = 120
MOST_RANKS = 8  # with a row of their own
UNEQUAL = 1.2  # the slowest rank's own time over the mean, from which it is named
UNEVEN = 1.5  # mean over median of the steps, from which the mean is doubtful
DATA, MEETING, REST = 0.15, 0.25, 0.25  # shares of a step that are worth a word


class Measured(NamedTuple):
    """One rank's; times are milliseconds."""

    rank: int
    timed: list[float]
    """Each step that was timed without the profiler."""
    traced: list[float]
    """Each step with it."""
    parts: dict[str, float]
    """A step's mean, by `PARTS`."""
    own: float
    """A step's median without communication, waiting for others included: one step of bad luck does not count."""
    operators: list[tuple[str, float, float]]
    """Name, calls in a step, time of its own in a step; the dearest first."""
    error: str | None
    """Why there is no trace of this rank, if there is none."""


class Setting(NamedTuple):
    """What the ranks did."""

    first_timed: int
    first_traced: int
    device: str
    strategy: str
    hidden: bool
    """Whether ranks met where only the trace could see it: the split is of traced steps then."""
    data: DataConfig


def summary(told: list[Measured], setting: Setting) -> str:
    """Where a step's time goes on every rank; the dearest operators of the slowest; and what stands out."""
    slowest, first = max(told, key=lambda one: one.own), told[0]
    timed, traced = _steps(setting.first_timed, first.timed), _steps(setting.first_traced, first.traced)
    from_trace = setting.hidden or not timed
    ranks = f"{len(told)} ranks" if len(told) > 1 else "1 rank"
    lines = [
        f"profile of {ranks} on {setting.device}, {setting.strategy}",
        _overhead(told, timed, traced),
        "",
        f"where a step's time goes: mean of {traced if from_trace else timed}, in ms",
        "".join([f"{'rank':14}", *(f"{head:>15}" for head in ("step", *PARTS))]),
        *_rows(told, slowest),
        "communication: with waiting for other ranks; rest: sums, Python. What is due between two steps (validation,",
        "probes, checkpoints, records) is no part of a step." + _doubt(setting, len(told)),
    ]
    if slowest.traced:
        lines += ["", *_operators(slowest, traced, on_gpu=setting.device == "cuda")]
    if found := diagnosis(told, setting.data):
        lines += ["", *found[:2]]
    return "\n".join(line[:WIDTH].rstrip() for line in lines) + "\n"


def _steps(first: int, each: list[float]) -> str:
    if not each:
        return ""
    return f"step {first}" if len(each) == 1 else f"steps {first} to {first + len(each) - 1}"


def _overhead(told: list[Measured], timed: str, traced: str) -> str:
    """What the profiler does to a step."""
    without, with_it = ([ms for one in told for ms in getattr(one, kind)] for kind in ("timed", "traced"))
    parts = [f"{median(without):.2f} ms without the profiler ({timed})"] if without else []
    parts += [f"{median(with_it):.2f} ms with it ({traced})"] if with_it else []
    ratio = f": {median(with_it) / median(without):.2f}x as long" if without and with_it else ""
    return f"median step {', '.join(parts)}{ratio}"


def _doubt(setting: Setting, num_ranks: int) -> str:
    if setting.hidden:
        return f" {setting.strategy} meets inside the passes: found in the trace."
    if num_ranks > 1 and setting.strategy not in ("ddp", "single"):
        return f" {setting.strategy} meets inside the passes: counted there."
    return ""


def _rows(told: list[Measured], slowest: Measured) -> list[str]:
    """One row a rank; of many, how far they lie apart."""
    if len(told) <= MOST_RANKS:
        return [_row(str(one.rank), one.parts) for one in told]
    rows = [_row(f"slowest: {slowest.rank}", slowest.parts)]
    for name, fold in (("min", min), ("median", median), ("max", max)):
        cells = [fold(sum(one.parts.values()) for one in told)]
        cells += [fold(one.parts[part] for one in told) for part in PARTS]
        rows.append(f"{name:14}" + "".join(f"{cell:15.2f}" for cell in cells))
    return rows


def _row(name: str, parts: dict[str, float]) -> str:
    """A row whose parts' shares are of the step.

    >>> _row("0", dict.fromkeys(PARTS, 0.0) | {"data": 1.0, "forward": 3.0}).split()
    ['0', '4.00', '1.00', '25%', '3.00', '75%', '0.00', '0%', '0.00', '0%', '0.00', '0%', '0.00', '0%']
    """
    step = sum(parts.values())
    return f"{name:14}{step:15.2f}" + "".join(f"{parts[part]:10.2f} {parts[part] / step:>4.0%}" for part in PARTS)


def _operators(one: Measured, steps: str, *, on_gpu: bool) -> list[str]:
    step, what = fmean(one.traced), "time of its kernels" if on_gpu else "self time"
    title = f"dearest operators of rank {one.rank}, {steps}: {what}"
    lines = [f"{title:75}{'calls a step':>15}{'ms a step':>15}{'share':>15}"]
    outside = max(0.0, step - sum(ms for _, _, ms in one.operators))
    rows = [*one.operators, ("no operator: Python, waiting", float("nan"), outside)]
    for name, calls, ms in rows:
        shown = "" if calls != calls else f"{calls:.10g}"
        lines.append(f"{name[:74]:75}{shown:>15}{ms:15.3f}{ms / step:15.1%}")
    return lines


def diagnosis(told: list[Measured], data: DataConfig) -> list[str]:
    """Sentences that the numbers support, the weightiest first; of equal ranks with little but computing, none.

    >>> def one(rank, **parts):
    ...     own = sum(parts.values()) - parts.get("communication", 0)
    ...     return Measured(rank, [], [], dict.fromkeys(PARTS, 0.0) | parts, own, [], None)
    >>> diagnosis([one(0, forward=2.0, communication=4.0), one(1, forward=6.0)], DataConfig())
    ['rank 1 computes 1.50x as long as the mean of all ranks, most of it in forward: the others wait for it.']
    >>> diagnosis([one(0, forward=7.0, data=3.0)], DataConfig())
    ['data takes 30% of a step: data.augment () and the size of its images are what it goes to.']
    >>> diagnosis([one(0, forward=9.0, data=1.0)], DataConfig())
    []
    >>> diagnosis([one(0, forward=9.0)._replace(timed=[3.0, 3.0, 21.0])], DataConfig())[0][:30]
    "a step's mean is 3.0x its medi"
    """
    found = []
    slowest = max(told, key=lambda one: one.own)
    mean = {part: fmean(one.parts[part] for one in told) for part in PARTS}
    step, own = sum(mean.values()), fmean(one.own for one in told)
    ratio = slowest.own / own
    if ratio >= UNEQUAL:
        part = max(set(PARTS) - {"communication"}, key=lambda part: slowest.parts[part] - mean[part])
        found.append(
            f"rank {slowest.rank} computes {ratio:.2f}x as long as the mean of all ranks, most of it in {part}: "
            "the others wait for it."
        )
    middle = median([ms for one in told for ms in one.timed] or [step])
    if step >= UNEVEN * middle:
        found.append(
            f"a step's mean is {step / middle:.1f}x its median: a few were held up, and most shares are theirs."
        )
    if mean["data"] >= DATA * step:
        remedy = (
            f"data.workers ({data.workers}) read too slowly"
            if data.streaming
            else f"data.augment ({', '.join(data.augment)}) and the size of its images are what it goes to"
        )
        found.append(f"data takes {mean['data'] / step:.0%} of a step: {remedy}.")
    if ratio < UNEQUAL and mean["communication"] >= MEETING * step:
        found.append(
            f"equally fast ranks spend {mean['communication'] / step:.0%} of a step on meeting: "
            "a larger batch.global_size, or fewer ranks, has less of it."
        )
    if mean["rest"] >= REST * step:
        found.append(
            f"{mean['rest'] / step:.0%} of a step lies around the passes: a larger batch.micro_size, where there are "
            "several of it in a step, has less of that."
        )
    return found
