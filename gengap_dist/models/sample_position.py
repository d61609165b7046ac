"""Position of a micro-batch in the global batch, for layers whose result must not depend on ranks or micro-batches."""

from dataclasses import dataclass, field

from torch import nn

from gengap_dist.compat.recomputation import in_backward


@dataclass
class SamplePosition:
    """Samples `start` .. `start + n` of a global batch; all layers of a network share one object.

    If no position is set, as for a network outside of a run, layers treat their input as the whole global batch.
    """

    start: int = 0
    global_size: int | None = None
    """Number of samples in the step; None: the size of the input."""
    num_ranks: int = 1
    """Number of ranks that share the step; their buffers are averaged before use."""
    key: tuple[int, ...] = (0,)
    """Numbers that identify the step, for the random masks of dropout."""

    calls: dict[int, int] = field(default_factory=dict)
    """Layer number to its number of calls in this pass minus 1: a network may call a layer several times."""
    recomputed: dict[int, int] = field(default_factory=dict)
    """Layer number to its number of calls in recomputations by torch.utils.checkpoint."""
    restores_calls: bool = False
    """Whether who recomputes has set `calls` to what they were."""

    def move_to(self, start: int, global_size: int, num_ranks: int, *key: int) -> None:
        """Set the position, and start a new pass."""
        self.start, self.global_size, self.num_ranks, self.key = start, global_size, num_ranks, key
        self.calls.clear()
        self.recomputed.clear()

    def next_call(self, layer: int) -> int:
        """The number of this call of a layer, from 0; in a recomputation that of the call that is repeated.

        torch.utils.checkpoint recomputes the last part of a network first, so the calls come in reverse.
        """
        if in_backward() and not self.restores_calls:
            self.recomputed[layer] = self.recomputed.get(layer, 0) + 1
            return max(0, self.calls.get(layer, 0) + 1 - self.recomputed[layer])
        self.calls[layer] = self.calls.get(layer, -1) + 1
        return self.calls[layer]


def position_of(model: nn.Module) -> SamplePosition:
    """The position object that the layers of `model` share; a new one if no layer uses it."""
    positions = (getattr(module, "position", None) for module in model.modules())
    return next((position for position in positions if isinstance(position, SamplePosition)), SamplePosition())
