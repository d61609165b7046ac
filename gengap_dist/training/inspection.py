"""What a training pass of a network does that a run must know: found with two samples, before the first step."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gengap_dist.compat.batch_norm_base import BatchNormBase
from gengap_dist.models.batch_norm import frozen_running_stats
from gengap_dist.models.sample_position import position_of
from gengap_dist.probes.activations import eval_context
from gengap_dist.training.tasks import Task


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
    """Pass a few inputs through the network twice, in training mode, with other random numbers; it is left as found.

    A network that fails in training mode is not inspected: its first step says why.
    """
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with _as_found(model):
            outputs, first = _calls(model, inputs, seed=0)
            loss = task.training_loss_sum(outputs, targets)
            used = _parameters_in_graph(loss)
            changed = [name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])]
        with _as_found(model):
            _, second = _calls(model, inputs, seed=1)
    except Exception:  # of any network
        return Inspection([], [], [])
    unused = [name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter not in used]
    return Inspection(unused, _random(first, second), [name for name in changed if not _is_of_batch_norm(model, name)])


@contextmanager
def _as_found(model: nn.Module) -> Iterator[None]:
    """Training mode with gradients, at a pass of its own; modes, buffers and random numbers are restored."""
    position = position_of(model)
    calls, position.calls = position.calls, {}
    try:
        with eval_context(model), frozen_running_stats(model), torch.enable_grad():
            model.train()
            yield
    finally:
        position.calls = calls


class _ModuleCall(NamedTuple):
    name: str
    inputs: list[Tensor]
    output: Any


def _calls(model: nn.Module, inputs: Tensor, *, seed: int) -> tuple[Any, list[_ModuleCall]]:
    """The output of a pass, and every call of a module in it, innermost first."""
    calls: list[_ModuleCall] = []
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any, name: str = name or "itself") -> None:
            calls.append(_ModuleCall(name, [arg.detach() for arg in args if isinstance(arg, Tensor)], output))

        handles.append(module.register_forward_hook(hook))
    try:
        torch.manual_seed(seed)
        return model(inputs), calls
    finally:
        for handle in handles:
            handle.remove()


def _random(first: list[_ModuleCall], second: list[_ModuleCall]) -> list[str]:
    """The innermost modules whose output differs between two passes although their inputs do not."""
    if [call.name for call in first] != [call.name for call in second]:
        return ["itself"]
    found: list[str] = []
    for one, other in zip(first, second, strict=True):
        same_inputs = all(torch.equal(a, b) for a, b in zip(one.inputs, other.inputs, strict=True))
        if same_inputs and not _equal(one.output, other.output):
            inside = [name for name in found if one.name == "itself" or name.startswith(f"{one.name}.")]
            if not inside:
                found.append(one.name)
    return list(Counter(found))


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_equal, one, other))
    return True


def _parameters_in_graph(loss: Tensor) -> set[Tensor]:
    """The leaves that `loss` depends on, from autograd's graph: no gradient is computed."""
    leaves: set[Tensor] = set()
    todo, seen = [loss.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (variable := getattr(node, "variable", None)) is not None:
            leaves.add(variable)
        todo += [following for following, _ in node.next_functions]
    return leaves


def _is_of_batch_norm(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), BatchNormBase)
