"""Write the report of a run or study again, send its results to MLflow, or copy what comparisons need of it.

Examples:
  gengap report studies/demo                writes studies/demo/report.html and figures/ (SVG, CSV)
  gengap report --pdf studies/demo          writes the figures as PDF, too
  gengap report sync studies/demo           sends to MLflow what is not there yet
  gengap report slim studies/demo results   copies the runs that have ended, without checkpoints and most spectra, with
                                            SHA-256 of each file: small enough to publish, enough for gengap compare
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gengap_dist.cli.exit_codes import OK, run_command, warn
from gengap_dist.cli.options import ReportOptions, SlimOptions, parse
from gengap_dist.config.own_code import own_code
from gengap_dist.errors import UsageError, visible
from gengap_dist.runs.links import check_links

PROG = "gengap report"


def command(argv: Sequence[str]) -> int:
    """Handle `[draw] DIR`, `sync DIR` or `slim DIR OUT`; returns the exit code."""
    words = list(argv)
    action = words.pop(0) if words[:1] in (["draw"], ["sync"], ["slim"]) else "draw"
    options = read_options(words, copying=action == "slim")
    folder = options.folder.resolve()
    if not ((folder / "run.json").exists() or (folder / "study.json").exists()):
        raise UsageError(
            f"DIR ({options.folder}) contains neither run.json nor study.json: give the folder of a run or study"
        )
    check_links(folder)
    if isinstance(options, SlimOptions):
        return _slim(folder, options.out)
    return _sync(folder, options) if action == "sync" else _draw(folder, pdf=options.pdf)


def read_options(words: Sequence[str], *, copying: bool) -> ReportOptions:
    """The options after the action."""
    usage = f"[--pdf] DIR\n       {PROG} sync DIR\n       {PROG} slim DIR OUT"
    options = SlimOptions if copying else ReportOptions
    return parse(options, words, prog=PROG, description=str(__doc__), usage=usage)[0]


def _draw(folder: Path, *, pdf: bool) -> int:
    from gengap_dist.analysis.report.html import write_report
    from gengap_dist.analysis.study_data import read_study
    from gengap_dist.cli.terminal import print_run, print_study
    from gengap_dist.runs.slim import sums_problem

    if problem := sums_problem(folder):
        warn(PROG, problem)
    study = read_study(folder)
    page = write_report(study, pdf=pdf)
    for line in study.left_out:
        warn(PROG, line)
    if (folder / "study.json").exists():
        print_study(study, page, None)
    else:
        print_run(folder, page, None)
    return OK


def _slim(folder: Path, out: Path) -> int:
    from gengap_dist.cli.terminal import RunProgress
    from gengap_dist.runs.slim import write_slim_copy

    with RunProgress("copying") as progress:
        number = write_slim_copy(folder, out, lambda name, done, total: progress(done, total, name))
    print(visible(f"{number} {'run' if number == 1 else 'runs'} that ended in {out}"))
    return OK


def _sync(folder: Path, options: ReportOptions) -> int:
    from gengap_dist.cli.terminal import RunProgress
    from gengap_dist.runs.run_folder import is_slim
    from gengap_dist.study.means import update_means
    from gengap_dist.tracking.mlflow.process import sync_now

    is_study = (folder / "study.json").exists()
    runs = sorted(path.parent for path in folder.glob("runs/*/*/run.json" if is_study else "run.json"))
    if slim := next(filter(is_slim, runs), None):
        raise UsageError(
            f"DIR ({folder}) is a slim copy (no metrics.jsonl in {slim}), and MLflow is sent whole runs: give the "
            "folder that it is a copy of"
        )
    for problem in update_means(folder) if is_study else ():
        warn(PROG, problem)
    for run in runs:
        if not (run / "mlflow.json").exists():
            _export_missing_model(run)
    with RunProgress("sending") as progress:
        tracking_uri = sync_now(
            folder, options.tracking_uri, lambda name, done, total: progress(done, total, name), options.metrics
        )
    print(visible(f"all of {folder} is in MLflow at {tracking_uri}"))
    return OK


def _export_missing_model(folder: Path) -> None:
    """Export the model of a finished run that was trained without MLflow, or by an earlier version."""
    from gengap_dist.runs.run_folder import read_info, write_info
    from gengap_dist.runs.schema import RunStatus

    try:
        info = read_info(folder)
    except UsageError:  # the uploader leaves it out with a message
        return
    section = info.config.get("mlflow")
    wanted = isinstance(section, dict) and section.get("log_model") and info.launcher != "probe"
    if name := own_code(info.config).get("model.name"):
        if wanted:
            reason = f"model.name ({name}) is code that its folder names, and only training imports it"
            warn(PROG, f"the model of {folder} is not sent: {reason}")
        return
    if wanted and info.status == RunStatus.FINISHED and not (info.model or info.model_error) and info.data:
        from gengap_dist.training.export import try_export

        exported = try_export(folder, info.config, info.data, info.result.get("num_steps") or 0)
        write_info(folder, info.with_fields(**exported))


def main(argv: Sequence[str] | None = None) -> Any:
    """Entry point."""
    run_command(PROG, command, argv)
