"""Writes the tables and the figure of a page in docs/results from the slim folder of its study.

    python benchmarks/result_page.py gpt_stdlib

Nothing is trained. The text of docs/results/NAME.md is written by hand; the parts between `<!-- NAME TABLE -->` and
`<!-- /NAME TABLE -->` are generated. tests/test_result_pages.py says that each page is what its folder gives.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from decisive import RESULTS, changed_arm, claims, markdown, number, values
from matplotlib.figure import Figure
from tables import fill, table

from gengap_dist.analysis.report.plotting import COLOURS, STYLE, plain_tick_labels
from gengap_dist.analysis.report.tables import arm_tables
from gengap_dist.analysis.report.text import last_layer
from gengap_dist.analysis.study_data import StudyData, read_study
from gengap_dist.config.measures import SUMMARY
from gengap_dist.config.metric_key import layer_metric

PAGES = ("gpt_stdlib", "hoffer_f1_mnist", "lenet5_batch_mnist")
"""Names of studies with a page NAME.md and a slim folder NAME."""
DRAWN = {"gpt_stdlib": ("b8", "b16", "b32", "b64", "b64-adam-sqrt", "b8-raise")}
"""Arms in the figure, by study; of a study that is not here, all."""
LONG_FALL = 20.0  # of the loss: above it the axis is logarithmic


def write(name: str, results: Path = RESULTS) -> None:
    """Fill the page of a study."""
    page = results / f"{name}.md"
    text, study = page.read_text(), read_study(results / name)
    for title, body in bodies(study).items():
        text = fill(text, f"{name} {title}", body)
    page.write_text(text)
    draw(study, results / f"{name}.svg")


def bodies(study: StudyData) -> dict[str, str]:
    """The generated parts of a page."""
    comparison = study.comparison
    arms, training = arm_tables(study, comparison)
    caveats = "".join(f" {text}" for text in comparison.caveats)
    return {
        "summary": f"{comparison.answer}\n\n{study.registration}{caveats}",
        "arms": markdown(arms),
        "training": markdown(training),
        "differences": differences(study),
        "claims": claims(study),
    }


def differences(study: StudyData) -> str:
    """One arm minus another at the end of the runs, seed by seed: test metric and near-rank loss, with intervals."""
    metric, layer = study.metric, last_layer(study)
    near_rank_loss = layer_metric(SUMMARY[0], layer or "")
    rows = []
    for one, other in pairs(study.arms, study.baseline or ""):
        scores = values(study, lambda run: run.info["result"][f"test/{metric.name}"], (one, other))
        losses = values(study, lambda run: run.untrained_and_trained(near_rank_loss)[1], (one, other))
        changed = number(scores[one] - scores[other], study.look, metric.format_difference)
        rows.append([f"{one} minus {other}", changed, number(losses[one] - losses[other], study.look)])
    return table(["arms", f"test {metric.name}", f"near-rank loss {layer}"], rows)


def pairs(arms: Sequence[str], baseline: str) -> list[tuple[str, str]]:
    """Each arm and the one that it changes, each that moves the rank and its placebo, and each batch and the baseline.

    >>> pairs(["b8", "b64", "b64-raise", "b64-placebo"], "b8")
    [('b64', 'b8'), ('b64-raise', 'b64'), ('b64-raise', 'b64-placebo'), ('b64-placebo', 'b64')]
    >>> pairs(["sb", "lb", "lb+lr", "lb+lr+gbn"], "sb")
    [('lb', 'sb'), ('lb+lr', 'lb'), ('lb+lr+gbn', 'lb+lr')]
    """
    out = []
    for arm in arms:
        changed = changed_arm(arm, arms)
        others = [changed or baseline]
        others += [f"{changed}-placebo"] if arm.rpartition("-")[2] in ("raise", "lower") else []
        out += [(arm, other) for other in others if other in arms and other != arm]
    return out


def draw(study: StudyData, path: Path) -> None:
    """Near-rank loss and effective rank of the last layer against the loss, both in the course of training."""
    layer = last_layer(study) or ""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.5, 3.6), layout="constrained")
        panels = figure.subplots(1, 2)
        for axes, name in zip(panels, SUMMARY, strict=True):
            for arm, color in zip(DRAWN.get(study.info["name"], study.arms), COLOURS, strict=False):
                runs = [run.history() for run in study.finished_runs(arm)]
                x, y = (mean_curve(runs, key) for key in ("probe/loss", layer_metric(name, layer)))
                axes.plot(x, y, "o-", color=color, label=arm, markersize=3, linewidth=1.2)
            low, high = axes.dataLim.intervalx
            if high > LONG_FALL * low:
                axes.set_xscale("log")
                plain_tick_labels(axes.xaxis)
            axes.invert_xaxis()
            axes.set_xlabel("loss on the probe set (training goes to the right)")
            axes.set_title(f"{name.partition('/')[0].replace('_', ' ')} of {layer}", fontsize=9, loc="left")
        panels[0].legend(frameon=False, fontsize=8)
        figure.savefig(path, metadata={"Date": None})


def mean_curve(runs: Sequence[Any], key: str) -> list[float]:
    """Means of a metric over runs, at the steps that all of them measured."""
    series = [dict(zip(*run.series(key), strict=True)) for run in runs]
    steps = sorted(set.intersection(*({*each} for each in series)))
    return [float(np.mean([each[step] for each in series])) for step in steps]


def main() -> None:
    """Write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=PAGES, help="of the page")
    write(parser.parse_args().name)


if __name__ == "__main__":
    main()
