"""Train one network with one global batch size, measure it during training, and write all results to one folder.

Examples:
  gengap train                                         LeNet-5 on digits: 96% in a few seconds
  gengap train --config configs/demo_train.yaml --launch.num_processes 2
  gengap train --data.name fashion_mnist --data.root DIR --batch.global_size 4096 --out runs/lb4096
  gengap train --resume --out runs/lb4096              continue that run after an interruption
  gengap train --profile                               print the time of each part of a step, with a trace of every rank
  torchrun --nproc_per_node 2 -m gengap_dist.train --config configs/demo_train.yaml
"""

import itertools
import os
import shlex
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from gengap_dist.analysis.report.process import ReportProcess
from gengap_dist.cli.exit_codes import OK, continues_with, run_command, warn
from gengap_dist.cli.options import Options, parse
from gengap_dist.config.file_names import as_file_name
from gengap_dist.config.loading import flat, load_yaml, merge, resolve, to_yaml, user_path, validate
from gengap_dist.config.own_code import check_servers, check_trusted
from gengap_dist.config.sections import RunConfig
from gengap_dist.distributed import launchers
from gengap_dist.distributed.preemption import ending_on_signals
from gengap_dist.errors import UsageError, explaining_full_disk
from gengap_dist.runs import lease, run_folder
from gengap_dist.runs.links import check_links
from gengap_dist.tracking.mlflow.client import check_store
from gengap_dist.tracking.mlflow.process import UploaderProcess
from gengap_dist.training import ENTRY_POINT

PROG = "gengap train"
_warn = partial(warn, PROG)


def command(argv: Sequence[str]) -> int:
    """Run a training from the command line; returns the exit code."""
    options, overrides = parse(Options, argv, prog=PROG, description=str(__doc__), settings=RunConfig)
    files = list(options.config)
    saved = options.out / "config.yaml" if options.resume and options.out and not files else None
    if saved and (saved.exists() or not overrides):  # a run that never began has none, and is started by its settings
        check_links(saved.parent)
        config = validate(RunConfig, merge(load_yaml(saved, of_run=True), overrides))
        said = flat(overrides)
        check_trusted(config.model_dump(), said, saved)
        check_servers(flat(config.model_dump(mode="json")), said, saved)
    else:
        config = resolve(RunConfig, files, overrides)
    if options.print_config:
        print(to_yaml(config), end="")
        return OK
    if options.resume and not options.out:
        raise UsageError(f"--resume needs the folder of the run: give --out {_last_run(config) or 'FOLDER'}")
    given = options.out or _default_out(config)
    out = user_path(given.resolve())
    launcher = partial(launchers.choose, config.launch, many_runs=False, entry_point=ENTRY_POINT)
    with continues_with(f"--resume --out {shlex.quote(str(given))}"), ending_on_signals():
        if not launchers.is_driver(config.launch):
            with launcher() as ranks:
                ranks.run(config, out, resume=options.resume, progress=lambda done, total, note: None)
            return OK
        check_store(config.mlflow)
        with lease.holding(out, _warn):
            resume = options.resume or launchers.restarted() or _started_by_this_launch(out)
            if resume and (out / "run.json").exists() and any(out.glob("checkpoints/step_*")):
                run_folder.check_settings(out, run_folder.read_info(out), config)  # before ranks or a cluster start
            with launcher() as ranks:
                return _drive(ranks, config, out, resume)


def _started_by_this_launch(out: Path) -> bool:
    """Whether the run in this folder was started by the launch to which this process belongs."""
    launch_id = launchers.launch_id()
    return launch_id is not None and (out / "run.json").exists() and run_folder.read_info(out).launch_id == launch_id


def _drive(ranks: launchers.Launcher, config: RunConfig, out: Path, resume: bool) -> int:
    """The driver process: the folder, progress, MLflow, the report."""
    run_folder.prepare_folder(out, "run.json", resume=resume)
    uploader = UploaderProcess(out, config.mlflow) if config.mlflow.enabled else None
    try:
        with explaining_full_disk("continue with --resume", file=f"a file in {out}"), ReportProcess(out) as report:
            from gengap_dist.cli.terminal import RunProgress, print_profile, print_run

            with RunProgress(out.name, stages=True) as progress:

                def show(done: int, total: int, note: str) -> None:
                    progress(done, total, note)
                    if note == run_folder.EXPORTING:
                        report.draw()

                ranks.run(config, out, resume=resume, progress=show)
                progress(0, 0, "writing the report")
                page = report.write()
    except BaseException as error:
        run_folder.close_abandoned(out, error)
        if uploader and (upload_warning := uploader.finish()):
            _warn(upload_warning)
        raise
    upload_warning = uploader.finish() if uploader else None
    if config.profile:
        print_profile(out)
    print_run(out, page, uploader.uri if uploader and not upload_warning else None)
    if upload_warning:
        _warn(upload_warning)
    return OK


def _default_out(config: RunConfig) -> Path:
    if launchers.uses_torchrun(config.launch) and not launchers.launch_id():
        raise UsageError("--out is required: ranks started by another program must all have the same folder")
    stamp = launchers.launch_id() or datetime.now().strftime("%Y%m%d-%H%M%S")
    name = _default_name(config) + stamp
    return Path("runs") / name if launchers.launch_id() else _new_folder(Path("runs"), name)


def _default_name(config: RunConfig) -> str:
    """Name of a default folder, without its time."""
    data, model = as_file_name(config.data.name), as_file_name(config.model.name)
    return f"{data}-{model}-b{config.batch.global_size}-s{config.seed}-"


def _last_run(config: RunConfig) -> str | None:
    """The run that was last written here to a default folder with the settings that its name tells."""
    found = [path for path in Path("runs").glob("*/run.json") if path.parent.name.startswith(_default_name(config))]
    last = max(found, key=lambda path: path.stat().st_mtime, default=None)
    return shlex.quote(str(last.parent)) if last else None


def _new_folder(parent: Path, name: str) -> Path:
    """A folder made for this process alone, with a number if another has just taken the name."""
    for number in itertools.count(1):
        folder = parent / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if os.path.lexists(folder):  # else it is the parent that cannot be made
                continue
        except OSError:  # what is wrong is said where an --out would be prepared
            pass
        return folder
    raise AssertionError


def main(argv: Sequence[str] | None = None) -> Any:
    """Entry point."""
    run_command(PROG, command, argv, result_is_printed=False)
