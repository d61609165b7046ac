"""Join the ranks that torchrun (or anything else that sets its variables) has started."""

import os
from pathlib import Path
from typing import Any

from gengap_dist.config import LaunchConfig, RunConfig


def chosen(config: LaunchConfig) -> bool:
    """Whether this process is one of several ranks that somebody else started."""
    return config.backend == "torchrun" or (config.backend == "auto" and "TORCHELASTIC_RUN_ID" in os.environ)


def is_driver() -> bool:
    """Whether this process is the one that prepares the folder, shows progress and mirrors to MLflow."""
    return os.environ.get("RANK", "0") == "0"


def run(config: RunConfig, out: Path, *, resume: bool, progress: Any) -> dict[str, Any]:
    """One run on the ranks that are there; see `run.run`."""
    from gengap_dist.run import run as run_rank
    from gengap_dist.world import disconnect

    try:
        return run_rank(config, out, resume=resume, progress=progress)
    finally:
        disconnect()
