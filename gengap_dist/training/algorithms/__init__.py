"""What is added to plain training: other gradients, another objective, other weights to evaluate."""

from gengap_dist.config.sections import RunConfig
from gengap_dist.data.batch_loader import Batches
from gengap_dist.data.sampler import Order
from gengap_dist.parallel.strategies import Strategy
from gengap_dist.training.algorithms.base import Course
from gengap_dist.training.algorithms.local_sgd import Local
from gengap_dist.training.algorithms.weight_averaging import Averaging


def course_of(config: RunConfig, strategy: Strategy, batches: Batches, order: Order, num_steps: int) -> Course:
    """The course that `config.algorithm` asks for, of a strategy that is set up."""
    algorithm = config.algorithm
    kind = Averaging if algorithm.weight_averaging else Local if algorithm.local_sgd else Course
    return kind(config, strategy, batches, order, num_steps)
