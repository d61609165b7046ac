"""The report in a real browser, from a file, without a network; and from folders that lack what they should have."""

import base64
import json
import re
import shutil
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from gengap_dist.analysis.report import html
from gengap_dist.analysis.report.html import write_report
from gengap_dist.analysis.report.plotting import THEME
from gengap_dist.analysis.study_data import read_study
from gengap_dist.cli.report import command
from tests.analysis.report.folders import ARMS, TUNED, write_run, write_study
from tests.browser import NEEDS_CHROMIUM, page, pictures
from tests.conftest import thinned

pytestmark = pytest.mark.processes

ALL = ["test_values", "near_rank_by_batch", "gap", "updates_to_target", "curves", "near_rank_change",
       "near_rank_loss_rel", "effective_rank", "spectra", "gap_against_explanations"]  # fmt: skip
SPACE = {"study": {"tune": {"trials": 2, "space": {"optim.lr": {"low": 0.1, "high": 0.4}}}}}


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """The page of a study with everything: tuning, a run that diverged, one half-written."""
    folder = write_study(tmp_path_factory.mktemp("study"), tuned=TUNED, config=SPACE)
    half = folder / "runs" / "lb64" / "seed9"
    half.mkdir()
    (half / "run.json").write_text('{"seed": 9, "sta')
    return write_report(read_study(folder))


@pytest.fixture(scope="module")
def shown(report: Path) -> Iterator[Any]:
    """The page in a browser that is cut off from every network."""
    with page(offline=True, viewport={"width": 1280, "height": 900}, color_scheme="light", accept_downloads=True) as p:
        p.goto(report.as_uri())
        p.evaluate("document.querySelectorAll('section > details').forEach(one => { one.open = true; })")
        yield p
        assert p.complaints == []


@NEEDS_CHROMIUM
def test_every_picture_is_drawn(shown):
    boxes = shown.evaluate(
        """() => [...document.querySelectorAll("figure")].map(figure => {
            const svg = figure.querySelector("svg[role=img]"), box = svg.getBoundingClientRect();
            const texts = [...svg.querySelectorAll("text")].map(t => t.textContent.trim()).filter(Boolean);
            const shapes = [...svg.querySelectorAll("path")].filter(p => p.getBoundingClientRect().width > 0).length;
            return [figure.id, box.width, box.height, texts.length, shapes, svg.getAttribute("aria-label")];
        })"""
    )
    assert [name for name, *_ in boxes] == ALL
    for name, width, height, texts, shapes, label in boxes:
        assert width > 200, name
        assert height > 80, name
        assert texts > 4, name
        assert shapes > 4, name
        assert label.endswith("."), name
    shown.screenshot(path=pictures() / "report-light.png", full_page=True)


@NEEDS_CHROMIUM
def test_the_answer_comes_first(shown):
    heads = shown.locator("h2").all_inner_texts()
    assert heads[:5] == ["Main figures", "Claims of the paper", "Limits of this comparison", "Arms", "Figures"]
    assert shown.locator("figure").first.get_attribute("id") == "test_values"
    assert shown.locator(".lead").first.inner_text() == "What does a larger batch cost?"
    assert shown.locator("h1").inner_text() == "toy <study>"
    outcomes = shown.locator(".outcome").all_inner_texts()
    assert outcomes
    assert set(outcomes) <= {"supported", "contradicted", "undecided"}
    assert len(outcomes) == shown.locator(".outcome svg[aria-hidden=true]").count()
    caveats = shown.locator("#caveats").inner_text()
    assert "lb256: 1 diverged" in caveats
    assert "runs/lb64/seed9/run.json is damaged: it is not JSON" in caveats
    assert "12 runs" not in shown.locator("header").inner_text()  # 13: the half-written one counts
    tuning = shown.locator("#tuning").inner_text()
    assert "optim.lr at its low end" in tuning
    assert "high: 0.4" in tuning


def column(shown: Any, table: str, at: int) -> list[str]:
    return shown.locator(f"#{table} tbody tr > :nth-child({at + 1})").all_inner_texts()


