"""Terminal output: progress bars while a command runs, tables when it is done."""

import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.padding import Padding
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from gengap_dist.analysis.report.text import (
    MAX_CAVEATS,
    first_sentences,
    gap_sentence,
    last_layer,
    limits,
    study_rows,
    test_head,
    ui_command,
    value_text,
)
from gengap_dist.analysis.study_data import RunData, StudyData, read_run
from gengap_dist.cli.console import PlainConsole
from gengap_dist.config.measures import MEASURES, PRIMARY
from gengap_dist.config.metric_key import layer_metric
from gengap_dist.runs.run_folder import EXPORTING
from gengap_dist.tracking.mlflow.uploader import ui_paths

if TYPE_CHECKING:  # these import torch, which the driver process does not need
    from gengap_dist.probes.spectra.layer_spectrum import LayerSpectrum
    from gengap_dist.training.observer import Observation

MEASURING = "measuring a few steps of each arm"
MAX_WIDTH = 50  # of a column: a name of 400 characters would leave no room for the others
MIN_MEASURED_SHARE, MIN_MEASURED_SECONDS = 0.01, 2.0  # of a measurement, before its time is estimated
QUIET_SECONDS = 15.0  # minimum interval between progress lines when there is no terminal
OUTCOMES = {"supported": "blue", "contradicted": "dark_orange3", "undecided": "dim"}
SHOWN = {
    "near_rank_loss/rel_1e-2": "near rank loss rel_1e-2",
    "near_rank_loss/abs_1e-2": "near rank loss abs_1e-2",
    "effective_rank": "effective rank",
}
"""Columns of a table of layers."""


class RunProgress:
    """A bar over the steps of every active run; without a terminal, a line every QUIET_SECONDS."""

    def __init__(self, title: str, num_runs: int = 1, *, stages: bool = False) -> None:
        """A bar named `title`; with several runs, another bar counts them, and each run has its own title.

        With `stages`, a line says what begins, if there is no terminal.
        """
        self.console = PlainConsole(stderr=True)
        self.title, self.num_runs, self._last_line_time = title, num_runs, time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            *([TimeRemainingColumn()] if num_runs == 1 else []),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._runs = self._bar.add_task("runs", total=num_runs, note="starting") if num_runs > 1 else None
        self._steps: dict[str, TaskID] = {}
        self._num_ended = 0
        self._seconds_left: float | None = None
        self.stages, self._stage = stages, ""

    def __enter__(self) -> Self:
        self._bar.start()
        if self._runs is None:
            self(0, 0, "starting")
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._bar.stop()

    def __call__(self, done: int, total: int, note: str, run: str = "") -> None:
        """`done` of `total` steps of a run."""
        run = run or self.title
        if run not in self._steps:
            self._steps[run] = self._bar.add_task(run, total=None, note="")
            self._count()
        (task,) = (task for task in self._bar.tasks if task.id == self._steps[run])
        begins = task.total is None and total > 0  # what was done before is not said of its steps
        self._bar.update(task.id, completed=done, total=total or None)
        if note or begins:
            self._bar.update(task.id, note=note)
        stage = _stage(total, note)
        if self.stages and stage not in ("", "starting", self._stage) and not self.console.is_terminal:
            self._stage = stage
            self.print_line(f"{run}: {stage}")
        if not self.console.is_terminal and time.monotonic() - self._last_line_time > QUIET_SECONDS:
            left = "" if self._seconds_left is None else f"; about {duration(self._seconds_left)} left for all runs"
            self.print_line(f"{run}: step {done}/{total} {task.fields['note']}".rstrip() + left)

    def remove(self, run: str) -> None:
        """Remove a bar."""
        if run in self._steps:
            self._bar.remove_task(self._steps.pop(run))

    def run_ended(self, run: str) -> int:
        """Remove the bar of a run that has ended; returns how many runs have ended."""
        self.remove(run)
        self._num_ended += 1
        self._count()
        return self._num_ended

    def _count(self) -> None:
        if self._runs is not None:
            note = f"{len(self._steps)} active"
            if self._seconds_left is not None:
                note += f", about {duration(self._seconds_left)} left"
            self._bar.update(self._runs, completed=self._num_ended, note=note)

    def time_left(self, seconds: float) -> None:
        """Show the forecast of the seconds until all runs have ended."""
        self._seconds_left = seconds
        self._count()

    def print_line(self, text: str | Text) -> None:
        """Print a permanent line above the bars."""
        self._last_line_time = time.monotonic()
        self.console.print_line(text)


