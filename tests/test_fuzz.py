"""Whatever a command is given, it ends with 0, or with 2 and one sentence: tests/fuzz.py makes it."""

import pytest

from tests.conftest import FULL
from tests.fuzz import complaint, complaints


@pytest.mark.parametrize(
    ("code", "error", "says"),
    [
        (0, "", ""),
        (2, "gengap train: seed (x) is not valid: choose another\n", ""),
        (1, "gengap train: no", "exit code 1"),
        ("hang", "", "exit code hang"),
        (2, "gengap train: SettingsError: no", "names SettingsError"),
        (2, "Traceback (most recent call last):", "names Traceback"),
        (2, "gengap train: no\nno", "says 2 lines"),
        (2, "gengap train: " + "x" * 301, "says a sentence of"),
        (2, "", "says nothing"),
    ],
)
def test_what_is_wrong_is_found(code, error, says):
    assert complaint(code, error).startswith(says)
    assert bool(complaint(code, error)) == bool(says)


def test_command_lines():
    assert not [*complaints(0, lines=2000 if FULL else 200)]


def test_files_of_settings():
    assert not [*complaints(0, files=2000 if FULL else 100)]


@pytest.mark.processes
def test_processes():
    assert not [*complaints(0, processes=40 if FULL else 1)]


@pytest.mark.full  # else: each shape of damage, in test_damaged_folders.py
def test_damaged_folders():
    assert not [*complaints(0, folders=200)]
