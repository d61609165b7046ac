"""Extensions of plain training: other gradients, other objectives, other weights for evaluation."""

from collections.abc import Callable

from gengap_dist.config.sections import RunConfig
from gengap_dist.data.batch_loader import BatchLoader
from gengap_dist.data.sampler import EpochSampler
from gengap_dist.parallel.strategies import Strategy
from gengap_dist.training.algorithms.base import TrainingAlgorithm
from gengap_dist.training.algorithms.local_sgd import LocalSGD
from gengap_dist.training.algorithms.weight_averaging import WeightAveraging
from gengap_dist.training.tasks import Task

BuildAlgorithm = Callable[[RunConfig, Task, Strategy, BatchLoader, EpochSampler, int], TrainingAlgorithm]
"""Makes the algorithm of a run from its settings, task, strategy (set up), batches, order, and number of steps."""


def build_algorithm(
    config: RunConfig,
    task: Task,
    strategy: Strategy,
    batches: BatchLoader,
    sampler: EpochSampler,
    num_steps: int,
) -> TrainingAlgorithm:
    """The training algorithm that `config.algorithm` selects; `strategy` must be set up."""
    algorithm = config.algorithm
    algorithm_class = (
        WeightAveraging if algorithm.weight_averaging else LocalSGD if algorithm.local_sgd else TrainingAlgorithm
    )
    return algorithm_class(config, task, strategy, batches, sampler, num_steps)
