"""What was measured of machines: the constants of the time model, and the sizes that batch.micro_size=auto found.

Two small JSON files in the user's cache folder; the first is measured by `calibrate` or written by hand.
"""

import json
from pathlib import Path

from pydantic import NonNegativeFloat

from gengap_dist.config.loading import validate
from gengap_dist.config.sections import RunConfig, Section
from gengap_dist.errors import UsageError
from gengap_dist.training.autotune.cache import default_path


class LinkConstants(Section):
    """A link's latency and bandwidth."""

    alpha: NonNegativeFloat
    """Seconds per message."""
    beta: NonNegativeFloat
    """Seconds per byte of one rank."""


class ComputeConstants(Section):
    """What a rank's own work takes."""

    seconds_per_sample: NonNegativeFloat
    """Forward and backward of one sample."""
    seconds_per_update: NonNegativeFloat
    """Gradient norm and optimizer step."""


class Constants(Section):
    """What is known of a machine; what is not, stays null."""

    where: str = ""
    """What was measured, in words."""
    inside: LinkConstants | None = None
    """Between the ranks of one node."""
    between: LinkConstants | None = None
    """Between nodes: measured nowhere here, so it comes from a file."""
    compute: dict[str, ComputeConstants] = {}
    """By `workload`."""


def workload(config: RunConfig, in_channels: int, micro_size: int) -> str:
    """A name for what one micro-batch computes.

    >>> workload(RunConfig(), 1, 64)
    'lenet5 1x32x32 float32 sgd micro_size=64'
    """
    model, side = config.model, config.data.image_size
    words = [model.name + (f"[{','.join(map(str, model.widths))}]" if model.name == "mlp" else "")]
    words += [f"{in_channels}x{side}x{side}", config.train.autocast or config.train.dtype, *config.data.augment]
    words += [f"norm={config.norm}{config.batch.ghost_size or ''}"] if config.norm != "local" else []
    words += [
        name
        for name in ("channels_last", "compile", "activation_checkpointing", "deterministic")
        if getattr(config.train, name)
    ]
    return " ".join([*words, config.optim.name, f"micro_size={micro_size}"])


def load(path: Path | None) -> Constants:
    """The constants in `path`, or in the user's cache folder, where there may be none yet.

    Raises:
        UsageError: if the file that was asked for is missing, or a file does not hold constants.
    """
    where = path or default_path()
    if not where.exists() and path is None:
        return Constants()
    try:
        return validate(Constants, json.loads(where.read_text()))
    except OSError as error:
        raise UsageError(
            f"--constants ({where}) cannot be read: {error.strerror}; give the path of a JSON file"
        ) from None
    except (ValueError, TypeError) as error:
        raise UsageError(f"--constants ({where}) holds no constants ({error}): measure them with --calibrate") from None


def save(constants: Constants, path: Path | None) -> Path:
    """Write constants to `path`, or to the user's cache folder; where they went."""
    where = path or default_path()
    where.parent.mkdir(parents=True, exist_ok=True)
    where.write_text(json.dumps(constants.model_dump(mode="json"), indent=1) + "\n")
    return where
