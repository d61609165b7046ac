"""Train every arm of a study with every seed, compare the arms with the baseline seed by seed, and write a report.

Every arm is checked against data and network before the first run. Finished runs are skipped, so an interrupted study
continues when the same command is started again.

Examples:
  gengap study --config study.yaml --dry-run       what it can decide, and how long it will take
  gengap study --config study.yaml --out studies/demo
  gengap study --config configs/lenet5_fashionmnist.yaml --data.root DIR
  torchrun --nproc_per_node 2 -m gengap_dist study --config configs/lenet5_fashionmnist.yaml --data.root DIR
"""

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from gengap_dist.cli.exit_codes import FAILED, OK, continues_with, run_command, warn
from gengap_dist.cli.options import StudyOptions, parse
from gengap_dist.compat.fast_imports import fast_imports
from gengap_dist.config.loading import resolve, to_yaml, user_path
from gengap_dist.config.study import StudyConfig
from gengap_dist.credentials import printable
from gengap_dist.distributed import launchers
from gengap_dist.distributed.preemption import ending_on_signals
from gengap_dist.errors import UsageError
from gengap_dist.runs import lease, run_folder
from gengap_dist.runs.schema import RunStatus
from gengap_dist.study import runner
from gengap_dist.study.run_matrix import Forecast, PlannedRun, StudyCallback
from gengap_dist.tracking.mlflow.client import check_store
from gengap_dist.tracking.mlflow.process import UploaderProcess
from gengap_dist.training.run_cost import ArmFacts

PROG = "gengap study"
_warn = partial(warn, PROG)


def command(
    argv: Sequence[str],
    *,
    prog: str = PROG,
    description: str = str(__doc__),
    kind: type[StudyOptions] = StudyOptions,
    first: Sequence[str] = (),
) -> int:
    """Run a study; returns the exit code, 1 if a run failed.

    Args:
        argv: the words of the user.
        prog: name of the command.
        description: for `--help`.
        kind: the options of the command.
        first: words that the command adds before those of the user.
    """
    options, overrides = parse(kind, [*first, *argv], prog=prog, description=description, settings=StudyConfig)
    if not options.config and not overrides:
        raise UsageError("a study needs its arms: give --config FILE, or start gengap demo, which has some")
    config = resolve(StudyConfig, list(options.config), overrides)
    if options.print_config:
        print(to_yaml(config), end="")
        return OK
    out = user_path((options.out or Path("studies") / config.study.name).resolve())
    with continues_with("the same command"), ending_on_signals():
        if not launchers.is_driver(config.launch):
            if not options.dry_run:
                runner.run_study(config, out, StudyCallback(), driver=False)
            return OK
        check_store(config.mlflow)
        if options.dry_run:
            return _dry_run(config, out, "" if launchers.uses_torchrun(config.launch) else _start_line(prog, argv))
        with lease.holding(out, _warn):
            run_folder.prepare_folder(out, "study.json", resume=True)
            return _drive(config, out, options.config)


def _start_line(prog: str, argv: Sequence[str]) -> str:
    """The command that starts the study of a dry run.

    >>> _start_line("gengap study", ["--config", "my study.yaml", "--dry-run", "--out", "out"])
    "gengap study --config 'my study.yaml' --out out"
    """
    words = [word for word in argv if word not in ("--dry-run", "--dry_run")]
    return printable(" ".join([prog, *map(shlex.quote, words)]))


def _dry_run(config: StudyConfig, out: Path, start: str) -> int:
    """Print the page of a study, and the command `start`; only the cache of costs is written, and nothing trained."""
    from rich.text import Text

    from gengap_dist.cli.study_page import forecast_line, study_page
    from gengap_dist.cli.terminal import MEASURING, RunProgress, print_page

    page: list[Any] = []

    class Kept(StudyCallback):
        """Keeps what is found."""

        def on_checked(self, facts: Mapping[str, ArmFacts]) -> None:
            page[:] = study_page(config, facts)

        def on_measure(self, done: int, total: int) -> None:
            progress(done, total, "", MEASURING)

        def on_forecast(self, forecast: Forecast) -> None:
            page.append(forecast_line(config, forecast))

    runner.check_concurrent(config)
    with RunProgress(out.name) as progress:
        runner.run_study(config, out, Kept(), driver=True, warn=_warn, dry_run=True)
    if page and start:
        page.append(Text.assemble(("start    ", "dim"), start))
    print_page(page or [Text("all runs of this study have ended: nothing would be trained")])
    return OK


