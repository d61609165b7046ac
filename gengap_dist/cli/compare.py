"""Compare existing runs, from folders or from MLflow, including runs of other programs.

Runs that share all settings but the seed are one arm; the arm with the smallest batch is the baseline.

Examples:
  gengap compare runs/sb* runs/lb*                      run folders, study folders, or folders that contain some
  gengap compare studies/a studies/b --baseline sb128
  gengap compare experiments:/large_batch --mlflow.tracking_uri http://mlflow:5000
  gengap compare runs:/3f2a... runs:/77c1... --accuracy test_acc --percent --size batch_size --seed random_seed
"""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gengap_dist.cli.exit_codes import OK, run_command, warn
from gengap_dist.cli.options import CompareOptions, parse
from gengap_dist.config.loading import user_path
from gengap_dist.errors import UsageError, did_you_mean

if TYPE_CHECKING:  # slow to import, and wrong options need none of it
    from gengap_dist.analysis.study_data import StudyData

PROG = "gengap compare"


def command(argv: Sequence[str]) -> int:
    """Find the runs, group them into arms, write and print the comparison; returns the exit code."""
    options = read_options(argv)
    out = user_path((options.out or Path("comparisons") / f"{datetime.now():%Y%m%d-%H%M%S}").resolve())
    from gengap_dist.analysis.report.html import write_report
    from gengap_dist.cli.terminal import print_study
    from gengap_dist.runs import run_folder
    from gengap_dist.runs.schema import StudyInfo

    made = run_folder.missing_folders(out)
    run_folder.prepare_folder(out, "study.json", resume=True)
    with run_folder.removing_if_empty(made):
        study = _gathered(options, out)
    run_folder.write_info(out, StudyInfo.model_validate(study.info))
    print_study(study, write_report(study), None)
    return OK


def _gathered(options: CompareOptions, out: Path) -> "StudyData":
    """The runs in arms, with the baseline that the user has named.

    Raises:
        UsageError: if there is nothing to compare, or no such baseline.
    """
    from gengap_dist.analysis.group_runs import gather
    from gengap_dist.runs.slim import sums_problem
    from gengap_dist.tracking.mlflow.importer import SourceNames

    runs = list(options.runs)
    folders = [user_path(source) for source in runs if ":/" not in source]
    names = SourceNames(options.accuracy, options.size, options.seed, options.updates, options.percent)
    study, problems = gather(runs, out, names, options.tracking_uri, options.question, across=options.across)
    for problem in [*filter(None, map(sums_problem, folders)), *problems]:
        warn(PROG, problem)
    if options.baseline and options.baseline not in study.arms:
        near = did_you_mean(options.baseline, study.arms)
        raise UsageError(f"--baseline ({options.baseline}) is not an arm{near}: choose one of {', '.join(study.arms)}")
    return study.with_baseline(options.baseline or study.baseline)


def read_options(argv: Sequence[str]) -> CompareOptions:
    """The options on the command line."""
    return parse(CompareOptions, argv, prog=PROG, description=str(__doc__), usage="[--option VALUE]... RUN...")[0]


def main(argv: Sequence[str] | None = None) -> Any:
    """Entry point."""
    run_command(PROG, command, argv)