@NEEDS_CHROMIUM
def test_tables_sort_by_keyboard_and_by_mouse(shown):
    heads = shown.locator("#arm-table thead th").all_inner_texts()
    at = heads.index("gap")
    button = shown.locator("#arm-table thead button").nth(at)
    before = column(shown, "arm-table", 0)
    assert before == list(ARMS)
    button.focus()
    shown.keyboard.press("Enter")
    shown.keyboard.press("Space")  # twice: descending
    head = shown.locator("#arm-table thead th").nth(at)
    assert head.get_attribute("aria-sort") == "descending"
    assert column(shown, "arm-table", 0) == ["lb256", "lb64-sqrt", "lb64", "sb8"]
    assert head.get_attribute("title").startswith("Result of the baseline minus that of the arm")
    shown.locator("#arm-table thead button").nth(heads.index("batch")).click()
    assert column(shown, "arm-table", heads.index("batch")) == ["8", "64", "64", "256"]  # by value, not by letters
    assert column(shown, "arm-table", 0) == ["sb8", "lb64-sqrt", "lb64", "lb256"]  # stable: equal ones stay
    assert head.get_attribute("aria-sort") is None
    at = heads.index("95% t")
    shown.locator("#arm-table thead button").nth(at).click()
    assert column(shown, "arm-table", at)[-1] == "-"
    shown.locator("#arm-table thead button").nth(at).click()
    assert column(shown, "arm-table", at)[-1] == "-"  # what is missing is last both ways
    shown.locator("#run-table thead button").nth(2).click()
    assert column(shown, "run-table", 2)[0] == "diverged"


@NEEDS_CHROMIUM
def test_data_can_be_taken_from_the_page(shown, report):
    with shown.expect_download() as download:
        shown.locator("#gap .csv a").click()
    assert download.value.suggested_filename == "gap.csv"
    text = Path(download.value.path()).read_text()
    assert text == (report.parent / "figures" / "gap.csv").read_text()
    assert text.startswith("arm,global_size,")
    for name in ALL:
        uri = shown.locator(f"#{name} .csv a").get_attribute("href")
        assert base64.b64decode(uri.split(",")[1]).decode() == (report.parent / "figures" / f"{name}.csv").read_text()


@NEEDS_CHROMIUM
def test_a_reader_without_eyes_or_mouse_finds_everything(shown):
    wrong = shown.evaluate(
        """() => {
            const wrong = [], name = e => (e.getAttribute("aria-label") || e.textContent).trim();
            const ids = [...document.querySelectorAll("[id]")].map(e => e.id);
            for (const id of ids) if (ids.indexOf(id) !== ids.lastIndexOf(id)) wrong.push("twice: " + id);
            for (const e of document.querySelectorAll("button, a, summary, [role=img], [role=region], nav, table"))
                if (!name(e)) wrong.push(e.outerHTML.slice(0, 80));
            for (const e of document.querySelectorAll("svg:not([role=img])"))
                if (e.getAttribute("aria-hidden") !== "true") wrong.push("no name: " + e.outerHTML.slice(0, 80));
            let level = 0;
            for (const e of document.querySelectorAll("h1, h2, h3, h4")) {
                if (Number(e.tagName[1]) > level + 1) wrong.push("skipped to " + e.textContent);
                level = Number(e.tagName[1]);
            }
            for (const e of document.querySelectorAll("a[href^='#'], [aria-labelledby], [aria-describedby]"))
                for (const name of ["href", "aria-labelledby", "aria-describedby"]) {
                    const id = e.getAttribute(name)?.replace("#", "");
                    if (id && !document.getElementById(id)) wrong.push("leads nowhere: " + id);
                }
            for (const e of document.querySelectorAll("*")) {
                const style = getComputedStyle(e);
                if (["auto", "scroll"].includes(style.overflowX) && e.scrollWidth > e.clientWidth + 1
                    && e.tabIndex < 0 && !e.querySelector("a, button")) wrong.push("no key scrolls " + e.className);
            }
            for (const tag of ["main", "nav", "header", "footer"])
                if (document.querySelectorAll(tag).length !== 1) wrong.push("landmark " + tag);
            return wrong;
        }"""
    )
    assert wrong == []
    shown.reload()
    shown.keyboard.press("Tab")
    assert shown.evaluate("document.activeElement.textContent") == "Skip to the results"
    assert shown.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    shown.keyboard.press("Enter")
    assert shown.evaluate("document.activeElement.id") == "main"


