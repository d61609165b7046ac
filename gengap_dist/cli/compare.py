"""Compare existing runs, from folders or from MLflow, including runs of other programs.

Runs that share all settings but the seed are one arm; the arm with the smallest batch is the baseline.

Examples:
  gengap compare runs/sb* runs/lb*                      run folders, study folders, or folders that contain some
  gengap compare studies/a studies/b --baseline sb128
  gengap compare experiments:/large_batch --tracking_uri http://mlflow:5000
  gengap compare runs:/3f2a... runs:/77c1... --accuracy test_acc --percent --size batch_size --seed random_seed
"""

import argparse
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from gengap_dist.cli.exit_codes import OK, run_command, warn
from gengap_dist.cli.options import Parser
from gengap_dist.config.loading import user_path
from gengap_dist.errors import UsageError, did_you_mean

PROG = "gengap compare"


def command(argv: Sequence[str]) -> int:
    """Find the runs, group them into arms, write and print the comparison; returns the exit code."""
    options = _parse(argv)
    out = user_path((options.out or Path("comparisons") / f"{datetime.now():%Y%m%d-%H%M%S}").resolve())
    from gengap_dist.analysis.group_runs import gather
    from gengap_dist.analysis.report.html import write_report
    from gengap_dist.cli.terminal import print_study
    from gengap_dist.runs import run_folder
    from gengap_dist.runs.schema import StudyInfo
    from gengap_dist.runs.slim import sums_problem
    from gengap_dist.tracking.mlflow.importer import SourceNames

    run_folder.prepare_folder(out, "study.json", resume=True)
    names = SourceNames(options.accuracy, options.size, options.seed, options.updates, options.percent)
    study, problems = gather(options.runs, out, names, options.tracking_uri, options.question, across=options.across)
    changed = [sums_problem(user_path(source)) for source in options.runs if ":/" not in source]
    for problem in [*filter(None, changed), *problems]:
        warn(PROG, problem)
    if options.baseline and options.baseline not in study.arms:
        near = did_you_mean(options.baseline, study.arms)
        raise UsageError(f"--baseline ({options.baseline}) is not an arm{near}: choose one of {', '.join(study.arms)}")
    study = study.with_baseline(options.baseline or study.baseline)
    run_folder.write_info(out, StudyInfo.model_validate(study.info))
    print_study(study, write_report(study), None)
    return OK


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add: Any = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="folder of a run or study, runs:/ID or experiments:/NAME of MLflow")
    add(
        "--baseline",
        metavar="ARM",
        help="arm with which the others are compared; default: the arm with the smallest batch",
    )
    add("--out", type=user_path, metavar="DIR", help="folder for report and figures; default: comparisons/<time>")
    add("--question", default="", help="question of the comparison; printed at the head of the report")
    add("--tracking_uri", metavar="URI", help="MLflow store of runs:/ and experiments:/; default: MLFLOW_TRACKING_URI")
    add("--accuracy", default="test/accuracy", metavar="METRIC", help="MLflow: metric with the test accuracy")
    add("--percent", action="store_true", help="MLflow: the accuracy is in percent")
    add("--size", default="batch.global_size", metavar="PARAM", help="MLflow: parameter with the global batch size")
    add("--seed", default="seed", metavar="PARAM", help="MLflow: parameter with the seed")
    add(
        "--updates",
        default="num_steps",
        metavar="NAME",
        help="MLflow: metric or parameter with the number of optimizer steps",
    )
    add(
        "--across",
        action="store_true",
        help="also compare runs of different data or networks, which are no pairs; the report says so",
    )
    add("--debug", action="store_true", help="show Python's traceback on an error")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> Any:
    """Entry point."""
    run_command(PROG, command, argv)
