"""Parameters, gradients and optimizer state sharded over ranks: torch's FSDP2, for models too large for one GPU.

With launch.shard_size each group of so many ranks shards one copy of the model (HSDP): parameters are gathered inside a
group only, and the groups' gradients are summed by an all-reduce.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, cast, final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gengap_dist.distributed.process_group import ensure_process_group
from gengap_dist.parallel.capabilities import CAPABILITIES
from gengap_dist.parallel.strategies.base import BuildOptimizer, OptimizerState, Strategy
from gengap_dist.parallel.strategies.local_grad_norm import LocalGradNorm
from gengap_dist.parallel.strategies.unsharded_copy import UnshardedCopy

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor  # takes a second to import, which other strategies do not need

MIN_UNIT_SIZE = 10_000  # modules with fewer parameters do not get a collective of their own
MAX_CONTAINER_SIZE = 5_000_000  # containers with more parameters are gathered child by child


def units(model: nn.Module) -> list[nn.Module]:
    """The modules whose parameters are gathered together; the remaining parameters are gathered with the model.

    They are the model's children, without small ones; a large container (Sequential, ModuleList, ModuleDict) is
    replaced by its children. No deeper levels: a module may use its children's parameters without calling them. A
    model with tied parameters has one unit only: itself.

    >>> [unit.out_features for unit in units(nn.Sequential(nn.Linear(1, 9000), nn.ReLU(), nn.Linear(9000, 2)))]
    [9000, 2]
    """
    if len(list(model.named_parameters(remove_duplicate=False))) > len(list(model.named_parameters())):
        return []
    modules: list[nn.Module] = []
    for child in model.children():
        size = sum(p.numel() for p in child.parameters())
        uncallable = isinstance(child, nn.ModuleList | nn.ModuleDict)
        if uncallable or (isinstance(child, nn.Sequential) and size > MAX_CONTAINER_SIZE):
            modules += units(child)
        elif size >= MIN_UNIT_SIZE:
            modules.append(child)
    return modules


@final
class FSDP(Strategy):
    """Parameters are gathered for each pass through a unit; gradients are reduce-scattered in every backward pass."""

    capabilities = CAPABILITIES["fsdp"]

    def setup(self, model: nn.Module, build: BuildOptimizer) -> None:
        """See `Strategy.setup`. Collective."""
        from torch.distributed.fsdp import FSDPModule, fully_shard

        self.world = ensure_process_group(self.world, self.config.launch.timeout_seconds)
        self._unsharded_copy = UnshardedCopy(model, self.world.device)
        shard_size, timeout = self.config.launch.shard_size, self.config.launch.timeout_seconds
        self._hybrid_mesh = self.world.hybrid_mesh(shard_size, timeout) if shard_size else None
        for module in (*units(model), model):
            fully_shard(module, mesh=self._hybrid_mesh or self.world.mesh)
        self._local_grad_norm = LocalGradNorm()
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
                module.set_gradient_divide_factor(1.0)  # the sum over ranks; FSDP itself would compute the mean
            # during a forward pass a module has the gathered parameters: only these receive the local gradient
            module.register_forward_pre_hook(self._register_gradient_hooks)
        super().setup(model, build)
        if isinstance(self.optimizer, torch.optim.SGD):
            for group in self.optimizer.param_groups:
                group["fused"] = None  # torch's fused SGD, unlike AdamW, does not support sharded parameters

    def _register_gradient_hooks(self, module: nn.Module, args: Any) -> None:
        if torch.is_grad_enabled():
            self._local_grad_norm.register_hooks(module.parameters(recurse=False))

    def _forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)

    def micro_step(self, *, last: bool) -> AbstractContextManager[object]:
        """Collective: every rank has equally many micro-steps."""
        self._local_grad_norm.start(self.track_local_grad_norm)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """See `Strategy.backward`."""
        loss.backward()

    def local_squared_grad_norm(self) -> Tensor:
        """See `Strategy.local_squared_grad_norm`."""
        return self._local_grad_norm.squared_norm()

    def gradient_norm(self) -> Tensor:
        """See `Strategy.gradient_norm`. Collective."""
        return _gather(super().gradient_norm())

    def unsharded_model(self) -> AbstractContextManager[nn.Module]:
        """See `Strategy.unsharded_model`: a copy."""
        return self._unsharded_copy.filled(self._weights(), self.model)

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            yield name, _gather(parameter.detach())

    def optimizer_state(self) -> OptimizerState:
        """See `Strategy.optimizer_state`: only on rank 0, in CPU memory."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        if not self.optimizer.state:  # it would be initialised by a step
            return {}
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        full: dict[str, Any] = get_optimizer_state_dict(self.model, self.optimizer, options=options)  # {} elsewhere
        return full.get("state", {})

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """See `Strategy.load_optimizer_state`."""
        from torch.distributed.tensor import distribute_tensor

        super().load_optimizer_state(state)
        for parameter, entry in self.optimizer.state.items():
            sharded = cast("DTensor", parameter)
            for key, value in entry.items():
                if value.shape == sharded.shape:  # every rank has the full tensor: nothing is sent
                    entry[key] = distribute_tensor(value, sharded.device_mesh, sharded.placements, src_data_rank=None)

    def close(self) -> None:
        """See `Strategy.close`: the process groups of hybrid sharding."""
        for group in self._hybrid_mesh.get_all_groups() if self._hybrid_mesh else ():
            dist.destroy_process_group(group)


def _gather(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one; other tensors are returned unchanged. Collective."""
    return cast("DTensor", tensor).full_tensor() if hasattr(tensor, "placements") else tensor
