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
    >>> seeds = {"sha256": "ef" * 32, "commit": "c" * 40, "committed": "...", "overridden": ["study.seeds"]}
    >>> registration_sentence(committed | {"later": [seeds]}, ["2026-01-02T08:00:01+00:00"])[-86:]
    ' It was started again with study.seeds set on the command line (SHA-256 efefefefefef).'
    >>> first, again = committed | {"overridden": ["study.seeds"]}, committed | {"sha256": "ef" * 32}
    >>> registration_sentence(first | {"later": [again]}, ["2026-01-02T08:00:01+00:00"])[-82:]
    ' It was started again without settings on the command line (SHA-256 efefefefefef).'
    >>> nowhere = {"sha256": "ab" * 32, "later": [{"sha256": "ef" * 32, "overridden": ["study.seeds"]}]}
    >>> registration_sentence(nowhere, [])[-57:]
    'command line (SHA-256 efefefefefef); it is not committed.'
    """
    if not registration:
        return ""
    later = "".join(f" {_changed(registration, each)}" for each in registration.get("later") or [])
    return _first(registration, started) + later


def _changed(first: Mapping[str, Any], later: Mapping[str, Any]) -> str:
    """That the study was started again with other settings: those of a command line, or of files that have changed."""
    digest, commit, before = f"SHA-256 {later['sha256'][:12]}", later.get("commit"), first.get("commit")
    where = f"in commit {commit[:12]} of {later['committed']}" if commit else "without being committed"
    words = _on_command_line(later)
    if not words and not (commit and commit == before):
        return f"It was changed since ({digest}), {where}."
    words = words or " without settings on the command line"
    if commit == before:
        return f"It was started again{words} ({digest}){'' if commit else '; it is not committed'}."
    return f"It was started again{words} ({digest}), and its files were changed, {where}."


def _on_command_line(registration: Mapping[str, Any]) -> str:
    names = registration.get("overridden") or []
    return f" with {', '.join(names[:3])}{' and more' * (len(names) > 3)} set on the command line" if names else ""


def _first(registration: Mapping[str, Any], started: Sequence[str]) -> str:
    subject = f"The configuration (SHA-256 {registration['sha256'][:12]})"
    if words := _on_command_line(registration):
        subject += f",{words},"
    commit, date = registration.get("commit"), registration.get("committed")
    if not commit or not date:
        return f"{subject} was not committed when the study was started."
    first = min((to_time(each) for each in started), default=None)
    relation = "before" if first is None or to_time(date) < first else "after"
    return f"{subject} was committed {relation} the first run (date of its commit {commit[:12]})."
