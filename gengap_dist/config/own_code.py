"""Imports what a user names in a setting as `module.path:NAME`. Only settings that a run is started with come here."""

import importlib
from typing import Any

from gengap_dist.errors import UsageError


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
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"{setting} ({name}) cannot be imported ({error}): "
            f"give module.path:{kind}, with the module on PYTHONPATH or in the current folder"
        ) from None
