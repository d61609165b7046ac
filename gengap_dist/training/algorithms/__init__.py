"""What is added to plain training: other gradients, another objective, other weights to evaluate."""

from gengap_dist.config.sections import RunConfig
from gengap_dist.data.batch_loader import BatchLoader
from gengap_dist.data.sampler import EpochSampler
from gengap_dist.parallel.strategies import Strategy
from gengap_dist.training.algorithms.base import TrainingAlgorithm
from gengap_dist.training.algorithms.local_sgd import LocalSGD
from gengap_dist.training.algorithms.weight_averaging import WeightAveraging


def build_algorithm(
    config: RunConfig, strategy: Strategy, batches: BatchLoader, order: EpochSampler, num_steps: int
) -> TrainingAlgorithm:
    """The course that `config.algorithm` asks for, of a strategy that is set up."""
    algorithm = config.algorithm
    kind = WeightAveraging if algorithm.weight_averaging else LocalSGD if algorithm.local_sgd else TrainingAlgorithm
    return kind(config, strategy, batches, order, num_steps)
