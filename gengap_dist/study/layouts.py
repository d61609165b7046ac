"""In which layouts (ranks, threads) a run of a study may be executed without changing what it measures."""

import math

from gengap_dist.config.sections import RunConfig
from gengap_dist.distributed.cores import threads_by_user
from gengap_dist.study.schedule import Layout


def keeps_ranks(config: RunConfig) -> bool:
    """Whether the settings alone say that a run needs launch.num_processes ranks.

    Strategies that shard need them for their memory, a profile shows them, and with batch.micro_size=auto a single rank
    may have no smaller batch, which the noise scale needs. What depends on the network is found when it is measured.
    """
    shards = config.launch.strategy not in ("auto", "ddp", "single")
    noise_scale = config.probe.enabled and "noise_scale" in config.probe.diagnostics
    return shards or config.profile or (noise_scale and config.batch.micro_size == "auto")


def possible_layouts(
    config: RunConfig, num_cores: int, *, fixed: bool, threads_beside_gpu: int | None = None
) -> list[Layout]:
    """The layouts of a run, smallest first.

    Args:
        config: the run.
        num_cores: of the machine; or the number of its GPUs.
        fixed: whether it keeps launch.num_processes ranks.
        threads_beside_gpu: of each rank if each has a GPU; None: ranks compute on cores.

    >>> one_thread = RunConfig.model_validate({"launch": {"threads_per_rank": 1}})
    >>> [tuple(layout) for layout in possible_layouts(one_thread, 4, fixed=False)]
    [(1, 1), (2, 1), (4, 1)]
    """
    on_gpu = threads_beside_gpu is not None
    powers = [2**power for power in range(num_cores.bit_length()) if 2**power <= num_cores]
    counts = sorted({*powers, num_cores})
    threads = given_threads(config) or threads_beside_gpu
    if fixed:
        ranks = config.launch.num_processes
        more = [] if threads or on_gpu else [num_cores // ranks]
        return [Layout(ranks, each) for each in dict.fromkeys([threads or 1, *more]) if each]
    layouts: dict[Layout, None] = {}
    for count in counts:
        each = threads or 1
        if count <= config.batch.global_size and (count == 1 or count * (1 if on_gpu else each) <= num_cores):
            layouts[Layout(count, each)] = None
        if not threads and not on_gpu:
            layouts[Layout(1, count)] = None
    return [*layouts]


def given_threads(config: RunConfig) -> int | None:
    """Threads of a rank that the user has set: launch.threads_per_rank, or OMP_NUM_THREADS."""
    return config.launch.threads_per_rank or threads_by_user()


def with_ranks(config: RunConfig, num_ranks: int) -> RunConfig:
    """The settings of a run on `num_ranks` ranks instead of launch.num_processes: the same experiment.

    The noise scale compares the gradient of the global batch with that of a smaller one: of a rank's first micro-batch.
    It stays as small, so that its measurement does not depend on the layout.
    """
    if num_ranks == config.launch.num_processes:
        return config
    launch = config.launch.model_copy(
        update={"num_processes": num_ranks, "strategy": "auto", "max_processes": None, "launcher": "local"}
    )
    update: dict[str, object] = {"launch": launch}
    share = math.ceil(config.batch.global_size / config.launch.num_processes)
    if config.batch.micro_size != "auto" and "noise_scale" in config.probe.diagnostics:
        micro_size = min(config.batch.micro_size, max(share, config.batch.ghost_size or 1))
        update["batch"] = config.batch.model_copy(update={"micro_size": micro_size})
    return config.model_copy(update=update)
