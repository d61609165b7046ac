"""`gengap COMMAND`: the entry point of all commands."""

import importlib
import sys
from pathlib import Path

from gengap_dist import __version__
from gengap_dist.compat.hard_exit import exit_without_teardown
from gengap_dist.compat.utf8_mode import ensure_utf8_mode

COMMANDS = {  # name: module, help text
    "demo": ("gengap_dist.cli.demo", "a small study on handwritten digits, from the question to the report"),
    "train": ("gengap_dist.cli.train", "train one network with one global batch size"),
    "study": ("gengap_dist.cli.study", "train all arms with all seeds, compare them, and write a report"),
    "probe": ("gengap_dist.cli.probe", "measure the near-rank loss of a trained or untrained network"),
    "compare": ("gengap_dist.cli.compare", "compare existing runs from folders or from MLflow"),
    "report": ("gengap_dist.cli.report", "write the report of a run or a study again, or upload it to MLflow"),
    "clean": ("gengap_dist.cli.clean", "list, and remove, checkpoints and spectra that a study needs no more"),
    "doctor": ("gengap_dist.cli.doctor", "check whether this machine can run a config"),
    "plan": ("gengap_dist.cli.plan", "predict memory and time of a run on a cluster, and list refused settings"),
}

START = """where to start:
  gengap train            one network on handwritten digits: 96% in a few seconds, with a report
  gengap demo             a study: question, arms, seeds, and an answer, in minutes
  gengap study --config FILE --dry-run    what a study of your own can decide, and what it will take"""


def main() -> None:
    """Run the command named by the first argument."""
    ensure_utf8_mode()
    try:
        Path.cwd()
    except FileNotFoundError:
        print("gengap: the current folder was removed: change to another", file=sys.stderr)
        sys.exit(2)
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        try:
            importlib.import_module(COMMANDS[name][0]).main(sys.argv[2:])
        except SystemExit as end:
            if "torch" in sys.modules and isinstance(end.code, int):
                exit_without_teardown(end.code)
            raise
    elif name in ("-h", "--help"):
        print("usage: gengap COMMAND ...\n\nLarge-batch training laboratory.\n\ncommands (each has its own --help):")
        print("\n".join(f"  {command:8} {text}" for command, (_, text) in COMMANDS.items()))
        print(f"\n{START}")
    elif name == "--version":
        print(f"gengap_dist {__version__}")
    else:
        from gengap_dist.errors import did_you_mean, visible

        near = did_you_mean(name, [*COMMANDS])
        shown = name or "an empty word"
        print(visible(f"gengap: {shown} is not a command{near}: choose {', '.join(COMMANDS)}"), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
