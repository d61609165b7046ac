"""Starts Python processes that do not take modules from the current folder (Python 3.11).

`python -m`, `python -c` and the processes of multiprocessing search that folder first: a file random.py there would be
taken for Python's own and executed, also in a folder that the user has never looked into.

Remove when Python starts them with a safe path by itself.
"""

import os
from pathlib import Path

PACKAGE_ROOT = Path(__file__).resolve().parents[2]


def safe_path_variables() -> dict[str, str]:
    """Environment variables of such a process; this package is found by it even if it lies in the current folder."""
    variables = {"PYTHONSAFEPATH": "1"}
    if Path.cwd() == PACKAGE_ROOT:
        paths = [str(PACKAGE_ROOT), os.environ.get("PYTHONPATH")]
        variables["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return variables
