"""mean.jsonl in the folder of a study's arm: means over seeds.

The first line says which runs the means are made of: {"made_of": {"ARM/SEED": time at which the run ended}}, the
baseline's included. The others are as in metrics.jsonl.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gengap_dist.runs.run_folder import json_line, read_from, write_atomically

FILE_NAME = "mean.jsonl"

Sources = dict[str, str]


def write_means(arm: Path, made_of: Sources, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write the means of the arm with the folder `arm`."""
    content = [json.dumps({"made_of": made_of}), *map(json_line, lines)]
    write_atomically(arm / FILE_NAME, "".join(f"{line}\n" for line in content))


def read_sources(arm: Path) -> Sources | None:
    """The runs that the means of an arm are made of; None if there are no means."""
    path = arm / FILE_NAME
    if not path.exists():
        return None
    with path.open() as file:
        return json.loads(file.readline())["made_of"]


def read_means(arm: Path) -> Iterator[dict[str, Any]]:
    """The means of an arm, by step."""
    with (arm / FILE_NAME).open("rb") as file:
        start = len(file.readline())
    return (line for line, _ in read_from(arm / FILE_NAME, start))
