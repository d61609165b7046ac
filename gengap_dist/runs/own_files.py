"""Caches on this machine: what other users may have written is not read."""

import os
import stat
from pathlib import Path

from gengap_dist.errors import UsageError
from gengap_dist.runs.run_folder import write_atomically

ROOT = 0  # the user
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def default_path() -> Path:
    """The path of constants.json in the user's cache folder, where all caches of this package are."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "gengap_dist" / "constants.json"


def check_own(path: Path, found: os.stat_result) -> None:
    """Refuse a file or folder that others may have written; root's are trusted.

    Raises:
        UsageError: says why.
    """
    if found.st_uid not in (os.geteuid(), ROOT):
        reason = f"belongs to another user ({found.st_uid})"
    elif found.st_mode & OTHERS_WRITE:
        reason = f"can be written by others (mode {stat.S_IMODE(found.st_mode):o})"
    else:
        return
    raise UsageError(f"{path} {reason}, and is not used: remove it, since they may have changed it")


def read_own(path: Path) -> bytes:
    """The content of a file that nobody else can have written.

    Raises:
        UsageError: if somebody can; see `check_own`.
        OSError: if it cannot be read.
    """
    with path.open("rb") as file:
        check_own(path, os.fstat(file.fileno()))
        return file.read()


def write_own(path: Path, content: str) -> None:
    """Write a complete file that `read_own` reads, whatever this user's umask is.

    Raises:
        OSError: if it cannot be written.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomically(path, content)
    path.chmod(0o600)
