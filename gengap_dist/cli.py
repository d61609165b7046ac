"""What the commands share: reading settings from files and the command line, and how they end."""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Never, NoReturn, TypeVar

from pydantic import AliasChoices, Field, PositiveInt
from pydantic_settings import BaseSettings, CliDualFlag, CliSettingsSource, CliToggleFlag, SettingsConfigDict

from gengap_dist.config.loading import field_names, validate
from gengap_dist.config.sections import RunConfig, Section
from gengap_dist.config.study import StudyConfig
from gengap_dist.distributed.launchers.base import leave, started_elsewhere
from gengap_dist.distributed.preemption import Preempted
from gengap_dist.errors import OutOfMemory, UsageError, did_you_mean

OptionsT = TypeVar("OptionsT", bound=Section)

FIRST_RANK_SECONDS = 15.0  # for the first rank of a machine to say what is wrong there, before the others say it

OK, FAILED, USAGE, PREEMPTED, INTERRUPTED = 0, 1, 2, 75, 130  # 75: EX_TEMPFAIL, "start me again"


class Settled(Section):
    """What every command that reads settings takes beside them."""

    config: list[Path] = []
    """YAML file with settings; may be given several times, later ones win. Files may build on others with `extends`."""
    print_config: CliToggleFlag[bool] = False
    """Print the settings that would be used, as YAML, and stop."""
    debug: CliToggleFlag[bool] = False
    """Show Python's traceback when something goes wrong."""


class Options(Settled):
    """What a command that trains takes beside the settings."""

    out: Path | None = None
    """Folder for everything this command writes; by default a new one is named after the settings."""
    resume: CliToggleFlag[bool] = False
    """Go on with what is in --out instead of refusing to touch it."""


class PlanOptions(Settled):
    """What `plan` takes beside the settings of the run."""

    nodes: PositiveInt = 1
    """Machines, all alike."""
    gpus_per_node: PositiveInt = Field(default=1, validation_alias=AliasChoices("gpus_per_node", "gpus-per-node"))
    """Ranks on each machine, one for each GPU (or share of its cores)."""
    calibrate: CliToggleFlag[bool] = False
    """Measure this machine's constants first, and keep them: about ten seconds for a small network."""
    constants: Path | None = None
    """JSON file with the constants of the time model; by default constants.json in the user's cache folder."""
    as_json: CliToggleFlag[bool] = Field(default=False, alias="json")
    """Print the plan as JSON."""


class DoctorOptions(Settled):
    """What `doctor` takes beside the settings."""

    out: Path = Path()
    """Folder that the run would write: is there room?"""
    as_json: CliToggleFlag[bool] = Field(default=False, alias="json")
    """Print what was found as JSON."""


class Flags(Section):
    """Settings of a run that are flags on a command line."""

    profile: CliDualFlag[bool] = Field(default=False, description=RunConfig.model_fields["profile"].description)


class TrainSettings(Flags, RunConfig, Options, BaseSettings):  # pyright: ignore[reportIncompatibleVariableOverride]
    """What `train` takes."""

    model_config = SettingsConfigDict(cli_use_class_docs_for_groups=True)


class StudySettings(Flags, StudyConfig, Options, BaseSettings):  # pyright: ignore[reportIncompatibleVariableOverride]
    """What `study` takes."""

    model_config = SettingsConfigDict(cli_use_class_docs_for_groups=True)


class PlanSettings(Flags, RunConfig, PlanOptions, BaseSettings):  # pyright: ignore[reportIncompatibleVariableOverride]
    """What `plan` takes."""

    model_config = SettingsConfigDict(cli_use_class_docs_for_groups=True)


class DoctorSettings(Flags, RunConfig, DoctorOptions, BaseSettings):  # pyright: ignore[reportIncompatibleVariableOverride]
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
    settings: type[BaseSettings], options: type[OptionsT], argv: Sequence[str], *, prog: str, description: str
) -> tuple[OptionsT, dict[str, Any]]:
    """The command's options, and the settings given on the command line as a nested dict.

    Raises:
        UsageError: for an unknown option, or one without its value.
    """
    width = min(120, max(80, os.get_terminal_size().columns if sys.stdout.isatty() else 100))
    parser = _Parser(
        prog=prog,
        description=description,
        usage=f"{prog} [--config FILE]... [--option VALUE]... [--section.setting VALUE]...",
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=36, width=width),
    )
    parser.known = [*field_names(settings)]
    source = CliSettingsSource[Any](
        settings, root_parser=parser, cli_parse_none_str="null", cli_hide_none_type=True, cli_avoid_json=True
    )
    overrides: dict[str, Any] = dict(source(args=list(argv))())
    names = [info.alias or name for name, info in options.model_fields.items()]
    return validate(options, {name: overrides.pop(name) for name in names if name in overrides}), overrides


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
    except OutOfMemory as error:
        if not error.told:
            _complain(prog, str(error), debug, every_rank=True)
        return USAGE
    except UsageError as error:
        _complain(prog, str(error), debug, patience=FIRST_RANK_SECONDS)
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


def _complain(prog: str, message: str, debug: bool, *, every_rank: bool = False, patience: float = 0.0) -> None:
    """Say on stderr what ended the command, once on each machine unless every rank has something of its own to say.

    torchrun ends all ranks when one has ended, also one that was about to speak for them. So the others wait for it,
    for `patience` seconds if it may be; a rank that is still there then is the only one that found something wrong.
    """
    rank = os.environ.get("RANK", "0")
    if started_elsewhere() and rank != "0":
        if not every_rank and os.environ.get("LOCAL_RANK", "0") != "0":
            if not patience:
                return  # one rank of each machine speaks for all there: what one lacks, another may have
            time.sleep(patience)
        prog = f"{prog}, rank {rank}"  # nobody else knows what happened here
    if debug:
        traceback.print_exc()
    print(f"{prog}: {message}", file=sys.stderr)
