"""Warnings on one line, with their text as the program shows it (Python 3.11).

Python passes control characters of a warning to the terminal, and prints a line of code below it.

Remove when Python shows control characters of warnings as text; there is no such plan.
"""

import warnings
from collections.abc import Callable


def format_warnings(shown: Callable[[str], str]) -> None:
    """Print warnings of this process on one line each; `shown` makes a text harmless."""
    warnings.formatwarning = lambda message, category, filename, lineno, line=None: (
        f"{filename}:{lineno}: {category.__name__}: {shown(str(message))}\n"
    )
