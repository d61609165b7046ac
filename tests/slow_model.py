"""A network whose steps become slow, so that a test that interrupts a run is not in a hurry to do it."""

import os
import time
from pathlib import Path

from torch import nn

from gengap_dist.models.mlp import mlp

NAME = f"{__name__}:make"
SECONDS = 0.5  # of a slow pass


def slow_after(out: Path, pattern: str) -> dict[str, str]:
    """Environment in which passes in training are slow as soon as something in `out` matches `pattern`.

    A file `fast` beside `out` ends it.
    """
    return {"SLOW_IN": str(out), "SLOW_AFTER": pattern}


def make(input_shape: tuple[int, ...], output_shape: tuple[int, ...]) -> nn.Module:
    """A small network; in an environment without the variables above, as fast as any."""
    model = mlp(input_shape=input_shape, output_shape=output_shape, widths=(16,))
    if "SLOW_IN" in os.environ:
        out, pattern = Path(os.environ["SLOW_IN"]), os.environ["SLOW_AFTER"]

        def wait(module: nn.Module, inputs: object) -> None:
            if module.training and any(out.glob(pattern)) and not out.with_name("fast").exists():
                time.sleep(SECONDS)

        model.register_forward_pre_hook(wait)
    return model
