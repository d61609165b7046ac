"""Links in the folder of a run or study: they must not lead out of it.

Such a folder is shared and sent elsewhere: behind a link to another place, files of the user who reads it would be
shown, copied or sent, or written to.
"""

import os
from collections.abc import Container
from pathlib import Path

from gengap_dist.errors import UsageError


def check_links(folder: Path, *, unread: Container[str] = ()) -> None:
    """Check all links at and below a folder.

    Args:
        folder: of a run or study.
        unread: names of folders in it that the caller neither reads nor writes.

    Raises:
        UsageError: if one leads out of it.
    """
    root, folders = folder.resolve(), [folder.resolve()]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if entry.is_symlink() and not Path(os.path.realpath(entry.path)).is_relative_to(root):
                        raise UsageError(
                            f"{entry.path} is a link that leads out of its folder, to {os.path.realpath(entry.path)}: "
                            "put what it leads to in its place"
                        )
                    if entry.is_dir(follow_symlinks=False) and entry.name not in unread:
                        folders.append(Path(entry.path))
        except OSError:  # it has vanished, or cannot be read
            continue
