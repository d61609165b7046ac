"""Options of the commands, and the parser of all command lines.

Options and settings are fields of models: type, default, and docstring for `--help`. A value is text where the field is
text, and else what it would be in a YAML file.
"""

import argparse
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo

from gengap_dist.config import yaml_core
from gengap_dist.config.loading import nearest_setting, nested, renamed, validate
from gengap_dist.config.measures import Cleanable
from gengap_dist.config.numbers import PositiveInt
from gengap_dist.config.sections import FrozenModel, UserPath
from gengap_dist.errors import UsageError, shortened

OptionsT = TypeVar("OptionsT", bound=FrozenModel)


@dataclass(frozen=True)
class Positional:
    """Marks an option that is given without its name, and says how usage names it."""

    metavar: str


@dataclass(frozen=True)
class Spelling:
    """Another name of an option."""

    name: str


class CommonOptions(FrozenModel):
    """Options of every command that reads settings."""

    config: list[UserPath] = []
    """YAML file with settings; may be given several times; later files override. Files may use `extends`."""
    print_config: bool = False
    """Print the resolved settings as YAML, and exit."""
    debug: bool = False
    """Show Python's traceback on an error."""


class Options(CommonOptions):
    """Options of the commands that train."""

    out: UserPath | None = None
    """Output folder; default: a new folder named after the settings."""
    resume: bool = False
    """Continue the run in --out, which must be given; without this, a folder with a run is refused."""


class StudyOptions(CommonOptions):
    """Options of `study`."""

    out: UserPath | None = None
    """Folder of the study; default: studies/NAME, with study.name. A study that is there is continued."""
    resume: bool = False
    """Not needed: a study that is there is always continued."""
    dry_run: Annotated[bool, Spelling("dry-run")] = False
    """Check every arm against data and network, measure a few steps of each, print what the study can decide and what
    it will take, and train nothing."""


class DemoOptions(StudyOptions):
    """Options of `demo`."""

    out: UserPath | None = Path("demo")
    """Folder of the study; default: demo. A study that is there is continued."""


class PlanOptions(CommonOptions):
    """Options of `plan`."""

    nodes: PositiveInt = 1
    """Number of machines, all identical."""
    gpus_per_node: Annotated[PositiveInt, Spelling("gpus-per-node")] = 1
    """Ranks on each machine, one for each GPU (or for each share of the CPU cores)."""
    calibrate: bool = False
    """Measure this machine's constants first, and save them: about ten seconds for a small network."""
    constants: UserPath | None = None
    """JSON file with the constants of the time model; default: constants.json in the user's cache folder."""
    as_json: bool = Field(default=False, alias="json")
    """Print the plan as JSON."""


class DoctorOptions(CommonOptions):
    """Options of `doctor`."""

    out: UserPath = Path()
    """Output folder of the run, checked for free space."""
    as_json: bool = Field(default=False, alias="json")
    """Print the results as JSON."""


class ProbeOptions(FrozenModel):
    """Options of `probe`."""

    model: str
    """lenet5, vgg16, resnet20 (44, 56, 110), f1, c1, mlp, gpt, torchvision:NAME, timm:NAME, transformers:NAME,
    module.path:factory, or the folder of a run: RUN_DIR (its last weights), RUN_DIR@best, RUN_DIR@STEP, RUN_DIR@0
    (untrained)."""
    weights: UserPath | None = None
    """State dict for the model (torch.save); a run has its own."""
    out: UserPath | None = None
    """Folder for spectra (npz), figures and a report; must be new or empty."""
    mlflow: bool = False
    """Send what is in --out to MLflow as a run."""
    tracking_uri: str | None = Field(default=None, alias="mlflow.tracking_uri")
    """MLflow store; default: MLFLOW_TRACKING_URI, or sqlite:///mlflow.db."""
    debug: bool = False
    """Show Python's traceback on an error."""


