"""Workarounds for Python: they work, and Python still needs them. A test that fails says which file may go."""

import subprocess
import sys
import warnings

from gengap_dist.compat.warnings_as_text import format_warnings
from gengap_dist.errors import visible
from tests.cli.test_places import ASCII_LOCALE
from tests.ray_cluster import ROOT

SAY = "import sys; print(sys.getfilesystemencoding(), sys.argv[1:])"
ENSURE = "from gengap_dist.compat.utf8_mode import ensure_utf8_mode; ensure_utf8_mode(); "


def said(code: str) -> str:
    env = ASCII_LOCALE | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    return subprocess.run([sys.executable, "-c", code, "é"], env=env, capture_output=True, encoding="utf-8").stdout


def test_a_command_starts_again_in_utf_8_mode():
    assert said(ENSURE + SAY) == "utf-8 ['é']\n"


def test_python_still_passes_control_characters_of_warnings_on(monkeypatch):
    text = r"warnings.formatwarning('\x1b[2J', UserWarning, 'a.py', 1)"
    assert "\x1b[2J" in said(f"import warnings; print({text})")
    monkeypatch.setattr(warnings, "formatwarning", None)
    format_warnings(visible)
    assert warnings.formatwarning("\x1b[2J", UserWarning, "a.py", 1) == "a.py:1: UserWarning: \\x1b[2J\n"
    ours = str(ROOT / "gengap_dist" / "training" / "observer.py")
    assert warnings.formatwarning("hessian is left out", UserWarning, ours, 1) == (
        "gengap: warning: hessian is left out\n"
    )
    assert warnings.formatwarning("old", FutureWarning, ours, 1) == f"{ours}:1: FutureWarning: old\n"


def test_python_still_decodes_file_names_by_the_locale():
    assert not said(SAY).startswith("utf-8")
