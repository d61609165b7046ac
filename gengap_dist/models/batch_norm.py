"""Batch norm as a stated treatment: what becomes of a network's batch norm layers, and over which samples they go.

Shapes: n samples of a micro-batch, C channels, any number of positions behind them.
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
from torch.nn.modules.batchnorm import _BatchNorm

from gengap_dist.distributed.process_group import World
from gengap_dist.errors import UsageError
from gengap_dist.models.sample_position import SamplePosition

GROUP_CHANNELS = 16  # of group norm, as in Wu & He 2018, table 3


class ReplacedBatchNorm(_BatchNorm):
    """Batch norm whose training statistics are its own affair; in eval mode it is torch's."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"batch norm needs [n, C, ...], got {list(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """[n, C, ...] to the same shape."""
        self._check_input_dim(input)
        return self.train_forward(input) if self.training else super().forward(input)

    def train_forward(self, input: Tensor) -> Tensor:
        """[n, C, ...] by the batch's statistics, which also enter the running ones."""
        raise NotImplementedError

    @torch.no_grad()
    def update_running_stats(self, mean: Tensor, var: Tensor, share: float) -> None:
        """Add this share of a mean [C] and an unbiased variance [C] to the running ones."""
        if self.running_mean is not None and self.running_var is not None:
            self.running_mean.add_(mean, alpha=share)
            self.running_var.add_(var, alpha=share)


