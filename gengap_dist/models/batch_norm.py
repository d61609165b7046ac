"""Variants of batch norm (`model.norm`): replacement of a network's layers, and the samples behind their statistics.

Shapes: n samples of a micro-batch, C channels, any number of trailing dimensions.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import batch_norm

from gengap_dist.compat.batch_norm_base import BatchNormBase
from gengap_dist.compat.recomputation import in_backward
from gengap_dist.distributed.process_group import World
from gengap_dist.errors import UsageError
from gengap_dist.models.sample_position import SamplePosition

GROUP_CHANNELS = 16  # of group norm, as in Wu & He 2018, table 3


class ReplacedBatchNorm(BatchNormBase):
    """Base of batch norm layers with their own training statistics; in eval mode they are torch's batch norm."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"batch norm needs [n, C, ...], got {list(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """[n, C, ...] to the same shape."""
        self._check_input_dim(input)
        return self.train_forward(input) if self.training else super().forward(input)

    def train_forward(self, input: Tensor) -> Tensor:
        """[n, C, ...] normalised by batch statistics, which also update the running statistics."""
        raise NotImplementedError

    @torch.no_grad()
    def update_running_stats(self, mean: Tensor, var: Tensor, share: float) -> None:
        """Add `share` times a mean [C] and an unbiased variance [C] to the running statistics."""
        if self.running_mean is not None and self.running_var is not None:
            self.running_mean.add_(mean, alpha=share)
            self.running_var.add_(var, alpha=share)


