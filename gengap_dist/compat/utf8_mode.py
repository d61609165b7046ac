"""Starts a command again in Python's UTF-8 mode, if the locale says that text and file names are in another encoding.

Settings, results and names of files are UTF-8 wherever a run is started: `LC_ALL=C` in a batch job must not decide
whether `data.root` exists. The mode cannot be switched on later, and holds for all processes that the command starts.

Remove when Python 3.15 is the oldest version: UTF-8 mode is its default (PEP 686).
"""

import os
import sys


def ensure_utf8_mode() -> None:
    """Replace this process by the same command in UTF-8 mode, if it needs that; nothing must have been read yet."""
    if sys.getfilesystemencoding() == "utf-8" or os.environ.get("PYTHONUTF8") == "1":
        return
    os.environ["PYTHONUTF8"] = "1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
