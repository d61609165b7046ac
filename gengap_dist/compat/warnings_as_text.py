"""Warnings on one line, with their text as the program shows it (Python 3.11).

Python passes control characters of a warning to the terminal, and prints a line of code below it. A warning of this
package is about what the user does, and is one sentence; that of any other code is shown with its place.

Remove when Python shows control characters of warnings as text; there is no such plan.
"""

import warnings
from collections.abc import Callable
from pathlib import Path

PACKAGE = Path(__file__).parent.parent


def format_warnings(shown: Callable[[str], str]) -> None:
    """Print warnings of this process on one line each; `shown` makes a text harmless."""

    def line_of(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: object = None
    ) -> str:
        is_ours = category is UserWarning and PACKAGE in Path(filename).parents
        place = "gengap: warning" if is_ours else f"{filename}:{lineno}: {category.__name__}"
        return f"{place}: {shown(str(message))}\n"

    warnings.formatwarning = line_of
