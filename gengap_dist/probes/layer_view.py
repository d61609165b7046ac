"""Views: how an activation becomes rows of a matrix."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gengap_dist.errors import UsageError
from gengap_dist.probes.layers import Layer

VIEWS = ("channel", "token", "pool", "flatten")


class LayerView(NamedTuple):
    """A layer in one view."""

    layer: Layer
    view: str
    rows_each: int
    """Rows that one input gives."""
    num_rows: int
    """N, over all inputs of all ranks."""
    num_units: int
    """D."""

    @property
    def wide(self) -> bool:
        """Whether the N x N form is the smaller one."""
        return self.num_units > self.num_rows

    @property
    def size(self) -> int:
        """k, the side of the matrix that is kept."""
        return self.num_rows + 1 if self.wide else self.num_units

    @property
    def dtype(self) -> torch.dtype:
        """What the view's values are in."""
        return torch.float64 if self.view == "pool" else self.layer.dtype

    @property
    def state_bytes(self) -> int:
        """Of the k x k matrix, twice: once kept, once more for solving."""
        return 16 * self.size**2

    def column_bytes(self, num_inputs: int) -> int:
        """What a rank with so many inputs holds of a column until it is turned; nothing of a tall site's."""
        return num_inputs * self.rows_each * self.dtype.itemsize if self.wide else 0


def layer_views(layers: Sequence[Layer], views: Sequence[str], num_inputs: int) -> list[LayerView]:
    """Every layer in every view that was asked for and that its output has."""
    if unknown := [view for view in views if view not in VIEWS]:
        raise UsageError(f"probe.views ({unknown[0]}) is not a view: choose among {', '.join(VIEWS)}")
    sites = []
    for layer in layers:
        shape = layer.output
        units, numel = shape[-1 if layer.channels_last else 1], shape.numel()
        by_position = "token" if layer.channels_last and len(shape) == 3 else "channel"
        possible = {by_position: (numel // units, units)}
        if shape[0] == 1:  # one example, one row; windows of attention and the like have more
            possible |= {"pool": (1, units), "flatten": (1, numel)} if len(shape) > 2 else {"": (1, units)}
        chosen = [view for view in possible if view in views or not view] if "" not in possible else [""]
        if not chosen:
            raise UsageError(
                f"probe.views ({', '.join(views)}) are no views of layer {layer.name}, which puts out {list(shape)} "
                f"for one sample: add {' or '.join(possible)}, or leave the layer out"
            )
        for view in chosen:
            rows_each, num_units = possible[view]
            sites.append(LayerView(layer, view, rows_each, rows_each * num_inputs, num_units))
    return sites


def columns(activation: Tensor, view: str, *, channels_last: bool) -> Tensor:
    """[D, rows]: the matrix of a view, transposed.

    >>> a = torch.arange(12.0).view(1, 3, 2, 2)
    >>> columns(a, "channel", channels_last=False).shape, columns(a, "flatten", channels_last=False).shape
    (torch.Size([3, 4]), torch.Size([12, 1]))
    """
    last = activation.ndim - 1
    match view:
        case "pool":
            positions = [*range(1, last)] if channels_last else [*range(2, last + 1)]
            return activation.mean(positions, dtype=torch.float64).T
        case "channel" | "token" if channels_last:
            return activation.flatten(0, -2).T
        case "channel" | "token":
            return activation.transpose(0, 1).flatten(1)
        case _:
            return activation.flatten(1).T
