"""Runs on ranks that were started by torchrun, deepspeed or another program that sets the same variables."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, final

from gengap_dist.config.sections import LaunchConfig, RunConfig
from gengap_dist.distributed.cores import thread_variables, threads_per_rank
from gengap_dist.distributed.launchers.base import Launcher, Progress, load_entry_point, started_externally
from gengap_dist.distributed.orphans import end_with
from gengap_dist.distributed.preemption import catching_signals
from gengap_dist.distributed.runtime_context import RuntimeContext, local_size


def uses_torchrun(config: LaunchConfig) -> bool:
    """Whether this process is a rank that torchrun or a similar program has started."""
    return config.launcher == "torchrun" or (config.launcher == "auto" and started_externally())


def launch_id() -> str | None:
    """Torchrun's id of this launch, unchanged after restarts; None if it has no name (--rdzv_id, --standalone)."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if name == "none" else name


def restarted() -> bool:
    """Whether torchrun has restarted these ranks, after a failure or a change of nodes."""
    return bool(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))


@final
class TorchrunLauncher(Launcher):
    """Runs on this process, which is already a rank. Collective: every rank makes the same calls."""

    def __init__(self, entry_point: str) -> None:
        """See `Launcher`."""
        super().__init__(entry_point)
        self.context = RuntimeContext("torchrun")
        if started_externally():
            agent = os.getppid()
            end_with(lambda: os.getppid() == agent)

    @staticmethod
    def is_first() -> bool:
        """Whether this is rank 0."""
        return os.environ.get("RANK", "0") == "0"

    def run(self, config: RunConfig, out: Path, *, resume: bool, progress: Progress) -> dict[str, Any]:
        """See `Launcher.run`; returns this rank's result, and exceptions are passed on unchanged."""
        threads = threads_per_rank(local_size(), config.launch.threads_per_rank)
        os.environ.update(thread_variables(threads.number))
        run = load_entry_point(self.entry_point)  # imports torch, which --help does not need
        context = replace(self.context, threads=threads)
        with catching_signals() as flag:
            return run(config, out, resume=resume, progress=progress, preemption_requested=flag, context=context)

    def close(self, *, kill: bool = False) -> None:
        """Destroy the process group."""
        from gengap_dist.distributed.process_group import destroy_process_group

        if not kill:
            destroy_process_group()
