"""What ends a command with a sentence for the user: one sentence with name, value, rule and remedy."""

import difflib


class UsageError(ValueError):
    """Something the user gave is wrong: one sentence with name, value, rule and remedy. Commands exit with 2 on it."""


class OutOfMemory(UsageError):
    """A rank's GPU has too little memory for the run."""

    def __init__(self, message: str, *, told: bool = False) -> None:
        """`told`: whether another rank says so."""
        super().__init__(message)
        self.reported_elsewhere = told


def did_you_mean(given: str, known: list[str] | tuple[str, ...]) -> str:
    """A hint that names the nearest known word, or nothing.

    >>> did_you_mean("batch.globl_size", ["batch.global_size", "optim.lr"])
    ' (did you mean batch.global_size?)'
    """
    near = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
    return f" (did you mean {near[0]}?)" if near else ""
