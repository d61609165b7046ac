"""Cache of autotuning results in the user's cache folder."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from gengap_dist.config.loading import validate
from gengap_dist.config.sections import FrozenModel
from gengap_dist.errors import UsageError
from gengap_dist.runs.own_files import default_path, read_own, write_own


class MicroSize(FrozenModel):
    """The fastest micro-batch size."""

    size: PositiveInt
    samples_per_second: dict[PositiveInt, PositiveFloat]
    """Of the slowest rank, by micro-batch size, for all measured sizes."""
    pass_bytes: NonNegativeInt
    """Peak memory of a pass of the fastest size, estimated."""
    where: dict[str, Any] = {}
    """Description of the network and the machine, for readers of the file."""


class MemoryFormat(FrozenModel):
    """The faster memory format of images."""

    channels_last: bool
    samples_per_second: tuple[NonNegativeFloat, NonNegativeFloat]
    """Of the slowest rank, in NCHW and in NHWC format; 0: out of memory."""
    where: dict[str, Any] = {}
    """Description of the network and the machine, for readers of the file."""


class MicroSizes(FrozenModel):
    """Cached results, by a key of network and machine; see `micro_batch` and `memory_format`."""

    found: dict[str, MicroSize] = {}
    memory_formats: dict[str, MemoryFormat] = {}


FIELDS: dict[type, str] = {MicroSize: "found", MemoryFormat: "memory_formats"}


def micro_sizes_path() -> Path:
    """The path of micro_sizes.json, in the folder of the constants."""
    return default_path().with_name("micro_sizes.json")


def read_micro_sizes() -> MicroSizes:
    """All cached results.

    Raises:
        UsageError: if the file is damaged, or others may have written it.
    """
    path = micro_sizes_path()
    try:
        return validate(MicroSizes, json.loads(read_own(path))) if path.exists() else MicroSizes()
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{path} has no valid micro-batch sizes ({error}): delete it") from None


def load_micro_sizes() -> MicroSizes:
    """All cached results; none, with a warning, if the file is damaged: the next measurement overwrites it."""
    try:
        return read_micro_sizes()
    except UsageError as error:
        warnings.warn(f"{error}, or it is overwritten by the next measurement", stacklevel=2)
        return MicroSizes()


def lookup(kind: type[MicroSize | MemoryFormat], key: str, previous: Mapping[str, Any]) -> dict[str, Any]:
    """The result for `key` as in run.json: from `previous`, or else from the cache file; {} if none."""
    if previous.get("mark") == key:
        return {**previous, "by": "this run's record"}
    found = getattr(load_micro_sizes(), FIELDS[kind]).get(key)
    return as_run_info(found, key, "an earlier measurement") if found else {}


def as_run_info(result: MicroSize | MemoryFormat, key: str, source: str) -> dict[str, Any]:
    """A result and its source, as saved in run.json."""
    return {"by": source, "mark": key, **result.model_dump(mode="json", exclude={"where"})}


def store(key: str, result: MicroSize | MemoryFormat) -> None:
    """Add a result to the cache file; warns if it cannot be written."""
    path, known = micro_sizes_path(), load_micro_sizes()
    kind = FIELDS[type(result)]
    known = known.model_copy(update={kind: getattr(known, kind) | {key: result}})
    try:
        write_own(path, json.dumps(known.model_dump(mode="json"), indent=1) + "\n")
    except OSError as error:
        warnings.warn(
            f"{path} cannot be written ({error.strerror}): the next run repeats the measurement", stacklevel=2
        )