class CompareOptions(FrozenModel):
    """Options of `compare`."""

    runs: Annotated[tuple[str, ...], Positional("RUN")]
    """Folder of a run or study, runs:/ID or experiments:/NAME of MLflow."""
    baseline: str | None = None
    """Arm with which the others are compared; default: the arm with the smallest batch."""
    out: UserPath | None = None
    """Folder for report and figures; default: comparisons/<time>."""
    question: str = ""
    """Question of the comparison; printed at the head of the report."""
    tracking_uri: str | None = Field(default=None, alias="mlflow.tracking_uri")
    """MLflow store of runs:/ and experiments:/; default: MLFLOW_TRACKING_URI."""
    accuracy: str = "test/accuracy"
    """MLflow: metric with the test accuracy; default: test/accuracy."""
    percent: bool = False
    """MLflow: the accuracy is in percent."""
    size: str = "batch.global_size"
    """MLflow: parameter with the global batch size; default: batch.global_size."""
    seed: str = "seed"
    """MLflow: parameter with the seed; default: seed."""
    updates: str = "num_steps"
    """MLflow: metric or parameter with the number of optimizer steps; default: num_steps."""
    across: bool = False
    """Also compare runs of different data or networks, which are no pairs; the report says so."""
    debug: bool = False
    """Show Python's traceback on an error."""


class ReportOptions(FrozenModel):
    """Options of `report`."""

    folder: Annotated[UserPath, Positional("DIR")]
    """Folder of a run or of a study."""
    pdf: bool = False
    """Also write the figures as PDF."""
    tracking_uri: str | None = Field(default=None, alias="mlflow.tracking_uri")
    """sync: MLflow store; default: the store to which the folder was uploaded."""
    metrics: Literal["essential", "all"] | None = Field(default=None, alias="mlflow.metrics")
    """sync: what to send of runs that are not there yet, or, with `all`, of all; default: as when they ran."""
    debug: bool = False
    """Show Python's traceback on an error."""


class SlimOptions(ReportOptions):
    """Options of `report slim`."""

    out: Annotated[UserPath, Positional("OUT")]
    """Folder of the copy: new, or an earlier copy."""


class CleanOptions(FrozenModel):
    """Options of `clean`."""

    folders: Annotated[tuple[UserPath, ...], Positional("FOLDER")]
    """Folder of a study or of a run."""
    what: tuple[Cleanable, ...] = ("checkpoints", "spectra")
    """What may go: `checkpoints` but the last of each run, `all_checkpoints` with the last and so the trained network,
    `spectra` of other layers than the last hidden one; default: checkpoints,spectra."""
    yes: bool = False
    """Remove what is listed; without it, nothing is removed."""
    debug: bool = False
    """Show Python's traceback on an error."""


class Parser(argparse.ArgumentParser):
    """ArgumentParser that raises instead of exiting."""

    def error(self, message: str) -> NoReturn:
        """Raise the error as one sentence.

        Raises:
            UsageError: always.
        """
        name = re.sub(r"^argument (\S+?)(/\S+)?: .*", r"\1", message)
        if "expected one argument" in message:
            raise UsageError(f"{name} has no value: write {name} VALUE, or {name}=VALUE for one that begins with -")
        if "ignored explicit argument" in message:
            raise UsageError(f"{name} takes no value: write it alone")
        if missing := message.partition("arguments are required: ")[2]:
            raise UsageError(f"{missing} must be given: see --help")
        raise UsageError(f"{message}: see --help")


