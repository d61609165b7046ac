"""Writes a self-contained HTML report and its figures, from a run folder or a study folder."""

import base64
import hashlib
import shlex
import warnings
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from jinja2 import Environment, StrictUndefined

from gengap_dist.analysis.report.figure_list import KEY_FIGURES, RUN_FIGURES, STUDY_FIGURES, name_metric
from gengap_dist.analysis.report.glossary import GLOSSARY, anchor, meaning, with_terms
from gengap_dist.analysis.report.plotting import STYLE, THEME, save
from gengap_dist.analysis.report.tables import (
    arm_tables,
    intervention_tables,
    matching_tables,
    representative_run,
    run_table,
    tuning_tables,
)
from gengap_dist.analysis.report.text import MAX_CAVEATS, first_sentences, limits
from gengap_dist.analysis.results import Comparison
from gengap_dist.analysis.study_data import StudyData
from gengap_dist.config import yaml_core
from gengap_dist.config.file_names import as_here
from gengap_dist.errors import visible
from gengap_dist.runs.run_folder import write_atomically
from gengap_dist.runs.schema import section

MAX_OPEN_ROWS = 20  # of the table of arms; a longer one is folded
MAX_ARMS = 40  # in figures, besides the baseline


class RenderedFigure(NamedTuple):
    """A figure on the page."""

    name: str
    title: str
    caption: str
    svg: str
    csv: str
    """Its data as a data: URI."""


def write_report(study: StudyData, *, pdf: bool = False) -> Path:
    """Write the report and figures of a study, or of a run (see `read_study`); returns the path of the page.

    Args:
        study: what to show.
        pdf: also write the figures as PDF, which doubles the time.
    """
    return write_page(study, draw_figures(study, pdf=pdf), pdf=pdf)


def write_page(study: StudyData, figures: Sequence[RenderedFigure], *, pdf: bool = False) -> Path:
    """Write the page with `figures`, which `draw_figures` has returned; returns its path."""
    is_study, comparison = _is_study(study), _comparison(study)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"csp_hash": csp_hash, "terms": with_terms, "meaning": meaning, "anchor": anchor}
    template = environment.from_string(
        files("gengap_dist.analysis.report").joinpath("template.html").read_text(encoding="utf-8")
    )
    page, ordered = study.folder / "report.html", _in_order(study)
    config = study.info.get("config") or {}
    html = template.render(
        study=study,
        title=study.name,
        folder=shlex.quote(as_here(study.folder.resolve())),
        summary=_summary(study, is_study),
        comparison=comparison,
        caveats=limits(study.look, comparison),
        evidence={claim.key: first_sentences(claim.evidence) for claim in comparison.claims},
        max_caveats=MAX_CAVEATS,
        max_open_rows=MAX_OPEN_ROWS,
        theme=THEME,
        arms=arm_tables(ordered, comparison) if is_study else (),
        glossary=GLOSSARY,
        interventions=intervention_tables(comparison),
        runs=run_table(ordered),
        key_figures=[figure for figure in figures if figure.name in KEY_FIGURES],
        figures=[figure for figure in figures if figure.name not in KEY_FIGURES],
        pdf=pdf,
        tuned=tuning_tables(study.info.get("tuned") or {}) + matching_tables(study.info.get("matched") or {}),
        space=_yaml(section(config, "study").get("tune")),
        facts=_facts(study),
        command=shlex.join(_without_interpreter_path(study.info.get("command") or [])),
        config=_yaml(config),
    )
    write_atomically(page, visible(html))
    return page


def csp_hash(text: str) -> str:
    """The source expression of a Content-Security-Policy that allows this inline style or script.

    >>> csp_hash("")
    "'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='"
    """
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def draw_figures(study: StudyData, *, pdf: bool = False) -> list[RenderedFigure]:
    """Draw every figure that has data, and write its files. A run that has measured everything need not have ended."""
    comparison, folder = _comparison(study), study.folder / "figures"
    folder.mkdir(exist_ok=True)
    out, drawn = [], _with_drawn_arms(_in_order(study), comparison)
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the browser has them
        for name, (title, draw) in (STUDY_FIGURES if _is_study(study) else RUN_FIGURES).items():
            if not drawn.runs or (figure := draw(drawn, comparison)) is None:
                continue
            title, caption = name_metric(title, study.metric), figure.caption
            if len(drawn.arms) < len(study.arms) and any("arm" in row for row in figure.rows):
                caption += (
                    f" Of {len(study.arms)} arms {len(drawn.arms)} are drawn: the baseline, and those that lose most "
                    "and least; the table of arms has all."
                )
            svg, csv = save(figure, folder, name, pdf=pdf)
            uri = "data:text/csv;base64," + base64.b64encode(csv.encode()).decode()
            out.append(RenderedFigure(name, title, caption, svg, uri))
    return out


