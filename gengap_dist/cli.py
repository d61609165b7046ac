"""What the commands share: reading settings from files and the command line, and how they end."""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Never, NoReturn, TypeVar

from pydantic import Field
from pydantic_settings import BaseSettings, CliSettingsSource, CliToggleFlag, SettingsConfigDict

from gengap_dist.config import RunConfig, Section, StudyConfig, UsageError, did_you_mean, field_names
from gengap_dist.launchers.base import leave, started_elsewhere
from gengap_dist.preemption import Preempted

T = TypeVar("T", bound=Section)

OK, FAILED, USAGE, PREEMPTED, INTERRUPTED = 0, 1, 2, 75, 130  # 75: EX_TEMPFAIL, "start me again"


class Options(Section):
    """What a command takes beside the settings."""

    config: list[Path] = []
    """YAML file with settings; may be given several times, later ones win. Files may build on others with `extends`."""
    out: Path | None = None
    """Folder for everything this command writes; by default a new one is named after the settings."""
    resume: CliToggleFlag[bool] = False
    """Go on with what is in --out instead of refusing to touch it."""
    print_config: CliToggleFlag[bool] = False
    """Print the settings that would be used, as YAML, and stop."""
    debug: CliToggleFlag[bool] = False
    """Show Python's traceback when something goes wrong."""


class TrainSettings(RunConfig, Options, BaseSettings):  # pyright: ignore[reportIncompatibleVariableOverride]
    """What `train` takes."""

    model_config = SettingsConfigDict(cli_use_class_docs_for_groups=True)


class StudySettings(StudyConfig, Options, BaseSettings):  # pyright: ignore[reportIncompatibleVariableOverride]
    """What `study` takes."""

    model_config = SettingsConfigDict(cli_use_class_docs_for_groups=True)


class DoctorOptions(Section):
    """What `doctor` takes beside the settings."""

    config: list[Path] = []
    """YAML file with settings, as `train` takes it; may be given several times."""
    out: Path = Path()
    """Folder that the run would write: is there room?"""
    as_json: CliToggleFlag[bool] = Field(default=False, alias="json")
    """Print what was found as JSON."""
    debug: CliToggleFlag[bool] = False
    """Show Python's traceback when something goes wrong."""


class DoctorSettings(RunConfig, DoctorOptions, BaseSettings):  # pyright: ignore[reportIncompatibleVariableOverride]
    """What `doctor` takes."""

    model_config = SettingsConfigDict(cli_use_class_docs_for_groups=True)


class _Parser(argparse.ArgumentParser):
    """argparse that raises instead of exiting, and names the nearest option for an unknown one."""

    known: Sequence[str] = ()

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: "):
            name = message.split()[2].split("=")[0]
            message = f"{name} is no setting{did_you_mean(name, [f'--{k}' for k in self.known])}: see --help for all"
        raise UsageError(message)


def parse(
    settings: type[BaseSettings], argv: Sequence[str], *, prog: str, description: str, options: type[T] = Options
) -> tuple[T, dict[str, Any]]:
    """The command's options, and the settings given on the command line as a nested dict.

    Raises:
        UsageError: for an unknown option, or one without its value.
    """
    width = min(120, max(80, os.get_terminal_size().columns if sys.stdout.isatty() else 100))
    parser = _Parser(
        prog=prog,
        description=description,
        usage=f"{prog} [--config FILE]... [--out DIR] [--section.setting VALUE]...",
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=36, width=width),
    )
    parser.known = [*field_names(settings)]
    source = CliSettingsSource[Any](
        settings, root_parser=parser, cli_parse_none_str="null", cli_hide_none_type=True, cli_avoid_json=True
    )
    overrides: dict[str, Any] = dict(source(args=list(argv))())
    names = [field.alias or name for name, field in options.model_fields.items()]
    given = {name: overrides.pop(name) for name in names if name in overrides}
    return options.model_validate(given), overrides


def guarded(prog: str, command: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> Never:
    """Run a command and exit: 0 done, 1 broken, 2 the user can mend it, 75 resume me, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        code = _outcome(prog, command, argv)
        sys.stdout.flush()
    except BrokenPipeError:  # somebody closed our output: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = OK
    if started_elsewhere():
        leave(code)
    sys.exit(code)


def _outcome(prog: str, command: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    debug = "--debug" in argv
    try:
        return command(argv)
    except UsageError as error:
        _complain(prog, str(error), debug)
        return USAGE
    except Preempted as error:
        _complain(prog, str(error), debug)
        return PREEMPTED
    except KeyboardInterrupt:
        _complain(prog, "interrupted; add --resume to go on", debug)
        return INTERRUPTED
    except BrokenPipeError:
        raise
    except Exception as error:
        text = str(error) if debug else " ".join(str(error).split()) + "; --debug shows where"
        _complain(prog, f"{type(error).__name__}: {text}", debug, every_rank=True)
        return FAILED


def _complain(prog: str, message: str, debug: bool, *, every_rank: bool = False) -> None:
    rank = os.environ.get("RANK", "0")
    if started_elsewhere() and rank != "0":
        if not every_rank:
            return  # rank 0 speaks for all
        prog = f"{prog}, rank {rank}"  # nobody else knows what happened here
    if debug:
        traceback.print_exc()
    print(f"{prog}: {message}", file=sys.stderr)
