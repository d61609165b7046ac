"""Runs whose last part is trained by several networks, each on its own: post-local SGD and SWAP.

There are K = algorithm.workers of them, dealt out to the ranks in turn, so the algorithm does not depend on the number
of ranks; a rank holds at most ceil(K / ranks), with their optimizers. Between two averages no gradient or weight
crosses.
"""

import io
from collections.abc import Mapping
from contextlib import AbstractContextManager
from copy import deepcopy
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from gengap_dist.config.sections import RunConfig
from gengap_dist.data.batch_loader import BatchLoader
from gengap_dist.data.sampler import EpochSampler
from gengap_dist.distributed.batch_plan import Span
from gengap_dist.distributed.process_group import World
from gengap_dist.models.batch_norm import average_buffers, has_batch_norm
from gengap_dist.parallel.strategies import OptimizerState, Single, Strategy
from gengap_dist.training.algorithms.base import StepResult, TrainingAlgorithm, batch_plan_for, first_step_after
from gengap_dist.training.algorithms.update_bn import recompute_running_stats
from gengap_dist.training.lr_schedule import scaled_lr
from gengap_dist.training.optimizer import build_optimizer
from gengap_dist.training.step import NUM_SUMS, StepBatch, train_step


@final
class LocalSGD(TrainingAlgorithm):
    """Plain up to `first_step`; from there the network of the run is the average of K, each a copy of it at first.

    post_local_sgd (Lin et al. 2020): a worker has its share of every global batch, and the run's rate; after every
    algorithm.local_steps all have the average's parameters and running statistics, and keep their own momentum.

    swap (Gupta et al. 2020): a worker visits all images in an order of its own, B / K in a step, at the run's rate
    times scaled_lr(B / K) / scaled_lr(B). The average gets running statistics of its own.

    The strategy's network, which no longer trains, is where the average is put.
    """

    def __init__(
        self, config: RunConfig, strategy: Strategy, batches: BatchLoader, order: EpochSampler, num_steps: int
    ) -> None:
        """See `TrainingAlgorithm`."""
        self.first_step = first_step_after("algorithm.local_start", config.algorithm.local_start, num_steps)
        super().__init__(config, strategy, batches, order, self.first_step)
        self.num_workers, self.world = config.algorithm.workers, strategy.world
        self.begun = False
        self.workers: dict[int, Strategy] = {}  # those of this rank
        self._is_average = False  # what the strategy's network holds is the average of the workers as they are
        self._shares: dict[int, list[Span]] = {}  # of the workers, by the size of the step
        self.rate = 1.0
        if config.algorithm.local_sgd == "swap":
            own = config.batch.global_size // self.num_workers
            self.rate = scaled_lr(config.optim, own) / scaled_lr(config.optim, config.batch.global_size)
            self.orders = [EpochSampler(order.num_samples, own, config.seed, worker=w) for w in range(self.num_workers)]

    def step(self, step: int, lr: float, momentum: float) -> StepResult:
        """See `TrainingAlgorithm.step`. In the local part collective only where workers are averaged.

        The norm is the root of the mean square of those of the workers that have samples.
        """
        if step < self.first_step:
            return super().step(step, lr, momentum)
        if not self.begun:
            average_buffers(self.strategy.model, self.world)
            self._begin(self.strategy.optimizer_state())
        with self.world.timer.phase("data"):
            sizes, parts = self._parts(step)
        if step == self.first_step and not self.config.optim.momentum_correction:
            momentum /= self.rate  # the form v = m v + lr g, in which momentum keeps the rate before
        lr *= self.rate
        num_active = sum(size > 0 for size in sizes)
        sums = torch.zeros(NUM_SUMS, dtype=torch.float64, device=self.world.device)
        for worker, strategy in self.workers.items():
            indices, epoch = parts[worker]
            if not len(indices):  # at a ragged end of an epoch: this worker makes no step at all
                continue
            self._seed(step, worker)
            strategy.set_rates(lr, momentum)
            spans = batch_plan_for(self.config, len(indices), 1).micro_batches(0)
            work = StepBatch(indices, epoch, spans, (self.config.seed, step, worker))
            found, norm = train_step(strategy, self.batches, work, self.objective, self.make)
            sums[:2] += found[:2]
            sums[-2] += found[-2] / num_active
            sums[-1] += norm.double().square() / num_active
        self._is_average = False
        algorithm = self.config.algorithm
        if algorithm.local_sgd == "post_local_sgd" and (step - self.first_step + 1) % algorithm.local_steps == 0:
            self._average()
            for strategy in self.workers.values():
                _put(_flat(self.strategy.model), strategy.model)
        return StepResult(sum(sizes), lr, sums, None)

    def _parts(self, step: int) -> tuple[list[int], dict[int, tuple[Tensor, int]]]:
        """Number of each worker's images in a step; and of this rank's workers the images, and the epoch they show."""
        if self.config.algorithm.local_sgd == "swap":
            at, begun = step - self.first_step, self.order.epoch(self.first_step)
            # epochs that augment as neither another worker's do nor those of the run before
            epoch = begun + 1 + self.orders[0].epoch(at) * self.num_workers
            sizes = [len(self.orders[0].indices(at))] * self.num_workers
            return sizes, {worker: (self.orders[worker].indices(at), epoch + worker) for worker in self.workers}
        indices, epoch = self.order.indices(step), self.order.epoch(step)
        if len(indices) not in self._shares:
            plan = batch_plan_for(self.config, len(indices), self.num_workers)
            cuts = map(plan.micro_batches, range(self.num_workers))
            self._shares[len(indices)] = [Span(spans[0].start, spans[-1].stop) for spans in cuts]
        shares = self._shares[len(indices)]
        return [span.size for span in shares], {w: (indices[slice(*shares[w])], epoch) for w in self.workers}

    def _begin(self, optimizer_state: OptimizerState) -> None:
        """Make this rank's workers, all like the strategy's network."""
        self.begun = True
        alone = World(0, 1, self.world.device, self.world.timer)
        for worker in range(self.world.rank, self.num_workers, self.world.size):
            strategy = self.workers[worker] = Single(self.config, alone)
            strategy.setup(deepcopy(self.strategy.model).train(), partial(build_optimizer, self.config.optim))
            strategy.load_optimizer_state(optimizer_state)
            strategy.scaler.load_state_dict(self.strategy.scaler.state_dict())
        self.strategy.optimizer.state.clear()  # the workers' count from here on

    def _average(self) -> None:
        """Put the workers' mean into the strategy's network. Collective."""
        total = torch.zeros_like(_flat(self.strategy.model))
        for strategy in self.workers.values():
            total += _flat(strategy.model)
        _put(self.world.all_reduce(total, "average of the workers") / self.num_workers, self.strategy.model)
        self._is_average = True

    def unsharded_model(self) -> AbstractContextManager[nn.Module]:
        """See `TrainingAlgorithm.whole`."""
        model = self.strategy.model
        if self.begun and not self._is_average:
            self._average()
            if self.config.algorithm.local_sgd == "swap" and has_batch_norm(model):
                recompute_running_stats(model, self.batches, self.world, self.config.batch.ghost_size)
        return self.strategy.unsharded_model()

    def state(self) -> dict[str, Any]:
        """See `TrainingAlgorithm.state`. Rank 0 has all workers' on its CPU."""
        if not self.begun:
            return {}
        mine = {worker: _packed(strategy) for worker, strategy in self.workers.items()}
        sizes = torch.zeros(self.num_workers, dtype=torch.int64)
        for worker, packed in mine.items():
            sizes[worker] = len(packed)
        states = []
        for worker, size in enumerate(self.world.all_reduce(sizes, "sizes of the workers").tolist()):
            packed = mine.pop(worker, None)
            told = torch.zeros(size, dtype=torch.uint8) if packed is None else packed
            self.world.all_reduce(told, "state of a worker")
            if self.world.rank == 0:
                states.append(torch.load(io.BytesIO(told.numpy().tobytes()), map_location="cpu", weights_only=True))
        return {"workers": states}

    def load(self, state: Mapping[str, Any]) -> None:
        """See `TrainingAlgorithm.load`."""
        self._begin({})
        for worker, strategy in self.workers.items():
            strategy.model.load_state_dict(state["workers"][worker]["model"])
            strategy.load_optimizer_state(state["workers"][worker]["optimizer"])
            strategy.scaler.load_state_dict(state["workers"][worker]["scaler"])


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *(buffer for buffer in model.buffers() if buffer.is_floating_point())]


@torch.no_grad()
def _flat(model: nn.Module) -> Tensor:
    """Parameters and running statistics, one after the other."""
    return torch.cat([tensor.flatten() for tensor in _tensors(model)])


@torch.no_grad()
def _put(flat: Tensor, model: nn.Module) -> None:
    tensors = _tensors(model)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def _packed(strategy: Strategy) -> Tensor:
    """Network and optimizer as bytes [n], on the CPU: so they go from rank to rank bit for bit, whatever is in them."""
    file = io.BytesIO()
    scaler = strategy.scaler.state_dict()
    torch.save({"model": strategy.model.state_dict(), "optimizer": strategy.optimizer_state(), "scaler": scaler}, file)
    return torch.frombuffer(file.getbuffer(), dtype=torch.uint8).clone()