def parse(
    options: type[OptionsT],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    settings: type[BaseModel] | None = None,
    only: tuple[str, ...] = ("",),
    usage: str = "",
) -> tuple[OptionsT, dict[str, Any]]:
    """The command's options, and the settings given on the command line as a nested dict.

    Args:
        options: model of the options.
        argv: the words.
        prog: name of the command.
        description: for `--help`.
        settings: model of the settings, which are options by their dotted names.
        only: beginnings of the names of those settings that the command has.
        usage: what stands between the name of the command and its settings.

    Raises:
        UsageError: for an unknown option, one without its value, or a value that cannot be.
    """
    width = min(120, max(80, os.get_terminal_size().columns if sys.stdout.isatty() else 100))
    parser = Parser(
        prog=prog,
        description=description,
        usage=" ".join([prog, usage or "[--option VALUE]...", *["[--section.setting VALUE]..."] * bool(settings)]),
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=36, width=width),
        argument_default=argparse.SUPPRESS,
    )
    own = {info.alias or name: info for name, info in options.model_fields.items()}
    for name, info in own.items():
        _add_option(parser, name, info)
    known: dict[str, FieldInfo] = {}
    groups: dict[str, Any] = {"": parser}
    for name, info, section in _settings(settings) if settings else ():
        if name.startswith(only):
            title = name.rpartition(".")[0]
            if title not in groups:
                groups[title] = parser.add_argument_group(f"{title} options", " ".join(str(section.__doc__).split()))
            _add_setting(groups[title], name, info)
            known[name] = info
    given, extra = parser.parse_known_args(argv)
    if lost := [word for word in argv if word.endswith("=--")]:  # argparse makes no value of it at all
        raise UsageError(f"{shortened(lost[0], 100)} gives no value: write another")
    if extra:
        raise UsageError(_about_unknown(extra[0], argv, own, known))
    chosen = {name: _own_value(name, own[name], word) for name, word in vars(given).items() if name in own}
    overrides = {name: _last_value(name, known[name], words) for name, words in vars(given).items() if name in known}
    return validate(options, chosen), nested(overrides)


def _settings(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo, type[BaseModel]]]:
    """Dotted names and fields of all settings, and the section of each; also of sections that may be null."""
    for name, info in model.model_fields.items():
        for kind in _kinds(info.annotation):
            if _is_section(kind):
                yield from _settings(kind, f"{prefix}{name}.")
                break
        else:
            yield prefix + name, info, model


def _kinds(annotation: Any) -> list[Any]:
    """The types of which a value may be.

    >>> _kinds(Annotated[int, "positive"] | None)
    [<class 'int'>, <class 'NoneType'>]
    """
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [kind for each in get_args(annotation) for kind in _kinds(each)]
    return [annotation]


def _add_option(parser: Parser, name: str, info: FieldInfo) -> None:
    text = str(info.description).replace("%", "%%")
    kinds = _kinds(info.annotation)
    marks = [each for each in info.metadata if isinstance(each, Positional)]
    if marks:
        parser.add_argument(name, nargs="+" if _is_list(kinds[0]) else None, metavar=marks[0].metavar, help=text)
        return
    flags = [f"--{name}", *(f"--{each.name}" for each in info.metadata if isinstance(each, Spelling))]
    if kinds == [bool]:
        parser.add_argument(*flags, dest=name, action="store_true", help=text)
    else:
        action = "append" if _is_list(kinds[0]) else "store"
        required, shown = info.is_required(), _type_name(info.annotation)
        parser.add_argument(*flags, dest=name, action=action, metavar=shown, required=required, help=text)


def _add_setting(group: Any, name: str, info: FieldInfo) -> None:
    alone = {"nargs": "?", "const": "true"} if _kinds(info.annotation) == [bool] else {}
    default = "" if info.is_required() else f" (default: {_shown(info.get_default(call_default_factory=True))})"
    text = f"{info.description}{default}".replace("%", "%%")
    group.add_argument(f"--{name}", action="append", metavar=_type_name(info.annotation), help=text, **alone)


def _type_name(annotation: Any) -> str:
    """A type as `--help` names it.

    >>> _type_name(int | Literal["auto"]), _type_name(tuple[float, ...] | None), _type_name(dict[str, float])
    ('int|auto', '[float,...]', '{name: float}')
    """

    def one(kind: Any) -> str:
        if get_origin(kind) is Literal:
            return "|".join(map(str, get_args(kind)))
        if _is_list(kind):
            return f"[{_type_name(get_args(kind)[0])},...]"
        if get_origin(kind) is dict:
            return f"{{name: {_type_name(get_args(kind)[1])}}}"
        return "value" if kind is Any or _is_section(kind) else kind.__name__.lower()

    return "|".join(one(kind) for kind in _kinds(annotation) if kind is not type(None))


