"""What the commands share: reading settings from files and the command line, and how they end."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import AliasChoices, Field, PositiveInt
from pydantic_settings import BaseSettings, CliDualFlag, CliSettingsSource, CliToggleFlag, SettingsConfigDict

from gengap_dist.config.loading import field_names, renamed, validate
from gengap_dist.config.sections import RunConfig, Section
from gengap_dist.config.study import StudyConfig
from gengap_dist.errors import UsageError, did_you_mean

OptionsT = TypeVar("OptionsT", bound=Section)


class CommonOptions(Section):
    """What every command that reads settings takes beside them."""

    config: list[Path] = []
    """YAML file with settings; may be given several times, later ones win. Files may build on others with `extends`."""
    print_config: CliToggleFlag[bool] = False
    """Print the settings that would be used, as YAML, and stop."""
    debug: CliToggleFlag[bool] = False
    """Show Python's traceback when something goes wrong."""


class Options(CommonOptions):
    """What a command that trains takes beside the settings."""

    out: Path | None = None
    """Folder for everything this command writes; by default a new one is named after the settings."""
    resume: CliToggleFlag[bool] = False
    """Go on with what is in --out instead of refusing to touch it."""


class PlanOptions(CommonOptions):
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


class DoctorOptions(CommonOptions):
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


class Parser(argparse.ArgumentParser):
    """argparse that raises instead of exiting, and names the nearest option for an unknown one."""

    settings: Sequence[str] = ()
    """Names of settings that are options, too."""

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong as one sentence.

        Raises:
            UsageError: always.
        """
        if message.startswith("unrecognized arguments: "):
            name = message.split()[2].split("=")[0]
            if new := renamed(name.removeprefix("--")):
                raise UsageError(f"{name} is called --{new} now: use that name")
            known = [*self._option_string_actions, *(f"--{setting}" for setting in self.settings)]
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
