"""Say whether this machine can do what a config asks, and what to do where it cannot; nothing is written.

Examples:
  gengap doctor                                        for the default run: LeNet-5 on digits, MLflow in a file
  gengap doctor --config configs/lenet5_fashionmnist.yaml --data.root DIR
  gengap doctor --launch.launcher ray --launch.ray_address head:6379 --launch.strategy zero2 --json

Exit code: 0 all is well, or only what this config does not need is missing; 1 something it needs is broken; 2 usage.
"""

import json
from collections.abc import Sequence
from typing import Any

from gengap_dist.cli.exit_codes import FAILED, OK, run_command
from gengap_dist.cli.options import DoctorOptions, DoctorSettings, parse
from gengap_dist.config.loading import resolve, to_yaml
from gengap_dist.config.sections import RunConfig

PROG = "gengap doctor"
COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red", "absent": "dim"}


def command(argv: Sequence[str]) -> int:
    """Check everything side by side, and print one table and a verdict; the exit code."""
    options, overrides = parse(DoctorSettings, DoctorOptions, argv, prog=PROG, description=str(__doc__))
    config = resolve(RunConfig, options.config, overrides)
    if options.print_config:
        print(to_yaml(config), end="")
        return OK
    from rich.console import Console

    from gengap_dist.preflight.doctor_checks import CheckRequest, run_checks

    with Console(stderr=True).status("checking") as spinner:
        found = run_checks(
            CheckRequest(config, options.out), lambda waiting: spinner.update(f"checking {', '.join(waiting)}")
        )
    broken = [what for what, finding in found.items() if finding.status == "fail"]
    less = [what for what, finding in found.items() if finding.status == "warn"]
    verdict = _verdict(broken, less)
    if options.as_json:
        checks = [{"what": what, **finding._asdict()} for what, finding in found.items()]
        print(json.dumps({"ok": not broken, "verdict": verdict, "checks": checks}, indent=1))
    else:
        _print(found, verdict)
    return FAILED if broken else OK


def _verdict(broken: list[str], less: list[str]) -> str:
    """The last line.

    >>> _verdict(["mlflow", "data"], [])
    'This machine cannot do what the config asks: mend mlflow, data.'
    >>> _verdict([], ["network"])
    'This machine can do what the config asks; better look at network.'
    """
    if broken:
        return f"This machine cannot do what the config asks: mend {', '.join(broken)}."
    return "This machine can do what the config asks" + (f"; better look at {', '.join(less)}." if less else ".")


def _print(found: "dict[str, Any]", verdict: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=80)
    table = Table(box=None, pad_edge=False)
    for head in ("", "what", "found, and -> what to do"):
        table.add_column(head, no_wrap=head in ("", "what"), overflow="fold")
    for what, finding in found.items():
        remedy = f"\n-> {finding.remedy}" if finding.remedy and finding.status != "ok" else ""
        table.add_row(Text(finding.status, COLOURS[finding.status]), what, Text(finding.found + remedy))
    console.print(table)
    console.print(verdict, highlight=False, soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> Any:
    """Entry point."""
    run_command(PROG, command, argv)
