"""Code of a user, which a setting names as `module.path:NAME`.

It is imported only if the user has named it, on the command line or in a file given there. A folder of results may come
from anywhere: what it names is code of whoever wrote it.
"""

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gengap_dist.credentials import without_logins
from gengap_dist.errors import UsageError

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
    try:
        if not all(part.isidentifier() for part in (*module_name.split("."), attribute)):
            raise ImportError("it is no such name")
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise UsageError(
            f"{setting} ({name}) cannot be imported ({error}): "
            f"give module.path:{kind}, with the module on PYTHONPATH or in the current folder"
        ) from None
