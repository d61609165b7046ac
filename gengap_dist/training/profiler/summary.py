"""The summary of all ranks' profiles as text: at most 40 lines of 120 characters."""

from statistics import fmean, median
from typing import NamedTuple

from gengap_dist.config.measures import Strategy
from gengap_dist.config.sections import DataConfig
from gengap_dist.parallel.capabilities import CAPABILITIES

PARTS: tuple[str, ...] = ("data", "forward", "backward", "communication", "optimizer", "rest")
WIDTH = 120
MOST_RANKS = 8  # maximum number of ranks with one row each
SLOW_RANK_RATIO = 1.2  # slowest rank's own time over the mean, above which it is named
UNEVEN_STEPS_RATIO = 1.5  # mean over median of the steps, above which the mean is not representative
DATA_SHARE, COMMUNICATION_SHARE, REST_SHARE = 0.15, 0.25, 0.25  # shares of a step above which there is a message


class RankProfile(NamedTuple):
    """The profile of one rank; times are in milliseconds."""

    rank: int
    timed: list[float]
    """Each timed step, without the profiler."""
    traced: list[float]
    """Each traced step, with the profiler."""
    parts: dict[str, float]
    """Mean of a step, by `PARTS`."""
    own_ms: float
    """Median of a step without communication and waiting; the median ignores single outliers."""
    operators: list[tuple[str, float, float]]
    """Name, calls per step, self time per step; the most expensive first."""
    error: str | None
    """Why there is no trace of this rank; None if there is one."""


class ProfileSetting(NamedTuple):
    """What was profiled."""

    first_timed: int
    first_traced: int
    device: str
    strategy: Strategy
    has_untimed_collectives: bool
    """Whether some collectives are only visible in the trace: the split is then that of traced steps."""
    data: DataConfig


def summary(profiles: list[RankProfile], setting: ProfileSetting) -> str:
    """The time of a step by part on every rank; the most expensive operators of the slowest rank; and a diagnosis."""
    slowest, first = max(profiles, key=lambda one: one.own_ms), profiles[0]
    timed, traced = _steps(setting.first_timed, first.timed), _steps(setting.first_traced, first.traced)
    from_trace = setting.has_untimed_collectives or not timed
    ranks = f"{len(profiles)} ranks" if len(profiles) > 1 else "1 rank"
    lines = [
        f"profile of {ranks} on {setting.device}, {setting.strategy}",
        _overhead(profiles, timed, traced),
        "",
        f"time of a step by part: mean of {traced if from_trace else timed}, in ms",
        "".join([f"{'rank':14}", *(f"{head:>15}" for head in ("step", *PARTS))]),
        *_rows(profiles, slowest),
        "communication: including waiting for other ranks; rest: sums, Python. Work between two steps (validation,",
        "probes, checkpoints, records) is not part of a step." + _untimed_note(setting, len(profiles)),
    ]
    if slowest.traced:
        lines += ["", *_operators(slowest, traced, on_gpu=setting.device == "cuda")]
    if sentences := diagnosis(profiles, setting.data):
        lines += ["", *sentences[:2]]
    return "\n".join(line[:WIDTH].rstrip() for line in lines) + "\n"


def _steps(first: int, step_times: list[float]) -> str:
    if not step_times:
        return ""
    return f"step {first}" if len(step_times) == 1 else f"steps {first} to {first + len(step_times) - 1}"


def _overhead(profiles: list[RankProfile], timed: str, traced: str) -> str:
    """The overhead of the profiler."""
    without, with_it = ([ms for one in profiles for ms in getattr(one, kind)] for kind in ("timed", "traced"))
    parts = [f"{median(without):.2f} ms without the profiler ({timed})"] if without else []
    parts += [f"{median(with_it):.2f} ms with it ({traced})"] if with_it else []
    ratio = f": {median(with_it) / median(without):.2f}x as long" if without and with_it else ""
    return f"median step {', '.join(parts)}{ratio}"


def _untimed_note(setting: ProfileSetting, num_ranks: int) -> str:
    if setting.has_untimed_collectives:
        return f" {setting.strategy} communicates inside the passes: measured from the trace."
    if num_ranks > 1 and CAPABILITIES[setting.strategy].has_untimed_collectives:
        return f" {setting.strategy} communicates inside the passes: counted as forward and backward."
    return ""


