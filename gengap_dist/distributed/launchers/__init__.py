"""Launchers: ranks are started on this machine, by torchrun, or by a Ray cluster. All call one entry point."""

from gengap_dist.config.sections import LaunchConfig
from gengap_dist.distributed.launchers.base import Launcher, Progress, RankFailed
from gengap_dist.distributed.launchers.local import InProcessLauncher, LocalLauncher
from gengap_dist.distributed.launchers.ray import RayLauncher, uses_ray
from gengap_dist.distributed.launchers.torchrun import TorchrunLauncher, launch_id, restarted, uses_torchrun

__all__ = [
    "Launcher",
    "Progress",
    "RankFailed",
    "choose",
    "is_driver",
    "launch_id",
    "restarted",
    "uses_ray",
    "uses_torchrun",
]


def choose(config: LaunchConfig, *, many_runs: bool, entry_point: str) -> Launcher:
    """The launcher for a config.

    Args:
        config: launch.launcher and launch.num_processes.
        many_runs: whether a study uses it: then even a single rank gets its own process, so that a crash ends only
            one run.
        entry_point: the function that every rank calls for a run, as `module:function`.
    """
    if uses_torchrun(config):
        return TorchrunLauncher(entry_point)
    if uses_ray(config):
        return RayLauncher(entry_point)
    return (
        InProcessLauncher(entry_point)
        if config.num_processes == 1 and not many_runs
        else LocalLauncher(config.num_processes, entry_point, config.threads_per_rank)
    )


def is_driver(config: LaunchConfig) -> bool:
    """Whether this process prepares folders, shows progress, uploads to MLflow and writes reports."""
    return not uses_torchrun(config) or TorchrunLauncher.is_first()
