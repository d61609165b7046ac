"""What one rank does to profile its run: clocks on some steady steps, then torch's profiler on a few more.

The split into parts is of steps without the profiler, which makes a step of many small operators much slower; operators
are of those with it. All times are milliseconds.
"""

import gc
import json
import os
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

from gengap_dist.config.sections import RunConfig
from gengap_dist.distributed.phase_timer import PhaseTimer
from gengap_dist.distributed.process_group import World
from gengap_dist.runs.run_folder import write_atomically
from gengap_dist.training.profiler import trace
from gengap_dist.training.profiler.summary import PARTS, Measured, Setting, summary

FOLDER, SUMMARY = "profile", "summary.txt"
COMPUTING = ("forward", "backward", "optimizer")  # which whereabouts call compute
PASSES = 16  # most in a trace, if that is one step or more: it is read event by event
QUIET = "99"  # kineto's log level at which it does not say that it starts, stops, or finds no GPU


class Window(NamedTuple):
    """How many steps go by, how many are then timed, and how many are then traced."""

    cold: int
    timed: int
    traced: int

    @classmethod
    def of(cls, num_steps: int, num_passes: int = 1) -> "Window":
        """The window of a run with so many steps before it, of so many passes each; however few, one is traced.

        >>> Window.of(1000), Window.of(3), Window.of(1)
        (Window(cold=5, timed=10, traced=5), Window(cold=1, timed=1, traced=1), Window(cold=0, timed=0, traced=1))
        >>> Window.of(1000, num_passes=8).traced
        2
        """
        most = max(1, min(5, PASSES // num_passes))
        cold, traced = min(5, num_steps // 3), min(most, -(-num_steps // 3))
        return cls(cold, min(10, num_steps - cold - traced), traced)


@final
class Clock(PhaseTimer):
    """Whereabouts that tell the parts of computing apart in the steps that a profile listens to."""

    def __init__(self, *, on_gpu: bool) -> None:
        """See `PhaseTimer`; nothing is listened to yet."""
        super().__init__(on_gpu=on_gpu)
        self._heard: list[tuple[str, Any, Any]] | None = None
        self._apart = False
        self.tracing = False
        """Whether what goes on is to have a name in the profiler's trace, too."""

    def span(self, name: str) -> Any:
        """See `PhaseTimer.part`."""
        return nullcontext() if self._heard is None else self.phase(name)

    @contextmanager
    def phase(self, kind: str, doing: str = "", *, meeting: bool = False) -> Iterator[None]:
        """See `PhaseTimer.during`."""
        named = record_function(trace.PREFIX + kind) if self.tracing else nullcontext()
        with named, super().phase(kind, doing, meeting=meeting):
            yield

    def _charge(self, kind: str, until: Any) -> None:
        if self._apart:
            self._mark = until
            return
        if self._heard is not None:
            self._heard.append((kind, self._mark, until))
        super()._charge("compute" if kind in COMPUTING else kind, until)

    def _cut(self) -> None:
        self._charge(self._kinds[-1], self.now())

    def listen(self) -> None:
        """Begin a step."""
        self._cut()
        self._heard = []

    def heard(self) -> list[tuple[str, Any, Any]]:
        """What the step was made of since `listen`: kinds and moments."""
        self._cut()
        found, self._heard = self._heard, None
        assert found
        return found

    @contextmanager
    def apart(self) -> Iterator[None]:
        """While open, time is nobody's: a profile is not part of the run."""
        self._cut()
        self._apart = True
        try:
            yield
        finally:
            self._cut()
            self._apart = False

    def split(self, heard: list[tuple[str, Any, Any]]) -> dict[str, float]:
        """Milliseconds of a step by part; their sum is from its beginning to its end.

        >>> clock = Clock(on_gpu=False)
        >>> found = clock.split([("other", 0.0, 0.5), ("forward", 0.5, 0.75), ("probe", 0.75, 1.0)])
        >>> {name: value for name, value in found.items() if value}
        {'forward': 250.0, 'rest': 750.0}
        """
        found = dict.fromkeys(PARTS, 0.0)
        for kind, start, end in heard:
            if self._on_gpu:
                end.synchronize()
            elapsed = start.elapsed_time(end) if self._on_gpu else 1000 * (end - start)
            found[kind if kind in found else "rest"] += elapsed
        return found


def with_profiler_clock(world: World) -> World:
    """The same ranks, with a clock that tells parts of a step apart."""
    return replace(world, where=Clock(on_gpu=world.device.type == "cuda"))


class NoProfile:
    """Of a run that nobody profiles."""

    def begin(self, left: int) -> None:
        """A step begins, and with it there are `left` to come."""

    def end(self) -> float:
        """It has ended. Returns the seconds the profile took for itself. Collective after the window's last step."""
        return 0.0

    def finish(self) -> float:
        """Write what there is, if that has not been done. Collective. Returns the seconds it took."""
        return 0.0

    def close(self) -> None:
        """Let go of a profiler that is still at work."""


@final
class Profile(NoProfile):
    """Of one start of a run: its first steady steps."""

    def __init__(self, out: Path, world: World, config: RunConfig, strategy: str, *, hidden: bool) -> None:
        """A profile that goes to `out`/profile.

        Args:
            out: the run's folder.
            world: as `clocked` made it.
            config: the run's, for its advice.
            strategy: name of it, for its title.
            hidden: whether the ranks also meet where whereabouts do not see it.
        """
        self.folder, self.world, self.config, self.strategy = out / FOLDER, world, config, strategy
        self.clock = cast("Clock", world.timer)
        self.hidden = hidden and world.size > 1 and world.device.type == "cpu"  # the only one whose trace can tell
        self.window: Window | None = None
        self.first_step = 0
        self._number = 0  # of the step that is under way, from 1
        self._steps: list[list[tuple[str, Any, Any]]] = []  # those of the window that are over
        self._profiler: Any = None
        self._named: Any = nullcontext()

    def begin(self, left: int) -> None:
        """See `NoProfile.begin`."""
        if self.window is None:
            batch = self.config.batch
            num_passes = -(-batch.global_size // (batch.max_micro_size * self.world.size))
            self.window, self.first_step = Window.of(left, num_passes), self.clock.step
            with self.clock.apart():
                gc.collect()  # the first large collection would fall among the timed steps of one rank
        self._number += 1
        if not self._listens():
            return
        if self._number > self.window.cold + self.window.timed:
            if self._profiler is None:
                self._start()
            self._named = record_function(trace.STEP + str(self.clock.step))
        self.clock.listen()
        self._named.__enter__()

    def _listens(self) -> bool:
        return self.window is not None and self.window.cold < self._number <= sum(self.window)

    def _start(self) -> None:
        with self.clock.apart():
            os.environ.setdefault("KINETO_LOG_LEVEL", QUIET)
            on_gpu = self.world.device.type == "cuda"
            self._profiler = profile(
                activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])],
                acc_events=True,  # there is one cycle: torch would warn that it forgets those before
            )
            self._profiler.start()
        self.clock.tracing = True

    def end(self) -> float:
        """See `NoProfile.end`."""
        if not self._listens():
            return 0.0
        self._named.__exit__(None, None, None)
        self._named = nullcontext()
        self._steps.append(self.clock.heard())
        return self.finish() if self.window and self._number == sum(self.window) else 0.0

    def finish(self) -> float:
        """See `NoProfile.finish`."""
        if not self._steps:
            return 0.0
        began = time.monotonic()
        with self.clock.apart():
            self._write(self._measured())
        self._steps.clear()
        self._number = sum(self.window or ())  # it is over, too, where the run ended in the middle of the window
        return time.monotonic() - began

    def close(self) -> None:
        """See `NoProfile.close`."""
        self.clock.tracing = False
        self._named.__exit__(None, None, None)
        self._named = nullcontext()
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def _measured(self) -> Measured:
        """What this rank has to tell; its trace is written."""
        assert self.window
        splits = [self.clock.split(heard) for heard in self._steps]
        timed, traced = splits[: self.window.timed], splits[self.window.timed :]
        profiler = self._profiler
        self.close()
        found, error = trace.Trace([]), None
        if profiler is not None:
            found = trace.Trace(profiler.events())
            error = trace.export(profiler, self.folder / f"rank{self.world.rank}.json.gz")
        counted = traced if traced and (self.hidden or not timed) else timed
        parts = {name: fmean(split[name] for split in counted) for name in PARTS}
        own = median(sum(split.values()) - split["communication"] for split in counted)
        if self.hidden:
            for name in COMPUTING:
                waited = min(parts[name], found.exposed(name))
                parts[name] -= waited
                parts["communication"] += waited
                own -= waited
        return Measured(
            rank=self.world.rank,
            timed=[sum(split.values()) for split in timed],
            traced=[sum(split.values()) for split in traced],
            parts=parts,
            own=own,
            operators=found.operators(),
            error=error,
        )

    def _write(self, mine: Measured) -> None:
        """Rank 0 writes what all ranks measured. Collective."""
        told = [Measured(**json.loads(text)) for text in gather(self.world, json.dumps(mine._asdict()))]
        if self.world.rank:
            return
        assert self.window
        setting = Setting(
            first_timed=self.first_step + self.window.cold,
            first_traced=self.first_step + self.window.cold + self.window.timed,
            device=self.world.device.type,
            strategy=self.strategy,
            hidden=self.hidden,
            data=self.config.data,
        )
        errors = [f"rank {one.rank}: {one.error}" for one in told if one.error]
        try:
            self.folder.mkdir(exist_ok=True)
            write_atomically(self.folder / SUMMARY, summary(told, setting))
        except OSError as error:
            errors.append(f"summary: {error.strerror}")
        if errors:
            warnings.warn(
                f"the profile could not be written to {self.folder} ({errors[0]}"
                + (f", and {len(errors) - 1} more" if errors[1:] else "")
                + "): the run goes on without it; make room there",
                stacklevel=2,
            )


def gather(world: World, text: str) -> list[str]:
    """What every rank says, on every rank. Collective."""
    mine = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    sizes = torch.zeros(world.size, dtype=torch.int64)
    sizes[world.rank] = len(mine)
    world.all_reduce(sizes, "sizes of what ranks measured")
    told = torch.zeros(world.size, int(sizes.max()), dtype=torch.uint8)
    told[world.rank, : len(mine)] = mine
    world.all_reduce(told, "what ranks measured")
    return [bytes(row[:size].tolist()).decode() for row, size in zip(told, sizes.tolist(), strict=True)]