class GhostBatchNorm(ReplacedBatchNorm):
    """Batch norm over groups of `ghost_size` consecutive samples of the global batch (Hoffer et al. 2017).

    `BatchPlan` never splits a group, so outputs do not depend on ranks or micro-batches. Neither do the running
    statistics, which are updated by all G groups of a step in order (Hoffer et al., algorithm 1), eta = `momentum`:

        running = (1 - eta)^G running + sum_i eta (1 - eta)^(G - 1 - i) statistics_i

    The sum is linear, so each rank adds the terms of its own groups, times the number of ranks, and the mean over ranks
    (`average_buffers`) is the sum above. A layer that a network calls K times in a pass has G K terms: of each group
    those of all calls, as plain batch norm has them when it gets one group after the other. K is known only when a pass
    has ended, so in a run the strategy calls `commit_running_stats` after each pass.

    >>> norm = GhostBatchNorm(1, 2)
    >>> norm(torch.tensor([[0.0], [2.0], [10.0], [30.0]])).flatten().tolist()
    [-0.9999949932098389, 0.9999949932098389, -0.9999999403953552, 0.9999999403953552]
    >>> round(norm.running_mean.item(), 5)  # 0.9 * 0.1 * 1 + 0.1 * 20
    2.09
    """

    def __init__(self, num_features: int, ghost_size: int, **settings: Any) -> None:
        """Arguments as of nn.BatchNorm1d or 2d, applied per group."""
        super().__init__(num_features, **settings)
        self.ghost_size = ghost_size
        self.position = SamplePosition()
        self._pending_stats: list[list[tuple[Tensor, Tensor, int]]] = []
        """By call of the last pass: mean, variance and size of each group, not yet committed."""
        self._undecayed_size: int | None = None
        """Samples of a step that has begun, before its first pass was committed."""

    def forward(self, input: Tensor) -> Tensor:
        """See `ReplacedBatchNorm`."""
        if not self.training and self._undecayed_size is not None:  # a rank without samples joins in eval mode
            self._pending_stats = [*self._pending_stats, []]
        return super().forward(input)

    def train_forward(self, input: Tensor) -> Tensor:
        """See `ReplacedBatchNorm`; the last group may be smaller."""
        out, stats = [], []
        for group in input.split(self.ghost_size):
            mean, var = input.new_zeros(2, self.num_features, dtype=_stats_dtype(input))
            out.append(batch_norm(group, mean, var, self.weight, self.bias, True, 1.0, self.eps))
            stats.append((mean, var, len(group)))
        # compiled code must not read what changes; a recomputation has had its statistics taken in the forward pass
        if torch.compiler.is_compiling() or (self.momentum and not in_backward()):
            self._pending_stats = [*self._pending_stats, stats]
        if not torch.compiler.is_compiling() and self.position.global_size is None:  # outside of a run
            self._undecayed_size = len(input) if self.momentum else None
            self.commit_running_stats()
        return torch.cat(out) if len(out) > 1 else out[0]

    def begin_step(self, global_size: int) -> None:
        """Begin a step of `global_size` samples; on every rank, also without samples."""
        self._pending_stats, self._undecayed_size = [], global_size

    def commit_running_stats(self) -> None:
        """Update the running statistics by the last pass of a step; its first pass also decays what was before."""
        calls, self._pending_stats = self._pending_stats, []
        eta, position = self.momentum or 0.0, self.position
        if not calls or not eta:
            return
        if self._undecayed_size is not None:
            self._decay((1 - eta) ** (self._num_groups(self._undecayed_size) * len(calls)))
            self._undecayed_size = None
        first = position.start // self.ghost_size
        num_groups = self._num_groups(position.global_size or sum(num for *_, num in calls[0]))
        for call, stats in enumerate(calls, 1):
            for number, (mean, var, _) in enumerate(stats, first + 1):
                later = (num_groups - number) * len(calls) + len(calls) - call  # terms of the step after this one
                self.update_running_stats(mean, var, position.num_ranks * eta * (1 - eta) ** later)

    def _num_groups(self, num_samples: int) -> int:
        return -(-num_samples // self.ghost_size)

    @torch.no_grad()
    def _decay(self, factor: float) -> None:
        if self.running_mean is not None and self.running_var is not None:
            self.running_mean.mul_(factor)
            self.running_var.mul_(factor)


class SyncBatchNorm(ReplacedBatchNorm):
    """Batch norm over the global batch, on any device; torch's version needs GPUs, and synchronizes in every layer.

    In training each rank must pass all of its samples of a step (possibly none) in one call, and all ranks must make
    the same number of calls.
    """

    def __init__(self, num_features: int, world: World, **settings: Any) -> None:
        """Arguments as of nn.BatchNorm1d or 2d, over all ranks of `world`."""
        super().__init__(num_features, **settings)
        self.world = world

    def train_forward(self, input: Tensor) -> Tensor:
        """See `ReplacedBatchNorm`. Collective, and so is its backward pass."""
        eta = self.momentum or 0.0
        if self.world.size == 1:
            return batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, True, eta, self.eps)
        out, mean, var, count = _SyncBatchNormFunction.apply(input, self.weight, self.bias, self.eps, self.world)
        self._update_running(mean, var, count, eta)
        return out

    @torch.no_grad()
    def _update_running(self, mean: Tensor, var: Tensor, count: Tensor, eta: float) -> None:
        """Update the running statistics by the mean [C] and biased variance [C] of a step over `count` values.

        A single value has no variance and changes nothing. `count` stays a tensor: to read it would synchronize a GPU.
        """
        if self.running_mean is None or self.running_var is None:
            return
        dtype = self.running_mean.dtype
        share = (count > 1).to(dtype) * eta
        self.running_mean.lerp_(mean.to(dtype), share)
        self.running_var.lerp_((var * (count / (count - 1).clamp_min(1))).to(dtype), share)


