"""docs/benchmarks.md and its picture of the peers, from the figures in docs/benchmarks/*.json.

    python benchmarks/page.py

The page's words are written by hand; what stands between `<!-- NAME -->` and `<!-- /NAME -->` is written anew here.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import fair
import matplotlib
from matplotlib.figure import Figure
from tables import fill, table

from gengap_dist.analysis.report.plotting import ACCENT, INK, QUIET, SOFT, STYLE, WARM

DOCS = Path(__file__).parents[1] / "docs"
COLOUR = {"ours": ACCENT, "peer": WARM, "limit": QUIET}


def keep(docs: Path, name: str, news: Mapping[str, Any]) -> None:
    """Add figures to docs/benchmarks/NAME.json; those of other workloads stay."""
    path = docs / "benchmarks" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(read(docs, name) | dict(news), indent=1) + "\n")


def read(docs: Path, name: str) -> dict[str, Any]:
    """What stands in docs/benchmarks/NAME.json."""
    path = docs / "benchmarks" / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write(docs: Path) -> None:
    """Fill the page with what has been measured, and draw the picture."""
    peers = read(docs, "peers")
    if not peers:
        return
    draw(peers, docs / "benchmarks" / "peers.svg")
    page = docs / "benchmarks.md"
    text = page.read_text() if page.exists() else "# Benchmarks\n\n<!-- peers -->\n<!-- /peers -->\n"
    for name, body in {"headline": headline(peers), "peers": details(peers), "memory": memory(peers)}.items():
        text = fill(text, name, body)
    page.write_text(text)


def headline(peers: Mapping[str, Any]) -> str:
    """For every workload, ours against the best peer and against the limit."""
    rows = []
    for found in peers.values():
        for num_ranks, speeds in found["images_per_second"].items():
            best = max((who for who in speeds if found["kinds"][who] == "peer"), key=lambda who: median(speeds[who]))
            for who in (who for who in speeds if found["kinds"][who] == "ours"):
                against = [str(fair.ratio(speeds[who], speeds[other])) for other in (best, "limit")]
                rows.append([found["title"], num_ranks, who, best, *against])
    words = sorted({fair.in_words(found["machine"]) for found in peers.values()})
    head = ["workload", "ranks", "", "best peer", "over the best peer", "over the limit"]
    return "\n\n".join([table(head, rows), f"Machine: {'; '.join(words)}."])


def details(peers: Mapping[str, Any]) -> str:
    """Everybody's speed, and ours over theirs."""
    parts = []
    for found in peers.values():
        for num_ranks, speeds in found["images_per_second"].items():
            ours = [who for who in speeds if found["kinds"][who] == "ours"]
            rows = [
                [
                    who,
                    f"{median(values):,.0f}",
                    *(str(fair.ratio(speeds[us], values)) if us != who else "" for us in ours),
                ]
                for who, values in speeds.items()
            ]
            rows += [[who, "not installed", *("" for _ in ours)] for who in found["missing"]]
            title = f"**{found['title']}, {num_ranks} rank{'s' * (num_ranks != '1')}** ({len(speeds['limit'])} rounds)"
            parts += [title, table(["", "images/s", *(f"{us} over this" for us in ours)], rows)]
    return "\n\n".join(parts)


def memory(peers: Mapping[str, Any]) -> str:
    """Peak memory of a rank."""
    with_memory = [found for found in peers.values() if "peak_mib" in found]
    everybody = list(dict.fromkeys(who for found in with_memory for who in found["peak_mib"]))
    rows = [
        [who, *(f"{found['peak_mib'][who]:,.0f}" if who in found["peak_mib"] else "" for found in with_memory)]
        for who in everybody
    ]
    rows.append(["the data set itself", *(f"{found['data_mib']:,.0f}" for found in with_memory)])
    return table(["peak MiB of a rank", *(found["title"] for found in with_memory)], rows)


def draw(peers: Mapping[str, Any], path: Path) -> None:
    """A panel for each workload and number of ranks, a bar for each contestant: speed over the limit's.

    Without any speed there is nothing to draw.
    """
    panels = [
        (found, num_ranks, speeds)
        for found in peers.values()
        for num_ranks, speeds in found["images_per_second"].items()
    ]
    if not panels:
        return
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 2.3 * -(-len(panels) // 2)))
        for number, (found, num_ranks, speeds) in enumerate(panels, 1):
            axes = figure.add_subplot(-(-len(panels) // 2), 2, number)
            who = [name for name in speeds if name != "limit"]
            ratios = [fair.ratio(speeds[name], speeds["limit"]) for name in who]
            for row, (name, ratio) in enumerate(zip(who, ratios, strict=True)):
                colour = COLOUR[found["kinds"][name]]
                noisy = ratio.doubt in ("too noisy", "too few rounds")  # no bar: there is no telling where it ends
                axes.barh(row, 0 if noisy else ratio.median, height=0.62, color=colour, alpha=0.85)
                axes.plot([ratio.low, ratio.high], [row, row], color=QUIET if noisy else INK, linewidth=1)
            axes.axvline(1.0, color=SOFT, linewidth=1, linestyle="--")
            axes.set_yticks(range(len(who)), who, fontsize=8)
            axes.invert_yaxis()
            axes.grid(visible=False, axis="y")
            axes.set_title(f"{found['title']}, {num_ranks} rank{'s' * (num_ranks != '1')}", fontsize=9)
            axes.set_xlabel("images per second over the limit's", fontsize=8)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None, "Creator": None})


def main() -> None:
    """Write the page again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of benchmarks.md")
    write(parser.parse_args().out)


if __name__ == "__main__":
    main()
