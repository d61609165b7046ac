"""What autotuning has found, kept in the user's cache folder."""

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from gengap_dist.config.loading import validate
from gengap_dist.config.sections import Section
from gengap_dist.errors import UsageError
from gengap_dist.runs.run_folder import write_atomically


def default_path() -> Path:
    """In the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "gengap_dist" / "constants.json"


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


def lookup(kind: type[MicroSize | MemoryFormat], mark: str, before: Mapping[str, Any]) -> dict[str, Any]:
    """What is known under `mark`, as a run's record tells it: from the record `before`, or else from the file."""
    if before.get("mark") == mark:
        return {**before, "by": "this run's record"}
    found = getattr(load_micro_sizes(), KINDS[kind]).get(mark)
    return as_fact(found, mark, "an earlier measurement") if found else {}


def as_fact(found: MicroSize | MemoryFormat, mark: str, by: str) -> dict[str, Any]:
    """What was found, and how, as a run's record tells it."""
    return {"by": by, "mark": mark, **found.model_dump(mode="json", exclude={"where"})}


def store(mark: str, found: MicroSize | MemoryFormat) -> None:
    """Add what was measured to the file; a warning if it cannot be written."""
    path, known = micro_sizes_path(), load_micro_sizes()
    kind = KINDS[type(found)]
    known = known.model_copy(update={kind: getattr(known, kind) | {mark: found}})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(known.model_dump(mode="json"), indent=1) + "\n")
    except OSError as error:
        warnings.warn(f"{path} cannot be written ({error.strerror}): the next run measures anew", stacklevel=2)