@NEEDS_CHROMIUM
def test_the_theme_follows_the_system_until_it_is_chosen(shown):
    paper = "getComputedStyle(document.body).backgroundColor"
    axis = "getComputedStyle(document.querySelector('#gap svg text')).fill"
    light = shown.evaluate(axis)
    shown.emulate_media(color_scheme="dark")
    assert shown.evaluate(paper) == rgb(THEME["paper"][1])
    assert shown.evaluate(axis) != light  # pictures follow, too
    shown.screenshot(path=pictures() / "report-dark.png", full_page=True)
    shown.locator("#theme").click()
    assert shown.locator("#theme").inner_text() == "Theme: light"
    assert shown.evaluate(paper) == rgb(THEME["paper"][0])
    assert shown.evaluate(axis) == light
    shown.reload()
    assert shown.locator("#theme").inner_text() == "Theme: light"  # kept
    shown.locator("#theme").click()
    assert shown.locator("#theme").inner_text() == "Theme: dark"
    shown.emulate_media(media="print")
    assert shown.evaluate(paper) == rgb(THEME["paper"][0])  # paper is white
    assert not shown.locator("#theme").is_visible()
    shown.emulate_media(media="screen")


@NEEDS_CHROMIUM
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_cut_at_the_side(shown, width):
    """Neither the page nor a table, also not the data of a figure, which are made a table when they are asked for."""
    shown.set_viewport_size({"width": width, "height": 844})
    shown.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    shown.locator("#gap details table").wait_for()
    assert shown.locator("#gap details tbody tr").count() == 11
    assert shown.evaluate("document.documentElement.scrollWidth") == width
    wide = """[...document.querySelectorAll(".scroll, .plate, pre")]
        .filter(box => box.scrollWidth > box.clientWidth + 1).map(box => box.outerHTML.slice(0, 120))"""
    assert shown.evaluate(wide) == []
    shown.evaluate("document.querySelectorAll('details.data').forEach(one => { one.open = false; })")


@NEEDS_CHROMIUM
def test_no_word_of_a_head_is_broken(shown):
    shown.set_viewport_size({"width": 1280, "height": 844})
    shown.evaluate("document.querySelectorAll('details').forEach(one => { one.open = !one.matches('.data'); })")
    broken = """[...document.querySelectorAll("#arms thead button")]
        .flatMap(head => [...head.firstChild.data.matchAll(/[\\w.]+/g)]
        .filter(word => { const range = document.createRange(); range.setStart(head.firstChild, word.index);
            range.setEnd(head.firstChild, word.index + word[0].length); return range.getClientRects().length > 1; })
        .map(word => word[0]))"""
    assert shown.locator("#arms thead button").count() > 12
    assert shown.evaluate(broken) == []


@NEEDS_CHROMIUM
def test_a_link_opens_what_is_folded(shown):
    shown.set_viewport_size({"width": 1280, "height": 900})
    shown.evaluate("document.querySelectorAll('section > details').forEach(one => { one.open = false; })")
    shown.locator("nav a[href='#runs']").click()
    assert shown.locator("#run-table").is_visible()
    term = shown.locator("#answer a.term").first
    assert term.get_attribute("title")
    term.click()
    assert shown.locator("#glossary dl").is_visible()
    shown.evaluate("document.querySelectorAll('section > details').forEach(one => { one.open = true; })")


@NEEDS_CHROMIUM
def test_a_phone_shows_the_whole_page(shown):
    shown.set_viewport_size({"width": 390, "height": 844})
    shown.screenshot(path=pictures() / "report-phone.png", full_page=True)


@NEEDS_CHROMIUM
def test_on_paper_everything_is_open(shown):
    number_open = shown.locator("details[open]").count()
    shown.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert shown.locator("details:not([open]):not(.data)").count() == 0
    shown.evaluate("dispatchEvent(new Event('afterprint'))")
    assert shown.locator("details[open]").count() == number_open


def rgb(colour: str) -> str:
    return f"rgb({', '.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))})"


