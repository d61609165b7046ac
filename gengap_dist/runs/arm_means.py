"""The folder of a study's arm: its runs, and mean.jsonl with means over seeds.

The first line of mean.jsonl says which runs the means are made of, the baseline's included: {"made_of": {"ARM/SEED":
time at which the run ended}}. The others are as in metrics.jsonl.
"""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from gengap_dist.config.regular_file import open_regular
from gengap_dist.errors import UsageError
from gengap_dist.runs.json_lines import read_from
from gengap_dist.runs.run_folder import json_line, read_info, write_atomically
from gengap_dist.runs.schema import RunInfo

FILE_NAME = "mean.jsonl"

Sources = dict[str, str]

_FIRST_LINE = TypeAdapter(dict[Literal["made_of"], Sources])


def read_runs(arm: Path, seeds: Collection[int], damaged: Callable[[UsageError], object]) -> dict[Path, RunInfo]:
    """The runs in the folder of an arm, of the seeds that its study contains, by folder.

    Args:
        arm: the folder.
        seeds: of the study.
        damaged: called with the error of each run that cannot be read, which is left out.
    """
    out: dict[Path, RunInfo] = {}
    for path in sorted(arm.glob("*/run.json")):
        try:
            info = read_info(path.parent)
        except UsageError as error:
            damaged(error)
        else:
            if info.seed in seeds:  # otherwise the study no longer contains it
                out[path.parent] = info
    return out


def have_ended(runs: Mapping[Path, RunInfo], seeds: Collection[int]) -> bool:
    """Whether there is a run of every seed, and all have come to their end."""
    return len(runs) >= len(seeds) and all(info.status.is_final for info in runs.values())


def write_means(arm: Path, made_of: Sources, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write the means of the arm with the folder `arm`."""
    content = [json.dumps({"made_of": made_of}), *map(json_line, lines)]
    write_atomically(arm / FILE_NAME, "".join(f"{line}\n" for line in content))


def read_sources(arm: Path) -> Sources | None:
    """The runs that the means of an arm are made of; None if there are no means, or they must be written again."""
    try:
        with open_regular(arm / FILE_NAME) as file:
            return _FIRST_LINE.validate_json(file.readline())["made_of"]
    except (OSError, ValueError):
        return None


def read_means(arm: Path) -> Iterator[dict[str, Any]]:
    """The means of an arm, by step."""
    with (arm / FILE_NAME).open("rb") as file:
        start = len(file.readline())
    return (line for line, _ in read_from(arm / FILE_NAME, start))