class GhostBatchNorm(ReplacedBatchNorm):
    """Batch norm over groups of `ghost_size` consecutive samples of the global batch (Hoffer et al. 2017).

    `BatchPlan` never cuts a group, so outputs do not depend on ranks or micro-batches. Nor do the running statistics,
    which go through all G groups of a step in order (Hoffer et al., algorithm 1), eta = `momentum`:

        running = (1 - eta)^G running + sum_i eta (1 - eta)^(G - 1 - i) statistics_i

    This is linear, so each rank adds its own groups' terms, times the number of ranks, and the mean over ranks
    (`average_buffers`) is the sum above.

    >>> norm = GhostBatchNorm(1, 2)
    >>> norm(torch.tensor([[0.0], [2.0], [10.0], [30.0]])).flatten().tolist()
    [-0.9999949932098389, 0.9999949932098389, -0.9999999403953552, 0.9999999403953552]
    >>> round(norm.running_mean.item(), 5)  # 0.9 * 0.1 * 1 + 0.1 * 20
    2.09
    """

    def __init__(self, num_features: int, ghost_size: int, **settings: Any) -> None:
        """Like nn.BatchNorm1d or 2d with these settings, per group."""
        super().__init__(num_features, **settings)
        self.ghost_size = ghost_size
        self.position = SamplePosition()
        self._seen: list[tuple[Tensor, Tensor, int]] = []  # mean, variance and size of groups not yet remembered

    def train_forward(self, input: Tensor) -> Tensor:
        """See `ReplacedBatchNorm`; the last group may be smaller."""
        out, seen = [], []
        for group in input.split(self.ghost_size):
            mean, var = input.new_zeros(2, self.num_features, dtype=_exact(input))
            out.append(batch_norm(group, mean, var, self.weight, self.bias, True, 1.0, self.eps))
            seen.append((mean, var, len(group)))
        self._seen = seen
        if not torch.compiler.is_compiling():  # places in the batch would be compiled in: the strategy calls afterwards
            self.commit_running_stats()
        return torch.cat(out) if len(out) > 1 else out[0]

    def commit_running_stats(self) -> None:
        """Let the groups of the last training pass enter the running statistics, if they have not."""
        seen, self._seen = self._seen, []
        where, eta = self.position, self.momentum or 0.0
        first, size = where.start // self.ghost_size, where.global_size
        if seen and size is None:  # alone
            first, size = 0, sum(num for *_, num in seen)
            self.begin_step(size)
        for number, (mean, var, _) in enumerate(seen, first):
            last = -(-(size or 0) // self.ghost_size) - 1
            self.update_running_stats(mean, var, where.num_ranks * eta * (1 - eta) ** (last - number))

    @torch.no_grad()
    def begin_step(self, global_size: int) -> None:
        """Make room in the running statistics for a step's groups; on every rank, also one without samples."""
        if self.running_mean is not None and self.running_var is not None:
            keep = (1 - (self.momentum or 0.0)) ** -(-global_size // self.ghost_size)
            self.running_mean.mul_(keep)
            self.running_var.mul_(keep)


class SyncBatchNorm(ReplacedBatchNorm):
    """Batch norm over the whole global batch, on any device: torch's own is for GPUs, and waits for one in every layer.

    Each rank must be given all of its samples of a step at once, in training, and equally often; none are welcome.
    """

    def __init__(self, num_features: int, world: World, **settings: Any) -> None:
        """Like nn.BatchNorm1d or 2d with these settings, over all ranks of `world`."""
        super().__init__(num_features, **settings)
        self.world = world

    def train_forward(self, input: Tensor) -> Tensor:
        """See `ReplacedBatchNorm`. Collective, and so is its backward pass."""
        eta = self.momentum or 0.0
        if self.world.size == 1:
            return batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, True, eta, self.eps)
        out, mean, var, count = _OverRanks.apply(input, self.weight, self.bias, self.eps, self.world)
        self._enter(mean, var, count, eta)
        return out

    @torch.no_grad()
    def _enter(self, mean: Tensor, var: Tensor, count: Tensor, eta: float) -> None:
        """Let a step's mean [C] and biased variance [C] over `count` values enter the running statistics.

        One value has no variance: it changes nothing. Nobody asks a GPU for `count`: that would wait for it.
        """
        if self.running_mean is None or self.running_var is None:
            return
        kind = self.running_mean.dtype
        share = (count > 1).to(kind) * eta
        self.running_mean.lerp_(mean.to(kind), share)
        self.running_var.lerp_((var * (count / (count - 1).clamp_min(1))).to(kind), share)


class _OverRanks(torch.autograd.Function):
    """Normalise by mean and variance over all ranks; one sum over ranks in each direction."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, world: World
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Output [n, C, ...], mean [C], biased variance [C], and number of values a channel, a scalar."""
        n, channels, kind = input.numel() // input.shape[1], input.shape[1], _exact(input)
        told = torch.zeros(world.size, 2 * channels + 1, dtype=torch.float64, device=input.device)
        if n:
            mean, var = torch.batch_norm_update_stats(input.to(kind), None, None, 0.0)  # 3 times as fast as var_mean
            told[world.rank] = torch.cat([mean.double(), var.double(), told.new_full((1,), n)])
        world.all_reduce(told, "batch norm statistics")
        means, variances, counts = told[:, :channels], told[:, channels:-1], told[:, -1:]
        count = counts.sum()
        # ranks' means and variances put together as Chan et al. (1983) do: nothing cancels
        mean = (means * counts).sum(0) / count.clamp_min(1)
        var = ((variances + (means - mean).square()) * counts).sum(0) / count.clamp_min(1)
        mean, var = mean.to(kind), var.to(kind)
        ctx.world, ctx.eps, ctx.has_bias = world, eps, bias is not None
        ctx.save_for_backward(input, weight, mean, var, count)
        ctx.mark_non_differentiable(mean, var, count)
        # torch's kernels for given statistics; they cannot take no samples at all
        out = batch_norm(input, mean, var, weight, bias, False, 0.0, eps) if n else torch.empty_like(input)
        return out, mean, var, count

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride], the decorator's doing
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        """The input's is scale (g - mean(g) - normed mean(g normed)): g the gradient times weight, means over ranks."""
        grad, (input, weight, mean, var, count) = grads[0], ctx.saved_tensors
        mine, inner = torch.zeros(2, len(mean), dtype=mean.dtype, device=mean.device), torch.empty_like(input)
        if input.numel():
            inner, *sums = torch.ops.aten.native_batch_norm_backward(
                grad, input, weight, mean, var, None, None, False, ctx.eps, [True, True, True]
            )  # scale g, and the sums over this rank's samples of g normed and g
            mine = torch.stack(sums)
        sums = ctx.world.all_reduce(mine.to(torch.float64, copy=True), "gradient of batch norm statistics")
        means = sums / count.clamp_min(1)
        if input.numel():
            scale = (var + ctx.eps).rsqrt()
            of_normed, of_all = (means.to(mean.dtype) * (scale if weight is None else scale * weight)).unbind()
            inner.addcmul_(input - _wide(mean, input), _wide(of_normed * scale, input), value=-1)
            inner.sub_(_wide(of_all, input))
        return inner, None if weight is None else mine[0], mine[1] if ctx.has_bias else None, None, None


def _exact(input: Tensor) -> torch.dtype:
    """What statistics are kept in: at least float32, also under autocast."""
    return torch.promote_types(input.dtype, torch.float32)


def _wide(vector_C: Tensor, like: Tensor) -> Tensor:
    """[C] as [1, C, 1, ...], to go with [n, C, ...]."""
    return vector_C.view(1, -1, *[1] * (like.ndim - 2)).to(like.dtype)


PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def replace_batch_norm(
    model: nn.Module, kind: str, *, ghost_size: int | None, position: SamplePosition, world: World
) -> None:
    """Put what `model.norm` asks for in the place of every batch norm layer, in place; weights and buffers stay.

    Args:
        model: the network, freshly made.
        kind: local (nothing changes), ghost, sync, group or none.
        ghost_size: samples in a ghost group.
        position: what ghost layers look at.
        world: the ranks of sync.

    Raises:
        UsageError: if there is no batch norm to treat, or one of an unknown kind or without momentum.
    """
    if kind == "local":
        return
    make: dict[str, Callable[[_BatchNorm], nn.Module]] = {
        "ghost": lambda old: _ghost(old, ghost_size or 0, position),
        "sync": lambda old: _sync(old, world),
        "group": _group,
        "none": lambda old: nn.Identity(),
    }
    every = model.named_modules(remove_duplicate=False)  # a layer may go by two names
    found = [(path, old) for path, old in every if isinstance(old, _BatchNorm)]
    if not found and kind != "none":
        raise UsageError(
            f"model.norm ({kind}) has no effect on {type(model).__name__}, which has no batch norm: leave model.norm "
            "and batch.ghost_size unset, or choose another model.name"
        )
    instead: dict[nn.Module, nn.Module] = {}
    for path, old in found:
        if kind in ("ghost", "sync") and old.momentum is None:
            raise UsageError(
                f"model.norm ({kind}) cannot treat {path}, whose momentum is None, an average over all steps: "
                "give it a momentum, or leave model.norm unset"
            )
        if old not in instead:
            instead[old] = _with_tail(path, old, _keeping(old, make[kind](old)))
        parent, _, last = path.rpartition(".")
        setattr(model.get_submodule(parent), last, instead[old])


def _keeping(old: _BatchNorm, new: nn.Module) -> nn.Module:
    """`new`, with the weights and buffers of `old` that it has a use for."""
    for name, kept in [*old.named_parameters(recurse=False), *old.named_buffers(recurse=False)]:
        if hasattr(new, name):
            setattr(new, name, kept)
    return new


def _settings(old: _BatchNorm) -> dict[str, Any]:
    return {
        "eps": old.eps, "momentum": old.momentum, "affine": old.affine, "track_running_stats": old.track_running_stats
    }  # fmt: skip


def _ghost(old: _BatchNorm, ghost_size: int, position: SamplePosition) -> nn.Module:
    new = GhostBatchNorm(old.num_features, ghost_size, **_settings(old))
    new.position = position
    return new


def _sync(old: _BatchNorm, world: World) -> nn.Module:
    return SyncBatchNorm(old.num_features, world, **_settings(old))


def _group(old: _BatchNorm) -> nn.Module:
    """Group norm over as many channels as GROUP_CHANNELS, or a divisor; over all of them if there is none."""
    channels = old.num_features
    size = gcd(channels, GROUP_CHANNELS)
    return nn.GroupNorm(channels // size if size > 1 else 1, channels, old.eps, old.affine)


def _with_tail(path: str, old: _BatchNorm, new: nn.Module) -> nn.Module:
    """`new`, followed by what else `old` does: timm's kind has dropout and a non-linearity inside."""
    if type(old) in PLAIN:
        return new
    tail = {name: part for name in ("drop", "act") if isinstance(part := getattr(old, name, None), nn.Module)}
    if type(old).__module__.startswith("timm.") and "act" in tail:
        return nn.Sequential(OrderedDict(norm=new, **tail))
    raise UsageError(
        f"model.norm cannot treat {path}, a {type(old).__name__}: leave it unset, or use nn.BatchNorm1d, 2d or 3d"
    )


def has_batch_norm(model: nn.Module) -> bool:
    """Whether any layer takes statistics over the samples of a batch."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


@contextmanager
def frozen_running_stats(model: nn.Module) -> Iterator[None]:
    """Training passes inside leave running statistics alone."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
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
    """Make floating-point buffers (running statistics) their mean over ranks. Collective.

    Between steps a rank's running statistics are of its own samples only; evaluation and saving need one.
    """
    buffers = [b for b in model.buffers() if b.is_floating_point()] if world.size > 1 else []
    if buffers:
        # in float64 the mean of three equal float32 is exact
        flat = torch.cat([b.flatten().double() for b in buffers])
        mean = world.all_reduce(flat, "running statistics") / world.size
        for buffer, part in zip(buffers, mean.split([b.numel() for b in buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))
