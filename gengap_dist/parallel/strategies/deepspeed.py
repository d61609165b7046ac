"""DeepSpeed's ZeRO: optimizer state (stage 1), gradients (2) and parameters (3) sharded over ranks; stage 0 is DDP.

The package is optional and slow to import: it is imported only when a strategy is created.

A stage keeps flat vectors: this rank's shards of many parameters, concatenated, with the optimizer state of the same
layout. A `ParameterShard` maps a range of a parameter to a range of a flat vector; with it, weights and state are
gathered and loaded by parameter name, for any number of ranks.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from gengap_dist.compat.deepspeed_fragments import fragment
from gengap_dist.compat.deepspeed_start import errors_only, import_deepspeed, join_process_group
from gengap_dist.config.sections import RunConfig
from gengap_dist.distributed.batch_plan import BatchPlan
from gengap_dist.distributed.process_group import World, ensure_process_group
from gengap_dist.errors import UsageError
from gengap_dist.parallel.capabilities import CAPABILITIES
from gengap_dist.parallel.strategies.base import BuildOptimizer, OptimizerState, Strategy
from gengap_dist.parallel.strategies.local_grad_norm import LocalGradNorm
from gengap_dist.parallel.strategies.unsharded_copy import UnshardedCopy

MAX_BUCKET_SIZE = 50_000_000  # maximum number of gradient elements that are reduced together
PERSISTENCE_THRESHOLD = 10_000  # stage 3: smaller parameters are not sharded
STAGES = (CAPABILITIES["zero0"], CAPABILITIES["zero1"], CAPABILITIES["zero2"], CAPABILITIES["zero3"])


class ParameterShard(NamedTuple):
    """Elements `start` .. `start + size` of a parameter are `offset` .. `offset + size` of a flat vector."""

    flat: Tensor
    offset: int
    start: int
    size: int


@final
class DeepSpeedZero(Strategy):
    """A DeepSpeed engine of one ZeRO stage that sums gradients exactly as the other strategies do."""

    def __init__(self, config: RunConfig, world: World, *, stage: int) -> None:
        """See `Strategy`.

        Raises:
            UsageError: if deepspeed cannot be imported.
        """
        super().__init__(config, world)
        self.stage, self.capabilities = stage, STAGES[stage]
        self._deepspeed = _import(f"zero{stage}", world.device)

    def setup(self, model: nn.Module, build: BuildOptimizer) -> None:
        """See `Strategy.setup`. Collective."""
        ensure_process_group(self.world, self.config.launch.timeout_seconds)
        join_process_group(self._deepspeed, self.world.device.type, self.config.launch.timeout_seconds)
        self._unsharded_copy = UnshardedCopy(model, self.world.device) if self.stage == 3 else None
        super().setup(model, build)
        with errors_only():
            self._engine, *_ = self._deepspeed.initialize(
                model=_AutocastModule(model, self.execution.autocast),
                optimizer=self.optimizer,
                config=self._engine_config(),
            )
        self._local_grad_norm = LocalGradNorm()
        self._local_grad_norm.register_hooks(model.parameters())

    def _engine_config(self) -> dict[str, Any]:
        """DeepSpeed's config."""
        batch, size = self.config.batch, self.world.size
        plan = BatchPlan(batch.global_size, size, batch.max_micro_size, batch.ghost_size)
        spans = [plan.micro_batches(rank) for rank in range(size)]
        # The sizes of an evenly split batch; an uneven one has fewer samples. DeepSpeed uses them only for checks and
        # counts: `backward` and `micro_step` avoid its divisions.
        micro, accumulation = max(span.size for of_rank in spans for span in of_rank), max(map(len, spans))
        bucket = min(MAX_BUCKET_SIZE, sum(p.numel() for p in self.model.parameters()))
        return {
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": accumulation,
            "train_batch_size": micro * accumulation * size,
            "zero_optimization": {
                "stage": self.stage,
                "reduce_bucket_size": bucket,
                "stage3_param_persistence_threshold": PERSISTENCE_THRESHOLD,
            },
            # its default clips the norm at 1
            "gradient_clipping": (self.config.optim.clip_norm or 0.0) if self.stage else 0.0,
            "zero_allow_untested_optimizer": True,  # SGD; the contract tests cover it
            "steps_per_print": sys.maxsize,
            "timers": {"throughput": {"enabled": False}},  # otherwise it waits for the GPU in every pass
        }

    def _forward(self, inputs: Tensor) -> Tensor:
        # the engine disables an outer autocast, with a warning: `_AutocastModule` enters it
        with torch.autocast(self.world.device.type, enabled=False):
            return self._engine(inputs)

    def micro_step(self, *, last: bool) -> AbstractContextManager[object]:
        """Collective in the last micro-step, from stage 2 on in all: every rank has equally many."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._local_grad_norm.start(self.track_local_grad_norm)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """See `Strategy.backward`."""
        # the engine computes the mean over ranks; the sum is the gradient of the global mean
        self._engine.backward(loss * self.world.size, scale_wrt_gas=False)

    def local_squared_grad_norm(self) -> Tensor:
        """See `Strategy.local_squared_grad_norm`."""
        return self._local_grad_norm.squared_norm() / self.world.size**2

    def step(self) -> Tensor:
        """See `Strategy.step`. Collective."""
        if self.stage == 0:
            norm = self.gradient_norm()
            self._clip(norm)
            self._engine.step()
            return norm
        self._engine.step()
        if not self._engine.was_step_applied():  # the gradient was not finite: other strategies have NaN weights then
            for parameter in self.model.parameters():
                parameter.data.fill_(torch.nan)
                getattr(parameter, "ds_tensor", parameter).data.fill_(torch.nan)
        norm = torch.as_tensor(self._engine.get_global_grad_norm())
        return norm.detach().to(self.world.device, torch.float32)

    def unsharded_model(self) -> AbstractContextManager[nn.Module]:
        """See `Strategy.unsharded_model`: at stage 3, a copy."""
        return (
            self._unsharded_copy.filled(self._weights(), self.model)
            if self._unsharded_copy
            else super().unsharded_model()
        )

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            local: Any = parameter  # with the attributes that DeepSpeed has added
            shard = _stage3_shard(local, local.ds_tensor.data.view(-1), 0, self.world.rank)
            yield name, self._gather(shard, shard.flat, local.ds_shape)

    def _shards(self) -> Iterator[tuple[str, torch.Size, ParameterShard | None]]:
        """Names and shapes of the trained parameters, and this rank's shard of each, if it has one."""
        zero = self._engine.optimizer
        for name, parameter in self.model.named_parameters():
            local: Any = parameter
            if not parameter.requires_grad:
                continue
            if self.stage == 3:
                group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
                flat = zero.fp32_partitioned_groups_flat[group]
                yield name, local.ds_shape, _stage3_shard(local, flat, offset, self.world.rank)
                continue
            shard = None
            if part := fragment(parameter):
                shard = ParameterShard(zero.single_partition_of_fp32_groups[part.group], *part[1:])
            yield name, parameter.shape, shard

    def _gather(self, shard: ParameterShard | None, values: Tensor, shape: torch.Size) -> Tensor:
        """The full tensor, from the ranks' shards. Collective."""
        full = torch.zeros(shape.numel(), dtype=values.dtype, device=self.world.device)
        if shard:
            full[shard.start : shard.start + shard.size] = values[shard.offset : shard.offset + shard.size]
        return self.world.all_reduce(full).view(shape)

    def optimizer_state(self) -> OptimizerState:
        """See `Strategy.optimizer_state`: only on rank 0, in CPU memory."""
        if self.stage == 0:
            return super().optimizer_state()
        out: OptimizerState = {}
        if not self.optimizer.state:
            return out
        any_flat = next(iter(self.optimizer.state))  # every rank has one, and all have the same quantities
        for name, shape, shard in self._shards():
            flat = shard.flat if shard else any_flat
            for key, values in self.optimizer.state[flat].items():
                value = self._gather(shard, values, shape) if values.shape == flat.shape else values
                if self.world.rank == 0:
                    out.setdefault(name, {})[key] = value.cpu().clone()
        return out

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """See `Strategy.load_optimizer_state`."""
        if self.stage == 0:
            return super().load_optimizer_state(state)
        for name, shape, shard in self._shards():
            if not shard or name not in state:
                continue
            entry = self.optimizer.state[shard.flat]
            for key, value in state[name].items():
                if value.shape != shape:
                    entry[key] = value.to(self.world.device, copy=True)
                    continue
                flat = entry.setdefault(key, torch.zeros_like(shard.flat))
                flat[shard.offset : shard.offset + shard.size] = value.view(-1)[shard.start : shard.start + shard.size]
        return None

    def close(self) -> None:
        """See `Strategy.close`; a cache inside DeepSpeed still keeps the shards of a stage 3 model."""
        self._engine.destroy()


def _stage3_shard(parameter: Any, flat: Tensor, offset: int, rank: int) -> ParameterShard:
    """Ranks hold consecutive shards of one size; the last ones are padded or empty."""
    size = parameter.partition_numel()
    start = min(rank * size, parameter.ds_numel)
    return ParameterShard(flat, offset, start, min(size, parameter.ds_numel - start))


class _AutocastModule(nn.Module):
    """The model as the engine calls it: under autocast."""

    def __init__(self, net: nn.Module, autocast: Callable[[], AbstractContextManager[object]]) -> None:
        super().__init__()
        self.net, self.autocast = net, autocast

    def forward(self, inputs: Tensor) -> Tensor:
        with self.autocast():
            return self.net(inputs)


def _import(strategy: str, device: torch.device) -> Any:
    """Import deepspeed.

    Raises:
        UsageError: if it is missing or broken.
    """
    try:
        return import_deepspeed(device.type)
    except ImportError as error:
        missing = error.name == "deepspeed"
        raise UsageError(
            f"launch.strategy ({strategy}) needs the package deepspeed"
            + ("" if missing else f", which cannot be imported ({error})")
            + ': pip install "gengap_dist[deepspeed]", or choose ddp or fsdp'
        ) from None
