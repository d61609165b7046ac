"""Check whether this machine can run a config, and print a remedy for each problem; nothing is written.

Of a study, the machine is checked for its baseline, and then every arm against its data and its network.

Examples:
  gengap doctor                                        for the default run: LeNet-5 on digits, MLflow in a file
  gengap doctor --config configs/demo_train.yaml
  gengap doctor --config study.yaml             for all arms of a study
  gengap doctor --launch.launcher ray --launch.ray_address head:6379 --launch.strategy zero2 --json

Exit code: 0 the config can run (parts that it does not need may be missing); 1 a part that it needs is broken; 2 usage.
"""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gengap_dist.cli.exit_codes import FAILED, OK, run_command
from gengap_dist.cli.options import DoctorOptions, parse
from gengap_dist.config.loading import to_yaml
from gengap_dist.config.sections import RunConfig
from gengap_dist.config.study import StudyConfig, resolve_run_or_study
from gengap_dist.errors import UsageError

if TYPE_CHECKING:  # torch is not loaded for --help
    from gengap_dist.preflight.doctor_checks import CheckResult

PROG = "gengap doctor"
COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red", "absent": "dim"}


def command(argv: Sequence[str]) -> int:
    """Run all checks in parallel, print a table and a verdict; returns the exit code."""
    options, overrides = parse(DoctorOptions, argv, prog=PROG, description=str(__doc__), settings=StudyConfig)
    config = resolve_run_or_study(options.config, overrides)
    if options.print_config:
        print(to_yaml(config), end="")
        return OK
    from gengap_dist.cli.console import PlainConsole
    from gengap_dist.preflight.doctor_checks import CheckRequest, run_checks

    arms = {arm.name: config.run_config(arm, 0) for arm in config.arms} if isinstance(config, StudyConfig) else {}
    of_machine = arms[config.baseline] if isinstance(config, StudyConfig) else config
    with PlainConsole(stderr=True).status("checking") as spinner:
        results = run_checks(
            CheckRequest(of_machine, options.out), lambda waiting: spinner.update(f"checking {', '.join(waiting)}")
        )
        if arms and results["torch"].status != "fail":
            spinner.update("checking arms")
            results["arms"] = _check_arms(arms)
    failed = [name for name, result in results.items() if result.status == "fail"]
    warned = [name for name, result in results.items() if result.status == "warn"]
    verdict = _verdict(failed, warned)
    if options.as_json:
        checks = [{"what": name, **result._asdict()} for name, result in results.items()]
        print(json.dumps({"ok": not failed, "verdict": verdict, "checks": checks}, indent=1))
    else:
        _print(results, verdict)
    return FAILED if failed else OK


def _check_arms(arms: Mapping[str, RunConfig]) -> "CheckResult":
    """Whether every arm matches its data and its network."""
    from gengap_dist.distributed.runtime_context import RuntimeContext
    from gengap_dist.preflight.doctor_checks import CheckResult
    from gengap_dist.training.arm_check import check_arms

    try:
        check_arms(arms, RuntimeContext())
    except UsageError as error:
        return CheckResult.refusal(error)
    return CheckResult("ok", f"all {len(arms)} match their data and networks")


def _verdict(failed: list[str], warned: list[str]) -> str:
    """The last line.

    >>> _verdict(["mlflow", "data"], [])
    'This machine cannot run this config: fix mlflow, data.'
    >>> _verdict([], ["network"])
    'This machine can run this config; check the warnings: network.'
    """
    if failed:
        return f"This machine cannot run this config: fix {', '.join(failed)}."
    return "This machine can run this config" + (f"; check the warnings: {', '.join(warned)}." if warned else ".")


def _print(results: "dict[str, Any]", verdict: str) -> None:
    from rich.table import Table
    from rich.text import Text

    from gengap_dist.cli.console import PlainConsole

    console = PlainConsole(width=80)
    table = Table(box=None, pad_edge=False)
    for head in ("", "what", "found, and -> remedy"):
        table.add_column(head, no_wrap=head in ("", "what"), overflow="fold")
    for name, result in results.items():
        remedy = f"\n-> {result.remedy}" if result.remedy and result.status != "ok" else ""
        table.add_row(Text(result.status, COLOURS[result.status]), name, Text(result.found + remedy))
    console.print(table)
    console.print_line(verdict)


def main(argv: Sequence[str] | None = None) -> Any:
    """Entry point."""
    run_command(PROG, command, argv)
