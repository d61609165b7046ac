"""Reads a growing metrics.jsonl from where the last reader stopped, also if the file was rewritten in between."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gengap_dist.runs.json_lines import METRICS, read_from


class Position(NamedTuple):
    """The last line that was read; the default: none."""

    start: int = 0
    """Byte at which the line begins."""
    end: int = 0
    """Byte after the line."""
    step: int = -1


def read_after(path: Path, position: Position) -> Iterator[tuple[dict[str, Any], Position]]:
    """The complete lines after `position`, each with its own position.

    A resumed run removes the last lines and writes them again. If the line of `position` is not in its place any more,
    the file is read from its beginning, so that lines may be given again. Otherwise what stands before it has been
    read, whatever it is now, because lines are sorted by step.
    """
    start = position.end if _is_in_place(path, position) else 0
    for line, end in read_from(path, start):
        yield line, Position(start, end, line["step"])
        start = end


def _is_in_place(path: Path, position: Position) -> bool:
    if not path.exists():
        return False
    with path.open("rb") as file:
        file.seek(position.start)
        line = file.read(position.end - position.start)
    try:
        return line.endswith(b"\n") and METRICS.validate_json(line)["step"] == position.step
    except ValueError:  # another line begins elsewhere
        return False
