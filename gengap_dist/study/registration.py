"""Records which committed configuration a study has, so that others can check that it is older than the first run."""

import hashlib
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gengap_dist.config.identity import declared_effect
from gengap_dist.config.loading import flat, resolve, yaml_files
from gengap_dist.config.study import StudyConfig

TIMEOUT = 10.0  # seconds for git


def registration(config: StudyConfig, sources: Sequence[Path]) -> dict[str, Any] | None:
    """What identifies the configuration of a study; None if it was not read from files.

    Args:
        config: the study.
        sources: the files given on the command line.

    Returns:
        `sha256` of all settings that are no runtime settings, as sorted JSON; `files`; `overridden`, the settings whose
        value on the command line is not that of the files; and, if the files and those they extend are unmodified in a
        git repository, `commit`, the last one that changed them, and `committed`, its date (ISO 8601).
    """
    if not sources:
        return None
    settings, of_files = _registered(config), _registered(resolve(StudyConfig, list(sources), {}))
    files = [file for source in sources for file in yaml_files(source)]
    found = {
        "sha256": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
        "files": [file.name for file in files],
        "overridden": sorted(name for name, value in settings.items() if of_files.get(name) != value),
    }
    return found | (_last_commit(files) or {})


def continued(first: dict[str, Any] | None, now: dict[str, Any] | None) -> dict[str, Any] | None:
    """The registration of a study that has runs and is started again: the first stays, `later` lists others.

    A study without a run has nothing that a change could follow from, so it is registered as it is now.

    >>> continued({"sha256": "a", "commit": "1"}, {"sha256": "a", "commit": "2"})  # a comment has changed
    {'sha256': 'a', 'commit': '1'}
    >>> continued({"sha256": "a"}, {"sha256": "b", "commit": "3"})
    {'sha256': 'a', 'later': [{'sha256': 'b', 'commit': '3'}]}
    """
    if not first or not now:
        return first or now
    known = [first, *first.get("later", [])]
    if any(each["sha256"] == now["sha256"] for each in known):
        return first
    return first | {"later": [*first.get("later", []), now]}


def _registered(config: StudyConfig) -> dict[str, Any]:
    return {name: value for name, value in flat(config).items() if declared_effect(name, StudyConfig) != "runtime"}


def _last_commit(files: Sequence[Path]) -> dict[str, str] | None:
    """The last commit that changed one of the files; None if one is not committed as it is, or there is no git."""
    folder, names = files[0].parent, [str(file) for file in files]
    try:
        _git(folder, "ls-files", "--error-unmatch", "--", *names)
        if _git(folder, "status", "--porcelain", "--", *names):
            return None
        commit, _, date = _git(folder, "log", "-1", "--format=%H %cI", "--", *names).partition(" ")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "committed": date} if commit else None


def _git(folder: Path, *args: str) -> str:
    command = ["git", "-C", str(folder), *args]
    return subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace", timeout=TIMEOUT, check=True
    ).stdout.strip()
