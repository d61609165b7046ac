"""Post-local SGD and SWAP: in the last part of a run, several workers train independent copies of the network.

The K = algorithm.workers workers are distributed round-robin over ranks, so the algorithm does not depend on the number
of ranks. A rank holds at most ceil(K / ranks) workers, with their optimizers. Between two averages, ranks exchange no
gradients or weights.
"""

import io
from collections.abc import Mapping
from contextlib import AbstractContextManager
from copy import deepcopy
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from gengap_dist.data.sampler import EpochSampler
from gengap_dist.distributed.batch_plan import Span
from gengap_dist.distributed.process_group import World
from gengap_dist.errors import UsageError
from gengap_dist.models.batch_norm import average_buffers, has_batch_norm
from gengap_dist.parallel.strategies import OptimizerState, Single, Strategy
from gengap_dist.training.algorithms.base import AlgorithmSetup, TrainingAlgorithm, batch_plan_for, first_step_after
from gengap_dist.training.algorithms.update_bn import recompute_running_stats
from gengap_dist.training.lr_schedule import scaled_lr
from gengap_dist.training.optimizer import build_optimizer
from gengap_dist.training.step import StepBatch, train_step
from gengap_dist.training.step_metrics import StepResult, zero_metrics


@final
class LocalSGD(TrainingAlgorithm):
    """Plain training before `first_step`; then the evaluated model is the average of K workers, initially equal copies.

    post_local_sgd (Lin et al. 2020): a worker has its share of every global batch, and the run's learning rate; after
    every algorithm.local_steps all get the averaged parameters and running statistics, and keep their own momentum.

    swap (Gupta et al. 2020): a worker visits all samples in its own order, B / K per step, with the run's learning
    rate times scaled_lr(B / K) / scaled_lr(B). Running statistics are recomputed for the average.

    The average is stored in the strategy's network, which is no longer trained.
    """

    def __init__(self, setup: AlgorithmSetup) -> None:
        """See `TrainingAlgorithm`."""
        config = setup.config
        self.first_step = first_step_after("algorithm.local_start", config.algorithm.local_start, setup.num_steps)
        super().__init__(setup._replace(num_steps=self.first_step))
        self.num_workers, self.world = config.algorithm.workers, setup.strategy.world
        self.has_workers = False
        self.workers: dict[int, Strategy] = {}  # workers of this rank
        self._holds_average = False  # the strategy's network is the average of the current workers
        self._shares: dict[int, list[Span]] = {}  # spans of the workers, by step size
        self.lr_factor, self.worker_optim = 1.0, config.scaled_optim
        if config.algorithm.local_sgd == "swap" and setup.sampler.in_order:
            raise UsageError(
                "algorithm.local_sgd (swap) gives each network an order of samples of its own, and the training "
                f"samples of data.name ({config.data.name}) are a stream: return a data set with __getitem__"
            )
        if config.algorithm.local_sgd == "swap":
            worker_size = config.batch.global_size // self.num_workers
            self.lr_factor = scaled_lr(config.optim, worker_size) / scaled_lr(config.optim, config.batch.global_size)
            self.worker_optim = config.optim.at_batch(worker_size)
            self.samplers = [
                EpochSampler(setup.sampler.num_samples, worker_size, config.seed, worker=w)
                for w in range(self.num_workers)
            ]

    def step(self, step: int, lr: float, momentum: float) -> StepResult:
        """See `TrainingAlgorithm.step`. In the local part it is collective only when workers are averaged.

        The norm is the root mean square over the workers that have samples.
        """
        if step < self.first_step:
            return super().step(step, lr, momentum)
        if not self.has_workers:
            average_buffers(self.strategy.model, self.world)
            self._create_workers(self.strategy.optimizer_state())
        with self.world.timer.phase("data"):
            sizes, worker_batches = self._worker_batches(step)
        if step == self.first_step and not self.config.optim.momentum_correction:
            momentum /= self.lr_factor  # the form v = m v + lr g: momentum contains the previous rate
        lr *= self.lr_factor
        num_active = sum(size > 0 for size in sizes)
        sums = zero_metrics(self.world.device)
        for worker, strategy in self.workers.items():
            indices, epoch = worker_batches[worker]
            if not len(indices):  # incomplete last batch of an epoch: this worker makes no step
                continue
            self._seed(step, worker)
            strategy.set_rates(lr, momentum)
            spans = batch_plan_for(self.config, len(indices), 1).micro_batches(0)
            step_batch = StepBatch(indices, epoch, spans, (self.config.seed, step, worker), self.targets_each)
            worker_sums, norm = train_step(strategy, self.batches, step_batch, self.objective, self.compute_gradient)
            sums.loss_sum.add_(worker_sums.loss_sum)
            sums.plain_loss_sum.add_(worker_sums.plain_loss_sum)
            sums.metric_sum.add_(worker_sums.metric_sum)
            sums.num_targets.add_(worker_sums.num_targets)
            sums.penalty.add_(worker_sums.penalty / num_active)
            sums.worker_squared_norm.add_(norm.double().square() / num_active)
        self._holds_average = False
        algorithm = self.config.algorithm
        if algorithm.local_sgd == "post_local_sgd" and (step - self.first_step + 1) % algorithm.local_steps == 0:
            self._average()
            for strategy in self.workers.values():
                _copy_from_flat(_flat(self.strategy.model), strategy.model)
        return StepResult(sum(sizes), lr, sums, None)

    def _worker_batches(self, step: int) -> tuple[list[int], dict[int, tuple[Tensor, int]]]:
        """Samples per worker in a step; for this rank's workers, their indices and the epoch for augmentation."""
        if self.config.algorithm.local_sgd == "swap":
            at, first_local_epoch = step - self.first_step, self.sampler.epoch(self.first_step)
            # an epoch number that no other worker and no earlier epoch uses, for augmentation
            epoch = first_local_epoch + 1 + self.samplers[0].epoch(at) * self.num_workers
            sizes = [len(self.samplers[0].indices(at))] * self.num_workers
            return sizes, {worker: (self.samplers[worker].indices(at), epoch + worker) for worker in self.workers}
        indices, epoch = self.sampler.indices(step), self.sampler.epoch(step)
        if len(indices) not in self._shares:
            plan = batch_plan_for(self.config, len(indices), self.num_workers)
            worker_spans = map(plan.micro_batches, range(self.num_workers))
            self._shares[len(indices)] = [Span(spans[0].start, spans[-1].stop) for spans in worker_spans]
        shares = self._shares[len(indices)]
        return [span.size for span in shares], {w: (indices[slice(*shares[w])], epoch) for w in self.workers}

    def _create_workers(self, optimizer_state: OptimizerState) -> None:
        """Create this rank's workers as copies of the strategy's network."""
        self.has_workers = True
        single_rank_world = World(0, 1, self.world.device, self.world.timer)
        for worker in range(self.world.rank, self.num_workers, self.world.size):
            strategy = self.workers[worker] = Single(self.config, single_rank_world)
            strategy.setup(deepcopy(self.strategy.model).train(), partial(build_optimizer, self.worker_optim))
            strategy.load_optimizer_state(optimizer_state)
            strategy.execution.scaler.load_state_dict(self.strategy.execution.scaler.state_dict())
        self.strategy.optimizer.state.clear()  # from now on only the workers' optimizers are used

    def _average(self) -> None:
        """Store the mean of the workers in the strategy's network. Collective."""
        total = torch.zeros_like(_flat(self.strategy.model))
        for strategy in self.workers.values():
            total += _flat(strategy.model)
        _copy_from_flat(self.world.all_reduce(total, "average of the workers") / self.num_workers, self.strategy.model)
        self._holds_average = True

    def unsharded_model(self) -> AbstractContextManager[nn.Module]:
        """See `TrainingAlgorithm.unsharded_model`."""
        model = self.strategy.model
        if self.has_workers and not self._holds_average:
            self._average()
            if self.config.algorithm.local_sgd == "swap" and has_batch_norm(model):
                recompute_running_stats(model, self.batches, self.world, self.config.batch.ghost_size)
        return self.strategy.unsharded_model()

    def state(self) -> dict[str, Any]:
        """See `TrainingAlgorithm.state`. Rank 0 has the state of all workers, on its CPU."""
        state = super().state()
        if not self.has_workers:
            return state
        own_states = {worker: _serialized(strategy) for worker, strategy in self.workers.items()}
        sizes = torch.zeros(self.num_workers, dtype=torch.int64)
        for worker, packed in own_states.items():
            sizes[worker] = len(packed)
        states = []
        for worker, size in enumerate(self.world.all_reduce(sizes, "sizes of the workers").tolist()):
            packed = own_states.pop(worker, None)
            buffer = torch.zeros(size, dtype=torch.uint8) if packed is None else packed
            self.world.all_reduce(buffer, "state of a worker")
            if self.world.rank == 0:
                states.append(torch.load(io.BytesIO(buffer.numpy().tobytes()), map_location="cpu", weights_only=True))
        return state | {"workers": states}

    def load(self, state: Mapping[str, Any]) -> None:
        """See `TrainingAlgorithm.load`."""
        super().load(state)
        if "workers" not in state:
            return
        self._create_workers({})
        for worker, strategy in self.workers.items():
            strategy.model.load_state_dict(state["workers"][worker]["model"])
            strategy.load_optimizer_state(state["workers"][worker]["optimizer"])
            strategy.execution.scaler.load_state_dict(state["workers"][worker]["scaler"])


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *(buffer for buffer in model.buffers() if buffer.is_floating_point())]


@torch.no_grad()
def _flat(model: nn.Module) -> Tensor:
    """Parameters and running statistics, flattened and concatenated."""
    return torch.cat([tensor.flatten() for tensor in _tensors(model)])


@torch.no_grad()
def _copy_from_flat(flat: Tensor, model: nn.Module) -> None:
    tensors = _tensors(model)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def _serialized(strategy: Strategy) -> Tensor:
    """Network and optimizer as bytes [n] on the CPU, so that ranks exchange them bit for bit."""
    file = io.BytesIO()
    scaler = strategy.execution.scaler.state_dict()
    torch.save({"model": strategy.model.state_dict(), "optimizer": strategy.optimizer_state(), "scaler": scaler}, file)
    return torch.frombuffer(file.getbuffer(), dtype=torch.uint8).clone()
