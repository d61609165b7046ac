"""One self-contained HTML page and its figures, from a run folder or a study folder."""

import base64
import shlex
from importlib.resources import files
from pathlib import Path
from typing import Any

import matplotlib
import yaml
from jinja2 import Environment, StrictUndefined

from gengap_dist.comparison.pairing import spread
from gengap_dist.report import figures
from gengap_dist.report.catalogue import RUN_FIGURES, STUDY_FIGURES
from gengap_dist.report.collect import StudyData, metric
from gengap_dist.report.terminal import interval, last_layer, percent, points, study_rows
from gengap_dist.tracking.record import write_atomically


def write_report(study: StudyData) -> Path:
    """Report and figures of a study (or of a run, as `read_study` sees it); the page's path."""
    is_study = (study.folder / "study.json").exists()
    catalogue = STUDY_FIGURES if is_study else RUN_FIGURES
    pictures = []
    (study.folder / "figures").mkdir(exist_ok=True)
    with matplotlib.rc_context(figures.STYLE):
        for name, (draw, caption) in catalogue.items():
            figure = draw(study)
            if figure is None:
                continue
            path = study.folder / "figures" / f"{name}.png"
            figure.savefig(path)
            data = base64.b64encode(path.read_bytes()).decode()
            pictures.append({"name": name, "caption": caption, "data": data})
    template = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(files("gengap_dist.report").joinpath("template.html").read_text())
    page = study.folder / "report.html"
    html = template.render(
        study=study,
        is_study=is_study,
        answers=answers(study) if is_study else [],
        arms=_arm_table(study),
        layers=_layer_table(study),
        runs=_run_table(study),
        pictures=pictures,
        facts=_facts(study),
        command=shlex.join(_readable(study.info["command"])),
        config=yaml.safe_dump(study.info["config"], sort_keys=False, default_flow_style=None, width=110),
    )
    write_atomically(page, html)
    return page


def answers(study: StudyData) -> list[str]:
    """What the numbers say, one sentence per arm: measured, not interpreted."""
    out = []
    for arm in study.arms:
        gap = study.gap(arm) if arm != study.baseline else None
        lost = study.not_finished(arm)
        suffix = f" {lost.capitalize()}." if lost else ""
        if gap is None:
            if lost and arm != study.baseline:
                out.append(f"{arm}: no pair to compare.{suffix}")
            continue
        pairs = len(gap.differences)
        side = "below" if gap.mean > 0 else "above"
        text = f"{arm}: test accuracy {abs(100 * gap.mean):.2f} points {side} {study.baseline}"
        if gap.student is None:
            text += ", on one pair of seeds: no interval, so nothing can be concluded."
        else:
            clear = gap.student[0] > 0 or gap.student[1] < 0
            text += f" (95% t interval {interval(gap.student)}, {pairs} pairs): "
            text += "a difference." if clear else "not told apart from none with these seeds."
        out.append(text + suffix)
    return out


def _arm_table(study: StudyData) -> dict[str, Any]:
    last = last_layer(study)
    heads = ["arm", "batch", "steps", "seeds", "test accuracy (sd)", "sb_lb_gap", "95% bootstrap", "95% t"]
    heads += [f"near-rank loss {last}", f"effective rank {last}"] if last else []
    return {"heads": heads, "rows": study_rows(study, last)}


def _layer_table(study: StudyData) -> dict[str, Any]:
    """Layer x arm: relative near-rank loss and effective rank, untrained and trained, means over seeds."""
    arms = [arm for arm in study.arms if study.finished(arm)]
    rows = []
    for key in study.layer_keys() if arms else []:
        row = [key]
        for name, threshold, digits in (("near_rank_loss", "rel_1e-2", ".3f"), ("effective_rank", "", ".1f")):
            ends = [
                [run.untrained_and_trained(metric(name, key, threshold)) for run in study.finished(arm)] for arm in arms
            ]
            means = [spread([first for pairs in ends for first, _ in pairs])[0]]
            means += [spread([last for _, last in pairs])[0] for pairs in ends]
            row += [format(mean, digits) if mean == mean else "-" for mean in means]
        rows.append(row)
    return {"arms": ["untrained", *arms], "rows": rows}


def _run_table(study: StudyData) -> list[dict[str, str]]:
    out = []
    for arm in study.arms:
        for run in study.of(arm):
            result = run.info.get("result", {})
            gap = result.get("train_test_gap")
            speed = result.get("images_per_second")
            out.append(
                {
                    "arm": arm,
                    "seed": str(run.seed),
                    "status": run.info["status"],
                    "steps": f"{run.info['num_steps']:,}",
                    "test": percent(result.get("test/accuracy")),
                    "best": percent(result.get("test_at_best_val/accuracy")),
                    "train": percent(result.get("train_full/accuracy")),
                    "gap": points(gap) if gap is not None else "-",
                    "speed": f"{speed:,.0f}" if speed else "-",
                    "seconds": f"{run.info.get('seconds', 0):,.1f}",
                }
            )
    return out


def _facts(study: StudyData) -> dict[str, str]:
    """Where and on what it ran."""
    run = study.runs[0].info if study.runs else study.info
    data = run.get("data") or {}
    git = study.info.get("git") or {}
    return {
        "data": f"{data.get('name')}: {data.get('num_train'):,} training, {data.get('num_val'):,} validation, "
        f"{data.get('num_test'):,} test images, digest {data.get('digest', '')[:12]}",
        "model": f"{run['config']['model']['name']}, {run.get('num_parameters', 0):,} parameters",
        "ranks": f"{run.get('world_size')} on {run.get('device')} ({run.get('strategy')}, {run.get('launcher')})",
        "probe": f"{run.get('num_probe_samples', 0):,} fixed training images, eval mode, no augmentation",
        "versions": ", ".join(f"{name} {version}" for name, version in study.info["versions"].items()),
        "commit": f"{git['commit'][:12]}{' with uncommitted changes' if git['dirty'] else ''}" if git else "none",
        "status": study.info["status"],
    }


def _readable(argv: list[str]) -> list[str]:
    return ["python" if number == 0 else word for number, word in enumerate(argv)]