def _drive(config: StudyConfig, out: Path, sources: Sequence[Path]) -> int:
    """The driver process: folders, progress, MLflow, the report."""
    runner.prepare(config, out, _warn, sources)
    uploader = UploaderProcess(out, config.mlflow) if config.mlflow.enabled else None
    try:
        num_failed = _run(config, out)
        with fast_imports():
            from gengap_dist.analysis.report.html import write_report
            from gengap_dist.analysis.study_data import read_study

        study_data = read_study(out)
        outcome = RunStatus.FAILED if num_failed else RunStatus.FINISHED
        info = runner.conclude(out, outcome, _headline(study_data), _verdicts(study_data))
        study = replace(study_data, info=info.content())
        page = write_report(study)
        for line in study.left_out:
            _warn(line)
    except BaseException as error:
        if not lease.is_of_another(out):
            try:
                runner.conclude(out, run_folder.status_after(error), {})
            except OSError as problem:
                _warn(f"study.json could not be written ({problem.strerror}): the study is not running, as it says")
        if uploader and (upload_warning := uploader.finish()):
            _warn(upload_warning)
        raise
    upload_warning = uploader.finish() if uploader else None
    from gengap_dist.cli.terminal import print_study

    print_study(study, page, uploader.uri if uploader and not upload_warning else None)
    if upload_warning:
        _warn(upload_warning)
    if num_failed:
        print(
            f"{PROG}: {num_failed} run(s) failed; their run.json has the error; start the study again to retry",
            file=sys.stderr,
        )
    return FAILED if num_failed else OK


def _run(config: StudyConfig, out: Path) -> int:
    from gengap_dist.analysis.report.text import value_text
    from gengap_dist.analysis.study_data import read_run
    from gengap_dist.cli.study_page import forecast_line, study_page
    from gengap_dist.cli.terminal import MEASURING, RunProgress, print_page

    total = runner.num_runs(config)
    with RunProgress(out.name, total) as progress:

        class Shown(StudyCallback):
            """Draws a bar for every active run, and prints a line for every run that has ended."""

            checked = False

            def on_checked(self, facts: Mapping[str, ArmFacts]) -> None:
                if not self.checked:  # tuning comes before the runs, and each is checked
                    print_page(study_page(config, facts), progress.console)
                    self.checked = True

            def on_forecast(self, forecast: Forecast) -> None:
                if forecast.seconds:
                    progress.print_line(forecast_line(config, forecast))

            def on_step(self, planned_run: PlannedRun, done: int, total: int, note: str) -> None:
                progress(done, total, note, planned_run.title)

            def on_run_end(self, planned_run: PlannedRun, note: str) -> None:
                done = progress.run_ended(planned_run.title)
                shown = note
                if (planned_run.folder / "run.json").exists():
                    run = read_run(planned_run.folder)
                    name = f"{'test' if planned_run.label.startswith('seed') else 'best_val'}/{run.metric.name}"
                    value = (run.info.get("result") or {}).get(name)
                    shown += f", {name.replace('/', ' ')} {value_text(value, run.metric)}"
                progress.print_line(f"[{done}/{total}] {planned_run.title}: {shown}")

            def on_measure(self, done: int, total: int) -> None:
                progress(done, total, "", MEASURING)
                if done == total:
                    progress.remove(MEASURING)

            def on_time_left(self, seconds: float) -> None:
                progress.time_left(seconds)

        return runner.run_study(config, out, Shown(), driver=True, warn=_warn)


def _verdicts(study: Any) -> list[str]:
    """The answer, then each claim with its outcome and evidence, for the note of the study's MLflow run."""
    from gengap_dist.analysis.report.text import first_sentences

    found = study.comparison
    claims = [
        f"{claim.claim} {claim.finding or claim.outcome}: {first_sentences(claim.evidence)[0]}"
        for claim in found.claims
    ]
    return [*[found.answer] * bool(found.answer), *claims]


def _headline(study: Any) -> dict[str, float]:
    """Accuracy and gap of each arm, as metrics of the study's MLflow parent run."""
    from gengap_dist.statistics.paired import mean_and_std

    out: dict[str, float] = {}
    for arm in study.arms:
        if values := list(study.test_values(arm).values()):
            mean, deviation = mean_and_std(values)
            name = f"test_{study.metric.name}/{arm}"
            out |= {f"{name}/mean": mean, f"{name}/num_seeds": len(values)}
            if deviation == deviation:
                out[f"{name}/sd"] = deviation
        gap = study.gap(arm)
        if arm == study.baseline or gap is None:
            continue
        out[f"sb_lb_gap/{arm}/mean"] = gap.mean
        for name, pair in (("bootstrap", gap.bootstrap), ("t", gap.student)):
            if pair:
                out |= {f"sb_lb_gap/{arm}/{name}_low": pair[0], f"sb_lb_gap/{arm}/{name}_high": pair[1]}
    return out


def main(argv: Sequence[str] | None = None) -> Any:
    """Entry point."""
    run_command(PROG, command, argv, result_is_printed=False)
