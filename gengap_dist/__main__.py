"""`gengap COMMAND`: the commands under one name."""

import importlib
import sys

from gengap_dist import __version__

COMMANDS = {  # name: module, what it does
    "train": ("gengap_dist.cli.train", "train one network with one global batch"),
    "study": ("gengap_dist.cli.study", "train arms x seeds, compare them with the baseline, write a report"),
    "probe": ("gengap_dist.cli.probe", "measure the near-rank loss of a network, trained or not"),
    "compare": ("gengap_dist.cli.compare", "compare runs that are there, from folders or from MLflow"),
    "report": ("gengap_dist.cli.report", "draw a run or a study again, or send it to MLflow"),
    "doctor": ("gengap_dist.cli.doctor", "tell whether this machine can do what a config asks"),
    "plan": ("gengap_dist.cli.plan", "say what a run will take on a cluster, and what is refused"),
}


def main() -> None:
    """Hand over to the command that was asked for."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        importlib.import_module(COMMANDS[name][0]).main(sys.argv[2:])
    elif name in ("-h", "--help"):
        print("usage: gengap COMMAND ...\n\nLarge batches, measured.\n\ncommands (each has its own --help):")
        print("\n".join(f"  {command:8} {text}" for command, (_, text) in COMMANDS.items()))
    elif name == "--version":
        print(f"gengap_dist {__version__}")
    else:
        from gengap_dist.errors import did_you_mean

        near = did_you_mean(name, [*COMMANDS])
        print(f"gengap: {name} is not a command{near}: choose {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