class MeasurementProgress:
    """A bar over the steps of each measurement, with the time left; without a terminal, one line for each of them.

    The time left is that of the steps so far, for the steps that are left.
    """

    def __init__(self, *, enabled: bool) -> None:
        """Show nothing unless `enabled`."""
        self.console, self.enabled = PlainConsole(stderr=True), enabled
        self._bar = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not (enabled and self.console.is_terminal),
        )
        self._task = self._bar.add_task("reading data", total=None, note="")
        self._stage_began, self._is_said = time.monotonic(), False

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._bar.stop()

    def __call__(self, stage: str, done: float, total: float) -> None:
        """`done` of `total` steps of a measurement; 0 when it begins."""
        if not done:
            self._bar.reset(self._task, description=stage, total=None, note="")
            self._stage_began, self._is_said = time.monotonic(), False
            return
        seconds = time.monotonic() - self._stage_began
        estimate = seconds * total / done
        self._bar.update(self._task, completed=done, total=total, note=f"{duration(estimate - seconds)} left")
        # short steps that are a small part of the whole say little about the others
        is_known = done >= MIN_MEASURED_SHARE * total or seconds > MIN_MEASURED_SECONDS
        if self.enabled and is_known and not self._is_said:
            self._is_said = True
            self.console.print_line(f"{stage}: about {duration(estimate)}")


def _stage(total: int, note: str) -> str:
    """What a run does, in words that stay the same while it does it; empty if the message does not say.

    >>> _stage(0, "reading images 3/10"), _stage(420, "val 91.2%"), _stage(0, "")
    ('reading images', 'training, 420 steps', '')
    """
    if note == EXPORTING:
        return note
    return f"training, {total:,} steps" if total else note.rstrip("0123456789/, ")


def duration(seconds: float) -> str:
    """Seconds as people say them.

    >>> duration(41.6), duration(190), duration(7000)
    ('42 s', '3 min', '1.9 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def print_run(out: Path, page: Path, uri: str | None) -> None:
    """Print the outcome of one run: result, layers, and paths of the report and of MLflow."""
    run = read_run(out)
    console = wide_console()
    result = run.info.get("result") or {}
    if run.info["status"] != "finished":
        console.print(Text.assemble((run.info["status"], "bold red"), f": {run.info.get('error', '')}"))
    else:
        metric = run.metric
        test, train, best = (
            value_text(result.get(f"{name}/{metric.name}"), metric) for name in ("test", "train_full", "best_val")
        )
        speed = run.samples_per_second
        rest = (
            f" (train {train}, val best {best}) after {result.get('num_steps') or 0:,} steps of {run.global_size:,}"
            + ("" if speed is None else f", {speed:,.0f} samples/s")
        )
        console.print(Text.assemble(f"test {metric.name} ", (test, "bold"), rest))
    if table := layer_table(run):
        console.print(table)
    if left_out := result.get("probe_left_out"):
        console.print(
            f"probe.max_time_fraction ({run.max_time_fraction:.0%}) skipped "
            f"{len(left_out)} measurement(s), at steps {', '.join(map(str, left_out))}; "
            "with probe.max_time_fraction=null none is skipped"
        )
    console.print_line(f"run     {out}\nreport  {page}")
    if uri:
        print_links(console, out, uri)


def print_links(console: PlainConsole, folder: Path, uri: str) -> None:
    """Print how to open MLflow, and where it shows a run, or the table of a study's arms and their comparison."""
    console.print_line(f"mlflow  {ui_command(uri)}")
    is_server = uri.startswith(("http://", "https://"))
    for name, path in ui_paths(folder).items():
        where = (
            f"{uri.rstrip('/')}/{path}" if is_server else f"ADDRESS/{path}  (ADDRESS: what this mlflow command prints)"
        )
        console.print_line(f"{name:8}{where}")


