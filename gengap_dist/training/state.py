"""What changes while a run trains."""

from dataclasses import dataclass
from typing import Any, final


@final
@dataclass
class TrainState:
    """How far a run is; the trainer and its parts share one object."""

    num_steps: int
    """Last step: the schedule's, or the one at which the target was reached."""
    step: int = 0
    """Optimizer steps done."""
    train_seconds: float = 0.0
    """Seconds in steps, without evaluation, probes and checkpoints."""

    @property
    def at_end(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.num_steps

    @property
    def at_first_or_last(self) -> bool:
        """Whether no step is done yet, or all are."""
        return self.step in (0, self.num_steps)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it; the last step follows from the config."""
        return {"step": self.step, "train_seconds": self.train_seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self.step, self.train_seconds = state["step"], state["train_seconds"]
