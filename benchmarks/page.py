"""Writes docs/benchmarks.md and the table of docs/statistics.md, with their figures, from docs/benchmarks/*.json.

    python benchmarks/page.py

The text of the page is written by hand; the parts between `<!-- NAME -->` and `<!-- /NAME -->` are generated. In the
results, `limit` is the synthetic baseline.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
import numpy as np
import paired_timing
import verdicts
from matplotlib.figure import Figure
from tables import fill, table

from gengap_dist.analysis.report.plotting import ACCENT, INK, QUIET, SOFT, STYLE, WARM, plain_tick_labels

DOCS = Path(__file__).parents[1] / "docs"
COLOUR = {"ours": ACCENT, "peer": WARM, "limit": QUIET}
STUDY_REFERENCE = "xargs -P"  # whose runs per hour those of others are divided by


def keep(docs: Path, name: str, results: Mapping[str, Any]) -> None:
    """Add results to docs/benchmarks/NAME.json; those of other workloads are kept."""
    path = docs / "benchmarks" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(read(docs, name) | dict(results), indent=1) + "\n")


def read(docs: Path, name: str) -> dict[str, Any]:
    """The content of docs/benchmarks/NAME.json; empty if there is no file."""
    path = docs / "benchmarks" / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write(docs: Path) -> None:
    """Fill the page with the results, and draw the figure."""
    peers, results_of_studies, results_of_gpt = read(docs, "peers"), read(docs, "studies"), read(docs, "gpt")
    bodies: dict[str, str] = {}
    if peers:
        draw(peers, docs / "benchmarks" / "peers.svg")
        bodies |= {"headline": headline(peers), "peers": details(peers), "memory": memory(peers)}
    if results_of_studies:
        bodies["studies"] = studies(results_of_studies)
    if results_of_gpt:
        bodies["gpt"] = gpt(results_of_gpt)
    if not bodies:
        return
    page = docs / "benchmarks.md"
    text = page.read_text() if page.exists() else "# Benchmarks\n\n<!-- peers -->\n<!-- /peers -->\n"
    for name, body in bodies.items():
        text = fill(text, name, body)
    page.write_text(text)
    if simulated := read(docs, "verdicts"):
        path = docs / "statistics.md"
        path.write_text(fill(path.read_text(), "verdicts", verdicts_table(simulated)))
        draw_verdicts(docs / "verdicts_updates.svg")


def draw_verdicts(path: Path) -> None:
    """A simulated study in which only the number of updates differs: accuracy by updates, and by training loss."""
    runs = [run for run in verdicts.only_updates(np.random.default_rng(1), 1) if run.arm != "lb1294-long"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 2.8), layout="constrained")
        by_updates, by_loss = figure.subplots(1, 2, sharey=True)
        for run, color in zip(runs, (INK, ACCENT, WARM), strict=True):
            if run.curve is None:
                continue
            curve, label = run.curve, f"batch {run.global_size:,}: {run.num_updates:,} updates"
            by_updates.plot(curve.steps, 100 * curve.scores, color=color, linewidth=1.4, label=label)
            by_updates.plot(curve.steps[-1], 100 * curve.scores[-1], "o", color=color)
            by_loss.plot(curve.losses, 100 * curve.scores, color=color, linewidth=1.4)
        for axes in (by_updates, by_loss):
            axes.set_xscale("log")
            plain_tick_labels(axes.xaxis)
        by_loss.invert_xaxis()
        by_updates.set_xlabel("updates")
        by_loss.set_xlabel("training loss")
        by_updates.set_ylabel("validation accuracy, %")
        by_updates.legend(fontsize=8, loc="upper left")
        figure.savefig(path, metadata={"Date": None})


def verdicts_table(results: Mapping[str, Any]) -> str:
    """The table of benchmarks/verdicts.py."""
    rows = [
        [
            row["truth"],
            str(row["n"]),
            row["called"],
            f"{row['percent']:.1f}",
            "" if row["before"] is None else f"{row['before']:.1f}",
            row["specified"],
        ]
        for row in results["rows"]
    ]
    head = ["truth", "n", "called", "%", "rules before, %", "should be, %"]
    return f"{results['studies']} simulated studies for each row:\n\n{table(head, rows)}"


def headline(peers: Mapping[str, Any]) -> str:
    """For every workload: gengap_dist against the best peer and against the synthetic baseline."""
    rows = []
    for result in peers.values():
        for num_ranks, speeds in result["images_per_second"].items():
            best = max(
                (name for name in speeds if result["kinds"][name] == "peer"), key=lambda name: median(speeds[name])
            )
            for name in (name for name in speeds if result["kinds"][name] == "ours"):
                ratios = [str(paired_timing.ratio(speeds[name], speeds[reference])) for reference in (best, "limit")]
                rows.append([result["title"], num_ranks, name, best, *ratios])
    machines = sorted({paired_timing.machine_summary(result["machine"]) for result in peers.values()})
    head = ["workload", "ranks", "", "best peer", "over the best peer", "over the limit"]
    return "\n\n".join([table(head, rows), f"Machine: {'; '.join(machines)}."])


def details(peers: Mapping[str, Any]) -> str:
    """Speed of every candidate, and the ratio of gengap_dist over it."""
    parts = []
    for result in peers.values():
        for num_ranks, speeds in result["images_per_second"].items():
            ours = [name for name in speeds if result["kinds"][name] == "ours"]
            rows = [
                [
                    name,
                    f"{median(values):,.0f}",
                    *(str(paired_timing.ratio(speeds[own], values)) if own != name else "" for own in ours),
                ]
                for name, values in speeds.items()
            ]
            rows += [[name, "not installed", *("" for _ in ours)] for name in result["missing"]]
            title = f"**{result['title']}, {num_ranks} rank{'s' * (num_ranks != '1')}** ({len(speeds['limit'])} rounds)"
            parts += [title, table(["", "images/s", *(f"{own} over this" for own in ours)], rows)]
    return "\n\n".join(parts)


def memory(peers: Mapping[str, Any]) -> str:
    """Peak memory per rank."""
    with_memory = [result for result in peers.values() if "peak_mib" in result]
    names = list(dict.fromkeys(name for result in with_memory for name in result["peak_mib"]))
    rows = [
        [name, *(f"{result['peak_mib'][name]:,.0f}" if name in result["peak_mib"] else "" for result in with_memory)]
        for name in names
    ]
    rows.append(["the data set itself", *(f"{result['data_mib']:,.0f}" for result in with_memory)])
    return table(["peak MiB of a rank", *(result["title"] for result in with_memory)], rows)


def studies(results: Mapping[str, Any]) -> str:
    """A table for each study, with the machine below it."""
    parts = []
    for result in results.values():
        head, *rows = study_columns(result)
        num_rounds = len(next(iter(result["contestants"].values()))["seconds"])
        parts += [f"**{result['title']}** ({num_rounds} rounds)", table(head, rows)]
        parts += [f"Machine: {paired_timing.machine_summary(result['machine'])}."]
    return "\n\n".join(parts)


def gpt(results: Mapping[str, Any]) -> str:
    """Tables for each run of benchmarks/gpt_throughput.py, by the clock and by CPU time: speed, and ratios over it."""
    parts = []
    for number, result in enumerate(results["runs"], 1):
        for unit, key in (("tokens/s", "tokens_per_second"), ("tokens per CPU s", "tokens_per_cpu_second")):
            speeds = result[key]
            ours = [name for name in speeds if name.startswith("gengap_dist")]
            rows = [
                [
                    name,
                    f"{median(values):,.0f}",
                    *("" if name in ours else str(paired_timing.ratio(speeds[own], values)) for own in ours),
                ]
                for name, values in speeds.items()
            ]
            parts.append(table(["", unit, *(f"{own} over this" for own in ours)], rows))
        num_rounds = len(next(iter(result["tokens_per_second"].values())))
        parts.insert(-2, f"**Run {number}** ({num_rounds} rounds, load {result['load']} per core at its end)")
    return "\n\n".join([*parts, f"Machine: {paired_timing.machine_summary(results['runs'][-1]['machine'])}."])


def study_columns(result: Mapping[str, Any]) -> list[list[str]]:
    """The head and a row for each contestant of benchmarks/studies.py; medians over rounds, means over runs."""
    by_name, num_runs = result["contestants"], result["num_runs"]
    per_hour = {name: [3600 * num_runs / seconds for seconds in each["seconds"]] for name, each in by_name.items()}
    head = ["", "runs/h", f"over {STUDY_REFERENCE}", "CPU s a run", "peak MiB", "test accuracy", "near-rank loss"]
    rows = []
    for name, each in by_name.items():
        accuracies = [value for of_arm in each["test_accuracy"].values() for value in of_arm]
        losses = [value for of_arm in each["near_rank_loss"].values() for value in of_arm if value is not None]
        ratio = paired_timing.ratio(per_hour[name], per_hour[STUDY_REFERENCE])
        rows.append(
            [
                name,
                f"{median(per_hour[name]):,.0f}",
                "" if name == STUDY_REFERENCE else str(ratio),
                f"{median(each['cpu_seconds']) / num_runs:.2f}",
                f"{median(each['peak_mib']):,.0f}",
                f"{sum(accuracies) / len(accuracies):.1%}",
                f"{sum(losses) / len(losses):.3f}" if losses else "",
            ]
        )
    return [head, *rows, *([name, why, *[""] * (len(head) - 2)] for name, why in result["missing"].items())]


def draw(peers: Mapping[str, Any], path: Path) -> None:
    """A panel for each workload and number of ranks, a bar for each candidate: speed over the synthetic baseline.

    Without any speeds, no figure is drawn.
    """
    panels = [
        (result, num_ranks, speeds)
        for result in peers.values()
        for num_ranks, speeds in result["images_per_second"].items()
    ]
    if not panels:
        return
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 2.3 * -(-len(panels) // 2)))
        for number, (result, num_ranks, speeds) in enumerate(panels, 1):
            axes = figure.add_subplot(-(-len(panels) // 2), 2, number)
            names = [name for name in speeds if name != "limit"]
            ratios = [paired_timing.ratio(speeds[name], speeds["limit"]) for name in names]
            for row, (name, ratio) in enumerate(zip(names, ratios, strict=True)):
                colour = COLOUR[result["kinds"][name]]
                noisy = ratio.doubt in ("too noisy", "too few rounds")  # no bar: its length is uncertain
                axes.barh(row, 0 if noisy else ratio.median, height=0.62, color=colour, alpha=0.85)
                axes.plot([ratio.low, ratio.high], [row, row], color=QUIET if noisy else INK, linewidth=1)
            axes.axvline(1.0, color=SOFT, linewidth=1, linestyle="--")
            axes.set_yticks(range(len(names)), names, fontsize=8)
            axes.invert_yaxis()
            axes.grid(visible=False, axis="y")
            axes.set_title(f"{result['title']}, {num_ranks} rank{'s' * (num_ranks != '1')}", fontsize=9)
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
