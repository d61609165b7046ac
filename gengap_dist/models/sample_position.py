"""Where in the global batch the samples are that a network is given: what a layer must know to be cut-independent."""

from dataclasses import dataclass, field

from torch import nn


@dataclass
class SamplePosition:
    """Samples `start` .. `start + n` of a global batch; one object for all layers of a network that ask for it.

    Layers that never hear of a global batch, as when a network is tried out alone, take what they are given for all
    of it.
    """

    start: int = 0
    global_size: int | None = None
    """Samples of the whole step; None: as many as are given."""
    num_ranks: int = 1
    """Over which the step's samples are spread, and whose buffers are averaged before they are used."""
    key: tuple[int, ...] = (0,)
    """Tells the draws of one step from another's, as dropout needs."""

    calls: dict[int, int] = field(default_factory=dict)
    """How often each layer that draws was called here: a network may call one several times in a pass."""

    def at(self, start: int, global_size: int, num_ranks: int, *key: int) -> None:
        """Move, or begin another pass at the same place."""
        self.start, self.global_size, self.num_ranks, self.key = start, global_size, num_ranks, key
        self.calls.clear()


def position_of(model: nn.Module) -> SamplePosition:
    """The position that the layers of `model` look at, or one that nobody looks at."""
    found = (getattr(module, "position", None) for module in model.modules())
    return next((position for position in found if isinstance(position, SamplePosition)), SamplePosition())
