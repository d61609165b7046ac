"""The order in which training images are visited: a function of seed and epoch, and of nothing else.

World size and micro-batches never enter, and the only state is the global step.
"""

import numpy as np
import torch
from torch import Tensor

from gengap_dist.config import UsageError


def stream(seed: int, *purpose: int) -> np.random.Generator:
    """A random generator of its own for each purpose (order, probe set, ...) under one seed."""
    return np.random.default_rng([seed, *purpose])


class Order:
    """The images of every step. Each epoch visits every image once; its last step may be smaller."""

    def __init__(self, num_samples: int, global_size: int, seed: int) -> None:
        """Order of `num_samples` images in steps of `global_size`.

        Raises:
            UsageError: if one step would need more images than there are.
        """
        if global_size > num_samples:
            raise UsageError(
                f"batch.global_size ({global_size}) is larger than the training set of {num_samples} images: "
                f"choose at most {num_samples}"
            )
        self.num_samples, self.global_size, self.seed = num_samples, global_size, seed
        self.steps_per_epoch = -(-num_samples // global_size)
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.int64)

    def epoch(self, step: int) -> int:
        """The epoch that step number `step` (from 0) belongs to."""
        return step // self.steps_per_epoch

    def indices(self, step: int) -> Tensor:
        """[n] int64 positions of the images of step `step` (from 0), n = global_size or the rest of the epoch."""
        epoch, at = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            permutation = stream(self.seed, 1, epoch).permutation(self.num_samples)
            self._epoch, self._permutation = epoch, torch.from_numpy(permutation)
        return self._permutation[at * self.global_size : (at + 1) * self.global_size]