def _rows(profiles: list[RankProfile], slowest: RankProfile) -> list[str]:
    """One row per rank; for many ranks, their minimum, median and maximum."""
    if len(profiles) <= MOST_RANKS:
        return [_row(str(one.rank), one.parts) for one in profiles]
    rows = [_row(f"slowest: {slowest.rank}", slowest.parts)]
    for name, fold in (("min", min), ("median", median), ("max", max)):
        values = [fold(sum(one.parts.values()) for one in profiles)]
        values += [fold(one.parts[part] for one in profiles) for part in PARTS]
        rows.append(f"{name:14}" + "".join(f"{value:15.2f}" for value in values))
    return rows


def _row(name: str, parts: dict[str, float]) -> str:
    """A row with the time of each part and its share of the step.

    >>> _row("0", dict.fromkeys(PARTS, 0.0) | {"data": 1.0, "forward": 3.0}).split()
    ['0', '4.00', '1.00', '25%', '3.00', '75%', '0.00', '0%', '0.00', '0%', '0.00', '0%', '0.00', '0%']
    """
    step = sum(parts.values())
    return f"{name:14}{step:15.2f}" + "".join(f"{parts[part]:10.2f} {parts[part] / step:>4.0%}" for part in PARTS)


def _operators(one: RankProfile, steps: str, *, on_gpu: bool) -> list[str]:
    step, time_kind = fmean(one.traced), "time of its kernels" if on_gpu else "self time"
    title = f"most expensive operators of rank {one.rank}, {steps}: {time_kind}"
    lines = [f"{title:75}{'calls per step':>15}{'ms per step':>15}{'share':>15}"]
    outside = max(0.0, step - sum(ms for _, _, ms in one.operators))
    rows = [*one.operators, ("no operator: Python, waiting", float("nan"), outside)]
    for name, calls, ms in rows:
        shown = "" if calls != calls else f"{calls:.10g}"
        lines.append(f"{name[:74]:75}{shown:>15}{ms:15.3f}{ms / step:15.1%}")
    return lines


def diagnosis(profiles: list[RankProfile], data: DataConfig) -> list[str]:
    """Sentences on the main costs, most important first; [] if ranks are equal and mostly compute.

    >>> def one(rank, **parts):
    ...     own = sum(parts.values()) - parts.get("communication", 0)
    ...     return RankProfile(rank, [], [], dict.fromkeys(PARTS, 0.0) | parts, own, [], None)
    >>> diagnosis([one(0, forward=2.0, communication=4.0), one(1, forward=6.0)], DataConfig())
    ['rank 1 computes 1.50x as long as the mean of all ranks, most of it in forward: the other ranks wait for it.']
    >>> diagnosis([one(0, forward=7.0, data=3.0)], DataConfig())
    ['data takes 30% of a step: the causes are data.augment () and the image size.']
    >>> diagnosis([one(0, forward=9.0, data=1.0)], DataConfig())
    []
    >>> diagnosis([one(0, forward=9.0)._replace(timed=[3.0, 3.0, 21.0])], DataConfig())[0][:30]
    "a step's mean is 3.0x its medi"
    """
    sentences = []
    slowest = max(profiles, key=lambda one: one.own_ms)
    mean = {part: fmean(one.parts[part] for one in profiles) for part in PARTS}
    step, own = sum(mean.values()), fmean(one.own_ms for one in profiles)
    ratio = slowest.own_ms / own
    if ratio >= SLOW_RANK_RATIO:
        part = max(set(PARTS) - {"communication"}, key=lambda part: slowest.parts[part] - mean[part])
        sentences.append(
            f"rank {slowest.rank} computes {ratio:.2f}x as long as the mean of all ranks, most of it in {part}: "
            "the other ranks wait for it."
        )
    median_step = median([ms for one in profiles for ms in one.timed] or [step])
    if step >= UNEVEN_STEPS_RATIO * median_step:
        sentences.append(
            f"a step's mean is {step / median_step:.1f}x its median: a few slow steps dominate most shares."
        )
    if mean["data"] >= DATA_SHARE * step:
        remedy = (
            f"data.workers ({data.workers}) read too slowly"
            if data.streaming
            else f"the causes are data.augment ({', '.join(data.augment)}) and the image size"
        )
        sentences.append(f"data takes {mean['data'] / step:.0%} of a step: {remedy}.")
    if ratio < SLOW_RANK_RATIO and mean["communication"] >= COMMUNICATION_SHARE * step:
        sentences.append(
            f"equally fast ranks spend {mean['communication'] / step:.0%} of a step on communication: "
            "use a larger batch.global_size, or fewer ranks."
        )
    if mean["rest"] >= REST_SHARE * step:
        sentences.append(
            f"{mean['rest'] / step:.0%} of a step is outside the passes: use a larger batch.micro_size, if a step has "
            "several micro-batches."
        )
    return sentences
