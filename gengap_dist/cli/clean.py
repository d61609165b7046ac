"""List what the runs of a study need no more, with sizes, and with --yes remove exactly that.

Of runs that have finished or diverged go older checkpoints, and spectra of other layers than the last hidden one. Their
results, metrics and last checkpoint stay, so that gengap report, compare, study and report slim give the same answer.
Runs that go on or may be continued, and what is not of a run, are left alone, and named.

Examples:
  gengap clean studies/demo                          what would go, what stays, and why; nothing is removed
  gengap clean studies/demo --yes                    remove what this lists
  gengap clean runs/* --what checkpoints             of some runs, and only their older checkpoints
  gengap clean studies/demo --what all_checkpoints   also the last of each run, and with it the trained network
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gengap_dist.cli.exit_codes import OK, continues_with, run_command, warn
from gengap_dist.cli.options import CleanOptions, parse
from gengap_dist.config.file_names import as_here
from gengap_dist.errors import UsageError, explaining_full_disk, first_of

if TYPE_CHECKING:  # --help needs neither rich nor what reads runs
    from rich.table import Table

    from gengap_dist.runs.clean import LeftAlone, RunPlan

PROG = "gengap clean"
MAX_NAMED = 20  # lines of what is left alone for the same reason
LOST = {
    "checkpoints": "older checkpoints: gengap probe --model RUN@STEP cannot measure them any more",
    "all_checkpoints": "all checkpoints: the trained networks are lost to gengap probe, load_network and --resume",
    "spectra": "spectra of other layers, and of weights: figures of spectra show the last hidden layer only; all other "
    "figures, the tables and the verdicts stay the same",
}


def command(argv: Sequence[str]) -> int:
    """List what goes of the runs in some folders, and remove it if told to; returns the exit code."""
    usage = "[--option VALUE]... FOLDER..."
    options = parse(CleanOptions, argv, prog=PROG, description=str(__doc__), usage=usage)[0]
    from rich.text import Text

    from gengap_dist.cli.terminal import RunProgress, print_page
    from gengap_dist.preflight.plan_table import in_bytes
    from gengap_dist.runs.clean import find_runs, plan_run, remove

    runs, others = dict[Path, None](), list["LeftAlone"]()
    for folder in dict.fromkeys(folder.resolve() for folder in options.folders):
        found, elsewhere = find_runs(folder)
        runs |= dict.fromkeys(found)
        others += elsewhere
    plans: list[RunPlan] = []
    with RunProgress("looking") as progress:
        for number, run in enumerate(runs):
            progress(number, len(runs), as_here(run))
            plans.append(plan_run(run, options.what))
    to_free = sum(plan.freed for plan in plans)
    total = in_bytes(sum(plan.num_bytes for plan in plans))
    if to_free:
        of_checkpoints = {each.is_checkpoint for plan in plans for each in plan.removals}
        lost = [LOST[kind] for kind in dict.fromkeys(options.what) if (kind != "spectra") in of_checkpoints]
        print_page([_table(plans), *(Text(f"lost: {each}") for each in lost)])
    others += [each for plan in plans for each in plan.left_alone]
    print_page(Text(line) for line in [*_left_alone(others), *_about_mlflow(runs)])
    if not to_free or not options.yes:
        said = (
            f"{in_bytes(to_free)} of {total} would be removed: add --yes" if to_free else f"{total}: nothing to remove"
        )
        print_page([Text(said, style="bold")])
        return OK
    freed = 0
    with (
        RunProgress("removing") as progress,
        explaining_full_disk("repeat the command"),
        continues_with("the same command"),
    ):
        for number, plan in enumerate(plans):
            progress(number, len(plans), as_here(plan.folder))
            of_run, changed = remove(plan)
            freed += of_run
            for each in changed:
                warn(PROG, f"{as_here(each.path)} {each.reason}; it stays")
    print_page([Text(f"{in_bytes(freed)} of {total} were removed", style="bold")])
    return OK


def _table(plans: Iterable["RunPlan"]) -> "Table":
    """What goes of each run, and what stays of that kind."""
    from rich.table import Table

    from gengap_dist.preflight.plan_table import in_bytes

    table = Table(box=None, pad_edge=False)
    for head in ("run", "goes", "size", "left of it"):
        table.add_column(head, justify="right" if head == "size" else "left", overflow="fold")
    for plan in plans:
        checkpoints = [each for each in plan.removals if each.is_checkpoint]
        spectra = [each for each in plan.removals if not each.is_checkpoint]
        if checkpoints:
            names = first_of([each.path.name for each in checkpoints], MAX_NAMED)
            size = in_bytes(sum(each.num_bytes for each in checkpoints))
            stays = plan.last_checkpoint or "none"
            table.add_row(as_here(plan.folder), f"checkpoints/ {names}", size, stays)
        if spectra:
            size = in_bytes(sum(each.num_bytes for each in spectra))
            layer = f"{plan.layer}" if any(each.kept for each in spectra) else "none"
            goes = f"spectra/ all layers but {plan.layer}, in {len(spectra)} files"
            table.add_row(as_here(plan.folder), goes, size, layer)
    return table


def _left_alone(found: Iterable["LeftAlone"]) -> Iterator[str]:
    """What is left alone, and why; of many with the same reason, some."""
    paths: dict[str, list[str]] = {}
    for each in found:
        paths.setdefault(each.reason, []).append(as_here(each.path))
    for reason, names in paths.items():
        yield from (f"left alone: {name} {reason}" for name in names[:MAX_NAMED])
        if len(names) > MAX_NAMED:
            yield f"left alone: ... and {len(names) - MAX_NAMED} more of which it {reason}"


def _about_mlflow(runs: Iterable[Path]) -> Iterator[str]:
    """That MLflow has copies of runs, which stay there, and how they are removed."""
    from gengap_dist.runs.upload_state import read_upload_state

    stores: dict[str, int] = {}
    for run in runs:
        try:
            state = read_upload_state(run)
        except UsageError:  # the uploader reports it
            continue
        if state.get("run_id"):
            stores[state["uri"]] = stores.get(state["uri"], 0) + 1
    for uri, number in stores.items():
        yield f"left alone: copies of {number} run(s) in MLflow at {uri}; docs/studies.md has the commands of MLflow"


def main(argv: Sequence[str] | None = None) -> Any:
    """Entry point."""
    run_command(PROG, command, argv)
