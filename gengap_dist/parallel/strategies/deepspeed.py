"""DeepSpeed's ZeRO: optimizer state (stage 1), gradients (2) and parameters (3) in parts over ranks; stage 0 is DDP.

The package is optional and slow to import: nothing of it is touched before a strategy is made.

A stage keeps flat vectors: this rank's parts of many parameters, end to end, with the optimizer's state beside them. A
`Part` says which stretch of a parameter is which stretch of a flat vector; with it weights and state are gathered and
given back by the parameters' names, whatever the number of ranks.
"""

import logging
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, NamedTuple, final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gengap_dist.config.sections import RunConfig
from gengap_dist.distributed.batch_plan import BatchPlan
from gengap_dist.distributed.process_group import World, ensure_process_group
from gengap_dist.errors import UsageError
from gengap_dist.parallel.strategies.base import BuildOptimizer, OptimizerState, Strategy
from gengap_dist.parallel.strategies.local_grad_norm import LocalGradNorm
from gengap_dist.parallel.strategies.unsharded_copy import UnshardedCopy

BUCKET = 50_000_000  # most gradients, in numbers, that wait to be reduced together
PERSISTENT = 10_000  # stage 3: parameters of fewer numbers stay whole on every rank


class ParameterShard(NamedTuple):
    """Numbers `start` .. `start + size` of a parameter are `offset` .. `offset + size` of a flat vector."""

    flat: Tensor
    offset: int
    start: int
    size: int


def check(config: RunConfig, stage: int) -> None:
    """Refuse what a stage cannot train; deepspeed itself is not needed to know.

    Raises:
        UsageError: for float64, and for LARS and LAMB where a rank sees parts of many layers as one vector.
    """
    if config.train.dtype != "float32":
        raise UsageError(
            f"train.dtype ({config.train.dtype}) is not for launch.strategy=zero{stage}, which keeps float32 "
            "weights: choose train.dtype=float32, or ddp or fsdp"
        )
    if stage and config.optim.name in ("lars", "lamb"):
        raise UsageError(
            f"optim.name ({config.optim.name}) is not for launch.strategy=zero{stage}, where a rank sees parts of many "
            "layers as one vector and a layer's norm is nowhere: choose zero0, ddp or fsdp"
        )