def print_profile(out: Path) -> None:
    """Print the step summary of a profiled run, and the path of its traces."""
    folder = out / "profile"
    if not (folder / "summary.txt").exists():
        return  # the run has warned that it cannot be written, or there was no profiled step
    console = wide_console()
    console.print_line((folder / "summary.txt").read_text(encoding="utf-8"))
    console.print_line(f"profile {folder}: traces of all ranks (open with https://ui.perfetto.dev), and this summary\n")


def layer_table(run: RunData) -> Table | None:
    """Near-rank loss and effective rank of every layer, untrained and trained."""
    steps = run.spectra_steps()
    if not steps:
        return None
    table = Table(title=f"activation spectra: step {steps[0]} -> step {steps[-1]}", title_justify="left")
    table.add_column("layer", no_wrap=True, max_width=MAX_WIDTH)
    table.add_column("units", justify="right")
    table.add_column("N/D", justify="right")
    for head in SHOWN.values():
        table.add_column(head, justify="right")
    for key, facts in run.layer_facts(steps[-1]).items():
        ends = [run.untrained_and_trained(layer_metric(name, key)) for name in SHOWN]
        cells = [f"{before:.3g} -> {after:.3g}" for before, after in ends]
        rows_per_unit = f"{facts['num_samples'] / facts['num_units']:.3g}"
        is_primary = layer_metric(PRIMARY, key) == run.primary_measure
        table.add_row(key + " (primary)" * is_primary, str(facts["num_units"]), rows_per_unit, *cells)
    if run.primary_measure:
        table.caption, table.caption_justify = f"primary: verdicts are about {run.primary_measure}", "left"
    return table


def print_observation(observation: "Observation", untrained: "Observation | None", title: str) -> None:
    """Print one row per layer and view, with a bar for the near-rank loss; then other probe sets and diagnostics."""
    before = {spectrum.key: spectrum.measures() for spectrum in untrained.spectra[""]} if untrained else {}
    change = " (untrained -> now)" if before else ""
    table = Table(title=f"{title}: near-rank loss{change}", title_justify="left")
    heads = ("layer", "N", "D", "N/D", "dead", "below 0.01 s1", "", "below 0.01", "effective rank", "s max", "floor")
    for number, head in enumerate(heads):
        table.add_column(head, justify="left" if number in (0, 6) else "right", no_wrap=True)
    for spectrum in observation.spectra[""]:
        values, values_before = spectrum.measures(), before.get(spectrum.key, {})
        near_rank_loss = values["near_rank_loss/rel_1e-2"]
        table.add_row(
            spectrum.key,
            f"{spectrum.num_samples:,}",
            f"{spectrum.num_units:,}" + (" > N" if spectrum.num_units > spectrum.num_samples else ""),
            f"{spectrum.num_samples / spectrum.num_units:.3g}",
            str(spectrum.dead_units),
            _before_and_after(values_before, values, "near_rank_loss/rel_1e-2", ".1%"),
            "\u2588" * round(10 * near_rank_loss),
            _before_and_after(values_before, values, "near_rank_loss/abs_1e-2", ".1%"),
            _before_and_after(values_before, values, "effective_rank", ".2f"),
            f"{values['sigma_max']:.3g}",
            f"{spectrum.floor:.1g}",
        )
    console = wide_console()
    console.print(table)
    if len(sets := {name: spectra for name, spectra in observation.spectra.items() if name != "weights"}) > 1:
        console.print(_samples_table(sets))
    for name, value in observation.metrics.items():
        if name.startswith("probe/") or (name in MEASURES and not MEASURES[name].is_derived):
            console.print(f"{name} {value:.4g}")


