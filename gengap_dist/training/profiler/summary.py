"""What all ranks measured, as text of one screen: at most 40 lines of 120 characters."""

from statistics import fmean, median
from typing import NamedTuple

from gengap_dist.config.sections import DataConfig

PARTS: tuple[str, ...] = ("data", "forward", "backward", "communication", "optimizer", "rest")
WIDTH = 120
MOST_RANKS = 8  # with a row of their own
SLOW_RANK_RATIO = 1.2  # the slowest rank's own time over the mean, from which it is named
UNEVEN_STEPS_RATIO = 1.5  # mean over median of the steps, from which the mean is doubtful
DATA_SHARE, COMMUNICATION_SHARE, REST_SHARE = 0.15, 0.25, 0.25  # shares of a step that are worth a word


class RankProfile(NamedTuple):
    """One rank's; times are milliseconds."""

    rank: int
    timed: list[float]
    """Each step that was timed without the profiler."""
    traced: list[float]
    """Each step with it."""
    parts: dict[str, float]
    """A step's mean, by `PARTS`."""
    own_ms: float
    """A step's median without communication, waiting for others included: one step of bad luck does not count."""
    operators: list[tuple[str, float, float]]
    """Name, calls in a step, time of its own in a step; the dearest first."""
    error: str | None
    """Why there is no trace of this rank, if there is none."""


class ProfileSetting(NamedTuple):
    """What the ranks did."""

    first_timed: int
    first_traced: int
    device: str
    strategy: str
    has_untimed_collectives: bool
    """Whether ranks met where only the trace could see it: the split is of traced steps then."""
    data: DataConfig


def summary(profiles: list[RankProfile], setting: ProfileSetting) -> str:
    """Where a step's time goes on every rank; the dearest operators of the slowest; and what stands out."""
    slowest, first = max(profiles, key=lambda one: one.own_ms), profiles[0]
    timed, traced = _steps(setting.first_timed, first.timed), _steps(setting.first_traced, first.traced)
    from_trace = setting.has_untimed_collectives or not timed
    ranks = f"{len(profiles)} ranks" if len(profiles) > 1 else "1 rank"
    lines = [
        f"profile of {ranks} on {setting.device}, {setting.strategy}",
        _overhead(profiles, timed, traced),
        "",
        f"where a step's time goes: mean of {traced if from_trace else timed}, in ms",
        "".join([f"{'rank':14}", *(f"{head:>15}" for head in ("step", *PARTS))]),
        *_rows(profiles, slowest),
        "communication: with waiting for other ranks; rest: sums, Python. What is due between two steps (validation,",
        "probes, checkpoints, records) is no part of a step." + _untimed_note(setting, len(profiles)),
    ]
    if slowest.traced:
        lines += ["", *_operators(slowest, traced, on_gpu=setting.device == "cuda")]
    if found := diagnosis(profiles, setting.data):
        lines += ["", *found[:2]]
    return "\n".join(line[:WIDTH].rstrip() for line in lines) + "\n"


def _steps(first: int, each: list[float]) -> str:
    if not each:
        return ""
    return f"step {first}" if len(each) == 1 else f"steps {first} to {first + len(each) - 1}"


def _overhead(profiles: list[RankProfile], timed: str, traced: str) -> str:
    """What the profiler does to a step."""
    without, with_it = ([ms for one in profiles for ms in getattr(one, kind)] for kind in ("timed", "traced"))
    parts = [f"{median(without):.2f} ms without the profiler ({timed})"] if without else []
    parts += [f"{median(with_it):.2f} ms with it ({traced})"] if with_it else []
    ratio = f": {median(with_it) / median(without):.2f}x as long" if without and with_it else ""
    return f"median step {', '.join(parts)}{ratio}"


def _untimed_note(setting: ProfileSetting, num_ranks: int) -> str:
    if setting.has_untimed_collectives:
        return f" {setting.strategy} meets inside the passes: found in the trace."
    if num_ranks > 1 and setting.strategy not in ("ddp", "single"):
        return f" {setting.strategy} meets inside the passes: counted there."
    return ""


