"""Join the ranks that torchrun, deepspeed or anything else that sets their variables has started."""

import os
from pathlib import Path
from typing import Any, final

from gengap_dist.config.sections import LaunchConfig, RunConfig
from gengap_dist.distributed.launchers.base import Launcher, Progress, load_entry_point, started_externally
from gengap_dist.distributed.preemption import catching_signals


def uses_torchrun(config: LaunchConfig) -> bool:
    """Whether this process is one of the ranks that somebody else started."""
    return config.launcher == "torchrun" or (config.launcher == "auto" and started_externally())


def launch_id() -> str | None:
    """What torchrun calls this launch: the same for its restarts, if it was given a name (--rdzv_id, --standalone)."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if name == "none" else name


def restarted() -> bool:
    """Whether torchrun started these ranks anew, after a failure or because nodes came or went."""
    return bool(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))


@final
class TorchrunLauncher(Launcher):
    """This process as the rank it was started as. Collective: every rank calls the same."""

    @staticmethod
    def is_first() -> bool:
        """Whether this is rank 0."""
        return os.environ.get("RANK", "0") == "0"

    def run(self, config: RunConfig, out: Path, *, resume: bool, progress: Progress) -> dict[str, Any]:
        """See `Launcher.run`; exceptions come as they are."""
        run = load_entry_point(self.entry_point)  # imports torch, which --help does not need
        with catching_signals() as leaving:
            return run(config, out, resume=resume, progress=progress, preemption_requested=leaving, launcher="torchrun")

    def close(self, *, kill: bool = False) -> None:
        """Leave the process group."""
        from gengap_dist.distributed.process_group import destroy_process_group

        if not kill:
            destroy_process_group()
