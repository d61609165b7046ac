"""The table of docs/gpu.md, from what tests of scenarios and synchronizations found.

usage: GENGAP_CUDA_TABLE=FILE pytest tests/cuda, with one or more versions of torch; then
       python -m tests.cuda.table FILE...
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]


def scenarios(rows: Rows) -> str:
    """Largest relative difference from the CPU, by scenario and version of torch."""
    versions = sorted({row["torch"] for row in rows}, key=lambda text: [int(part) for part in text.split(".")[:2]])
    found: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        found[row["name"]][row["torch"]] = row
    lines = [
        "| run | numbers compared | " + " | ".join(f"torch {version}" for version in versions) + " |",
        "|---|---" + "|---" * len(versions) + "|",
    ]
    for name, by_version in found.items():
        cells = [_difference(by_version.get(version)) for version in versions]
        numbers = max(row["numbers"] for row in by_version.values())
        lines.append(f"| {name} | {numbers:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _difference(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    return "0" if row["worst"] == 0 else f"{row['worst']:.0e}"


def waits(rows: Rows) -> str:
    """Waits for the GPU in a step, ours and libraries', by configuration and version of torch."""
    lines = ["| step | ranks | torch | ours | libraries' own |", "|---|---|---|---|---|"]
    for row in rows:
        theirs = "; ".join(f"{number:g} in {place}" for place, number in row["theirs"].items()) or "0"
        lines.append(f"| {row['step']} | {row['ranks']} | {row['torch']} | {row['ours']:g} | {theirs} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    found = [json.loads(line) for path in sys.argv[1:] for line in Path(path).read_text().splitlines()]
    print(scenarios([row for row in found if "name" in row]))
    print()
    print(waits([row for row in found if "step" in row]))