def _samples_table(sets: dict[str, list["LayerSpectrum"]]) -> Table:
    """Near-rank loss and effective rank of every layer on raw activations, by probe set, smaller sets first."""
    table = Table(title="by number of probe samples: share below 0.01 s1, effective rank", title_justify="left")
    table.add_column("layer", no_wrap=True, max_width=MAX_WIDTH)
    columns = [*(name for name in sets if name), ""]
    for name in columns:
        table.add_column(name or "the probe set", justify="right", no_wrap=True)
    for key in [s.key for s in sets[""] if not s.centred]:
        measures = [next((s.measures() for s in sets[name] if s.key == key), {}) for name in columns]
        cells = [
            f"{values['near_rank_loss/rel_1e-2']:.1%}, {values['effective_rank']:.2f}" if values else "-"
            for values in measures
        ]
        table.add_row(key, *cells)
    return table


def _before_and_after(before: dict[str, float], now: dict[str, float], name: str, style: str) -> str:
    """A measure, with its value in the untrained network before it if known.

    >>> _before_and_after({"a": 0.5}, {"a": 0.25}, "a", ".0%"), _before_and_after({}, {}, "a", ".0%")
    ('50% -> 25%', '-')
    """
    shown = format(now[name], style) if name in now else "-"
    return f"{format(before[name], style)} -> {shown}" if name in before else shown


def wide_console() -> PlainConsole:
    """A console with the width of the terminal; files and pipes get 150 columns, enough for every table."""
    return PlainConsole(width=150)


def print_page(parts: Iterable[Table | Text | Padding], console: PlainConsole | None = None) -> None:
    """Print tables and lines, on stdout unless there is a `console`; the terminal may wrap lines, a file does not."""
    console = console or wide_console()
    for part in parts:
        if isinstance(part, Text):
            console.print_line(part)
        else:
            console.print(part)


def print_study(study: StudyData, page: Path, uri: str | None) -> None:
    """Print the outcome of a study: one row per arm, claims, caveats, and paths of the report and of MLflow."""
    console = wide_console()
    console.print(study_table(study, every_column=console.width >= 118))
    console.print(
        f"gap: {gap_sentence(study.baseline, study.metric)}, paired by seed, at the end of the runs; "
        "loss ratio: final training loss / the baseline's",
        style="dim",
    )
    if study.comparison.answer:
        console.print(f"\n{study.comparison.answer}\n", style="bold")
    for claim in study.comparison.claims:
        finding = f" ({claim.finding})" if claim.finding else ""
        outcome = (f"{claim.outcome:12}", OUTCOMES[claim.outcome])
        console.print(Text.assemble(outcome, " ", (claim.claim, "bold"), (finding, "dim")))
        evidence, rest = first_sentences(claim.evidence)
        evidence += " ... (the rest is in the report)" if rest else ""
        console.print(Padding(evidence, (0, 0, 0, 13)))
    caveats = limits(study.look, study.comparison)
    rest = [f"... and {len(caveats) - MAX_CAVEATS} more in the report"] if len(caveats) > MAX_CAVEATS else []
    for caveat in [*caveats[:MAX_CAVEATS], *rest]:
        console.print(Padding(caveat, (0, 0, 0, 13)), style="dim")
    if study.registration:
        console.print(study.registration, style="dim")
    console.print_line(f"report  {page}")
    if uri:
        print_links(console, study.folder, uri)


def study_table(study: StudyData, *, every_column: bool = True) -> Table:
    """One row per arm: metric and gap with intervals; with `every_column` also ranks of the last measured layer."""
    table = Table(title=study.name, title_justify="left")
    last = last_layer(study) if every_column else None
    heads = ["arm", "batch", "steps", "seeds", test_head(study.metric), "train", "loss ratio", "train-test gap"]
    heads += ["gap", "95% t"]
    heads += [f"near-rank loss {last}", f"eff. rank {last}"] if last else []
    for number, head in enumerate(heads):
        table.add_column(
            head, justify="left" if number == 0 else "right", no_wrap=number in (0, 8, 9), max_width=MAX_WIDTH
        )
    for row in study_rows(study, last):
        table.add_row(*row)
    return table
