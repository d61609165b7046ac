"""Profiles the run of one rank: first timed steps without torch's profiler, then a few steps with it.

The split into parts comes from steps without the profiler, which slows down steps of many small operators; operator
times come from steps with it. All times are in milliseconds.
"""

import gc
import json
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple, cast, final

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from gengap_dist.compat.quiet_kineto import start_quietly
from gengap_dist.config.measures import Strategy
from gengap_dist.config.sections import RunConfig
from gengap_dist.distributed.phase_timer import PhaseTimer
from gengap_dist.distributed.process_group import World
from gengap_dist.runs.run_folder import write_atomically
from gengap_dist.training.profiler import trace
from gengap_dist.training.profiler.summary import PARTS, ProfileSetting, RankProfile, summary

FOLDER, SUMMARY = "profile", "summary.txt"
COMPUTE_PARTS = ("forward", "backward", "optimizer")  # PhaseTimer counts these as compute
MAX_PASSES = 16  # maximum number in a trace, but at least one step: events are read one by one


class Window(NamedTuple):
    """Numbers of steps: first warm-up, then timed, then traced."""

    warmup: int
    timed: int
    traced: int

    @classmethod
    def of(cls, num_steps: int, num_passes: int = 1) -> "Window":
        """The window of a run of `num_steps` steps with `num_passes` passes each; at least one step is traced.

        >>> Window.of(1000), Window.of(3), Window.of(1)
        (Window(warmup=5, timed=10, traced=5), Window(warmup=1, timed=1, traced=1), Window(warmup=0, timed=0, traced=1))
        >>> Window.of(1000, num_passes=8).traced
        2
        """
        max_traced = max(1, min(5, MAX_PASSES // num_passes))
        warmup, traced = min(5, num_steps // 3), min(max_traced, -(-num_steps // 3))
        return cls(warmup, min(10, num_steps - warmup - traced), traced)


@final
class ProfilerClock(PhaseTimer):
    """A PhaseTimer that splits compute time into parts in the profiled steps."""

    def __init__(self, *, on_gpu: bool) -> None:
        """See `PhaseTimer`; no step is profiled yet."""
        super().__init__(on_gpu=on_gpu)
        self._step_intervals: list[tuple[str, Any, Any]] | None = None
        self._paused = False
        self.tracing = False
        """Whether phases are also marked in the profiler's trace."""

    def span(self, name: str) -> Any:
        """See `PhaseTimer.span`."""
        return nullcontext() if self._step_intervals is None else self.phase(name)

    @contextmanager
    def phase(self, kind: str, activity: str = "", *, collective: bool = False) -> Iterator[None]:
        """See `PhaseTimer.phase`."""
        named = record_function(trace.PREFIX + kind) if self.tracing else nullcontext()
        with named, super().phase(kind, activity, collective=collective):
            yield

    def _charge(self, kind: str, until: Any) -> None:
        if self._paused:
            self._mark = until
            return
        if self._step_intervals is not None:
            self._step_intervals.append((kind, self._mark, until))
        super()._charge("compute" if kind in COMPUTE_PARTS else kind, until)

    def _charge_until_now(self) -> None:
        self._charge(self._open_phases[-1], self.now())

    def begin_step(self) -> None:
        """Start recording a step."""
        self._charge_until_now()
        self._step_intervals = []

    def end_step(self) -> list[tuple[str, Any, Any]]:
        """The intervals since `begin_step`: part, start and end."""
        self._charge_until_now()
        intervals, self._step_intervals = self._step_intervals, None
        assert intervals
        return intervals

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While open, time is not counted: profiling is not part of the run."""
        self._charge_until_now()
        self._paused = True
        try:
            yield
        finally:
            self._charge_until_now()
            self._paused = False

    def milliseconds_by_part(self, intervals: list[tuple[str, Any, Any]]) -> dict[str, float]:
        """Milliseconds of a step by part; their sum is the duration of the step.

        >>> clock = ProfilerClock(on_gpu=False)
        >>> parts = clock.milliseconds_by_part([("other", 0.0, 0.5), ("forward", 0.5, 0.75), ("probe", 0.75, 1.0)])
        >>> {name: value for name, value in parts.items() if value}
        {'forward': 250.0, 'rest': 750.0}
        """
        parts = dict.fromkeys(PARTS, 0.0)
        for kind, start, end in intervals:
            if self._on_gpu:
                end.synchronize()
            elapsed = start.elapsed_time(end) if self._on_gpu else 1000 * (end - start)
            parts[kind if kind in parts else "rest"] += elapsed
        return parts


def with_profiler_clock(world: World) -> World:
    """The same ranks, with a ProfilerClock as timer."""
    return replace(world, timer=ProfilerClock(on_gpu=world.device.type == "cuda"))


class NoProfile:
    """Null object of a run without a profile."""

    def begin(self, num_remaining: int) -> None:
        """Start a step; `num_remaining` steps, including it, remain in the run."""

    def end(self) -> float:
        """End a step. Returns the seconds that the profile itself took. Collective after the window's last step."""
        return 0.0

    def finish(self) -> float:
        """Write the profile of the recorded steps, if not yet written. Returns the seconds this took. Collective."""
        return 0.0

    def close(self) -> None:
        """Stop a profiler that is still running."""


@final
class Profile(NoProfile):
    """Profiles the first steps after warm-up."""

    def __init__(
        self, out: Path, world: World, config: RunConfig, strategy: Strategy, *, has_untimed_collectives: bool
    ) -> None:
        """A profile that is written to `out`/profile.

        Args:
            out: the run folder.
            world: from `with_profiler_clock`.
            config: the run's, for advice.
            strategy: its name, for the title.
            has_untimed_collectives: whether the strategy has collectives that PhaseTimer does not measure.
        """
        self.folder, self.world, self.config = out / FOLDER, world, config
        self.strategy: Strategy = strategy
        self.clock = cast("ProfilerClock", world.timer)
        self.has_untimed_collectives = (
            has_untimed_collectives and world.size > 1 and world.device.type == "cpu"
        )  # the only one whose trace can tell
        self.window: Window | None = None
        self.first_step = 0
        self._step_number = 0  # number of the current step, from 1
        self._steps: list[list[tuple[str, Any, Any]]] = []  # completed steps of the window
        self._profiler: Any = None
        self._step_range: Any = nullcontext()

    def begin(self, num_remaining: int) -> None:
        """See `NoProfile.begin`."""
        if self.window is None:
            batch = self.config.batch
            num_passes = -(-batch.global_size // (batch.max_micro_size * self.world.size))
            self.window, self.first_step = Window.of(num_remaining, num_passes), self.clock.step
            with self.clock.paused():
                gc.collect()  # otherwise the first large collection could fall in the timed steps of one rank
        self._step_number += 1
        if not self._in_window():
            return
        if self._step_number > self.window.warmup + self.window.timed:
            if self._profiler is None:
                self._start_profiler()
            self._step_range = record_function(trace.STEP + str(self.clock.step))
        self.clock.begin_step()
        self._step_range.__enter__()

    def _in_window(self) -> bool:
        return self.window is not None and self.window.warmup < self._step_number <= sum(self.window)

    def _start_profiler(self) -> None:
        with self.clock.paused():
            on_gpu = self.world.device.type == "cuda"
            self._profiler = profile(
                activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])],
                acc_events=True,  # there is one cycle: avoids torch's warning about earlier cycles
            )
            start_quietly(self._profiler)
        self.clock.tracing = True

    def end(self) -> float:
        """See `NoProfile.end`."""
        if not self._in_window():
            return 0.0
        self._step_range.__exit__(None, None, None)
        self._step_range = nullcontext()
        self._steps.append(self.clock.end_step())
        return self.finish() if self.window and self._step_number == sum(self.window) else 0.0

    def finish(self) -> float:
        """See `NoProfile.finish`."""
        if not self._steps:
            return 0.0
        start_time = time.monotonic()
        with self.clock.paused():
            self._write(self._own_profile())
        self._steps.clear()
        self._step_number = sum(self.window or ())  # also if the run ended within the window
        return time.monotonic() - start_time

    def close(self) -> None:
        """See `NoProfile.close`."""
        self.clock.tracing = False
        self._step_range.__exit__(None, None, None)
        self._step_range = nullcontext()
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def _own_profile(self) -> RankProfile:
        """The profile of this rank; also writes its trace."""
        assert self.window
        splits = [self.clock.milliseconds_by_part(intervals) for intervals in self._steps]
        timed, traced = splits[: self.window.timed], splits[self.window.timed :]
        profiler = self._profiler
        self.close()
        rank_trace, error = trace.Trace([]), None
        if profiler is not None:
            rank_trace = trace.Trace(profiler.events())
            error = trace.export(profiler, self.folder / f"rank{self.world.rank}.json.gz")
        split_steps = traced if traced and (self.has_untimed_collectives or not timed) else timed
        parts = {name: fmean(split[name] for split in split_steps) for name in PARTS}
        own_ms = median(sum(split.values()) - split["communication"] for split in split_steps)
        if self.has_untimed_collectives:
            for name in COMPUTE_PARTS:
                wait_ms = min(parts[name], rank_trace.exposed_communication(name))
                parts[name] -= wait_ms
                parts["communication"] += wait_ms
                own_ms -= wait_ms
        return RankProfile(
            rank=self.world.rank,
            timed=[sum(split.values()) for split in timed],
            traced=[sum(split.values()) for split in traced],
            parts=parts,
            own_ms=own_ms,
            operators=rank_trace.operators(),
            error=error,
        )

    def _write(self, own: RankProfile) -> None:
        """Write the profiles of all ranks, on rank 0. Collective."""
        profiles = [RankProfile(**json.loads(text)) for text in all_gather_text(self.world, json.dumps(own._asdict()))]
        if self.world.rank:
            return
        assert self.window
        setting = ProfileSetting(
            first_timed=self.first_step + self.window.warmup,
            first_traced=self.first_step + self.window.warmup + self.window.timed,
            device=self.world.device.type,
            strategy=self.strategy,
            has_untimed_collectives=self.has_untimed_collectives,
            data=self.config.data,
        )
        errors = [f"rank {one.rank}: {one.error}" for one in profiles if one.error]
        try:
            self.folder.mkdir(exist_ok=True)
            write_atomically(self.folder / SUMMARY, summary(profiles, setting))
        except OSError as error:
            errors.append(f"summary: {error.strerror}")
        if errors:
            warnings.warn(
                f"the profile could not be written to {self.folder} ({errors[0]}"
                + (f", and {len(errors) - 1} more" if errors[1:] else "")
                + "): the run continues without it; free disk space there",
                stacklevel=2,
            )


def all_gather_text(world: World, text: str) -> list[str]:
    """The texts of all ranks, on every rank. Collective."""
    own = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    sizes = torch.zeros(world.size, dtype=torch.int64)
    sizes[world.rank] = len(own)
    world.all_reduce(sizes, "sizes of the ranks' profiles")
    rows = torch.zeros(world.size, int(sizes.max()), dtype=torch.uint8)
    rows[world.rank, : len(own)] = own
    world.all_reduce(rows, "the ranks' profiles")
    return [bytes(row[:size].tolist()).decode() for row, size in zip(rows, sizes.tolist(), strict=True)]
