"""Reports of commands that tests start have a few figures: to draw all takes longer than most of these commands."""

import os
from collections.abc import Callable
from typing import Any

KEPT = ("gap", "curves", "rank_by_samples")


def draw_few(setattr: Callable[[Any, str, Any], None] = setattr) -> None:
    """Reports of this process have the figures KEPT, and it draws them itself; with GENGAP_FULL=1 nothing changes.

    Args:
        setattr: sets an attribute; pytest's also takes it back.
    """
    from gengap_dist.analysis.report import html, process
    from gengap_dist.distributed.cores import Cores

    if "GENGAP_FULL" in os.environ:
        return
    for name in ("STUDY_FIGURES", "RUN_FIGURES"):
        setattr(html, name, {key: entry for key, entry in getattr(html, name).items() if key in KEPT})
    setattr(process, "available_cores", lambda: Cores(1, "machine"))  # so there is no process beside this one
