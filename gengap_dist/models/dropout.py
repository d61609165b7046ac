"""Random layers whose draws depend on step and sample, not on the rank or the micro-batch of the sample.

Shapes: n samples of a micro-batch, U units or channels of a sample.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from gengap_dist.data.counter_bits import counter_bits
from gengap_dist.models.sample_position import SamplePosition

DRAWS = 2**24  # a draw is one of so many numbers
ALPHA = 1.7580993408473766  # lambda alpha of SELU, the negative of its limit (Klambauer et al. 2017)


class SampleDraws(nn.Module):
    """Base of random layers: a draw is a hash of (step, layer, call in a pass, position in the global batch, unit)."""

    def __init__(self, p: float, layer: int, position: SamplePosition) -> None:
        """Drop with probability p; `layer` is a number that gives each layer its own draws."""
        super().__init__()
        self.p, self.layer, self.position = p, layer, position
        self.inplace = False
        """As of nn.Dropout, whose readers find it."""

    def extra_repr(self) -> str:
        """See nn.Module."""
        return f"p={self.p}"

    @property
    def scale(self) -> float:
        """1 / (1 - p), which keeps the mean; 1 where everything is dropped."""
        return 1 / (1 - self.p) if self.p < 1 else 1.0

    def forward(self, input: Tensor) -> Tensor:
        """[n, ...] to the same shape."""
        return self.drop(input) if self.training and self.p and len(input) else input

    def drop(self, input: Tensor) -> Tensor:
        """The output in training."""
        raise NotImplementedError

    def kept(self, input: Tensor, num_draws: int, *, whole_batch: bool = False) -> Tensor:
        """[n, num_draws] bool, true with probability 1 - p; with `whole_batch` [1, num_draws], once for the step."""
        first = 0 if whole_batch else self.position.start * num_draws
        num = num_draws * (1 if whole_batch else len(input))
        counters = torch.arange(first, first + num, device=input.device)
        call = self.position.next_call(self.layer)
        draws = counter_bits(counters, *self.position.key, self.layer + (call << 16)) >> 38  # the upper 24 bits
        return (draws >= self.p * DRAWS).view(-1, num_draws)


class SampleDropout(SampleDraws):
    """nn.Dropout: each unit of each sample."""

    def drop(self, input: Tensor) -> Tensor:
        """See `SampleDraws.drop`."""
        return input * self.kept(input, input[0].numel()).view_as(input) * self.scale


class SampleChannelDropout(SampleDraws):
    """nn.Dropout1d, 2d and 3d: each channel of each sample, [n, U, ...]."""

    def drop(self, input: Tensor) -> Tensor:
        """See `SampleDraws.drop`."""
        return input * _over_positions(self.kept(input, input.shape[1]), input) * self.scale


class SampleAlphaDropout(SampleDraws):
    """nn.AlphaDropout, and nn.FeatureAlphaDropout with `by_channel`: dropped values are SELU's limit -ALPHA.

    An affine map then restores mean 0 and variance 1 (Klambauer et al. 2017, eq. 4): with q = 1 - p the factor is
    (q + ALPHA^2 q p)^(-1/2).
    """

    def __init__(self, p: float, layer: int, position: SamplePosition, *, by_channel: bool) -> None:
        """See `SampleDraws`."""
        super().__init__(p, layer, position)
        self.by_channel = by_channel

    def drop(self, input: Tensor) -> Tensor:
        """See `SampleDraws.drop`."""
        if self.p == 1:
            return torch.zeros_like(input)
        if self.by_channel:
            kept = _over_positions(self.kept(input, input.shape[1]), input)
        else:
            kept = self.kept(input, input[0].numel()).view_as(input)
        factor = ((1 - self.p) * (1 + ALPHA**2 * self.p)) ** -0.5
        return torch.where(kept, input, -ALPHA) * factor + factor * ALPHA * self.p


class SampleStochasticDepth(SampleDraws):
    """Stochastic depth (Huang et al. 2016), also called drop path: the whole of a sample, or of the step."""

    def __init__(
        self, p: float, layer: int, position: SamplePosition, *, whole_batch: bool = False, rescale: bool = True
    ) -> None:
        """With `whole_batch` all samples of a step are dropped together; `rescale` keeps the mean."""
        super().__init__(p, layer, position)
        self.whole_batch, self.rescale = whole_batch, rescale

    def drop(self, input: Tensor) -> Tensor:
        """See `SampleDraws.drop`."""
        kept = self.kept(input, 1, whole_batch=self.whole_batch)
        return input * _over_positions(kept, input) * (self.scale if self.rescale else 1.0)


def _over_positions(kept: Tensor, input: Tensor) -> Tensor:
    """[n, U] as [n, U, 1, ...], with as many dimensions as the input."""
    return kept.view(*kept.shape, *[1] * (input.ndim - 2)) if input.ndim > 1 else kept[:, 0]


def replace_random_layers(model: nn.Module, position: SamplePosition) -> None:
    """Replace every random layer that is known by one that draws by sample, in place.

    Known are torch's kinds of dropout, torchvision's StochasticDepth, and classes whose name ends in DropPath and that
    have a `drop_prob`, as those of timm and transformers. `random_modules` finds what else is random.
    """
    modules = model.named_modules(remove_duplicate=False)  # a layer with two names gets a mask for each
    found = [(path, old) for path, old in modules if path and _replacement(old, 0, position) is not None]
    for number, (path, old) in enumerate(found):
        parent, _, last = path.rpartition(".")
        new = _replacement(old, number, position)
        assert new is not None
        setattr(model.get_submodule(parent), last, new.train(old.training))


def _replacement(old: nn.Module, layer: int, position: SamplePosition) -> SampleDraws | None:
    kind: Any = type(old)
    at: Any = {"layer": layer, "position": position}
    settings: Any = old
    if kind is nn.Dropout:
        return SampleDropout(settings.p, **at)
    if kind in (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d):
        return SampleChannelDropout(settings.p, **at)
    if kind in (nn.AlphaDropout, nn.FeatureAlphaDropout):
        return SampleAlphaDropout(settings.p, **at, by_channel=kind is nn.FeatureAlphaDropout)
    if kind.__module__ == "torchvision.ops.stochastic_depth":
        return SampleStochasticDepth(settings.p, **at, whole_batch=settings.mode == "batch")
    is_path = kind.__name__.endswith("DropPath") and isinstance(getattr(old, "drop_prob", None), float | int)
    if is_path and len(inspect.signature(old.forward).parameters) == 1:
        return SampleStochasticDepth(settings.drop_prob, **at, rescale=getattr(old, "scale_by_keep", True))
    return None
