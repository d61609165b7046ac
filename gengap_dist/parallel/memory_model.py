"""What a rank holds: weights, gradients, optimizer state, activations, images, the probe. In bytes."""

import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from gengap_dist.config.sections import OptimConfig, RunConfig
from gengap_dist.parallel.execution import blocks
from gengap_dist.probes.layer_view import LayerView
from gengap_dist.probes.spectra.measure import ColumnBlock


class Sharding(NamedTuple):
    """What a strategy spreads over ranks instead of keeping all of it on each (Rajbhandari et al. 2020, ZeRO)."""

    state: bool = False
    gradients: bool = False
    parameters: bool = False
    masters: bool = False
    """Whether the engine keeps float32 copies of its share of the parameters, even of float32 ones (DeepSpeed does)."""


SHARDING = {
    "single": Sharding(),
    "ddp": Sharding(),
    "zero0": Sharding(),
    "zero1": Sharding(state=True, masters=True),
    "zero2": Sharding(state=True, gradients=True, masters=True),
    "zero3": Sharding(state=True, gradients=True, parameters=True, masters=True),
    "fsdp": Sharding(state=True, gradients=True, parameters=True),
}


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank, the one with the most."""

    parameters: int
    """And buffers."""
    gradients: int
    optimizer_state: int
    """And masters, where the strategy has them."""
    kept_weights: int
    """Copies that the run keeps whole: where training started (the probe), and the best so far (validation)."""
    data: int
    """The whole data set: every rank holds it."""
    activations: int
    """What one micro-batch saves for its backward pass."""
    activations_by: str
    """How that was found."""
    probe: int
    """Matrices, held columns and blocks at their most, probe images, and whole parameters where they are sharded."""
    probe_limit: int
    """probe.memory_mib, which bounds the first three."""

    @property
    def total(self) -> int:
        """At the fuller moment, training or probe; temporaries of single operations and libraries are not in it."""
        held = self.parameters + self.gradients + self.optimizer_state + self.kept_weights + self.data
        return held + max(self.activations, self.probe)


def state_copies(config: OptimConfig) -> int:
    """Numbers that the optimizer remembers for each parameter.

    >>> state_copies(OptimConfig(name="adamw")), state_copies(OptimConfig(momentum=0.0))
    (2, 0)
    """
    return 2 if config.name in ("adamw", "lamb") else int(config.momentum > 0)


def algorithm_copies(config: RunConfig, num_ranks: int) -> int:
    """Copies of the weights that a rank's algorithm keeps beside the network that trains, at the fullest moment.

    SAM: the weights and the ascent. Gradient penalty: the weights, two gradients and their sum. Averages: one. Networks
    that step on their own: weights, gradient and optimizer state of each that the rank has.

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


def weights(config: RunConfig, model: nn.Module, strategy: str, num_ranks: int) -> dict[str, int]:
    """Bytes of parameters, gradients, optimizer state and kept weights on a rank of `strategy`."""
    sharding = SHARDING[strategy]
    itemsize = getattr(torch, config.train.dtype).itemsize
    whole = itemsize * sum(p.numel() for p in model.parameters())
    trained = itemsize * sum(p.numel() for p in model.parameters() if p.requires_grad)
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    copies = int(config.probe.enabled) + int(config.data.val_fraction > 0) + algorithm_copies(config, num_ranks)

    def part(num_bytes: int, shared: bool) -> int:
        return -(-num_bytes // num_ranks) if shared else num_bytes

    return {
        "parameters": part(whole, sharding.parameters) + buffers,
        "gradients": part(trained, sharding.gradients),
        "optimizer_state": part((state_copies(config.optim) + sharding.masters) * trained, sharding.state),
        "kept_weights": copies * whole,
    }


def saved_for_backward(config: RunConfig, model: nn.Module, shape: Sequence[int], micro_size: int) -> tuple[int, str]:
    """Bytes that autograd saves in one forward pass of `micro_size` images [C, H, W] and its loss, and how it is known.

    Every storage that is saved counts once; parameters and buffers do not count. With
    train.activation_checkpointing they are those of blocks' inputs, those saved outside blocks, and the most that one
    block saves when its turn comes. Tensors are fake: they have shapes and no values, so the pass takes neither the
    memory nor the time of a real one. A network that cannot run so (its path depends on values) is run with 2 and 4
    real images, and the line through both is drawn.
    """
    try:
        with FakeTensorMode() as mode:
            named = {n: mode.from_tensor(t) for n, t in [*model.named_parameters(), *model.named_buffers()]}
            found = _saved(config, model, named, _blank(config, model, (micro_size, *shape)))
        return found, f"one pass of {micro_size} fake images"
    except Exception as error:  # whatever an unknown network meets where numbers have no values
        warnings.warn(
            f"{config.model.name} needs values to run ({type(error).__name__}): its activations are measured with 2 "
            "and 4 images, and extrapolated",
            stacklevel=2,
        )
    named = dict([*model.named_parameters(), *model.named_buffers()])
    two, four = (_saved(config, model, named, _blank(config, model, (n, *shape))) for n in (2, 4))
    return two + (four - two) * (micro_size - 2) // 2, "passes of 2 and 4 images, extrapolated"


def _blank(config: RunConfig, model: nn.Module, shape: Sequence[int]) -> Tensor:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return torch.zeros(*shape, dtype=getattr(torch, config.train.dtype), device=device)


def _saved(config: RunConfig, model: nn.Module, named: Mapping[str, Tensor], images: Tensor) -> int:
    own = {tensor.untyped_storage()._cdata for tensor in named.values()}
    outside: dict[int, int] = {}
    saved = outside  # or by the block that is running, if it will be computed again
    inside: list[dict[int, int]] = []
    kept: list[Tensor] = []  # so that no other storage takes its place

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage.nbytes()
            kept.append(tensor.detach())
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
    for block in blocks(model) if config.train.activation_checkpointing else []:
        hooks.callback(block.register_forward_pre_hook(enter).remove)
        hooks.callback(block.register_forward_hook(leave).remove)
    autocast = torch.autocast(images.device.type, torch.bfloat16, enabled=config.train.autocast is not None)
    with hooks, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with autocast:
            logits = functional_call(model.train(), dict(named), (images,))
        labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        loss = cross_entropy(logits.to(images.dtype), labels, reduction="sum")
    del loss
    most = max((sum(size for key, size in block.items() if key not in outside) for block in inside), default=0)
    return sum(outside.values()) + most


def probe_bytes(
    sites: Sequence[LayerView], passes: Sequence[Sequence[ColumnBlock]], most_inputs: int, stream: int
) -> int:
    """What the probe's matrices, held columns and one block take on the rank with the most inputs, in its worst pass.

    A site whose columns take several passes keeps its matrix through all of them.
    """
    worst = 0
    for number, pieces in enumerate(passes):
        begun = {piece.site for earlier in passes[:number] for piece in earlier}
        goes_on = {piece.site for later in passes[number:] for piece in later}
        alive = {piece.site for piece in pieces} | (begun & goes_on)
        held = sum((piece.stop - piece.start) * sites[piece.site].column_bytes(most_inputs) for piece in pieces)
        worst = max(worst, held + sum(sites[site].state_bytes for site in alive))
    return worst + stream
