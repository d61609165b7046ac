"""What was measured of machines: the constants of the time model, and the sizes that batch.micro_size=auto found.

Two small JSON files in the user's cache folder; the first is measured by `calibrate` or written by hand.
"""

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from gengap_dist.config.loading import validate
from gengap_dist.config.sections import RunConfig, Section
from gengap_dist.errors import UsageError
from gengap_dist.runs.run_folder import write_atomically


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
        name for name in ("channels_last", "compile", "recompute", "deterministic") if getattr(config.train, name)
    ]
    return " ".join([*words, config.optim.name, f"micro_size={micro_size}"])


def default_path() -> Path:
    """In the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "gengap_dist" / "constants.json"


def load(path: Path | None) -> Constants:
    """The constants in `path`, or in the user's cache folder, where there may be none yet.

    Raises:
        UsageError: if the file that was asked for is missing, or a file is no constants.
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


class MicroSize(Section):
    """The fastest size of micro-batches."""

    size: PositiveInt
    images_per_second: dict[PositiveInt, PositiveFloat]
    """Of the slowest rank, by size: all that were measured."""
    pass_bytes: NonNegativeInt
    """What a pass of the fastest takes at its most."""
    where: dict[str, Any] = {}
    """The network and the machine, for whoever reads the file."""


class MemoryFormat(Section):
    """The faster order of pictures in memory."""

    channels_last: bool
    images_per_second: tuple[NonNegativeFloat, NonNegativeFloat]
    """Of the slowest rank, in NCHW and in NHWC order; 0: it does not fit."""
    where: dict[str, Any] = {}
    """The network and the machine, for whoever reads the file."""


class MicroSizes(Section):
    """What is known, by a mark of network and machine; see `planning.micro_size` and `planning.memory_format`."""

    found: dict[str, MicroSize] = {}
    memory_formats: dict[str, MemoryFormat] = {}


KINDS: dict[type, str] = {MicroSize: "found", MemoryFormat: "memory_formats"}


def micro_sizes_path() -> Path:
    """Beside the constants."""
    return default_path().with_name("micro_sizes.json")


def read_micro_sizes() -> MicroSizes:
    """What was measured before.

    Raises:
        UsageError: if the file is damaged.
    """
    path = micro_sizes_path()
    try:
        return validate(MicroSizes, json.loads(path.read_text())) if path.exists() else MicroSizes()
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{path} holds no micro-batch sizes ({error}): delete it") from None


def load_micro_sizes() -> MicroSizes:
    """What was measured before; nothing, with a warning, if the file is damaged: the next measurement replaces it."""
    try:
        return read_micro_sizes()
    except UsageError as error:
        warnings.warn(f"{error}, or have it written anew", stacklevel=2)
        return MicroSizes()


def recall(kind: type[MicroSize | MemoryFormat], mark: str, before: Mapping[str, Any]) -> dict[str, Any]:
    """What is known under `mark`, as a run's record tells it: from the record `before`, or else from the file."""
    if before.get("mark") == mark:
        return {**before, "by": "this run's record"}
    found = getattr(load_micro_sizes(), KINDS[kind]).get(mark)
    return told(found, mark, "an earlier measurement") if found else {}


def told(found: MicroSize | MemoryFormat, mark: str, by: str) -> dict[str, Any]:
    """What was found, and how, as a run's record tells it."""
    return {"by": by, "mark": mark, **found.model_dump(mode="json", exclude={"where"})}


def remember(mark: str, found: MicroSize | MemoryFormat) -> None:
    """Add what was measured to the file; a warning if it cannot be written."""
    path, known = micro_sizes_path(), load_micro_sizes()
    kind = KINDS[type(found)]
    known = known.model_copy(update={kind: getattr(known, kind) | {mark: found}})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(known.model_dump(mode="json"), indent=1) + "\n")
    except OSError as error:
        warnings.warn(f"{path} cannot be written ({error.strerror}): the next run measures anew", stacklevel=2)
