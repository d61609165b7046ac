"""The contract between the loop and whatever turns gradients into an update.

The seam is at the micro-step and at the step, never at clipping, backward or optimizer: some engines own those.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from gengap_dist.config.sections import RunConfig
from gengap_dist.distributed.process_group import World
from gengap_dist.models.batch_norm import GhostBatchNorm, SyncBatchNorm
from gengap_dist.models.sample_position import position_of
from gengap_dist.parallel.execution import checkpoint_blocks, compiled

OptimizerState = dict[str, dict[str, Tensor]]
"""What an optimizer remembers, by name of the parameter and of the quantity, whole; the same for every strategy."""
BuildOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


class Strategy(ABC):
    """One model and its optimizer, trained by all ranks together."""

    needs_warmup_backward = False
    """Whether the first backward pass changes the order in which gradients are summed; a run does one that counts for
    nothing then, so that a resumed run sums like one that was never interrupted."""
    equal_micro_batches_required = False
    """Whether all ranks must do equally many micro-steps, some of them empty; see `BatchPlan.micro_batches`."""

    has_untimed_collectives = False
    """Whether ranks also meet where whereabouts do not see it, inside of the engine's passes."""

    def __init__(self, config: RunConfig, world: World) -> None:
        """A strategy for the ranks of `world`.

        Raises:
            UsageError: if it cannot serve this config, or a package it needs is missing.
        """
        self.config, self.world = config, world
        self.model: nn.Module
        """The network that trains; a sharded strategy holds only a part of each parameter, but every buffer."""
        self.optimizer: torch.optim.Optimizer
        self.has_sync_bn = False
        """Whether ranks meet in forward passes of training, too."""
        self.track_local_grad_norm = False
        """Whether `local_energy` will be asked for; it costs one pass over the gradients."""
        self.compiled_batch_sizes: set[int] = set()
        """Samples in the micro-batches of full steps. Under train.compile others, such as those of an epoch's last
        step, run as they are: compiling takes longer, and what is compiled for any size is slower."""
        # Off, as it mostly is, it changes nothing. Gradients meet before they are unscaled, so one that is infinite on
        # one rank is infinite or no number on all: they skip the step, and halve the scale, together.
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.train.autocast == "float16")
        """Multiplies the loss, so that gradients in float16 do not vanish; a run resumes with its state."""

    def setup(self, model: nn.Module, build: BuildOptimizer) -> None:
        """Take the model, whose weights are equal on all ranks, and make its optimizer. Collective."""
        train = self.config.train
        if train.channels_last:
            model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        if train.activation_checkpointing:
            checkpoint_blocks(model)
        self.model, self.optimizer = model, build(model)
        self.net = compiled(model) if train.compile else model
        """What training calls: the model, or what it was compiled to, on the same parameters."""
        if self.scaler.is_enabled() and isinstance(self.optimizer, torch.optim.SGD):
            self._begin_momentum()
        self.position = position_of(model)
        self._ghosts = [module for module in model.modules() if isinstance(module, GhostBatchNorm)]
        self.has_sync_bn = any(isinstance(module, SyncBatchNorm | nn.SyncBatchNorm) for module in model.modules())

    def _begin_momentum(self) -> None:
        """Torch's fused SGD (2.15) takes momentum from memory that nobody wrote, if it skips its first step."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"] if group["momentum"] else []:
                self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    def begin_step(self, global_size: int) -> None:
        """Tell layers that count samples how many this step has. On every rank, also one without samples."""
        for layer in self._ghosts:
            layer.begin_step(global_size)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [n, num_classes] of this rank's images [n, C, H, W], in the images' dtype."""
        return self._through(self._forward, images)

    def local_forward(self, images: Tensor) -> Tensor:
        """`forward`, without the engine: for gradients of this rank's own that nobody else is to meet."""
        return self._through(self.net, images)

    def _through(self, net: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        if self.config.train.channels_last and images.ndim == 4:
            images = images.to(memory_format=torch.channels_last)
        with self._autocast(), self._stance(len(images)):
            logits = net(images).to(images.dtype)
        for layer in self._ghosts:
            layer.commit_running_stats()
        return logits

    def _autocast(self) -> AbstractContextManager[object]:
        kind = self.config.train.autocast
        return torch.autocast(self.world.device.type, dtype=getattr(torch, kind)) if kind else nullcontext()

    def _stance(self, size: int) -> AbstractContextManager[object]:
        seldom = self.config.train.compile and self.compiled_batch_sizes and size not in self.compiled_batch_sizes
        return torch.compiler.set_stance("force_eager") if seldom else nullcontext()

    @abstractmethod
    def _forward(self, images: Tensor) -> Tensor:
        """Logits, in whatever precision."""

    @abstractmethod
    def micro_step(self, *, last: bool) -> AbstractContextManager[object]:
        """Context around forward *and* backward of one micro-batch; gradients meet the other ranks' in the last."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, whose sum over micro-batches and ranks is the global batch's mean loss."""

    def local_squared_grad_norm(self) -> Tensor:
        """|g|^2, float64, of this rank's own gradient after its first micro-batch, not yet summed over ranks."""
        return self.unscaled(nn.utils.get_total_norm(self._gradients()).double()).square()

    def set_rates(self, lr: float, momentum: float) -> None:
        """Take the learning rate and the momentum of the next step; not every optimizer has the latter."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            if "momentum" in group:
                group["momentum"] = momentum

    def step(self) -> Tensor:
        """Update the parameters and clear the gradients.

        Returns:
            The global gradient's 2-norm, before optim.clip_norm is applied; a scalar on the device. Of a gradient that
            was too large for float16 it is not finite, and the parameters stay what they were.
        """
        self.scaler.unscale_(self.optimizer)
        norm = self.gradient_norm()
        self._clip(norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=False)
        return norm

    def unscaled(self, value: Tensor) -> Tensor:
        """What is proportional to the gradients as they come from `backward`, as it is for those of the loss."""
        # what get_scale gives, without waiting for a GPU
        return value / self.scaler.scale(torch.ones((), device=value.device)) if self.scaler.is_enabled() else value

    def gradient_norm(self) -> Tensor:
        """2-norm of the parameters' gradients after the last micro-step, a scalar on the device. Collective."""
        return nn.utils.get_total_norm(self._gradients())

    def _gradients(self) -> list[Tensor]:
        groups = self.optimizer.param_groups  # not model.parameters(), which walks through all modules
        return [p.grad for group in groups for p in group["params"] if p.grad is not None]

    def _clip(self, norm: Tensor) -> None:
        if limit := self.config.optim.clip_norm:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), limit, norm)

    def unsharded_model(self) -> AbstractContextManager[nn.Module]:
        """The plain network with all its parameters and buffers, on every rank, to look at. Collective.

        It may be a copy, good until the context ends: nothing that is written to it lasts.
        """
        return nullcontext(self.model)

    def optimizer_state(self) -> OptimizerState:
        """What the optimizer remembers, whole. Collective; ranks other than 0 may get less, or nothing."""
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.model.named_parameters()}
        return {names[parameter]: dict(kept) for parameter, kept in self.optimizer.state.items() if kept}

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Go on from what the optimizer of any strategy remembered; `state` is whole, on every rank. Collective."""
        for name, parameter in self.model.named_parameters():
            if kept := state.get(name):
                self.optimizer.state[parameter] = {key: _like(parameter, value) for key, value in kept.items()}

    def close(self) -> None:  # noqa: B027, most have nothing to let go of
        """Let go of the model: some engines hold on to it otherwise, and the next run of a study needs the memory."""


def _like(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """A copy on the parameter's device, in the order in memory that the parameter has: fused optimizers go by that."""
    copy = value.to(parameter.device, copy=True)
    if value.shape != parameter.shape or copy.stride() == parameter.stride():
        return copy
    return torch.empty_like(parameter, dtype=value.dtype).copy_(copy)