class _SyncBatchNormFunction(torch.autograd.Function):
    """Normalise by mean and variance over all ranks; one all-reduce in each direction."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, world: World
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Output [n, C, ...], mean [C], biased variance [C], and the number of values per channel, a scalar."""
        n, channels, dtype = input.numel() // input.shape[1], input.shape[1], _stats_dtype(input)
        rank_stats = torch.zeros(world.size, 2 * channels + 1, dtype=torch.float64, device=input.device)
        if n:
            mean, var = torch.batch_norm_update_stats(input.to(dtype), None, None, 0.0)  # 3 times as fast as var_mean
            rank_stats[world.rank] = torch.cat([mean.double(), var.double(), rank_stats.new_full((1,), n)])
        world.all_reduce(rank_stats, "batch norm statistics")
        means, variances, counts = rank_stats[:, :channels], rank_stats[:, channels:-1], rank_stats[:, -1:]
        count = counts.sum()
        # combine means and variances of ranks as in Chan et al. (1983), without cancellation
        mean = (means * counts).sum(0) / count.clamp_min(1)
        var = ((variances + (means - mean).square()) * counts).sum(0) / count.clamp_min(1)
        mean, var = mean.to(dtype), var.to(dtype)
        ctx.world, ctx.eps, ctx.has_bias = world, eps, bias is not None
        ctx.save_for_backward(input, weight, mean, var, count)
        ctx.mark_non_differentiable(mean, var, count)
        # torch's kernels for given statistics; they do not accept an empty input
        out = batch_norm(input, mean, var, weight, bias, False, 0.0, eps) if n else torch.empty_like(input)
        return out, mean, var, count

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride], because of the decorator
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Gradient of the input: scale (g - mean(g) - normed mean(g normed)), g = grad weight, means over ranks."""
        grad, (input, weight, mean, var, count) = grads[0], ctx.saved_tensors
        local_sums = torch.zeros(2, len(mean), dtype=mean.dtype, device=mean.device)
        input_grad = torch.empty_like(input)
        if input.numel():
            input_grad, *sums = torch.ops.aten.native_batch_norm_backward(
                grad, input, weight, mean, var, None, None, False, ctx.eps, [True, True, True]
            )  # scale g, and the sums of g normed and g over the samples of this rank
            local_sums = torch.stack(sums)
        sums = ctx.world.all_reduce(local_sums.to(torch.float64, copy=True), "gradient of batch norm statistics")
        means = sums / count.clamp_min(1)
        if input.numel():
            scale = (var + ctx.eps).rsqrt()
            of_normed, of_all = (means.to(mean.dtype) * (scale if weight is None else scale * weight)).unbind()
            centred = input - _broadcast(mean, input)
            input_grad.addcmul_(centred, _broadcast(of_normed * scale, input), value=-1)
            input_grad.sub_(_broadcast(of_all, input))
        weight_grad = None if weight is None else local_sums[0]
        return input_grad, weight_grad, local_sums[1] if ctx.has_bias else None, None, None


def _stats_dtype(input: Tensor) -> torch.dtype:
    """Dtype of statistics: at least float32, also under autocast."""
    return torch.promote_types(input.dtype, torch.float32)


def _broadcast(vector_C: Tensor, like: Tensor) -> Tensor:
    """[C] as [1, C, 1, ...], to broadcast with `like` [n, C, ...]."""
    return vector_C.view(1, -1, *[1] * (like.ndim - 2)).to(like.dtype)


TORCH_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def replace_batch_norm(
    model: nn.Module, kind: str, *, ghost_size: int | None, position: SamplePosition, world: World
) -> None:
    """Replace every batch norm layer as `model.norm` requests, in place; weights and buffers are kept.

    Args:
        model: the network, newly initialised.
        kind: local (no change), ghost, sync, group or none.
        ghost_size: samples per ghost group.
        position: position of the micro-batch, for ghost layers.
        world: the ranks of sync layers.

    Raises:
        UsageError: if there is no batch norm layer, or one of an unknown class or without momentum.
    """
    if kind == "local":
        return
    factories: dict[str, Callable[[BatchNormBase], nn.Module]] = {
        "ghost": lambda old: _ghost(old, ghost_size or 0, position),
        "sync": lambda old: _sync(old, world),
        "group": _group,
        "none": lambda old: nn.Identity(),
    }
    modules = model.named_modules(remove_duplicate=False)  # a layer may have two names
    batch_norms = [(path, old) for path, old in modules if isinstance(old, BatchNormBase)]
    if not batch_norms and kind != "none":
        raise UsageError(
            f"model.norm ({kind}) has no effect on {type(model).__name__}, which has no batch norm: leave model.norm "
            "and batch.ghost_size unset, or choose another model.name"
        )
    replacements: dict[nn.Module, nn.Module] = {}
    for path, old in batch_norms:
        if kind in ("ghost", "sync") and old.momentum is None:
            raise UsageError(
                f"model.norm ({kind}) cannot replace {path}, whose momentum is None, an average over all steps: "
                "give it a momentum, or leave model.norm unset"
            )
        if old not in replacements:
            replacements[old] = _with_tail(path, old, _copy_state(old, factories[kind](old)))
        parent, _, last = path.rpartition(".")
        setattr(model.get_submodule(parent), last, replacements[old])


def _copy_state(old: BatchNormBase, new: nn.Module) -> nn.Module:
    """`new`, with those weights and buffers of `old` that it has."""
    for name, tensor in [*old.named_parameters(recurse=False), *old.named_buffers(recurse=False)]:
        if hasattr(new, name):
            setattr(new, name, tensor)
    return new


def _settings(old: BatchNormBase) -> dict[str, Any]:
    return {
        "eps": old.eps, "momentum": old.momentum, "affine": old.affine, "track_running_stats": old.track_running_stats
    }  # fmt: skip


def _ghost(old: BatchNormBase, ghost_size: int, position: SamplePosition) -> nn.Module:
    new = GhostBatchNorm(old.num_features, ghost_size, **_settings(old))
    new.position = position
    return new


def _sync(old: BatchNormBase, world: World) -> nn.Module:
    return SyncBatchNorm(old.num_features, world, **_settings(old))


def _group(old: BatchNormBase) -> nn.Module:
    """Group norm with gcd(channels, GROUP_CHANNELS) channels per group; with a single group if that is 1."""
    channels = old.num_features
    size = gcd(channels, GROUP_CHANNELS)
    return nn.GroupNorm(channels // size if size > 1 else 1, channels, old.eps, old.affine)


def _with_tail(path: str, old: BatchNormBase, new: nn.Module) -> nn.Module:
    """`new`, followed by the other parts of `old`: timm's batch norm contains dropout and a non-linearity."""
    if type(old) in TORCH_BATCH_NORMS:
        return new
    tail = {name: part for name in ("drop", "act") if isinstance(part := getattr(old, name, None), nn.Module)}
    if type(old).__module__.startswith("timm.") and "act" in tail:
        return nn.Sequential(OrderedDict(norm=new, **tail))
    raise UsageError(
        f"model.norm cannot replace {path}, a {type(old).__name__}: leave it unset, or use nn.BatchNorm1d, 2d or 3d"
    )


def has_batch_norm(model: nn.Module) -> bool:
    """Whether any layer uses statistics over the samples of a batch."""
    return any(isinstance(module, BatchNormBase) for module in model.modules())


@contextmanager
def frozen_running_stats(model: nn.Module) -> Iterator[None]:
    """In the context, training passes do not change running statistics."""
    norms = [module for module in model.modules() if isinstance(module, BatchNormBase)]
    before = [(module, module.momentum, module.num_batches_tracked) for module in norms]
    for module in norms:
        module.momentum, module.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for module, momentum, count in before:
            module.momentum, module.num_batches_tracked = momentum, count


@torch.no_grad()
def average_buffers(model: nn.Module, world: World) -> None:
    """Replace floating-point buffers (running statistics) by their mean over ranks. Collective.

    In training, running statistics come from the samples of the rank only; evaluation and saving need the mean.
    """
    buffers = [b for b in model.buffers() if b.is_floating_point()] if world.size > 1 else []
    if buffers:
        # in float64 the mean of equal float32 values is exact
        flat = torch.cat([b.flatten().double() for b in buffers])
        mean = world.all_reduce(flat, "running statistics") / world.size
        for buffer, part in zip(buffers, mean.split([b.numel() for b in buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))
