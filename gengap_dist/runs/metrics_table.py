"""metrics.jsonl as a table: a tenth of the memory of its lines; used to aggregate many runs.

A network may have thousands of metrics, of which most are measured at a few steps: only what was recorded is stored.
"""

import io
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gengap_dist.config.regular_file import open_regular
from gengap_dist.errors import UsageError
from gengap_dist.runs.schema import REMEDY

LINES_PER_BATCH = 1000  # lines held as dicts at one time
NO_LINES = 0  # bytes of metrics.jsonl that metrics.npz of a slim copy is the table of


class MetricsTable(NamedTuple):
    """The metrics of a run, by column. Points are in the order of columns, and of lines in a column."""

    num_lines: int
    """They are sorted by step."""
    columns: Mapping[str, int]
    """Metric name to column, in order of first appearance; `step` and `seconds` are columns, too."""
    starts: np.ndarray
    """int64 [columns + 1]: the first point of each column, and the number of points."""
    rows: np.ndarray
    """int32 [points]: the line of each point."""
    values: np.ndarray
    """float64 [points]; a recorded value may be NaN."""

    def column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The lines that have a metric, int32 [points], and its values there, float64 [points]."""
        if name not in self.columns:
            return self.rows[:0], self.values[:0]
        points = slice(*self.starts[self.columns[name] :][:2])
        return self.rows[points], self.values[points]

    def series(self, name: str, against: str = "step") -> tuple[np.ndarray, np.ndarray]:
        """Values of `against` and of `name`, float64 [points], at the lines that have `name`.

        >>> to_table([{"step": 0, "a": 5.0}, {"step": 1}, {"step": 2, "a": 7.0}]).series("a")
        (array([0., 2.]), array([5., 7.]))
        """
        rows, values = self.column(name)
        return self._dense(against)[0][rows], values

    def line(self, row: int) -> dict[str, float]:
        """The metrics of one line, by name."""
        points = np.flatnonzero(self.rows == row)
        names, columns = [*self.columns], np.searchsorted(self.starts, points, side="right") - 1
        return {names[at]: float(self.values[point]) for at, point in zip(columns, points, strict=True)}

    def values_at(self, steps: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Values, nan where there is none, and whether there is one: float64 and bool [steps, names]."""
        rows = np.searchsorted(self.column("step")[1], steps)
        values, known = np.empty((len(rows), len(names))), np.empty((len(rows), len(names)), dtype=bool)
        for at, name in enumerate(names):
            of_lines, known_of_lines = self._dense(name)
            values[:, at], known[:, at] = of_lines[rows], known_of_lines[rows]
        return values, known

    def _dense(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The values of a metric, nan where a line lacks it, and whether a line has it: float64 and bool [lines]."""
        values, known = np.full(self.num_lines, np.nan), np.zeros(self.num_lines, dtype=bool)
        rows, found = self.column(name)
        values[rows], known[rows] = found, True
        return values, known

    def select_columns(self, names: Collection[str]) -> "MetricsTable":
        """A copy of the given columns; absent ones are ignored."""
        selected = [name for name in self.columns if name in names]
        parts = [self.column(name) for name in selected]
        rows = np.concatenate([self.rows[:0], *(rows for rows, _ in parts)])
        values = np.concatenate([self.values[:0], *(values for _, values in parts)])
        starts = np.cumsum([0, *(len(rows) for rows, _ in parts)])
        return MetricsTable(self.num_lines, {name: i for i, name in enumerate(selected)}, starts, rows, values)


def to_table(lines: Iterable[Mapping[str, Any]]) -> MetricsTable:
    """Convert lines to a table; strings for NaN and infinities become numbers.

    >>> table = to_table([{"step": 0, "a": "inf"}, {"step": 1, "b": 6.0}])
    >>> table.columns, table.line(1)
    ({'step': 0, 'a': 1, 'b': 2}, {'step': 1.0, 'b': 6.0})
    """
    columns: dict[str, int] = {}
    blocks = [(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0))]  # column, line and value of points
    num_lines, remaining = 0, iter(lines)
    while batch := list(islice(remaining, LINES_PER_BATCH)):
        for names, rows, numbers in _blocks(batch, num_lines):
            at = np.array([columns.setdefault(name, len(columns)) for name in names], dtype=np.int32)
            blocks.append((np.tile(at, len(rows)), np.repeat(np.array(rows, dtype=np.int32), len(at)), numbers))
        num_lines += len(batch)
    return _by_column(num_lines, [*columns], *map(np.concatenate, zip(*blocks, strict=True)))


def _by_column(
    num_lines: int, names: Sequence[str], at: np.ndarray, rows: np.ndarray, values: np.ndarray
) -> MetricsTable:
    """The table of points in any order, [points] each."""
    order = np.lexsort((rows, at))
    starts = np.concatenate([[0], np.cumsum(np.bincount(at, minlength=len(names)))])
    return MetricsTable(num_lines, {name: i for i, name in enumerate(names)}, starts, rows[order], values[order])


def _blocks(lines: Sequence[Mapping[str, Any]], first: int) -> Iterator[tuple[tuple[str, ...], list[int], np.ndarray]]:
    """Lines with the same names: the names, the numbers of the lines, and their values, float64 [lines * names]."""
    rows_by_names: dict[tuple[str, ...], list[int]] = {}
    for at, line in enumerate(lines):
        rows_by_names.setdefault(tuple(line), []).append(at)
    for names, rows in rows_by_names.items():
        numbers = np.fromiter(chain.from_iterable(lines[at].values() for at in rows), float, len(rows) * len(names))
        yield names, [first + at for at in rows], numbers


def dump(table: MetricsTable, size: int, *, compress: bool = False) -> bytes:
    """A table as the bytes of an npz file; `size`: bytes of its metrics.jsonl."""
    buffer = io.BytesIO()
    save = np.savez_compressed if compress else np.savez
    names = np.frombuffer(json.dumps([*table.columns]).encode(), dtype=np.uint8)
    save(
        buffer, size=size, num_lines=table.num_lines, names=names, starts=table.starts, rows=table.rows,
        values=table.values,
    )  # fmt: skip
    return buffer.getvalue()


def load(path: Path, size: int) -> MetricsTable | None:
    """Load a file of `dump`; None if it is missing, damaged, or of a metrics.jsonl of another size.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "metrics.npz"
    >>> _ = path.write_bytes(dump(to_table([{"step": 0, "a": 1.5}, {"step": 1}]), size=31))
    >>> load(path, size=31).line(0), load(path, size=32)
    ({'step': 0.0, 'a': 1.5}, None)
    """
    try:
        file = read_arrays(path)
        if int(file["size"]) != size:
            return None
        if "known" in file:
            return _of_dense(file) if size == NO_LINES else None  # the lines take less memory
        names = json.loads(file["names"].tobytes())
        table = MetricsTable(
            int(file["num_lines"]), {name: at for at, name in enumerate(names)}, file["starts"], file["rows"],
            file["values"],
        )  # fmt: skip
    except (UsageError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return table if _is_whole(table, names) else None


def _is_whole(table: MetricsTable, names: Sequence[Any]) -> bool:
    """Whether the arrays belong together, and every line has its step, which is above that of the line before."""
    num_lines, columns, starts, rows, values = table
    if len(columns) < len(names) or not all(isinstance(name, str) for name in names):
        return False
    if any(array.ndim != 1 for array in (starts, rows, values)) or (starts.dtype.kind, rows.dtype.kind) != ("i", "i"):
        return False
    if len(starts) != len(columns) + 1 or starts[0] or (np.diff(starts) < 0).any() or values.dtype.kind != "f":
        return False
    if not starts[-1] == len(rows) == len(values) or ((rows < 0) | (rows >= num_lines)).any():
        return False
    of_steps, steps = table.column("step")
    return len(steps) == num_lines and bool((of_steps[1:] > of_steps[:-1]).all() and (steps[1:] > steps[:-1]).all())


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an npz file; no code in it is executed.

    Raises:
        UsageError: if it cannot be read, or is damaged.
    """
    try:
        with open_regular(path) as raw, np.lib.npyio.NpzFile(raw, allow_pickle=False) as file:
            return dict(file)
    except OSError as error:
        problem = f"{error.strerror or error}"
    except Exception as error:  # numpy and zipfile raise many kinds
        problem = f"{error}"
    raise UsageError(f"{path} is damaged ({problem or 'it is not complete'}): {REMEDY}")


def _of_dense(file: Mapping[str, np.ndarray]) -> MetricsTable:
    """The table of a file that an earlier version wrote: a value for each line and each column, and which are known."""
    values, names = file["values"], json.loads(str(file["columns"]))
    known = np.unpackbits(file["known"], count=values.size).view(bool).reshape(values.shape)
    rows, at = np.nonzero(known)
    return _by_column(len(values), names, at, rows.astype(np.int32), values[known])
