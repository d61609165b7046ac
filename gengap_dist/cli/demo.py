"""Run a small study on handwritten digits, from the question to the report: 6 arms x 4 seeds, a few minutes at most.

It is `gengap study` with a config that comes with the package; all options of that command may follow. Finished runs
are skipped, so an interrupted demo continues when it is started again.

Examples:
  gengap demo                 in the folder demo
  gengap demo --dry-run       what the study can decide, and how long it takes here
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gengap_dist.cli.exit_codes import run_command
from gengap_dist.cli.options import DemoOptions
from gengap_dist.cli.study import command as run_study

PROG = "gengap demo"
CONFIG = Path(__file__).parent.parent / "configs" / "demo.yaml"


def command(argv: Sequence[str]) -> int:
    """Run the study; returns the exit code."""
    return run_study(argv, prog=PROG, description=str(__doc__), kind=DemoOptions, first=["--config", str(CONFIG)])


def main(argv: Sequence[str] | None = None) -> Any:
    """Entry point."""
    run_command(PROG, command, argv, result_is_printed=False)
