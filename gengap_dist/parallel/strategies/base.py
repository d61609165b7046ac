"""The interface between the training loop and the engine that turns gradients into an update.

The interface has micro-steps and steps, but no clipping and no optimizer calls: some engines do these themselves.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from gengap_dist.compat.change_count import change_count
from gengap_dist.config.sections import RunConfig
from gengap_dist.distributed.process_group import World
from gengap_dist.models.batch_norm import GhostBatchNorm, SyncBatchNorm
from gengap_dist.models.sample_position import position_of
from gengap_dist.parallel.capabilities import Capabilities
from gengap_dist.parallel.execution import Execution

OptimizerState = dict[str, dict[str, Any]]
"""Unsharded optimizer state: parameter name to quantity name to tensor; the same for every strategy. That of a user's
own optimizer is its state dict, under OWN."""
OWN = ""  # no parameter has this name
BuildOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


class Strategy(ABC):
    """A model and its optimizer, trained by all ranks together."""

    capabilities: Capabilities
    """What the strategy shards, sends and supports; of the class, or of its stage."""

    def __init__(self, config: RunConfig, world: World) -> None:
        """A strategy for the ranks of `world`.

        Raises:
            UsageError: if it does not support this config, or a required package is missing.
        """
        self.config, self.world = config, world
        self.model: nn.Module
        """The model in training; with a sharded strategy, it has shards of the parameters but all buffers."""
        self.optimizer: torch.optim.Optimizer
        self.has_sync_bn = False
        """Whether forward passes in training contain collectives (SyncBatchNorm)."""
        self.has_unused_parameters = False
        """Whether some trainable parameters may get no gradient; to be set before `setup`."""
        self.track_local_grad_norm = False
        """Whether `local_squared_grad_norm` will be called; it costs one pass over the gradients."""
        self.execution = Execution(config.train, world.device)
        """Precision, memory format and compilation of the passes."""

    def setup(self, model: nn.Module, build: BuildOptimizer) -> None:
        """Take the model, whose weights are equal on all ranks, and build its optimizer. Collective."""
        self.net = self.execution.prepare(model)
        """Called in training: the model, or its compiled form with the same parameters."""
        self.model, self.optimizer = model, build(model)
        self._rate_factors = [float(group["lr"]) / self.config.optim.lr for group in self.optimizer.param_groups]
        self.execution.prepare_optimizer(self.optimizer)
        self.position = position_of(model)
        self._ghost_norms = [module for module in model.modules() if isinstance(module, GhostBatchNorm)]
        self.has_sync_bn = any(isinstance(module, SyncBatchNorm | nn.SyncBatchNorm) for module in model.modules())

    def begin_step(self, global_size: int) -> None:
        """Set this step's number of samples in ghost batch norm layers. On every rank, also one without samples."""
        for layer in self._ghost_norms:
            layer.begin_step(global_size)

    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs [n, ...] of this rank's inputs [n, ...], in train.dtype."""
        return self._run_forward(self._forward, inputs)

    def local_forward(self, inputs: Tensor) -> Tensor:
        """`forward` without the engine: for gradients of this rank that are not reduced over ranks."""
        return self._run_forward(self.net, inputs)

    def _run_forward(self, net: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        outputs = self.execution.run(net, inputs)
        for layer in self._ghost_norms:
            layer.commit_running_stats()
        return outputs

    @abstractmethod
    def _forward(self, inputs: Tensor) -> Tensor:
        """Outputs, in any precision."""

    @abstractmethod
    def micro_step(self, *, last: bool) -> AbstractContextManager[object]:
        """Context for forward *and* backward of one micro-batch; gradients are reduced over ranks in the last one."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, whose sum over micro-batches and ranks is the global batch's mean loss."""

    def local_squared_grad_norm(self) -> Tensor:
        """|g|^2, float64, of this rank's gradient after its first micro-batch, before the sum over ranks."""
        return self.execution.unscaled(nn.utils.get_total_norm(self._gradients()).double()).square()

    def set_rates(self, lr: float, momentum: float) -> None:
        """Set the learning rate and, if the optimizer has it, the momentum of the next step.

        A group that was built with another rate than optim.lr keeps its ratio to it, and a user's own optimizer keeps
        its momentum.
        """
        for group, factor in zip(self.optimizer.param_groups, self._rate_factors, strict=True):
            group["lr"] = lr * factor
            if "momentum" in group and not self.config.optim.is_own:
                group["momentum"] = momentum

    def step(self) -> Tensor:
        """Update the parameters and clear the gradients.

        Returns:
            The global gradient's 2-norm before clipping by optim.clip_norm; a scalar on the device. If the gradient
            overflowed float16, it is not finite, and the parameters are unchanged.
        """
        scaler = self.execution.scaler
        scaler.unscale_(self.optimizer)
        norm = self.gradient_norm()
        self._clip(norm)
        scaler.step(self.optimizer)
        scaler.update()
        self.optimizer.zero_grad(set_to_none=False)
        return norm

    def gradient_norm(self) -> Tensor:
        """2-norm of the parameters' gradients after the last micro-step, a scalar on the device. Collective."""
        return nn.utils.get_total_norm(self._gradients())

    def _gradients(self) -> list[Tensor]:
        groups = self.optimizer.param_groups  # not model.parameters(), which traverses all modules
        return [p.grad for group in groups for p in group["params"] if p.grad is not None]

    def _clip(self, norm: Tensor) -> None:
        if max_norm := self.config.optim.clip_norm:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), max_norm, norm)

    def unsharded_model(self) -> AbstractContextManager[nn.Module]:
        """Context with the plain model with all its parameters and buffers, on every rank, to read only. Collective.

        It may be the model in training, or a copy that is valid until the context ends.

        Raises:
            RuntimeError: at the end, if a parameter of the model in training was changed.
        """
        return _for_reading(self.model)

    def optimizer_state(self) -> OptimizerState:
        """The unsharded optimizer state. Collective; complete on rank 0, possibly incomplete on others."""
        if self.config.optim.is_own:
            return {OWN: self.optimizer.state_dict()}
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.model.named_parameters()}
        return {names[parameter]: dict(entry) for parameter, entry in self.optimizer.state.items() if entry}

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Load the optimizer state of any strategy; `state` is complete on every rank. Collective."""
        if OWN in state:
            self.optimizer.load_state_dict(deepcopy(state[OWN]))
        for name, parameter in self.model.named_parameters():
            if entry := state.get(name):
                self.optimizer.state[parameter] = {key: _to_layout_of(parameter, value) for key, value in entry.items()}

    def close(self) -> None:  # noqa: B027, most have nothing to release
        """Release the model: some engines keep references to it, and the next run of a study needs the memory."""


@contextmanager
def _for_reading(model: nn.Module) -> Iterator[nn.Module]:
    """Context with `model`, whose parameters must not change. (A user's network may count its passes in a buffer.)"""
    before = [change_count(parameter) for parameter in model.parameters()]
    yield model
    named = zip(model.named_parameters(), before, strict=True)
    if changed := [name for (name, parameter), count in named if change_count(parameter) != count]:
        raise RuntimeError(f"parameter {changed[0]} was changed in `unsharded_model`, which is for reading")


def _to_layout_of(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """A copy on the parameter's device with the parameter's strides, which fused optimizers require."""
    copy = value.to(parameter.device, copy=True)
    if value.shape != parameter.shape or copy.stride() == parameter.stride():
        return copy
    return torch.empty_like(parameter, dtype=value.dtype).copy_(copy)
