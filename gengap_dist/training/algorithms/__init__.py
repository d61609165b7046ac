"""Extensions of plain training: other gradients, other objectives, other weights for evaluation."""

from collections.abc import Callable

from gengap_dist.training.algorithms.base import AlgorithmSetup, TrainingAlgorithm
from gengap_dist.training.algorithms.local_sgd import LocalSGD
from gengap_dist.training.algorithms.weight_averaging import WeightAveraging

BuildAlgorithm = Callable[[AlgorithmSetup], TrainingAlgorithm]


def build_algorithm(setup: AlgorithmSetup) -> TrainingAlgorithm:
    """The training algorithm that `config.algorithm` selects."""
    algorithm = setup.config.algorithm
    algorithm_class = (
        WeightAveraging if algorithm.weight_averaging else LocalSGD if algorithm.local_sgd else TrainingAlgorithm
    )
    return algorithm_class(setup)
