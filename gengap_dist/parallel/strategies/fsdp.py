"""Parameters, gradients and optimizer state in parts over ranks: torch's FSDP2, for models that outgrow one GPU."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, cast, final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gengap_dist.distributed.process_group import ensure_process_group
from gengap_dist.errors import UsageError
from gengap_dist.parallel.strategies.base import BuildOptimizer, OptimizerState, Strategy
from gengap_dist.parallel.strategies.local_grad_norm import LocalGradNorm
from gengap_dist.parallel.strategies.unsharded_copy import UnshardedCopy

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor  # a second of imports that other strategies need not wait for

SMALL = 10_000  # parameters of fewer numbers in all are not worth a collective of their own
LARGE = 5_000_000  # containers of more are gathered child by child


def units(model: nn.Module) -> list[nn.Module]:
    """The modules whose parameters are gathered together, whatever is left being the model's own.

    They are the model's children, without the small ones; a large container (Sequential, ModuleList, ModuleDict) stands
    for its own children. Never deeper: a module may use its children's parameters without calling them. Tied
    parameters need one unit: the model.

    >>> [unit.out_features for unit in units(nn.Sequential(nn.Linear(1, 9000), nn.ReLU(), nn.Linear(9000, 2)))]
    [9000, 2]
    """
    if len(list(model.named_parameters(remove_duplicate=False))) > len(list(model.named_parameters())):
        return []
    found: list[nn.Module] = []
    for child in model.children():
        size = sum(p.numel() for p in child.parameters())
        uncallable = isinstance(child, nn.ModuleList | nn.ModuleDict)
        if uncallable or (isinstance(child, nn.Sequential) and size > LARGE):
            found += units(child)
        elif size >= SMALL:
            found.append(child)
    return found


@final
class FSDP(Strategy):
    """Parameters are gathered for each pass through a unit, gradients summed and scattered in every backward pass."""

    equal_micro_batches_required = True
    has_untimed_collectives = True

    def setup(self, model: nn.Module, build: BuildOptimizer) -> None:
        """See `Strategy.setup`. Collective.

        Raises:
            UsageError: if the model has a parameter without dimensions.
        """
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        for name, parameter in model.named_parameters():
            if not parameter.ndim:
                raise UsageError(
                    f"launch.strategy (fsdp) cannot split parameter {name}, which has no dimension: "
                    "give it the shape [1], or choose zero3"
                )
        ensure_process_group(self.world, self.config.launch.timeout_seconds)
        self._twin = UnshardedCopy(model, self.world.device)
        assert dist.group.WORLD is not None
        # not init_device_mesh, which may make a group of its own, with torch's timeout in place of ours
        mesh = DeviceMesh.from_group(dist.group.WORLD, self.world.device.type)
        for module in (*units(model), model):
            fully_shard(module, mesh=mesh)
        self._energy = LocalGradNorm()
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
                module.set_gradient_divide_factor(1.0)  # the sum over ranks, where FSDP itself would take the mean
            # inside a forward pass a module's parameters are the gathered ones: only these see the local gradient
            module.register_forward_pre_hook(self._listen)
        super().setup(model, build)
        if isinstance(self.optimizer, torch.optim.SGD):
            for group in self.optimizer.param_groups:
                group["fused"] = None  # torch's fused SGD, unlike AdamW, does not know parameters in parts

    def _listen(self, module: nn.Module, args: Any) -> None:
        if torch.is_grad_enabled():
            self._energy.listen(module.parameters(recurse=False))

    def _forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def micro_step(self, *, last: bool) -> AbstractContextManager[object]:
        """Collective: every rank has equally many."""
        self._energy.start(self.track_local_grad_norm)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """See `Strategy.backward`."""
        loss.backward()

    def local_squared_grad_norm(self) -> Tensor:
        """See `Strategy.local_squared_grad_norm`."""
        return self._energy.total()

    def gradient_norm(self) -> Tensor:
        """See `Strategy.gradient_norm`. Collective."""
        return _whole(super().gradient_norm())

    def unsharded_model(self) -> AbstractContextManager[nn.Module]:
        """See `Strategy.unsharded_model`: a copy."""
        return self._twin.filled(self._weights(), self.model)

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            yield name, _whole(parameter.detach())

    def optimizer_state(self) -> OptimizerState:
        """See `Strategy.optimizer_state`: on rank 0, in the CPU's memory."""
        out: OptimizerState = {}
        for name, kept in super().optimizer_state().items():
            whole = {key: _whole(value) for key, value in kept.items()}
            if self.world.rank == 0:
                out[name] = {key: value.cpu() for key, value in whole.items()}
        return out

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """See `Strategy.load_optimizer_state`."""
        from torch.distributed.tensor import distribute_tensor

        super().load_optimizer_state(state)
        for parameter, kept in self.optimizer.state.items():
            place = cast("DTensor", parameter)
            for key, value in kept.items():
                if value.shape == place.shape:  # every rank has the whole: nothing is sent
                    kept[key] = distribute_tensor(value, place.device_mesh, place.placements, src_data_rank=None)


def _whole(tensor: Tensor) -> Tensor:
    """A tensor that is spread over ranks, gathered; one that is not, as it is. Collective."""
    return cast("DTensor", tensor).full_tensor() if hasattr(tensor, "placements") else tensor
