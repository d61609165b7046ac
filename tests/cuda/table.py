"""The tables of docs/gpu.md, from what tests of scenarios and synchronizations found.

usage: python -m tests.cuda.table [--before FILE] FILE...

Each FILE is written by `GENGAP_CUDA_TABLE=FILE pytest tests/cuda`, with some version of torch; that of --before by the
same tests on an earlier commit.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Cells = dict[str, Row]
"""Rows by version of torch."""


def read(path: str) -> list[Row]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def by_version(rows: list[Row], *names: str) -> dict[tuple[Any, ...], Cells]:
    """Rows with one value of `names`, by version of torch."""
    found: dict[tuple[Any, ...], Cells] = defaultdict(dict)
    for row in rows:
        if names[0] in row:
            found[tuple(row[name] for name in names)][row["torch"]] = row
    return found


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])


def scenarios(rows: list[Row]) -> str:
    """Largest relative difference from the CPU, by run and version of torch."""
    versions = in_order(rows)
    found = by_version(rows, "name")
    return table(
        ["run", "numbers", *(f"torch {version}" for version in versions)],
        [
            [name, f"{max(row['numbers'] for row in cells.values()):,}", *(_worst(cells.get(v)) for v in versions)]
            for (name,), cells in found.items()
        ],
    )


def _worst(row: Row | None) -> str:
    return "-" if row is None else "0" if row["worst"] == 0 else f"{row['worst']:.0e}"


def waits(rows: list[Row], before: list[Row]) -> str:
    """Waits for the GPU in a step, ours before and now, and those of libraries."""
    versions = in_order(rows)
    earlier = {key: next(iter(cells.values()))["ours"] for key, cells in by_version(before, "step", "ranks").items()}
    return table(
        ["step", "GPUs", "before", *(f"torch {version}" for version in versions), "libraries' own"],
        [
            [
                str(key[0]),
                str(key[1]),
                f"{earlier[key]:g}" if key in earlier else "failed",
                *(f"{cells[v]['ours']:g}" if v in cells else "-" for v in versions),
                _theirs(cells),
            ]
            for key, cells in by_version(rows, "step", "ranks").items()
        ],
    )


def _theirs(cells: Cells) -> str:
    """Of the newest version."""
    newest = cells[in_order([*cells.values()])[-1]]["theirs"]
    return "; ".join(f"{number:g} in {place}" for place, number in newest.items()) or "0"


def in_order(rows: list[Row]) -> list[str]:
    """Versions of torch, the oldest first."""
    return sorted({row["torch"] for row in rows}, key=lambda text: [int(part) for part in text.split(".")[:2]])


if __name__ == "__main__":
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        sys.exit(__doc__)
    old = read(words[1]) if words[0] == "--before" else []
    rows = [row for path in words[2 if old else 0 :] for row in read(path)]
    print(scenarios(rows), waits(rows, old), sep="\n\n")