def _in_order(study: StudyData) -> StudyData:
    """The study with its arms in the order of the page: the baseline, then by batch."""
    sizes = {arm: runs[0].global_size if (runs := study.runs_of(arm)) else 0 for arm in study.arms}
    return replace(study, arms=sorted(study.arms, key=lambda arm: (arm != study.baseline, sizes[arm])))


def _with_drawn_arms(study: StudyData, comparison: Comparison) -> StudyData:
    """The study with the arms that figures show: of very many, which nobody could read, the baseline and the extremes.

    Arms without a gap are drawn if there is room, the first ones first.
    """
    if len(study.arms) <= MAX_ARMS:
        return study
    by_gap = sorted(comparison.gaps, key=lambda arm: comparison.gaps[arm].paired.mean)
    others = [arm for arm in study.arms if arm not in comparison.gaps and arm != comparison.baseline]
    extremes = [*by_gap[: MAX_ARMS // 2], *by_gap[MAX_ARMS // 2 :][-MAX_ARMS // 2 :]]
    chosen = {comparison.baseline, *[*extremes, *others][:MAX_ARMS]}
    return replace(
        study,
        arms=[arm for arm in study.arms if arm in chosen],
        runs=[run for run in study.runs if run.arm in chosen],
    )


def _is_study(study: StudyData) -> bool:
    return (study.folder / "study.json").exists()


def _comparison(study: StudyData) -> Comparison:
    return (
        study.comparison if _is_study(study) else Comparison(study.metric, study.baseline, "", {}, {}, [], None, [], [])
    )


def _summary(study: StudyData, is_study: bool) -> str:
    """The number of arms and runs, or the outcome of the run, as one line."""
    done = sum(len(study.finished_runs(arm)) for arm in study.arms)
    if is_study:
        return f"{len(study.arms)} arms, {len(study.runs) + len(study.unreadable)} runs, {done} finished"
    result, metric = study.runs[0].info.get("result") or {}, study.metric
    value = result.get(f"test/{metric.name}")
    shown = f", test {metric.name} {metric.format(float(value))}" if value is not None else ""
    return f"One run, {study.runs[0].info['status']}{shown}"


def _facts(study: StudyData) -> dict[str, str]:
    """Data, model, hardware, versions and status, for the end of the page."""
    run_data = representative_run(study)
    run = run_data.info if run_data else study.info
    data, git = run.get("data") or {}, study.info.get("git") or {}
    model = (run.get("config") or {}).get("model") or {}
    model = model if isinstance(model, dict) else {"name": model}  # in a run of another program
    return {
        "data": f"{data.get('name', '-')}: {_count(data.get('num_train'))} training, {_count(data.get('num_val'))} "
        f"validation, {_count(data.get('num_test'))} test samples, digest {data.get('digest', '-')[:12]}",
        "model": f"{model.get('name', '-')}, {_count(run.get('num_parameters'))} parameters",
        "ranks": f"{_count(run.get('world_size'))} on {run.get('device', '-')} "
        f"({run.get('strategy', '-')}, {run.get('launcher', '-')})",
        "probe": f"{_count(run.get('num_probe_samples'))} fixed training samples, eval mode, no augmentation",
        "versions": ", ".join(f"{name} {version}" for name, version in (study.info.get("versions") or {}).items()),
        "commit": f"{git['commit'][:12]}{' with uncommitted changes' if git['dirty'] else ''}" if git else "none",
        "status": study.info.get("status", "-"),
        "started": study.info.get("started", "-"),
    }


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _yaml(value: Any) -> str:
    return yaml_core.write(value) if value else ""


def _without_interpreter_path(argv: list[str]) -> list[str]:
    return ["python" if number == 0 else word for number, word in enumerate(argv)]
