"""Whether the configuration of a study was committed before its first run, as a sentence."""

from collections.abc import Mapping, Sequence
from typing import Any

from gengap_dist.runs.schema import to_time


def registration_sentence(registration: Mapping[str, Any] | None, started: Sequence[str]) -> str:
    """What study.json says of its configuration; empty if it was not read from files.

    Args:
        registration: see `study/registration.py`.
        started: when each run started, ISO 8601.

    >>> committed = {"sha256": "ab" * 32, "commit": "c" * 40, "committed": "2026-01-02T10:00:00+02:00"}
    >>> registration_sentence(committed, ["2026-01-02T08:00:01+00:00"])
    'The configuration (SHA-256 abababababab) was committed before the first run (date of its commit cccccccccccc).'
    >>> registration_sentence({"sha256": "ab" * 32}, [])
    'The configuration (SHA-256 abababababab) was not committed when the study was started.'
    >>> registration_sentence(committed | {"later": [{"sha256": "ef" * 32}]}, ["2026-01-02T08:00:01+00:00"])[-70:]
    ' It was changed since (SHA-256 efefefefefef), without being committed.'
    """
    if not registration:
        return ""
    later = "".join(f" {_changed(each)}" for each in registration.get("later") or [])
    return _first(registration, started) + later


def _changed(later: Mapping[str, Any]) -> str:
    """That the configuration is another one since."""
    commit = later.get("commit")
    where = f"in commit {commit[:12]} of {later['committed']}" if commit else "without being committed"
    return f"It was changed since (SHA-256 {later['sha256'][:12]}), {where}."


def _first(registration: Mapping[str, Any], started: Sequence[str]) -> str:
    subject = f"The configuration (SHA-256 {registration['sha256'][:12]})"
    overridden = registration.get("overridden") or []
    if overridden:
        subject += f", with {', '.join(overridden[:3])}{' and more' * (len(overridden) > 3)} set on the command line,"
    commit, date = registration.get("commit"), registration.get("committed")
    if not commit or not date:
        return f"{subject} was not committed when the study was started."
    first = min((to_time(each) for each in started), default=None)
    relation = "before" if first is None or to_time(date) < first else "after"
    return f"{subject} was committed {relation} the first run (date of its commit {commit[:12]})."
