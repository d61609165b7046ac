"""Measure the near-rank loss of a network's layers, and other diagnostics, on a fixed set of training images.

Examples:
  gengap probe --model lenet5                             an untrained LeNet-5 on digits
  gengap probe --model runs/lb4096                        a run's last weights and its untrained network, on the
                                                          run's own data and probe set
  gengap probe --model runs/lb4096@best --probe.diagnostics hessian,keskar --out probes/lb4096
  gengap probe --model torchvision:vgg16 --data.name cifar10 --data.root DIR --probe.num_samples 128,256,512,1024
  gengap probe --model timm:resnet18 --weights resnet18.pt --probe.layers 'auto,layer*.*' --out probes/mine --mlflow
  torchrun --nproc_per_node 2 -m gengap_dist probe --model my.module:make

Each measurement says after its first steps how long it takes. Spectra of weights are measured if --probe.diagnostics
names them. Without --out, diagnostics and controls are those of the network asked for, not of the untrained one.
"""

import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gengap_dist.cli.exit_codes import OK, run_command
from gengap_dist.cli.options import ProbeOptions, parse
from gengap_dist.config.loading import flat, load_yaml, merge, user_path, validate
from gengap_dist.config.own_code import check_trusted
from gengap_dist.config.sections import RunConfig
from gengap_dist.errors import UsageError
from gengap_dist.runs.links import check_links

if TYPE_CHECKING:  # torch is slow to import, and --help does not need it
    from torch import Tensor

    Network = tuple[int, Path, dict[str, Tensor] | None]

PROG = "gengap probe"


def command(argv: Sequence[str]) -> int:
    """Measure, print a table, and with --out write spectra, figures and a report; returns the exit code."""
    options, overrides = read_options(argv)
    folder, which_weights = _split_run_and_step(options.model)
    is_run = (folder / "run.json").exists()
    if folder.is_dir() and not is_run:
        raise UsageError(f"--model ({options.model}) is a folder without run.json: give the folder of a run")
    if options.mlflow and not options.out:
        raise UsageError("--mlflow sends what is in --out: add --out DIR")
    # all settings of the run but launch, as it may have run on GPUs or under Ray, and the optimizer, which is not made
    if is_run:
        check_links(folder)
        base = load_yaml(folder / "config.yaml", of_run=True) | {"launch": {}, "optim": {}}
        config = validate(RunConfig, merge(base, overrides))
        check_trusted(config.model_dump(), flat(overrides), folder / "config.yaml")
    else:
        config = validate(RunConfig, merge(overrides, {"model": {"name": options.model}}))
    if "diagnostics" not in overrides.get("probe", {}):  # spectra of large weights take minutes
        config = _without_weights(config)
    out = user_path(options.out.resolve()) if options.out else None

    from gengap_dist.cli.terminal import MeasurementProgress
    from gengap_dist.distributed.process_group import destroy_process_group, init_process_group
    from gengap_dist.distributed.runtime_context import rank_environment
    from gengap_dist.runs.run_folder import missing_folders, prepare_folder, removing_if_empty
    from gengap_dist.training.probe_only import probe

    networks = _of_run(folder, which_weights) if is_run else _of_file(options.weights)
    made: list[Path] = []
    if out and rank_environment()[0] == 0:
        made = missing_folders(out)
        prepare_folder(out, "run.json", resume=False)
    with removing_if_empty(made):
        world = init_process_group(config.launch.device, config.launch.timeout_seconds)
        world.barrier()  # rank 0 has created the folder, or has raised
        with MeasurementProgress(enabled=world.rank == 0) as progress:
            observations = probe(config, world, networks, out, progress)
    if world.rank == 0:
        _show(options, config, observations, out)
    destroy_process_group()
    return OK


def _without_weights(config: RunConfig) -> RunConfig:
    chosen = tuple(name for name in config.probe.diagnostics if name != "weights")
    return config.model_copy(update={"probe": config.probe.model_copy(update={"diagnostics": chosen})})


def _show(options: ProbeOptions, config: RunConfig, observations: list[Any], out: Path | None) -> None:
    from gengap_dist.cli.terminal import print_observation, wide_console

    step, last = observations[-1]
    untrained = observations[0][1] if len(observations) > 1 else None
    print_observation(last, untrained, title=f"{options.model} on {config.data.name}, step {step:,}")
    if not out:
        return
    from gengap_dist.analysis.report.html import write_report
    from gengap_dist.analysis.study_data import read_study

    console = wide_console()
    page = write_report(read_study(out))
    paths = f"spectra  {out / 'spectra'}\nfigures  {out / 'figures'}\nreport   {page}"
    console.print_line(paths)
    if options.mlflow:
        from gengap_dist.analysis.report.text import ui_command
        from gengap_dist.tracking.mlflow.process import sync_now

        uri = sync_now(out, options.tracking_uri, lambda name, done, total: None, "all")
        console.print_line(f"mlflow   {ui_command(uri)}")


def _split_run_and_step(model: str) -> tuple[Path, str]:
    """A run's folder, and which of its weights: the part after `@`, or `last`.

    >>> _split_run_and_step("runs/a@0"), _split_run_and_step("runs/a")
    ((PosixPath('runs/a'), '0'), (PosixPath('runs/a'), 'last'))
    """
    folder, at, step = model.rpartition("@")
    return (user_path(folder), step) if at else (user_path(model), "last")


def _of_run(folder: Path, which_weights: str) -> "list[Network]":
    """The untrained network and the weights asked for: `last`, `best`, or a step with a checkpoint.

    Raises:
        UsageError: if the run has no such weights.
    """
    from gengap_dist.runs import checkpoint
    from gengap_dist.training.checkpoint_manager import read_run_state

    if which_weights == "0":
        return [(0, folder, None)]
    kept = {
        str(step): (step, path / "model.pt")
        for step, path in checkpoint.checkpoints_by_step(folder / "checkpoints").items()
    }
    if kept:
        path = checkpoint.latest(folder / "checkpoints", partial(warnings.warn, stacklevel=2))
        assert path is not None
        state = read_run_state(path)
        kept["last"] = (state["train"]["step"], path / "model.pt")
        if best := state["evaluator"]["best"]:
            kept["best"] = (best["step"], path / "best.pt")
    if which_weights not in kept:
        names = ", ".join(
            ["0", *(f"{name} (step {step})" if name in ("last", "best") else name for name, (step, _) in kept.items())]
        )
        raise UsageError(f"--model: the run in {folder} has no weights of step {which_weights}: choose {names}")
    step, path = kept[which_weights]
    return [(0, folder, None), (step, path, checkpoint.evaluated_state(path))]


def _of_file(weights: Path | None) -> "list[Network]":
    """The untrained network, and the network in `weights` if given."""
    if weights is None:
        return [(0, Path(), None)]
    from gengap_dist.runs import checkpoint

    return [(0, weights, None), (1, weights, checkpoint.load_weights(weights))]


def read_options(argv: Sequence[str]) -> tuple[ProbeOptions, dict[str, Any]]:
    """The options on the command line, and the settings there."""
    return parse(
        ProbeOptions,
        argv,
        prog=PROG,
        description=str(__doc__),
        settings=RunConfig,
        only=("data.", "probe.", "seed", "train.dtype", "model.name", "task.name"),
    )


def main(argv: Sequence[str] | None = None) -> Any:
    """Entry point."""
    run_command(PROG, command, argv)
