"""Options of the commands, and the parser for settings from files and the command line."""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import AliasChoices, Field, PositiveInt
from pydantic_settings import BaseSettings, CliDualFlag, CliSettingsSource, CliToggleFlag, SettingsConfigDict

from gengap_dist.config.loading import field_names, renamed, validate
from gengap_dist.config.sections import FrozenModel, RunConfig, UserPath
from gengap_dist.config.study import StudyConfig
from gengap_dist.errors import UsageError, did_you_mean

OptionsT = TypeVar("OptionsT", bound=FrozenModel)


class CommonOptions(FrozenModel):
    """Options of every command that reads settings."""

    config: list[UserPath] = []
    """YAML file with settings; may be given several times; later files override. Files may use `extends`."""
    print_config: CliToggleFlag[bool] = False
    """Print the resolved settings as YAML, and exit."""
    debug: CliToggleFlag[bool] = False
    """Show Python's traceback on an error."""


class Options(CommonOptions):
    """Options of the commands that train."""

    out: UserPath | None = None
    """Output folder; default: a new folder named after the settings."""
    resume: CliToggleFlag[bool] = False
    """Continue the run or study in --out; without this, a folder with a run is refused."""


class PlanOptions(CommonOptions):
    """Options of `plan`."""

    nodes: PositiveInt = 1
    """Number of machines, all identical."""
    gpus_per_node: PositiveInt = Field(default=1, validation_alias=AliasChoices("gpus_per_node", "gpus-per-node"))
    """Ranks on each machine, one for each GPU (or for each share of the CPU cores)."""
    calibrate: CliToggleFlag[bool] = False
    """Measure this machine's constants first, and save them: about ten seconds for a small network."""
    constants: UserPath | None = None
    """JSON file with the constants of the time model; default: constants.json in the user's cache folder."""
    as_json: CliToggleFlag[bool] = Field(default=False, alias="json")
    """Print the plan as JSON."""


class DoctorOptions(CommonOptions):
    """Options of `doctor`."""

    out: UserPath = Path()
    """Output folder of the run, checked for free space."""
    as_json: CliToggleFlag[bool] = Field(default=False, alias="json")
    """Print the results as JSON."""


class Flags(FrozenModel):
    """Settings of a run that are flags on the command line."""

    profile: CliDualFlag[bool] = Field(default=False, description=RunConfig.model_fields["profile"].description)


class TrainSettings(Flags, RunConfig, Options, BaseSettings):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Settings and options of `train`."""

    model_config = SettingsConfigDict(cli_use_class_docs_for_groups=True)


class StudySettings(Flags, StudyConfig, Options, BaseSettings):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Settings and options of `study`."""

    model_config = SettingsConfigDict(cli_use_class_docs_for_groups=True)


class PlanSettings(Flags, StudyConfig, PlanOptions, BaseSettings):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Settings and options of `plan`."""

    model_config = SettingsConfigDict(cli_use_class_docs_for_groups=True)


class DoctorSettings(Flags, RunConfig, DoctorOptions, BaseSettings):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Settings and options of `doctor`."""

    model_config = SettingsConfigDict(cli_use_class_docs_for_groups=True)


class Parser(argparse.ArgumentParser):
    """ArgumentParser that raises instead of exiting, and suggests the nearest name for an unknown option."""

    settings: Sequence[str] = ()
    """Names of settings that are also options."""

    def error(self, message: str) -> NoReturn:
        """Raise the error as one sentence.

        Raises:
            UsageError: always.
        """
        if message.startswith("unrecognized arguments: "):
            name = message.split()[2].split("=")[0]
            if new := renamed(name.removeprefix("--")):
                raise UsageError(f"{name} is called --{new} now: use that name")
            options = re.findall(r"--[\w.-]+", self.format_usage())
            known = [*options, *(f"--{setting}" for setting in self.settings)]
            message = f"{name} is not a setting{did_you_mean(name, known)}: see --help for all"
        raise UsageError(message)


def parse(
    settings: type[BaseSettings], options: type[OptionsT], argv: Sequence[str], *, prog: str, description: str
) -> tuple[OptionsT, dict[str, Any]]:
    """The command's options, and the settings given on the command line as a nested dict.

    Raises:
        UsageError: for an unknown option, or one without its value.
    """
    width = min(120, max(80, os.get_terminal_size().columns if sys.stdout.isatty() else 100))
    parser = Parser(
        prog=prog,
        description=description,
        usage=f"{prog} [--config FILE]... [--option VALUE]... [--section.setting VALUE]...",
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=36, width=width),
    )
    parser.settings = [*field_names(settings)]
    source = CliSettingsSource[Any](
        settings, root_parser=parser, cli_parse_none_str="null", cli_hide_none_type=True, cli_avoid_json=True
    )
    overrides: dict[str, Any] = dict(source(args=list(argv))())
    names = [info.alias or name for name, info in options.model_fields.items()]
    return validate(options, {name: overrides.pop(name) for name in names if name in overrides}), overrides
