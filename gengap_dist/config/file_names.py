"""Names of folders: which ones arms, studies and runs of a store may have, and how a folder is named in a command."""

import re
from pathlib import Path

from gengap_dist.errors import CONTROL

MAX_BYTES = 200  # of the 255 that file systems allow: some names get an ending
_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9\u00b9\u00b2\u00b3]|lpt[0-9\u00b9\u00b2\u00b3])(\..*)?", re.I | re.S)


def file_name_problem(name: str) -> str:
    r"""Why a name cannot be that of a folder, on any system, as the end of a sentence; empty if it can.

    >>> file_name_problem("lb4096+lr"), file_name_problem("..")
    ('', 'is no name of a folder')
    >>> file_name_problem("a/b"), file_name_problem("nul.txt"), file_name_problem("x" * 201)
    ('contains / or \\', 'is a device on Windows', 'is longer than 200 bytes')
    """
    if not name.strip(". "):
        return "is no name of a folder"
    if re.search(r"[/\\]", name):
        return "contains / or \\"
    if CONTROL.search(name) or re.search(r"[\t\n]", name):
        return "contains control characters"
    if name[-1] in ". " or name[0] == " ":
        return "begins or ends with a space, or ends with a dot"
    if _DEVICE.fullmatch(name):
        return "is a device on Windows"
    return f"is longer than {MAX_BYTES} bytes" if len(name.encode()) > MAX_BYTES else ""


def as_file_name(text: str) -> str:
    """A text as a part of a folder's name: other characters than letters, digits and `._+-` become dots.

    >>> as_file_name("torchvision:resnet18"), as_file_name("../x")
    ('torchvision.resnet18', '...x')
    """
    return re.sub(r"[^A-Za-z0-9._+-]", ".", text)[: MAX_BYTES // 4]


def as_here(path: Path) -> str:
    """An absolute path as a command names it that is given where this one was: relative if it lies here.

    >>> as_here(Path.cwd() / "studies/tiny"), as_here(Path("/studies"))
    ('studies/tiny', '/studies')
    """
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
