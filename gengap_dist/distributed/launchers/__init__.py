"""Where ranks come from: started here, by torchrun, or by a Ray cluster. Each calls an entry point on every rank."""

from gengap_dist.config.sections import LaunchConfig
from gengap_dist.distributed.launchers.base import Launcher, Progress, RankFailed
from gengap_dist.distributed.launchers.local import InProcess, Pool
from gengap_dist.distributed.launchers.ray import RayTrain, asked
from gengap_dist.distributed.launchers.torchrun import Joined, joining, launch_id, restarted

__all__ = ["Launcher", "Progress", "RankFailed", "asked", "choose", "is_driver", "joining", "launch_id", "restarted"]


def choose(config: LaunchConfig, *, many_runs: bool, entry_point: str) -> Launcher:
    """The launcher for a config.

    Args:
        config: launch.launcher and launch.num_processes.
        entry_point: what every rank calls for a run, as `module:function`.
        many_runs: a study follows: even one rank gets a process of its own, so that its crash ends one run only.
    """
    if joining(config):
        return Joined(entry_point)
    if asked(config):
        return RayTrain(entry_point)
    return (
        InProcess(entry_point)
        if config.num_processes == 1 and not many_runs
        else Pool(config.num_processes, entry_point)
    )


def is_driver(config: LaunchConfig) -> bool:
    """Whether this process prepares folders, shows progress, mirrors to MLflow and writes reports."""
    return not joining(config) or Joined.is_first()
