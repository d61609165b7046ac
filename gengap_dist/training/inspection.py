"""What a training pass of a network does that a run must know: found with two samples, before the first step."""

import hashlib
import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from gengap_dist.compat.batch_norm_base import BatchNormBase
from gengap_dist.models.batch_norm import frozen_running_stats
from gengap_dist.models.dropout import SampleDraws
from gengap_dist.training.tasks import Task

ROOT = "itself"  # the network outside of its modules


class Inspection(NamedTuple):
    """Of one network; the same on every rank."""

    unused_parameters: list[str]
    """Trainable parameters that get no gradient."""
    random_modules: list[str]
    """Modules that draw random numbers by micro-batch, not by sample; "itself": the network outside of its modules."""
    changed_buffers: list[str]
    """Buffers that every pass changes, other than those of batch norm."""

    @property
    def depends_on_ranks(self) -> list[str]:
        """What makes the result depend on the number of ranks and micro-batches."""
        return [*self.random_modules, *self.changed_buffers]


def inspect(model: nn.Module, inputs: Tensor, targets: Tensor, task: Task) -> Inspection:
    """Pass a few inputs through a copy of the network, in training mode; the network is not touched.

    A network that cannot be copied, or fails in training mode, is not inspected: its first step says why.
    """
    with _random_numbers_restored():
        try:
            model = deepcopy(model).train()
            before = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
            with frozen_running_stats(model), torch.enable_grad():
                outputs, drawing = _pass(model, inputs.clone())
                used = _parameters_in_graph(task.training_loss_sum(outputs, targets))
        except Exception:  # of any network
            return Inspection([], [], [])
    names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    unused = [] if used is None else [name for parameter, name in names.items() if parameter not in used]
    changed = [
        name
        for name, buffer in model.named_buffers()
        if name in before and not _same_values(buffer, before[name]) and not _is_of_batch_norm(model, name)
    ]
    return Inspection(unused, drawing, changed)


@contextmanager
def _random_numbers_restored() -> Iterator[None]:
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    gpus = [*range(torch.cuda.device_count())] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=gpus):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002


def _random_state(device: torch.device) -> bytes:
    """Changes whenever a random number is drawn, by torch, numpy or Python."""
    parts = [random.getstate(), np.random.get_state(), torch.get_rng_state().numpy().tobytes()]  # noqa: NPY002
    if device.type == "cuda":
        parts.append(torch.cuda.get_rng_state(device).numpy().tobytes())
    return hashlib.blake2b(pickle.dumps(parts)).digest()


def _pass(model: nn.Module, inputs: Tensor) -> tuple[Any, list[str]]:
    """The output, and the innermost modules that draw random numbers, or draw by rows that are not the samples."""
    drawing: list[str] = []
    entered: list[tuple[bytes, int]] = []  # of each running module: the random state, and how many had drawn before

    def enter(module: nn.Module, args: object) -> None:
        entered.append((_random_state(inputs.device), len(drawing)))

    def leave(name: str, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        state, num_before = entered.pop()
        rows_are_not_samples = isinstance(module, SampleDraws) and module.p and len(args[0]) != len(inputs)
        draws = rows_are_not_samples or _random_state(inputs.device) != state
        if draws and len(drawing) == num_before:  # and no module inside of it
            drawing.append(name)

    handles: list[Any] = []
    for name, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(
                module.register_forward_hook(lambda *call, name=name or ROOT: leave(name, *call), always_call=True)
            )
    try:
        outputs = model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return outputs, list(dict.fromkeys(drawing))


def _parameters_in_graph(loss: Tensor) -> set[Tensor] | None:
    """The leaves that `loss` depends on, from autograd's graph, without a gradient.

    None: not known, because a part of the graph is made in the backward pass (torch.utils.checkpoint's older kind).
    """
    leaves: set[Tensor] = set()
    todo, seen = [loss.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if "Checkpoint" in type(node).__name__:
            return None
        if (variable := getattr(node, "variable", None)) is not None:
            leaves.add(variable)
        todo += [following for following, _ in node.next_functions]
    return leaves


def _is_of_batch_norm(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), BatchNormBase)


def _same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape hold the same numbers; NaN is the same as NaN.

    >>> _same_values(torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.nan]))
    True
    """
    if one.layout != other.layout or one.shape != other.shape:
        return False
    if one.is_sparse:
        one, other = one.to_dense(), other.to_dense()
    return bool(((one == other) | ((one != one) & (other != other))).all())