def _shown(default: Any) -> str:
    if isinstance(default, tuple | list):
        return f"[{', '.join(map(_shown, default))}]"
    return {"None": "null", "True": "true", "False": "false"}.get(str(default), str(default))


def _is_list(kind: Any) -> bool:
    return get_origin(kind) in (list, tuple)


def _own_value(name: str, info: FieldInfo, given: Any) -> Any:
    """The value of an option of the command itself, which argparse has read: a word, some words, or True."""
    if isinstance(given, list):
        element = get_args(_kinds(info.annotation)[0])[0]
        words = [each.strip() for word in given for each in word.split(",")] if _is_choice(element) else given
        return [_value(f"--{name}", element, word) for word in words]
    shown = next((each.metavar for each in info.metadata if isinstance(each, Positional)), f"--{name}")
    return given if given is True else _value(shown, info.annotation, given)


def _last_value(name: str, info: FieldInfo, words: list[str]) -> Any:
    if len(words) > 1 and any(map(_is_list, _kinds(info.annotation))):
        raise UsageError(f"--{name} is given twice: write one list, [{', '.join(words)}]")
    return _value(f"--{name}", info.annotation, words[-1])


def _value(name: str, annotation: Any, word: str) -> Any:
    """A word as a value of a field: text as it is, `a,b` as a list, and all else as in a YAML file."""
    kinds = _kinds(annotation)
    if word == "null" and type(None) in kinds:
        return None
    if Path in kinds:
        if not word:
            raise UsageError(f"{name} () is empty: give a file or folder")
        return word  # which user_path checks
    try:
        yaml_core.check_text(word)
        if all(kind in (str, type(None)) or _is_choice(kind) for kind in kinds):
            return word
        if not word.strip():
            raise yaml_core.YamlError("is empty: give a value")
        lists = [kind for kind in kinds if _is_list(kind)]
        if lists and word[0] != "[":
            return [_value(name, get_args(lists[0])[0], each.strip()) for each in word.split(",")]
        if lists or any(kind is Any or get_origin(kind) is dict or _is_section(kind) for kind in kinds):
            return yaml_core.read(word)
        return yaml_core.scalar(word)
    except yaml_core.YamlError as error:
        raise UsageError(f"{name} ({shortened(word, 60)}) {error}") from None


def _is_choice(kind: Any) -> bool:
    return get_origin(kind) is Literal


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _about_unknown(word: str, argv: Sequence[str], own: dict[str, FieldInfo], known: dict[str, FieldInfo]) -> str:
    """The sentence about a word that is neither an option nor the value of one."""
    if word.startswith("-"):
        flag = word.partition("=")[0]
        name, shown = flag.removeprefix("--"), shortened(flag, 100)
        if (new := renamed(name)) and (new in known or new in own):
            return f"{shown} is called --{new} now: use that name"
        if inside := [setting for setting in known if setting.startswith(f"{name}.")]:
            return f"{shown} is a section: give one of its settings, such as --{inside[0]}"
        near = nearest_setting(flag, [f"--{name}" for name in (*own, *known)])
        return f"{shown} is not a setting{near}: see --help for all"
    for place, flag in enumerate(argv):
        name = flag.removeprefix("--")
        values = [*takewhile(lambda word: not word.startswith("--"), argv[place + 1 :])]
        if name in known and len(values) > 1:
            wanted = f"[{', '.join(values)}]" if any(map(_is_list, _kinds(known[name].annotation))) else "one of them"
            return f"{flag} takes one value, not {len(values)}: write {wanted}"
    shown = shortened(word, 100)
    if "config" in own and word.endswith((".yaml", ".yml")):
        return f"{shown} is not a setting: write --config {shown} for a file with settings"
    return f"{shown or 'an empty word'} is not a setting: see --help for all"
