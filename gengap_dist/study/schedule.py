"""Which runs of a study run side by side, each on how many cores, so that the study ends soonest. Pure functions.

The runs are moldable tasks (Turek, Wolf & Yu 1992, "Approximate algorithms for scheduling parallelizable tasks"): a run
may have one of several layouts, and keeps it. For each limit T, every run gets the fewest cores with which it takes at
most T, and the runs are started longest first as cores become free; the best T is taken. "Cores" are GPUs where runs
compute on GPUs.
"""

import heapq
from collections.abc import Iterable, Sequence
from typing import NamedTuple

MIN_SECONDS = 1e-6  # of a run whose cost is not known: others start after it, not with it
MAX_SPREAD = 4  # schedules, and last runs of each, that may get more cores


class Layout(NamedTuple):
    """Ranks of a run, and threads of each."""

    ranks: int
    threads: int

    @property
    def cores(self) -> int:
        """Cores that it occupies."""
        return self.ranks * self.threads


class Option(NamedTuple):
    """One way to do a run."""

    layout: Layout
    cores: int
    """Cores or GPUs that it occupies."""
    seconds: float
    memory: int = 0
    """Bytes of all its ranks."""


class Resources(NamedTuple):
    """What runs share."""

    cores: int
    memory: float = float("inf")
    slots: float = float("inf")
    """Largest number of runs at once."""


class Placed(NamedTuple):
    """A run in a schedule."""

    number: int
    option: Option
    start: float
    end: float


def placed(
    options: Sequence[Option], resources: Resources, running: Iterable[tuple[float, Option]] = ()
) -> list[Placed]:
    """Start the runs longest first, each as soon as its cores and its memory are free; shorter ones may go before.

    Args:
        options: of each run, its one option.
        resources: of the machine.
        running: (seconds until its end, option) of the runs that have started before.

    >>> one, two = Option(Layout(1, 1), 1, 4.0), Option(Layout(2, 1), 2, 3.0)
    >>> [(run.number, run.start) for run in placed([two, one, one], Resources(2))]
    [(1, 0.0), (2, 0.0), (0, 4.0)]
    """
    cores, memory, slots = resources
    ends: list[tuple[float, int, Option]] = []
    for order, (left, option) in enumerate(running):
        heapq.heappush(ends, (left, -1 - order, option))
        cores, memory, slots = cores - option.cores, memory - option.memory, slots - 1
    waiting = sorted(range(len(options)), key=lambda number: -options[number].seconds)
    schedule: list[Placed] = []
    now = 0.0
    while waiting:
        left_over: list[int] = []
        for place, number in enumerate(waiting):
            if ends and (cores < 1 or slots < 1):
                left_over += waiting[place:]
                break
            option = options[number]
            alone = not ends and not left_over  # what does not fit at all runs alone
            fits = option.cores <= cores and option.memory <= memory and slots >= 1
            if fits or alone:
                cores, memory, slots = cores - option.cores, memory - option.memory, slots - 1
                end = now + max(option.seconds, MIN_SECONDS)
                heapq.heappush(ends, (end, number, option))
                schedule.append(Placed(number, option, now, end))
            else:
                left_over.append(number)
        waiting = left_over
        if waiting:
            now, _, option = heapq.heappop(ends)
            cores, memory, slots = cores + option.cores, memory + option.memory, slots + 1
    return schedule


def length(schedule: Sequence[Placed], running: Iterable[tuple[float, Option]] = ()) -> float:
    """Seconds until the last run ends."""
    return max([0.0, *(run.end for run in schedule), *(left for left, _ in running)])


def best_schedule(
    runs: Sequence[Sequence[Option]], resources: Resources, running: Sequence[tuple[float, Option]] = ()
) -> list[Placed]:
    """The schedule that ends soonest among those of all limits T; see above.

    >>> both = [Option(Layout(1, 1), 1, 10.0), Option(Layout(2, 1), 2, 6.0)]
    >>> [(run.option.layout.ranks, run.start) for run in best_schedule([both] * 3, Resources(2))]
    [(1, 0.0), (1, 0.0), (2, 10.0)]
    """
    limits = sorted({option.seconds for options in runs for option in options}, reverse=True)
    candidates: list[list[Placed]] = []
    for limit in limits:
        chosen = [_fewest_cores(options, limit) for options in runs]
        candidates.append(placed(chosen, resources, running))

    def end(schedule: list[Placed]) -> tuple[float, float]:
        return length(schedule, running), sum(run.end for run in schedule)

    shortest = sorted(candidates, key=end)[:MAX_SPREAD]
    return min((_last_spread(each, runs, resources, running) for each in shortest), key=end, default=[])


def _fewest_cores(options: Sequence[Option], limit: float) -> Option:
    """The option with the fewest cores that takes at most `limit` seconds; the fastest, if none does."""
    good = [option for option in options if option.seconds <= limit]
    return (
        min(good, key=lambda option: (option.cores, option.seconds)) if good else min(options, key=lambda o: o.seconds)
    )


def _last_spread(
    schedule: list[Placed],
    runs: Sequence[Sequence[Option]],
    resources: Resources,
    running: Sequence[tuple[float, Option]],
) -> list[Placed]:
    """The same with the last runs on more cores, one after the other, as long as that makes it shorter."""
    chosen = {run.number: run.option for run in schedule}
    for last in sorted(schedule, key=lambda run: -run.start)[:MAX_SPREAD]:
        for option in runs[last.number]:
            changed = {**chosen, last.number: option}
            other = placed([changed[number] for number in range(len(runs))], resources, running)
            if length(other, running) < length(schedule, running):
                schedule, chosen = other, changed
    return schedule
