"""Views: how an activation tensor is reshaped into the rows of a matrix."""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gengap_dist.config.measures import VIEWS
from gengap_dist.errors import UsageError
from gengap_dist.probes.trace import Layer


class LayerView(NamedTuple):
    """One layer in one view."""

    layer: Layer
    view: str
    rows_per_input: int
    """Rows per input."""
    num_rows: int
    """N, rows over all inputs of all ranks."""
    num_units: int
    """D, columns."""

    @property
    def is_wide(self) -> bool:
        """Whether D > N, so that the N x N Gram matrix is the smaller one."""
        return self.num_units > self.num_rows

    @property
    def size(self) -> int:
        """k, the side of the accumulated matrix."""
        return self.num_rows + 1 if self.is_wide else self.num_units

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the view's values."""
        return torch.float64 if self.view == "pool" else self.layer.dtype

    @property
    def state_bytes(self) -> int:
        """Bytes of the k x k matrix, twice: the matrix itself and a copy for the eigenvalue solver."""
        return 16 * self.size**2

    def column_bytes(self, num_inputs: int) -> int:
        """Bytes of one column on a rank with `num_inputs` inputs, kept until redistribution; 0 if D <= N."""
        return num_inputs * self.rows_per_input * self.dtype.itemsize if self.is_wide else 0


def build_layer_views(layers: Sequence[Layer], views: Sequence[str], num_inputs: int) -> list[LayerView]:
    """Every layer in every requested view that its output supports. A layer without one is left out, with a warning.

    A layer with one position, such as [N, C, 1, 1], has one matrix, that of its view "".

    Raises:
        UsageError: if a view is unknown, a layer that the user named supports none of `views`, or no layer does.
    """
    if unknown := [view for view in views if view not in VIEWS]:
        raise UsageError(f"probe.views ({unknown[0]}) is not a view: choose among {', '.join(VIEWS)}")
    layer_views, without = [], []
    for layer in layers:
        shape, num_units = layer.output, layer.output[-1 if layer.channels_last else 1]
        numel = shape.numel() // 2  # of one sample; two were traced
        by_position = "token" if layer.channels_last and len(shape) == 3 else "channel"
        possible = {by_position: (numel // num_units, num_units)}
        if shape[0] == 2 and numel == num_units:  # [N, D]; of one position all views are the same
            possible = {"": (1, num_units)}
        elif shape[0] == 2:  # one row per sample; attention windows, for example, have more
            possible |= {"pool": (1, num_units), "flatten": (1, numel)}
        chosen = [view for view in possible if view in views or not view]
        if not chosen:
            without.append((layer, possible))
        for view in chosen:
            rows_each, columns_each = possible[view]
            layer_views.append(LayerView(layer, view, rows_each, rows_each * num_inputs, columns_each))
    for layer, possible in without:
        if layer.is_asked or not layer_views:
            raise UsageError(
                f"probe.views ({', '.join(views)}) do not apply to layer {layer.name}, which outputs "
                f"{list(layer.output)} for two samples: add {' or '.join(possible)}, or leave the layer out"
            )
    if without:
        warnings.warn(
            f"probe.views ({', '.join(views)}) do not apply to {', '.join(layer.name for layer, _ in without)}: not "
            "measured",
            stacklevel=3,
        )
    return layer_views


def columns(activation: Tensor, view: str, *, channels_last: bool) -> Tensor:
    """The transposed matrix of a view: [D, rows].

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