def luminance(colour: str) -> float:
    """Relative luminance, WCAG 2.2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_can_be_read_in_both_themes(theme):
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    colours = {name: pair[theme] for name, pair in THEME.items()}
    for text in ("ink", "soft", "c0"):
        for ground in ("paper", "card"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    for mark in ("quiet", "c1"):
        assert contrast(colours[mark], colours["paper"]) >= 3, mark


def only(folder: Path, pattern: str) -> None:
    for path in folder.glob(pattern):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_one_run_alone(tmp_path):
    write_run(tmp_path / "run", 1, 0)
    text = write_report(read_study(tmp_path / "run")).read_text()
    assert "One run, finished, test accuracy 88.00%" in text
    assert 'id="all_spectra"' in text
    assert 'id="arms"' not in text
    assert "Claims of the paper" not in text


def test_pdfs_are_written_on_request(tmp_path, monkeypatch):
    monkeypatch.setattr("gengap_dist.cli.terminal.print_run", lambda *told: None)
    monkeypatch.setattr(html, "RUN_FIGURES", {"curves": html.RUN_FIGURES["curves"]})
    run = tmp_path / "runs" / "my run"
    write_run(run, 1, 0)
    figures = run / "figures"
    assert command(["--pdf", str(run)]) == 0
    assert {path.name for path in figures.iterdir()} == {"curves.svg", "curves.csv", "curves.pdf"}
    assert "as SVG and PDF" in (run / "report.html").read_text()
    assert command([str(run)]) == 0
    assert {path.name for path in figures.iterdir()} == {"curves.svg", "curves.csv"}
    assert "gengap report --pdf 'runs/my run'" in unescape((run / "report.html").read_text())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert command(["../runs/my run"]) == 0
    assert f"gengap report --pdf '{run}'" in unescape((run / "report.html").read_text())


def test_one_arm_and_one_seed(tmp_path):
    text = write_report(read_study(write_study(tmp_path, {"sb8": {}}, 1))).read_text()
    assert 'id="test_values"' in text
    assert 'id="gap"' not in text
    two = write_study(tmp_path / "two", {"sb8": {}, "lb64": {"batch__global_size": 64}}, 1)
    assert "With one pair of seeds there is no interval" in write_report(read_study(two)).read_text()


@pytest.mark.parametrize(
    "lacking",
    thinned(
        ["runs/*", "runs/sb8/*", "runs/lb64", "runs/*/*/metrics.jsonl", "runs/*/*/spectra", "runs/*/*/run.json"],
        lambda lacking: lacking not in ("runs/lb64", "runs/*/*/spectra"),
    ),
)
def test_whatever_is_missing_the_rest_is_shown(tmp_path, lacking):
    folder = write_study(tmp_path, {"sb8": {}, "lb64": {"batch__global_size": 64}}, 2)
    only(folder, lacking)
    text = write_report(read_study(folder)).read_text()
    assert "What does a larger batch cost?" in text
    if lacking in ("runs/*", "runs/sb8/*"):
        assert "The baseline (sb8) has no finished run" in text
    if lacking == "runs/*/*/run.json":
        assert text.count("A run is left out of the report") == 4
    if lacking == "runs/*/*/spectra":
        assert 'id="gap"' in text


def test_metrics_that_say_little(tmp_path):
    contents = ["", '{"step": 0, "epoch": 0}\n', '{"step": 0, "epoch": 0, "train/loss": "nan"}\n{"st', None]
    folder = write_study(tmp_path, {"sb8": {}, "lb64": {"batch__global_size": 64}}, len(contents))
    for content, path in zip(contents, sorted(folder.glob("runs/*/*/metrics.jsonl")), strict=False):
        path.unlink() if content is None else path.write_text(content)
    only(folder, "runs/sb8/seed0/spectra/step_00000000.npz")
    assert 'id="gap"' in write_report(read_study(folder)).read_text()


def test_runs_without_results(tmp_path):
    folder = write_study(tmp_path, {"sb8": {}, "lb64": {"batch__global_size": 64}}, 2)
    for path in folder.glob("runs/lb64/*/run.json"):
        info = json.loads(path.read_text())
        path.write_text(json.dumps({"status": "running", "seed": info["seed"], "config": info["config"]}))
    for path in folder.glob("runs/sb8/*/run.json"):
        path.write_text(re.sub(r'"test/accuracy": [\d.]+,', "", path.read_text()))
    text = write_report(read_study(folder)).read_text()
    assert "0 + 2 running" in text
    assert 'id="near_rank_change"' in text
