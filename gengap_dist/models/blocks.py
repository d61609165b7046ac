"""The layer that this package's networks are made of."""

from collections import OrderedDict

from torch import nn

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "linear": nn.Identity}


def activated(
    affine: nn.Module, norm: nn.Module | None = None, activation: str = "relu", **more: nn.Module
) -> nn.Sequential:
    """An affine map, its norm if it has one, its non-linearity as `act` (a key of ACTIVATIONS), then `more`.

    >>> [name for name, _ in activated(nn.Linear(2, 2), nn.BatchNorm1d(2), dropout=nn.Dropout()).named_children()]
    ['affine', 'norm', 'act', 'dropout']
    """
    norms = {} if norm is None else {"norm": norm}
    return nn.Sequential(OrderedDict(affine=affine, **norms, act=ACTIVATIONS[activation](), **more))


def he_init(model: nn.Module) -> None:
    """Every convolution drawn as in He et al. 2015, eq. 10: normal, of variance 2 / (inputs of one unit); biases 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
