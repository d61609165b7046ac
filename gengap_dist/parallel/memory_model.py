"""Memory of a rank in bytes: weights, gradients, optimizer state, activations, samples, probe."""

import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gengap_dist.compat.fake_tensors import FakeTensorMode
from gengap_dist.config.measures import Strategy
from gengap_dist.config.sections import OptimConfig, RunConfig
from gengap_dist.data.data_spec import DataSpec
from gengap_dist.parallel.capabilities import CAPABILITIES
from gengap_dist.parallel.execution import checkpointable_blocks
from gengap_dist.probes.hessian import LossSum
from gengap_dist.probes.layer_view import LayerView
from gengap_dist.probes.spectra.measure import ColumnBlock


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the rank that needs most."""

    parameters: int
    """Including buffers."""
    gradients: int
    optimizer_state: int
    """Including master weights, if the strategy has them."""
    kept_weights: int
    """Unsharded copies that the run keeps: the initial weights (probe) and the best weights so far (validation)."""
    data: int
    """The whole data set, on every rank."""
    activations: int
    """Saved for the backward pass of one micro-batch."""
    activations_method: str
    """How `activations` was determined."""
    probe: int
    """Maximum of matrices, column blocks and batch blocks; probe samples; unsharded parameters if they are sharded."""
    probe_limit: int
    """probe.memory_mib, which limits the matrices, column blocks and batch blocks."""

    @property
    def total(self) -> int:
        """The larger of training and probe; without temporaries of single operations and of libraries."""
        constant = self.parameters + self.gradients + self.optimizer_state + self.kept_weights + self.data
        return constant + max(self.activations, self.probe)


def state_copies(config: OptimConfig) -> int:
    """Values of optimizer state per parameter; of muon those of its adamw part, of a user's own as many.

    >>> state_copies(OptimConfig(name="adamw")), state_copies(OptimConfig(momentum=0.0))
    (2, 0)
    """
    return int(config.momentum > 0) if config.name in ("sgd", "lars") else 2


def algorithm_copies(config: RunConfig, num_ranks: int) -> int:
    """Maximum number of copies of the weights that a rank's algorithm keeps besides the model.

    SAM: the weights and the ascent step. Gradient penalty: the weights, two gradients and their sum. Weight averaging:
    one. Local SGD: weights, gradient and optimizer state of each worker on the rank.

    >>> algorithm_copies(RunConfig.model_validate({"algorithm": {"local_sgd": "swap", "workers": 4}}), num_ranks=3)
    6
    """
    algorithm = config.algorithm
    copies = (
        2 * (algorithm.sam_rho is not None)
        + 4 * (algorithm.gradient_penalty is not None)
        + bool(algorithm.weight_averaging)
    )
    if algorithm.local_sgd:
        copies += -(-algorithm.workers // num_ranks) * (2 + state_copies(config.optim))
    return copies


def weight_bytes(config: RunConfig, model: nn.Module, strategy: Strategy, num_ranks: int) -> dict[str, int]:
    """Bytes of parameters, gradients, optimizer state and kept weights on a rank under `strategy`."""
    sharding = CAPABILITIES[strategy].sharding
    itemsize = getattr(torch, config.train.dtype).itemsize
    unsharded_bytes = itemsize * sum(p.numel() for p in model.parameters())
    trained = itemsize * sum(p.numel() for p in model.parameters() if p.requires_grad)
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    copies = int(config.probe.enabled) + int(config.data.val_fraction > 0) + algorithm_copies(config, num_ranks)

    def per_rank(num_bytes: int, sharded: bool) -> int:
        return -(-num_bytes // (config.launch.shard_size or num_ranks)) if sharded else num_bytes

    return {
        "parameters": per_rank(unsharded_bytes, sharding.parameters) + buffers,
        "gradients": per_rank(trained, sharding.gradients),
        "optimizer_state": per_rank((state_copies(config.optim) + sharding.master_weights) * trained, sharding.state),
        "kept_weights": copies * unsharded_bytes,
    }


def saved_for_backward(
    config: RunConfig, model: nn.Module, spec: DataSpec, loss_sum: LossSum, micro_size: int
) -> tuple[int, str]:
    """Bytes that autograd saves in one forward pass of `micro_size` samples and its loss, and the method used.

    Every saved storage counts once; parameters and buffers do not count. With train.activation_checkpointing the sum
    is over blocks' inputs, tensors saved outside blocks, and the maximum that one block saves when it is recomputed.
    The pass uses fake tensors, which have shapes but no values, so it takes neither the memory nor the time of a real
    pass. A model that cannot run on them (its control flow depends on values) is run with 2 and 4 real samples, and the
    result is extrapolated linearly.
    """
    try:
        with FakeTensorMode() as mode:
            named = {n: mode.from_tensor(t) for n, t in [*model.named_parameters(), *model.named_buffers()]}
            num_bytes = _saved_bytes(config, model, named, spec, loss_sum, micro_size)
        return num_bytes, f"one pass of {micro_size} fake samples"
    except Exception as error:  # an unknown model may raise anything on fake tensors
        warnings.warn(
            f"{config.model.name} needs values to run ({type(error).__name__}): its activations are measured with 2 "
            "and 4 samples, and extrapolated",
            stacklevel=2,
        )
    named = dict([*model.named_parameters(), *model.named_buffers()])
    two, four = (_saved_bytes(config, model, named, spec, loss_sum, num) for num in (2, 4))
    return two + (four - two) * (micro_size - 2) // 2, "passes of 2 and 4 samples, extrapolated"


def _saved_bytes(
    config: RunConfig, model: nn.Module, named: Mapping[str, Tensor], spec: DataSpec, loss_sum: LossSum, num: int
) -> int:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    inputs, targets = spec.zero_inputs(num, getattr(torch, config.train.dtype), device), spec.zero_targets(num, device)
    own = {tensor.untyped_storage() for tensor in named.values()}
    outside: dict[torch.UntypedStorage, int] = {}
    saved = outside  # or the dict of the running block, if it is checkpointed
    inside: list[dict[torch.UntypedStorage, int]] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage not in own:
            saved[storage] = storage.nbytes()
        return tensor

    def enter(block: nn.Module, args: tuple[object, ...]) -> None:
        nonlocal saved
        for tensor in args:
            if isinstance(tensor, Tensor):
                pack(tensor)
        inside.append({})
        saved = inside[-1]

    def leave(block: nn.Module, args: object, output: object) -> None:
        nonlocal saved
        saved = outside

    hooks = ExitStack()
    for block in checkpointable_blocks(model) if config.train.activation_checkpointing else []:
        hooks.callback(block.register_forward_pre_hook(enter).remove)
        hooks.callback(block.register_forward_hook(leave).remove)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.train.autocast is not None)
    with hooks, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with autocast:
            outputs = functional_call(model.train(), dict(named), (inputs,))
        loss = loss_sum(outputs.to(getattr(torch, config.train.dtype)), targets)
    del loss
    max_block = max(
        (sum(size for storage, size in block.items() if storage not in outside) for block in inside), default=0
    )
    return sum(outside.values()) + max_block


def probe_bytes(
    views: Sequence[LayerView], passes: Sequence[Sequence[ColumnBlock]], max_inputs: int, block_bytes: int
) -> int:
    """Bytes of the probe's matrices, column blocks and one batch block on the rank with the most inputs; the maximum
    over passes.

    A layer view whose columns need several passes keeps its matrix during all of them.
    """
    worst = 0
    for number, column_blocks in enumerate(passes):
        started = {block.view_index for earlier in passes[:number] for block in earlier}
        continued = {block.view_index for later in passes[number:] for block in later}
        alive = {block.view_index for block in column_blocks} | (started & continued)
        column_bytes = sum(
            (block.stop - block.start) * views[block.view_index].column_bytes(max_inputs) for block in column_blocks
        )
        worst = max(worst, column_bytes + sum(views[index].state_bytes for index in alive))
    return worst + block_bytes
