"""Reads files of JSON lines: metrics.jsonl, mean.jsonl and system.jsonl. Each line is checked as it is read.

A line is an object of numbers. JSON has no NaN and no infinities: they are strings (see `run_folder.json_line`), and
become numbers here.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic_core import SchemaValidator, ValidationError, core_schema

from gengap_dist.config.regular_file import open_regular
from gengap_dist.errors import UsageError
from gengap_dist.runs.schema import REMEDY, first_error

MAX_LINE_BYTES = 2**20  # more than the longest line of metrics.jsonl


def _lines_with(needed: str) -> SchemaValidator:
    """Lines that have an integer `needed`. Validation parses them, too, as fast as a parser does."""
    field, finite = core_schema.typed_dict_field, core_schema.float_schema(allow_inf_nan=False)
    fields = {needed: field(core_schema.int_schema(ge=0, le=2**53))}
    fields |= {name: field(finite, required=False) for name in ("epoch", "seconds")}
    numbers = core_schema.float_schema()
    return SchemaValidator(core_schema.typed_dict_schema(fields, extra_behavior="allow", extras_schema=numbers))


METRICS, SYSTEM = _lines_with("step"), _lines_with("time")


def read_lines(path: Path, kind: SchemaValidator = METRICS) -> Iterator[dict[str, Any]]:
    """The complete lines of a file; none if it is missing. Raises what `read_from` raises."""
    return (values for values, _ in read_from(path, kind=kind))


def read_from(
    path: Path,
    start: int = 0,
    damaged: Callable[[UsageError], object] | None = None,
    *,
    kind: SchemaValidator = METRICS,
) -> Iterator[tuple[dict[str, Any], int]]:
    """The complete lines from byte `start` on, each with the byte after it.

    Args:
        path: the file; there are no lines if it does not exist.
        start: the beginning of a line.
        damaged: called for each damaged line, which is left out; None: the error is raised.
        kind: the lines of the file.

    Raises:
        UsageError: if the file cannot be read, or a line is damaged and `damaged` is None: file, line and field.
    """
    try:
        file = open_regular(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}): {REMEDY}") from None
    with file:
        file.seek(start)
        end, step = start, -1
        for line in file:
            if not line.endswith(b"\n"):
                return
            line_start, end = end, end + len(line)
            values: dict[str, Any] = {}
            try:
                values = kind.validate_json(line)
            except ValidationError as error:
                problem = first_error(error).replace(" at line 1 column", " at column")
            else:
                problem = ""
                if kind is METRICS:
                    if values["step"] <= step:
                        problem = f"step ({values['step']}) is not above that of the line before ({step})"
                    step = max(step, values["step"])
            if not problem:
                yield values, end
                continue
            found = UsageError(f"{path} is damaged in line {_line_number(path, line_start)}: {problem}; {REMEDY}")
            if damaged is None:
                raise found
            damaged(found)


def last_step(path: Path) -> int | None:
    """The step of the last line of metrics.jsonl; None if that is missing, incomplete or damaged."""
    try:
        with open_regular(path) as file:
            file.seek(max(0, path.stat().st_size - MAX_LINE_BYTES))
            *_, last, rest = file.read().split(b"\n")
        return None if rest else METRICS.validate_json(last)["step"]
    except (OSError, ValueError):
        return None


def _line_number(path: Path, start: int) -> int:
    """The number of the line that begins at byte `start`, from 1."""
    with path.open("rb") as file:
        return 1 + file.read(start).count(b"\n")
