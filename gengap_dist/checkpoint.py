"""The state of a run on disk: one file, written whole or not at all."""

import io
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gengap_dist.config import UsageError
from gengap_dist.tracking.record import write_atomically

State = dict[str, Any]


def save(path: Path, state: State) -> None:
    """Write a state of tensors and plain values."""
    path.parent.mkdir(exist_ok=True)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, buffer.getvalue())


def load(path: Path) -> State:
    """Read a state back, onto the CPU; nothing in the file is executed.

    Raises:
        UsageError: if the file is missing or damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"{path} is missing: the run saved nothing yet; start it again in a new --out") from None
    except Exception as error:  # torch raises what the unpickler met, of many kinds
        raise UsageError(f"{path} is damaged ({type(error).__name__}): remove it and start the run again") from None


def restore(model: nn.Module, state: State, path: Path) -> None:
    """Load a model's parameters and buffers.

    Raises:
        UsageError: if they are another model's.
    """
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UsageError(
            f"{path} is of another model ({first}): use the config that the run was started with"
        ) from None
