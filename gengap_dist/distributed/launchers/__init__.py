"""Where ranks come from: started here, by torchrun, or by a Ray cluster. Each calls an entry point on every rank."""

from gengap_dist.config.sections import LaunchConfig
from gengap_dist.distributed.launchers.base import Launcher, Progress, RankFailed
from gengap_dist.distributed.launchers.local import InProcessLauncher, LocalLauncher
from gengap_dist.distributed.launchers.ray import RayLauncher, uses_ray
from gengap_dist.distributed.launchers.torchrun import TorchrunLauncher, launch_id, restarted, uses_torchrun

__all__ = [
    "Launcher",
    "Progress",
    "RankFailed",
    "uses_ray",
    "choose",
    "is_driver",
    "uses_torchrun",
    "launch_id",
    "restarted",
]


def choose(config: LaunchConfig, *, many_runs: bool, entry_point: str) -> Launcher:
    """The launcher for a config.

    Args:
        config: launch.launcher and launch.num_processes.
        entry_point: what every rank calls for a run, as `module:function`.
        many_runs: a study follows: even one rank gets a process of its own, so that its crash ends one run only.
    """
    if uses_torchrun(config):
        return TorchrunLauncher(entry_point)
    if uses_ray(config):
        return RayLauncher(entry_point)
    return (
        InProcessLauncher(entry_point)
        if config.num_processes == 1 and not many_runs
        else LocalLauncher(config.num_processes, entry_point)
    )


def is_driver(config: LaunchConfig) -> bool:
    """Whether this process prepares folders, shows progress, mirrors to MLflow and writes reports."""
    return not uses_torchrun(config) or TorchrunLauncher.is_first()
