"""Join the ranks that torchrun (or anything else that sets its variables) has started."""

import os
from pathlib import Path
from typing import Any, final

from gengap_dist.config import LaunchConfig, RunConfig
from gengap_dist.launchers.base import Launcher, Progress


def joining(config: LaunchConfig) -> bool:
    """Whether this process is one of the ranks that somebody else started."""
    return config.backend == "torchrun" or (config.backend == "auto" and "TORCHELASTIC_RUN_ID" in os.environ)


@final
class Joined(Launcher):
    """This process as the rank it was started as. Collective: every rank calls the same."""

    @staticmethod
    def is_first() -> bool:
        """Whether this is rank 0."""
        return os.environ.get("RANK", "0") == "0"

    def run(self, config: RunConfig, out: Path, *, resume: bool, progress: Progress) -> dict[str, Any]:
        """See `Launcher.run`; exceptions come as they are."""
        from gengap_dist.run import run  # torch, which --help does not need

        return run(config, out, resume=resume, progress=progress)

    def close(self, *, kill: bool = False) -> None:
        """Leave the process group."""
        from gengap_dist.world import disconnect

        if not kill:
            disconnect()
