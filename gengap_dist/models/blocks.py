"""The building block of this package's networks, and He initialisation."""

from collections import OrderedDict

from torch import nn

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "linear": nn.Identity}


def activated(
    affine: nn.Module, norm: nn.Module | None = None, activation: str = "relu", **more: nn.Module
) -> nn.Sequential:
    """Sequence of an affine map, an optional norm, the non-linearity `act` (a key of ACTIVATIONS), and `more`.

    >>> [name for name, _ in activated(nn.Linear(2, 2), nn.BatchNorm1d(2), dropout=nn.Dropout()).named_children()]
    ['affine', 'norm', 'act', 'dropout']
    """
    norms = {} if norm is None else {"norm": norm}
    return nn.Sequential(OrderedDict(affine=affine, **norms, act=ACTIVATIONS[activation](), **more))


def he_init(model: nn.Module) -> None:
    """Initialise convolutions as in He et al. 2015, eq. 10: normal with variance 2 / fan-in; biases 0. In place."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