def _rows(profiles: list[RankProfile], slowest: RankProfile) -> list[str]:
    """One row a rank; of many, how far they lie apart."""
    if len(profiles) <= MOST_RANKS:
        return [_row(str(one.rank), one.parts) for one in profiles]
    rows = [_row(f"slowest: {slowest.rank}", slowest.parts)]
    for name, fold in (("min", min), ("median", median), ("max", max)):
        cells = [fold(sum(one.parts.values()) for one in profiles)]
        cells += [fold(one.parts[part] for one in profiles) for part in PARTS]
        rows.append(f"{name:14}" + "".join(f"{cell:15.2f}" for cell in cells))
    return rows


def _row(name: str, parts: dict[str, float]) -> str:
    """A row whose parts' shares are of the step.

    >>> _row("0", dict.fromkeys(PARTS, 0.0) | {"data": 1.0, "forward": 3.0}).split()
    ['0', '4.00', '1.00', '25%', '3.00', '75%', '0.00', '0%', '0.00', '0%', '0.00', '0%', '0.00', '0%']
    """
    step = sum(parts.values())
    return f"{name:14}{step:15.2f}" + "".join(f"{parts[part]:10.2f} {parts[part] / step:>4.0%}" for part in PARTS)


def _operators(one: RankProfile, steps: str, *, on_gpu: bool) -> list[str]:
    step, what = fmean(one.traced), "time of its kernels" if on_gpu else "self time"
    title = f"dearest operators of rank {one.rank}, {steps}: {what}"
    lines = [f"{title:75}{'calls a step':>15}{'ms a step':>15}{'share':>15}"]
    outside = max(0.0, step - sum(ms for _, _, ms in one.operators))
    rows = [*one.operators, ("no operator: Python, waiting", float("nan"), outside)]
    for name, calls, ms in rows:
        shown = "" if calls != calls else f"{calls:.10g}"
        lines.append(f"{name[:74]:75}{shown:>15}{ms:15.3f}{ms / step:15.1%}")
    return lines


def diagnosis(profiles: list[RankProfile], data: DataConfig) -> list[str]:
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
    slowest = max(profiles, key=lambda one: one.own_ms)
    mean = {part: fmean(one.parts[part] for one in profiles) for part in PARTS}
    step, own = sum(mean.values()), fmean(one.own_ms for one in profiles)
    ratio = slowest.own_ms / own
    if ratio >= SLOW_RANK_RATIO:
        part = max(set(PARTS) - {"communication"}, key=lambda part: slowest.parts[part] - mean[part])
        found.append(
            f"rank {slowest.rank} computes {ratio:.2f}x as long as the mean of all ranks, most of it in {part}: "
            "the others wait for it."
        )
    middle = median([ms for one in profiles for ms in one.timed] or [step])
    if step >= UNEVEN_STEPS_RATIO * middle:
        found.append(
            f"a step's mean is {step / middle:.1f}x its median: a few were held up, and most shares are theirs."
        )
    if mean["data"] >= DATA_SHARE * step:
        remedy = (
            f"data.workers ({data.workers}) read too slowly"
            if data.streaming
            else f"data.augment ({', '.join(data.augment)}) and the size of its images are what it goes to"
        )
        found.append(f"data takes {mean['data'] / step:.0%} of a step: {remedy}.")
    if ratio < SLOW_RANK_RATIO and mean["communication"] >= COMMUNICATION_SHARE * step:
        found.append(
            f"equally fast ranks spend {mean['communication'] / step:.0%} of a step on meeting: "
            "a larger batch.global_size, or fewer ranks, has less of it."
        )
    if mean["rest"] >= REST_SHARE * step:
        found.append(
            f"{mean['rest'] / step:.0%} of a step lies around the passes: a larger batch.micro_size, where there are "
            "several of it in a step, has less of that."
        )
    return found
