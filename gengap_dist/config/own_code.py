"""Code of a user, which a setting names as `module.path:NAME`.

It is imported only if the user has named it, on the command line or in a file given there. A folder of results may come
from anywhere: what it names is code of whoever wrote it.
"""

import importlib
import importlib.util
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Mapping
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from gengap_dist.credentials import without_logins
from gengap_dist.errors import UsageError, did_you_mean

ZOOS = ("torchvision", "timm", "transformers")
"""Packages whose networks `model.name` names as PACKAGE:NETWORK."""
SETTINGS = ("model.name", "data.name", "task.name", "optim.name")
SERVERS = {"mlflow.tracking_uri": "MLFLOW_TRACKING_URI", "launch.ray_address": "RAY_ADDRESS"}
"""Settings that name a server, with the variable that may name it, too."""


def own_code(config: Mapping[str, Any]) -> dict[str, str]:
    """The settings that name code of a user, by dotted name.

    Args:
        config: of a run, nested; perhaps that of another program.

    >>> own_code({"model": {"name": "my.nets:make"}, "data": {"name": "digits"}, "task": 7})
    {'model.name': 'my.nets:make'}
    """
    found: dict[str, str] = {}
    for setting in SETTINGS:
        section, _, field = setting.partition(".")
        inside = config.get(section)
        name = inside.get(field) if isinstance(inside, Mapping) else None
        if isinstance(name, str) and ":" in name and not (section == "model" and name.partition(":")[0] in ZOOS):
            found[setting] = name
    return found


def check_trusted(config: Mapping[str, Any], named: Mapping[str, Any], folder: Path) -> None:
    """Check that the user has named all code that the settings of a folder name.

    Args:
        config: the settings, nested.
        named: what the user gave on the command line, by dotted name.
        folder: where the settings are from.

    Raises:
        UsageError: if there is other code.
    """
    for setting, name in own_code(config).items():
        if named.get(setting) != name:
            raise UsageError(
                f"{setting} ({name}) is code that {folder} names, and nothing in a folder is executed without your "
                f"word: if you trust it, add --{setting} {name}"
            )


def check_servers(config: Mapping[str, Any], named: Mapping[str, Any], folder: Path) -> None:
    """Check that the user has named all servers that the settings of a folder name: they get data and logins.

    Args:
        config: the settings, by dotted name.
        named: what the user gave on the command line, by dotted name.
        folder: where the settings are from.

    Raises:
        UsageError: if there is another server.
    """
    for setting, variable in SERVERS.items():
        address = config.get(setting)
        known = (named.get(setting), os.environ.get(variable))
        if address and address != "local" and address not in [without_logins(each) for each in known if each]:
            raise UsageError(
                f"{setting} ({address}) is a server that {folder} names, and nothing is sent where only a folder says "
                f"so: if it is yours, add --{setting} {address}"
            )


def load_own(setting: str, name: str, kind: str) -> Any:
    """The object `name` of a user, a `module.path:NAME`.

    The module may also be in the current folder, which is searched after all other places: a file there is never taken
    for a module of Python or for an installed one.

    Args:
        setting: what gave the name, for the message.
        name: the text.
        kind: what the object is, for the message: `factory` or `Class`.

    Raises:
        UsageError: if it cannot be imported.

    >>> load_own("model.name", "os.path:join", "factory").__name__
    'join'
    """
    module_name, _, attribute = name.partition(":")

    def refused(why: str, remedy: str) -> UsageError:
        return UsageError(f"{setting} ({name}) cannot be imported ({why}): {remedy}")

    if not all(part.isidentifier() for part in (*module_name.split("."), attribute)):
        example = module_name.removesuffix(".py").replace("/", ".").strip(".")
        raise refused("it is no such name", f"give module.path:{kind}, such as {example or 'my_module'}:make")
    top = module_name.partition(".")[0]
    _search_current_folder(top)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            why = f"there is no module {error.name} in {_current_folder() or 'the current folder, which was removed,'}"
            remedy = f"give module.path:{kind}, with the module there, on PYTHONPATH or installed"
            raise refused(f"{why}, nor elsewhere{_hidden(top)}", remedy) from None
        raise refused(described(error), "fix the module") from error
    if not hasattr(module, attribute):
        why = f"{place_of_module(module)} has no {attribute}{did_you_mean(attribute, [*vars(module)])}{_hidden(top)}"
        raise refused(why, f"give module.path:{kind}")
    return getattr(module, attribute)


def call_own(setting: str, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a function of a user returns.

    Raises:
        UsageError: if it fails; names the line.
    """
    try:
        return function(*args, **kwargs)
    except UsageError:
        raise
    except (Exception, SystemExit) as error:  # a user's function may raise anything
        raise UsageError(f"{setting} ({name}) failed ({described(error)}): fix the function") from error


def described(error: BaseException) -> str:
    """An error that code of a user has raised: its line, its type and its message."""
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    kind = "" if isinstance(error, TypeError) else type(error).__name__  # messages of TypeError need no name
    said = ": ".join(part for part in (kind, message) if part)
    return ", ".join(part for part in (_line_of(error), said) if part)


def place_of_module(module: ModuleType) -> str:
    """The file of a module; its name, if it has none."""
    file = getattr(module, "__file__", None)
    return _shown(file) if file else f"module {module.__name__}"


def _line_of(error: BaseException) -> str:
    """The last line of the user's own code that an error has passed, as FILE:NUMBER; "" if there is none."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{_shown(error.filename)}:{error.lineno}"
    lines = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    ours = str(Path(__file__).resolve().parents[1])
    lines = [line for line in lines if not line[0].startswith(("<", ours))]
    installed = tuple({sysconfig.get_paths()[kind] for kind in ("stdlib", "platstdlib", "purelib", "platlib")})
    own = [line for line in lines if not line[0].startswith(installed)] or lines
    return f"{_shown(own[-1][0])}:{own[-1][1]}" if own else ""


def _shown(file: str) -> str:
    folder = _current_folder()
    return os.path.relpath(file, folder) if folder and file.startswith(folder + os.sep) else file


def _current_folder() -> str | None:
    try:
        return os.getcwd()  # noqa: PTH109  a module is searched in folders that are texts
    except FileNotFoundError:
        return None


def _in_current_folder(top: str) -> ModuleSpec | None:
    """The module `top` in the current folder."""
    folder = _current_folder()
    return PathFinder.find_spec(top, [folder]) if folder else None


def _search_current_folder(top: str) -> None:
    """Let the current folder be searched after all other places, if the module `top` is there only.

    It stays: modules there may import each other later, and processes that read data get the same places.
    """
    if top in sys.modules or (here := _in_current_folder(top)) is None:
        return
    found = importlib.util.find_spec(top)
    if found is None or (found.origin is None and here.origin is not None):  # folders without __init__.py come last
        sys.path.append(str(_current_folder()))
        importlib.invalidate_caches()


def _hidden(top: str) -> str:
    """A hint at a file in the current folder that is not read, because another module has its name."""
    here, module = _in_current_folder(top), sys.modules.get(top)
    if here is None or module is None or not here.origin or getattr(module, "__file__", None) == here.origin:
        return ""
    return f"; {_shown(here.origin)} is another module of this name, and is not read: rename it"
