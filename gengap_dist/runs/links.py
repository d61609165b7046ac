"""Links in the folder of a run or study must not lead out of it, and what is no folder must be a regular file.

Such a folder is shared and sent elsewhere: behind a link to another place, files of the user who reads it would be
shown, copied or sent, or written to. A named pipe waits for whoever opens its other end, and a device may never end.
"""

import os
from collections.abc import Container
from pathlib import Path

from gengap_dist.errors import UsageError


def check_links(folder: Path, *, unread: Container[str] = ()) -> None:
    """Check all links, pipes and devices at and below a folder.

    Args:
        folder: of a run or study.
        unread: names of folders in it that the caller neither reads nor writes.

    Raises:
        UsageError: if a link leads out of it, or there is a pipe or device.
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
                    if entry.is_dir(follow_symlinks=False):
                        if entry.name not in unread:
                            folders.append(Path(entry.path))
                    elif not (entry.is_symlink() or entry.is_file() or not os.path.lexists(entry.path)):
                        raise UsageError(f"{entry.path} is a named pipe or device, no file: remove it")
        except OSError:  # it has vanished, or cannot be read
            continue
