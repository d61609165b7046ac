"""Train one network with one global batch, measure it while it trains, and keep everything in one folder.

Examples:
  gengap train                                         LeNet-5 on digits, a few seconds
  gengap train --config configs/demo_train.yaml --launch.num_processes 2
  gengap train --data.name fashion_mnist --data.root DIR --batch.global_size 4096 --out runs/lb4096
  gengap train --profile                               say where a step's time goes, with a trace of every rank
  torchrun --nproc_per_node 2 -m gengap_dist.train --config configs/demo_train.yaml
"""

import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from gengap_dist.cli.exit_codes import OK, run_command
from gengap_dist.cli.options import Options, TrainSettings, parse
from gengap_dist.compat.fast_imports import fast_imports
from gengap_dist.config.loading import resolve, to_yaml
from gengap_dist.config.sections import RunConfig
from gengap_dist.distributed import launchers
from gengap_dist.errors import UsageError
from gengap_dist.runs import run_folder
from gengap_dist.tracking.mlflow.process import UploaderProcess
from gengap_dist.training import ENTRY_POINT

PROG = "gengap train"


def command(argv: Sequence[str]) -> int:
    """One run, from the command line to the last word on the terminal; the exit code."""
    options, overrides = parse(TrainSettings, Options, argv, prog=PROG, description=str(__doc__))
    files = list(options.config)
    if options.resume and options.out and not files:
        files = [options.out / "config.yaml"]
    config = resolve(RunConfig, files, overrides)
    if options.print_config:
        print(to_yaml(config), end="")
        return OK
    out = (options.out or _name(config)).resolve()
    resume = options.resume or launchers.restarted() or _began_here(out)
    with launchers.choose(config.launch, many_runs=False, entry_point=ENTRY_POINT) as ranks:
        if not launchers.is_driver(config.launch):
            ranks.run(config, out, resume=resume, progress=lambda done, total, note: None)
            return OK
        return _drive(ranks, config, out, resume)


def _began_here(out: Path) -> bool:
    """Whether the run in this folder was begun by the launch that this process belongs to."""
    launch_id = launchers.launch_id()
    return (
        launch_id is not None
        and (out / "run.json").exists()
        and run_folder.read_info(out).get("launch_id") == launch_id
    )


def _drive(ranks: launchers.Launcher, config: RunConfig, out: Path, resume: bool) -> int:
    """What only one process does: the folder, progress, MLflow, the report."""
    from gengap_dist.cli.terminal import RunProgress, print_profile, print_run

    run_folder.prepare_folder(out, "run.json", resume=resume)
    follower = UploaderProcess(out, config.mlflow, "gengap_dist.cli.upload") if config.mlflow.enabled else None
    try:
        with RunProgress(out.name) as progress:
            ranks.run(config, out, resume=resume, progress=progress)
        with fast_imports():
            from gengap_dist.analysis.report.html import write_report
            from gengap_dist.analysis.study_data import read_study

        page = write_report(read_study(out), pdf=False)  # `gengap report` has the time for it
    except BaseException as error:
        run_folder.close_abandoned(out, error)
        raise
    finally:
        behind = follower.finish() if follower else None
    if config.profile:
        print_profile(out)
    print_run(out, page, follower.uri if follower and not behind else None)
    if behind:
        print(f"{PROG}: warning: {behind}", file=sys.stderr)
    return OK


def _name(config: RunConfig) -> Path:
    if launchers.uses_torchrun(config.launch) and not launchers.launch_id():
        raise UsageError("--out is needed here: ranks that something else started must be told one folder")
    stamp = launchers.launch_id() or datetime.now().strftime("%Y%m%d-%H%M%S")
    model = config.model.name.replace(":", ".")
    return Path("runs") / f"{config.data.name}-{model}-b{config.batch.global_size}-s{config.seed}-{stamp}"


def main(argv: Sequence[str] | None = None) -> Any:
    """Entry point."""
    run_command(PROG, command, argv)
