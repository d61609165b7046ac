"""Write the report of a run or study again, or send its results to MLflow.

Examples:
  gengap report studies/demo            writes studies/demo/report.html and figures/ (SVG, CSV)
  gengap report --pdf studies/demo      writes the figures as PDF, too
  gengap report sync studies/demo       sends to MLflow what is not there yet
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gengap_dist.cli.exit_codes import OK, run_command
from gengap_dist.cli.options import Parser
from gengap_dist.errors import UsageError

PROG = "gengap report"


def command(argv: Sequence[str]) -> int:
    """Handle `[draw] DIR` or `sync DIR`; returns the exit code."""
    words = list(argv)
    action = words.pop(0) if words[:1] in (["draw"], ["sync"]) else "draw"
    parser = Parser(
        prog=PROG,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=f"{PROG} [sync] [--pdf] DIR",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of a run or of a study")
    parser.add_argument("--pdf", action="store_true", help="also write the figures as PDF")
    parser.add_argument(
        "--tracking_uri", help="sync: MLflow store; default: the store to which the folder was uploaded"
    )
    parser.add_argument("--debug", action="store_true", help="show Python's traceback on an error")
    options = parser.parse_args(words)
    folder = options.folder.resolve()
    if not ((folder / "run.json").exists() or (folder / "study.json").exists()):
        raise UsageError(
            f"DIR ({options.folder}) contains neither run.json nor study.json: give the folder of a run or study"
        )
    return _sync(folder, options.tracking_uri) if action == "sync" else _draw(folder, pdf=options.pdf)


def _draw(folder: Path, *, pdf: bool) -> int:
    from gengap_dist.analysis.report.html import write_report
    from gengap_dist.analysis.study_data import read_study
    from gengap_dist.cli.terminal import print_run, print_study

    study = read_study(folder)
    page = write_report(study, pdf=pdf)
    if (folder / "study.json").exists():
        print_study(study, page, None)
    else:
        print_run(folder, page, None)
    return OK


def _sync(folder: Path, uri: str | None) -> int:
    from gengap_dist.cli.terminal import RunProgress
    from gengap_dist.study.means import update_means
    from gengap_dist.tracking.mlflow.process import sync_now

    is_study = (folder / "study.json").exists()
    for problem in update_means(folder) if is_study else ():
        print(f"{PROG}: warning: {problem}", file=sys.stderr)
    for run in sorted(path.parent for path in folder.glob("runs/*/*/run.json" if is_study else "run.json")):
        if not (run / "mlflow.json").exists():
            _export_missing_model(run)
    with RunProgress("sending") as progress:
        tracking_uri = sync_now(folder, uri, lambda name, done, total: progress(done, total, name))
    print(f"all of {folder} is in MLflow at {tracking_uri}")
    return OK


def _export_missing_model(folder: Path) -> None:
    """Export the model of a finished run that was trained without MLflow, or by an earlier version."""
    from gengap_dist.runs.run_folder import read_info, write_info
    from gengap_dist.runs.schema import RunStatus

    try:
        info = read_info(folder)
    except UsageError:  # the uploader leaves it out with a message
        return
    wanted = info.config.get("mlflow", {}).get("log_model", False) and info.launcher != "probe"
    if wanted and info.status == RunStatus.FINISHED and not (info.model or info.model_error) and info.data:
        from gengap_dist.training.export import try_export

        exported = try_export(folder, info.config, info.data, info.result["num_steps"])
        write_info(folder, info.with_fields(**exported))


def main(argv: Sequence[str] | None = None) -> Any:
    """Entry point."""
    run_command(PROG, command, argv)
