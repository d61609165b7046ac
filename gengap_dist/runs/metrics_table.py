"""metrics.jsonl as a table: a tenth of the memory of its lines; used to aggregate many runs."""

import io
import json
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

LINES_PER_BATCH = 1000  # lines held as dicts at one time


class MetricsTable(NamedTuple):
    """The metrics of a run."""

    columns: Mapping[str, int]
    """Metric name to column, in order of first appearance; `step` and `seconds` are columns, too."""
    values: np.ndarray
    """float64 [lines, columns], sorted by step."""
    known: np.ndarray
    """bool [lines, columns]: whether the line has the metric, because a recorded value may be NaN."""

    def series(self, name: str, against: str = "step") -> tuple[np.ndarray, np.ndarray]:
        """Values of `against` and of `name`, float64 [points], at the lines that have `name`.

        >>> to_table([{"step": 0, "a": 5.0}, {"step": 1}, {"step": 2, "a": 7.0}]).series("a")
        (array([0., 2.]), array([5., 7.]))
        """
        if name not in self.columns:
            return np.empty(0), np.empty(0)
        rows = self.known[:, self.columns[name]]
        return self.values[rows, self.columns[against]], self.values[rows, self.columns[name]]

    def line(self, row: int) -> dict[str, float]:
        """The metrics of one line, by name."""
        return {name: float(self.values[row, at]) for name, at in self.columns.items() if self.known[row, at]}

    def values_at(self, steps: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Parts of `values` and `known`, [steps, names], in the given order."""
        rows = np.searchsorted(self.series("step")[1], steps)
        index = np.ix_(rows, np.array([self.columns[name] for name in names], dtype=int))
        return self.values[index], self.known[index]

    def select_columns(self, names: Collection[str]) -> "MetricsTable":
        """The table of the given columns; absent ones are ignored."""
        selected = [name for name in self.columns if name in names]
        at = [self.columns[name] for name in selected]
        return MetricsTable({name: i for i, name in enumerate(selected)}, self.values[:, at], self.known[:, at])


def to_table(lines: Iterable[Mapping[str, Any]]) -> MetricsTable:
    """Convert lines to a table; strings for NaN and infinities become numbers.

    >>> table = to_table([{"step": 0, "a": "inf"}, {"step": 1, "b": 6.0}])
    >>> table.columns, table.line(1)
    ({'step': 0, 'a': 1, 'b': 2}, {'step': 1.0, 'b': 6.0})
    """
    blocks = []
    num_lines, remaining = 0, iter(lines)
    while batch := list(islice(remaining, LINES_PER_BATCH)):
        blocks += _blocks(batch, num_lines)
        num_lines += len(batch)
    columns = {name: at for at, name in enumerate(dict.fromkeys(chain.from_iterable(names for names, _, _ in blocks)))}
    values = np.full((num_lines, len(columns)), np.nan)
    known = np.zeros(values.shape, dtype=bool)
    for names, rows, numbers in blocks:
        index = np.ix_(rows, [columns[name] for name in names])
        values[index] = numbers
        known[index] = True
    return MetricsTable(columns, values, known)


def _blocks(lines: Sequence[Mapping[str, Any]], first: int) -> Iterator[tuple[tuple[str, ...], list[int], np.ndarray]]:
    """Lines with the same names as one array each, with their row numbers."""
    rows_by_names: dict[tuple[str, ...], list[int]] = {}
    for at, line in enumerate(lines):
        rows_by_names.setdefault(tuple(line), []).append(at)
    for names, rows in rows_by_names.items():
        numbers = np.fromiter(chain.from_iterable(lines[at].values() for at in rows), float, len(rows) * len(names))
        yield names, [first + at for at in rows], numbers.reshape(len(rows), len(names))


def dump(table: MetricsTable, size: int, *, compress: bool = False) -> bytes:
    """A table as the bytes of an npz file; `size`: bytes of its metrics.jsonl."""
    buffer = io.BytesIO()
    known, save = np.packbits(table.known), np.savez_compressed if compress else np.savez
    save(buffer, size=size, columns=np.array(json.dumps([*table.columns])), values=table.values, known=known)
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
        with path.open("rb") as raw, np.load(raw) as file:
            if int(file["size"]) != size:
                return None
            names, values = json.loads(str(file["columns"])), file["values"]
            known = np.unpackbits(file["known"], count=values.size).view(bool).reshape(values.shape)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    return MetricsTable({name: at for at, name in enumerate(names)}, values, known)
