"""metrics.jsonl as columns: a tenth of the memory of its lines, and what many runs are aggregated from."""

import io
import json
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

BATCH = 1000  # lines that are dicts at one time


class MetricsTable(NamedTuple):
    """What a run has recorded."""

    columns: Mapping[str, int]
    """Name to column, in the order in which names came up; `step` and `seconds` are names as all others are."""
    values: np.ndarray
    """float64 [lines, columns], lines in rising order of step."""
    known: np.ndarray
    """bool [lines, columns]: whether the line has it, for what it has may be nan."""

    def series(self, name: str, against: str = "step") -> tuple[np.ndarray, np.ndarray]:
        """Values of `against` and of `name`, float64 [points], where `name` was recorded.

        >>> to_table([{"step": 0, "a": 5.0}, {"step": 1}, {"step": 2, "a": 7.0}]).series("a")
        (array([0., 2.]), array([5., 7.]))
        """
        if name not in self.columns:
            return np.empty(0), np.empty(0)
        rows = self.known[:, self.columns[name]]
        return self.values[rows, self.columns[against]], self.values[rows, self.columns[name]]

    def line(self, row: int) -> dict[str, float]:
        """What one line has, by name."""
        return {name: float(self.values[row, at]) for name, at in self.columns.items() if self.known[row, at]}

    def at(self, steps: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Parts of `values` and `known`, [steps, names]: lines of some of the steps, columns in this order."""
        rows = np.searchsorted(self.series("step")[1], steps)
        here = np.ix_(rows, np.array([self.columns[name] for name in names], dtype=int))
        return self.values[here], self.known[here]

    def only(self, names: Collection[str]) -> "MetricsTable":
        """The columns that are named, of those that are there."""
        kept = [name for name in self.columns if name in names]
        at = [self.columns[name] for name in kept]
        return MetricsTable({name: i for i, name in enumerate(kept)}, self.values[:, at], self.known[:, at])


def to_table(lines: Iterable[Mapping[str, Any]]) -> MetricsTable:
    """Lines as columns; words for NaN and infinities are numbers here.

    >>> found = to_table([{"step": 0, "a": "inf"}, {"step": 1, "b": 6.0}])
    >>> found.columns, found.line(1)
    ({'step': 0, 'a': 1, 'b': 2}, {'step': 1.0, 'b': 6.0})
    """
    blocks = []
    num_lines, coming = 0, iter(lines)
    while batch := list(islice(coming, BATCH)):
        blocks += _blocks(batch, num_lines)
        num_lines += len(batch)
    columns = {name: at for at, name in enumerate(dict.fromkeys(chain.from_iterable(names for names, _, _ in blocks)))}
    values = np.full((num_lines, len(columns)), np.nan)
    known = np.zeros(values.shape, dtype=bool)
    for names, rows, numbers in blocks:
        here = np.ix_(rows, [columns[name] for name in names])
        values[here] = numbers
        known[here] = True
    return MetricsTable(columns, values, known)


def _blocks(lines: Sequence[Mapping[str, Any]], first: int) -> Iterator[tuple[tuple[str, ...], list[int], np.ndarray]]:
    """Lines of the same names as an array each, with the rows they go to."""
    alike: dict[tuple[str, ...], list[int]] = {}
    for at, line in enumerate(lines):
        alike.setdefault(tuple(line), []).append(at)
    for names, rows in alike.items():
        numbers = np.fromiter(chain.from_iterable(lines[at].values() for at in rows), float, len(rows) * len(names))
        yield names, [first + at for at in rows], numbers.reshape(len(rows), len(names))


def dump(found: MetricsTable, size: int) -> bytes:
    """Columns as the bytes of an npz file; `size` is that of the metrics.jsonl they are of, in bytes."""
    buffer = io.BytesIO()
    known = np.packbits(found.known)
    np.savez(buffer, size=size, columns=np.array(json.dumps([*found.columns])), values=found.values, known=known)
    return buffer.getvalue()


def load(path: Path, size: int) -> MetricsTable | None:
    """What `dump` wrote; None if it is not there, is damaged, or is of a metrics.jsonl of another size.

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
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return MetricsTable({name: at for at, name in enumerate(names)}, values, known)