@final
class DeepSpeedZero(Strategy):
    """A DeepSpeed engine of one ZeRO stage, made to sum gradients exactly as the other strategies do."""

    has_untimed_collectives = True

    def __init__(self, config: RunConfig, world: World, *, stage: int) -> None:
        """See `Strategy`.

        Raises:
            UsageError: if deepspeed cannot be imported, or the stage cannot train what the config asks for.
        """
        super().__init__(config, world)
        self.stage = stage
        self.equal_micro_batches_required = stage >= 2  # gradients are reduced in every backward pass
        check(config, stage)
        self._deepspeed = _import(f"zero{stage}", world.device)

    def setup(self, model: nn.Module, build: BuildOptimizer) -> None:
        """See `Strategy.setup`. Collective."""
        ensure_process_group(self.world, self.config.launch.timeout_seconds)
        _adopt_group(self._deepspeed, self.world.device, self.config.launch.timeout_seconds)
        self._twin = UnshardedCopy(model, self.world.device) if self.stage == 3 else None
        super().setup(model, build)
        with _quiet():
            self._engine, *_ = self._deepspeed.initialize(
                model=_Inside(model, super()._autocast), optimizer=self.optimizer, config=self._settings()
            )
        self._energy = LocalGradNorm()
        self._energy.listen(model.parameters())

    def _settings(self) -> dict[str, Any]:
        """DeepSpeed's config."""
        batch, size = self.config.batch, self.world.size
        plan = BatchPlan(batch.global_size, size, batch.max_micro_size, batch.ghost_size)
        spans = [plan.micro_batches(rank) for rank in range(size)]
        # Terms of a batch that is cut evenly: an uneven one has fewer samples. DeepSpeed only checks and counts with
        # them; `backward` and `micro_step` leave it no division to make.
        micro, accumulation = max(span.size for some in spans for span in some), max(map(len, spans))
        bucket = min(BUCKET, sum(p.numel() for p in self.model.parameters()))
        return {
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": accumulation,
            "train_batch_size": micro * accumulation * size,
            "zero_optimization": {
                "stage": self.stage,
                "reduce_bucket_size": bucket,
                "stage3_param_persistence_threshold": PERSISTENT,
            },
            # without a word it clips the norm at 1
            "gradient_clipping": (self.config.optim.clip_norm or 0.0) if self.stage else 0.0,
            "zero_allow_untested_optimizer": True,  # SGD; the contract's tests are its tests
            "steps_per_print": sys.maxsize,
            "timers": {"throughput": {"enabled": False}},  # it would wait for the GPU in every pass
        }

    def _autocast(self) -> AbstractContextManager[object]:
        return nullcontext()  # the engine would leave an outer one: `_Inside` enters it

    def _forward(self, images: Tensor) -> Tensor:
        return self._engine(images)

    def micro_step(self, *, last: bool) -> AbstractContextManager[object]:
        """Collective in the last micro-step, from stage 2 on in every one: every rank has equally many."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._energy.start(self.track_local_grad_norm)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """See `Strategy.backward`."""
        # the engine takes the mean over ranks, of what is the global mean when summed
        self._engine.backward(loss * self.world.size, scale_wrt_gas=False)

    def local_squared_grad_norm(self) -> Tensor:
        """See `Strategy.local_squared_grad_norm`."""
        return self._energy.total() / self.world.size**2

    def step(self) -> Tensor:
        """See `Strategy.step`. Collective."""
        if self.stage == 0:
            norm = self.gradient_norm()
            self._clip(norm)
            self._engine.step()
            return norm
        self._engine.step()
        if not self._engine.was_step_applied():  # the gradient was no number: elsewhere, the weights are none now
            for parameter in self.model.parameters():
                parameter.data.fill_(torch.nan)
                getattr(parameter, "ds_tensor", parameter).data.fill_(torch.nan)
        norm = torch.as_tensor(self._engine.get_global_grad_norm())
        return norm.detach().to(self.world.device, torch.float32)

    def unsharded_model(self) -> AbstractContextManager[nn.Module]:
        """See `Strategy.unsharded_model`: at stage 3, a copy."""
        return self._twin.filled(self._weights(), self.model) if self._twin else super().unsharded_model()

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            local: Any = parameter  # with what DeepSpeed has put on it
            part = _stage3_part(local, local.ds_tensor.data.view(-1), 0, self.world.rank)
            yield name, self._gather(part, part.flat, local.ds_shape)

    def _parts(self) -> Iterator[tuple[str, torch.Size, ParameterShard | None]]:
        """Names and shapes of the trained parameters, and this rank's part of each, if it has one."""
        zero = self._engine.optimizer
        for name, parameter in self.model.named_parameters():
            local: Any = parameter
            if not parameter.requires_grad:
                continue
            if self.stage == 3:
                group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
                flat = zero.fp32_partitioned_groups_flat[group]
                yield name, local.ds_shape, _stage3_part(local, flat, offset, self.world.rank)
                continue
            part = None
            if found := local._hp_mapping:
                here, there = found.lp_fragment_address, found.hp_fragment_address
                flat = zero.single_partition_of_fp32_groups[found.param_group_index]
                part = ParameterShard(flat, there.start, here.start, here.numel)
            yield name, parameter.shape, part

    def _gather(self, part: ParameterShard | None, values: Tensor, shape: torch.Size) -> Tensor:
        """A whole tensor, from the ranks' parts of it. Collective."""
        whole = torch.zeros(shape.numel(), dtype=values.dtype, device=self.world.device)
        if part:
            whole[part.start : part.start + part.size] = values[part.offset : part.offset + part.size]
        return self.world.all_reduce(whole).view(shape)

    def optimizer_state(self) -> OptimizerState:
        """See `Strategy.optimizer_state`: on rank 0, in the CPU's memory."""
        if self.stage == 0:
            return super().optimizer_state()
        out: OptimizerState = {}
        if not self.optimizer.state:
            return out
        some_flat = next(iter(self.optimizer.state))  # every rank has one, and all hold the same quantities
        for name, shape, part in self._parts():
            flat = part.flat if part else some_flat
            for key, values in self.optimizer.state[flat].items():
                value = self._gather(part, values, shape) if values.shape == flat.shape else values
                if self.world.rank == 0:
                    out.setdefault(name, {})[key] = value.cpu().clone()
        return out

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """See `Strategy.load_optimizer_state`."""
        if self.stage == 0:
            return super().load_optimizer_state(state)
        for name, shape, part in self._parts():
            if not part or name not in state:
                continue
            kept = self.optimizer.state[part.flat]
            for key, value in state[name].items():
                if value.shape != shape:
                    kept[key] = value.to(self.world.device, copy=True)
                    continue
                flat = kept.setdefault(key, torch.zeros_like(part.flat))
                flat[part.offset : part.offset + part.size] = value.view(-1)[part.start : part.start + part.size]
        return None

    def close(self) -> None:
        """See `Strategy.close`; a cache of DeepSpeed's own keeps the parts of a stage 3 model all the same."""
        self._engine.destroy()


def _stage3_part(parameter: Any, flat: Tensor, offset: int, rank: int) -> ParameterShard:
    """Ranks hold consecutive parts of one size, the last ones padded or empty."""
    size = parameter.partition_numel()
    start = min(rank * size, parameter.ds_numel)
    return ParameterShard(flat, offset, start, min(size, parameter.ds_numel - start))


class _Inside(nn.Module):
    """The network as the engine calls it: under autocast."""

    def __init__(self, net: nn.Module, autocast: Callable[[], AbstractContextManager[object]]) -> None:
        super().__init__()
        self.net, self.autocast = net, autocast

    def forward(self, images: Tensor) -> Tensor:
        with self.autocast():
            return self.net(images)


def _import(strategy: str, device: torch.device) -> Any:
    """The package.

    Raises:
        UsageError: if it is missing or broken.
    """
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported
    try:
        import deepspeed
    except ImportError as error:
        missing = error.name == "deepspeed"
        raise UsageError(
            f"launch.strategy ({strategy}) needs the package deepspeed"
            + ("" if missing else f", which cannot be imported ({error})")
            + ': pip install "gengap_dist[deepspeed]", or choose ddp or fsdp'
        ) from None
    return deepspeed


def _adopt_group(deepspeed: Any, device: torch.device, timeout_seconds: int) -> None:
    """Let DeepSpeed talk over our ranks: our process group, our timeout, and nothing compiled. Collective.

    On a CPU it would first build an op with g++ and ninja, for a minute; only inference calls it.
    """
    from deepspeed.utils import groups

    if deepspeed.comm.is_initialized():
        return
    known = deepspeed.ops.__dict__.pop("__compatible_ops__", None)
    deepspeed.ops.__compatible_ops__ = defaultdict(bool)
    with _quiet():
        deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False)
    del deepspeed.ops.__compatible_ops__
    if known is not None:
        deepspeed.ops.__compatible_ops__ = known
    groups._WORLD_GROUP = dist.new_group(timeout=timedelta(seconds=timeout_seconds))


@contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed says errors only: its warnings here are of what is done on purpose."""
    logger = logging.getLogger("DeepSpeed")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
