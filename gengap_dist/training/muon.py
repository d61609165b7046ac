"""Muon for the hidden matrices of a network, AdamW for its other parameters: torch's two optimizers as one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor  # takes a second to import, which most runs do not need

BUFFER = "momentum_buffer"


class MuonWithAdamW(torch.optim.Optimizer):
    """Steps of `muon` and of `adamw`, whose parameter groups and state it shares.

    Muon replaces the averaged gradient of a matrix by an orthogonal matrix near it, by five Newton-Schulz steps in
    bfloat16 (Jordan et al. 2024). These need the whole matrix: products of shards, each rounded to bfloat16, would not
    add up to the products of the matrix. So sharded gradients and momentum are gathered for the step.
    """

    def __init__(self, muon: torch.optim.Optimizer, adamw: torch.optim.Optimizer) -> None:
        """An optimizer of the parameters of both."""
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self.muon, self.adamw = muon, adamw
        muon.state = adamw.state = self.state

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update all parameters. Collective, if they are sharded."""
        assert closure is None, "no closure is called"
        with _whole_matrices(self.muon):
            self.muon.step()
        self.adamw.step()


@contextmanager
def _whole_matrices(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Context in which every rank has all of the gradient and momentum of sharded parameters. Collective."""
    parameters = (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
    sharded = [cast("DTensor", p) for p in parameters if hasattr(p, "placements")]
    gradients = [p.grad for p in sharded]
    for p, gradient in zip(sharded, gradients, strict=True):
        p.grad = _replicated(gradient)
        if BUFFER in optimizer.state[p]:
            optimizer.state[p][BUFFER] = _replicated(optimizer.state[p][BUFFER])
    yield
    for p, gradient in zip(sharded, gradients, strict=True):
        p.grad = gradient
        optimizer.state[p][BUFFER] = optimizer.state[p][BUFFER].redistribute(placements=p.placements)


def _replicated(tensor: Any) -> Any:
    from torch.distributed.tensor import Replicate

    return tensor.redistribute(placements=[Replicate()] * tensor.device_mesh.ndim)
