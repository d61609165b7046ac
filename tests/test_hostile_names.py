"""Names of anything, as in a folder from somewhere: every output shows them as text, and nothing acts on them."""

import csv
import io
import json
import re
import warnings
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.table import Table
from rich.text import Text

from gengap_dist.analysis.group_runs import _from_mlflow, gather
from gengap_dist.analysis.report import html
from gengap_dist.analysis.report.html import write_report
from gengap_dist.analysis.report.plotting import FORMULA
from gengap_dist.analysis.study_data import read_study
from gengap_dist.cli import report, train
from gengap_dist.cli.console import PlainConsole
from gengap_dist.cli.exit_codes import run_command, warn
from gengap_dist.cli.study_page import study_plan_page
from gengap_dist.cli.terminal import RunProgress, print_page, print_study
from gengap_dist.config.file_names import MAX_BYTES
from gengap_dist.config.loading import validate
from gengap_dist.config.sections import RunConfig
from gengap_dist.config.study import StudyConfig
from gengap_dist.errors import CONTROL, UsageError, visible
from gengap_dist.preflight.batch_layout import Cluster
from gengap_dist.preflight.machine_constants import Constants
from gengap_dist.preflight.plan import Plan
from gengap_dist.preflight.plan_table import plan_page
from gengap_dist.tracking.mlflow.importer import SourceNames
from gengap_dist.tracking.mlflow.uploader import MlflowUploader
from tests.analysis.report import folders
from tests.analysis.report.folders import write_run, write_study
from tests.browser import NEEDS_CHROMIUM, page

NASTY = [
    "$x^{$", r"\frac{", "$", "[/red]", "[bold]b", ":smile:", "\x1b[31mred\x1b[0m\x07", "\x1b]0;t\x07", "nul\x00\x85",
    "\u202eevil", '=HYPERLINK("http://e","x")', "@SUM(1)", "+1", "-1", "\t=1", "\r=1", "<img src=x onerror=alert(1)>",
    "</script><script>alert(1)</script>", "]]>-->", "'\"`", "a|b [l](http://e) ![i](http://e)", "../x", "a/b", "CON",
    "_hidden", "x" * 400,
    "two\nlines", "{{ 7*7 }}", "%s{0}", "größe 中文 🙂", "#0072b2",
]  # fmt: skip
FEW = ["$x^{$", "_hidden", "[/red]"]  # arms of several batch sizes are drawn with legends


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A comparison whose arms, layers, question, errors and versions have these names."""
    folder = compared(tmp_path_factory.mktemp("nasty"), NASTY)
    write_report(read_study(folder))
    return folder


def compared(folder: Path, names: list[str]) -> Path:
    arms = ["sb", *names]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders, "LAYERS", ("fc1", "[/red]$x^{$", "\x1b[31m\u202e=1"))
        for number, _ in enumerate(arms):
            size = 8 if number == 0 else 64 * (number if names is FEW else 1)
            write_run(folder / "r" / str(number), number, 0, batch__global_size=size)
    last = folder / "r" / str(len(names)) / "run.json"
    last.write_text(json.dumps(json.loads(last.read_text()) | {"status": "failed", "error": "".join(NASTY)}))
    (folder / "study.json").write_text(
        json.dumps({
            "schema": 2, "status": "finished", "name": "\x1b[1m[/b]<b>$^{$", "question": "".join(NASTY), "arms": arms,
            "baseline": "sb", "seeds": [0], "command": ["python", *(n for n in NASTY if "\x00" not in n)],
            "members": [{"arm": arm, "folder": str(folder / "r" / str(n))} for n, arm in enumerate(arms)],
            "versions": {"\x1b[31m<b>": "</dd><script>"}, "registration": {"sha256": "\x1b[31m[/x]"},
        })
    )  # fmt: skip
    return folder


class Seen(HTMLParser):
    """The elements of a page, and the text of the first cells of its tables of arms."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.num_scripts, self.text, self.csp = 0, "", ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.num_scripts += tag == "script"
        if ("http-equiv", "Content-Security-Policy") in attrs:
            self.csp = str(dict(attrs)["content"])

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report_shows_names_as_text(written, tmp_path, capsys, monkeypatch):
    few = compared(tmp_path, FEW)
    monkeypatch.setattr(
        html, "STUDY_FIGURES", {name: html.STUDY_FIGURES[name] for name in ("gap", "test_values", "curves")}
    )
    assert report.command([str(few)]) == 0
    print_study(read_study(written), written / "report.html", None)
    said = capsys.readouterr().out
    assert not CONTROL.search(said)
    for folder in (written, few):
        arms = json.loads((folder / "study.json").read_text())["arms"]
        shown = " ".join(said.split())
        for arm in arms:
            assert " ".join(visible(arm).split())[:40] in shown, arm

        text = (folder / "report.html").read_text()
        assert not CONTROL.search(text)
        found = Seen()
        found.feed(text)
        assert found.num_scripts == 1
        assert not found.tags & {"img", "b", "iframe", "object", "embed", "link", "base", "form", "foreignobject"}
        assert not {name for name in found.attributes if name.startswith("on")}
        assert "default-src 'none'" in found.csp
        assert all(" ".join(visible(arm).split()) in " ".join(found.text.split()) for arm in arms)

        pictures = [*folder.glob("figures/*.svg")]
        assert len(pictures) > (2 if folder is few else 6)
        for path in pictures:
            texts = [*ElementTree.parse(path).getroot().itertext()]  # it is XML
            assert not any("mathdefault" in each for each in texts), path
        texts = " ".join(ElementTree.parse(folder / "figures" / "gap.svg").getroot().itertext())
        assert "$x^{$" in texts
        assert "_hidden" in texts
        for path in folder.glob("figures/*.csv"):
            content = path.read_bytes().decode()
            assert not CONTROL.search(content)
            for row in csv.DictReader(io.StringIO(content)):
                for head, cell in row.items():
                    assert not FORMULA.search(head), path
                    assert not FORMULA.search(cell) or float(cell) < 0, (path, head, cell)


@NEEDS_CHROMIUM
def test_what_gets_into_the_page_all_the_same_does_nothing(written, tmp_path):
    path, marker = tmp_path / "report.html", "document.title = 'changed'"
    inserted = (
        f'<style>body {{ display: none }}</style><script>{marker}</script><img src="x.png" onerror="{marker}">'
        '<iframe src="report.html"></iframe><link rel="stylesheet" href="x.css"><h1>'
    )
    path.write_text((written / "report.html").read_text().replace("<h1>", inserted, 1))
    with page(offline=True) as shown:
        shown.goto(path.as_uri())
        assert "changed" not in shown.title()
        assert shown.locator("main").is_visible()
        assert shown.locator("thead button").count() > 10  # the page's own script ran
        refused = [said for said in shown.complaints if "Content Security Policy" in said]
    assert len(refused) >= 5


def test_the_terminal_gets_no_sequence_from_a_name(capsys, monkeypatch):
    file = io.StringIO()
    console = PlainConsole(width=1000, file=file)
    table = Table(title=NASTY[6])
    table.add_column(NASTY[6])
    for name in NASTY:
        table.add_row(name)
        console.print(name, style="bold")
        console.print_line(Text.assemble((name, "bold red"), name))
    console.print(table)
    shown = file.getvalue()
    assert not CONTROL.search(shown)
    assert all(shown.count(visible(name).split("\n")[0]) >= 2 for name in NASTY if "\t" not in name)
    assert len({len(line) for line in shown.splitlines() if line.startswith("│") and line.isascii()}) <= 1
    colours = io.StringIO()
    PlainConsole(file=colours, force_terminal=True, color_system="standard").print("\x1b[2J", style="red")
    assert colours.getvalue() == "\x1b[31m\\x1b[2J\x1b[0m\n"

    with RunProgress("\x1b[31m[/x]", 2) as progress:
        progress.console = PlainConsole(stderr=True, width=100)
        progress(1, 2, "note [/x]\x1b[0m", "run [/x]\x1b")
        progress.print_line("".join(NASTY))
    warn("gengap", NASTY[6])
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # `run_command` sets it

    def fail(argv: object) -> int:
        raise UsageError("".join(NASTY))

    with pytest.raises(SystemExit):
        run_command("gengap", fail, [])
    plan = Plan(Cluster(1, 1), "single", NASTY[6], refused=NASTY, warned=NASTY, assumed=NASTY, missing=NASTY[3])
    print_page(plan_page(plan, Constants(where=NASTY[6])))
    print_page(study_plan_page(dict.fromkeys(NASTY, plan), []))
    out = capsys.readouterr()
    assert out.err.count("\\x1b[31m") >= 2
    assert out.out.count("\\x1b[31m") > 3 * len(NASTY)
    assert not CONTROL.search(out.out + out.err)


def test_only_one_console_and_no_markup():
    """Everything that rich prints passes the console that makes names visible."""
    cli = Path(report.__file__).parent
    for path in [*cli.glob("*.py"), *cli.parent.glob("*/*table.py")]:
        text = path.read_text()
        assert path.name == "console.py" or not re.search(r"\bConsole\(|rich\.markup|from_markup", text), path


def test_mlflow_takes_all_names_and_its_pages_show_them(mlflow_db, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(folders.FACTS, "data", folders.FACTS["data"] | {"root": None, "num_classes": 10})
    verdict, arms = (
        "lb_64 <b>loses</b> | [x](http://e)",
        {"sb8": {"batch__global_size": 8}, "lb64": {"batch__global_size": 64}},
    )
    config = {"study": {"tune": None}, "mlflow": {"experiment": "nasty"}}
    metrics = {f"sb_lb_gap/{name}/mean": float(n) for n, name in enumerate(NASTY)}
    folder = write_study(tmp_path / "s", arms, 1, question="".join(NASTY), verdicts=[verdict], name=NASTY[6],
                         config=config, metrics=metrics, started="2026-01-01T00:00:00+00:00")  # fmt: skip
    uploader = MlflowUploader(folder, f"sqlite:///{mlflow_db}", "nasty")
    uploader.sync(closing=True)
    sent = uploader.client.get_run(json.loads((folder / "mlflow.json").read_text())["run_id"]).data
    assert sorted(sent.metrics.values()) == sorted(metrics.values())
    note = sent.tags["mlflow.note.content"]
    assert not CONTROL.search(note)
    assert not re.search(r"(?<!\\)[<>|`!]|(?<!\\)\](?!\()|[a-z]://", note.rpartition("\n\n")[0])
    assert r"- lb\_64 \<b\>loses\</b\> \| \[x\](http\://e)" in note.split("\n")
    assert not CONTROL.search(capsys.readouterr().out)

    name = "../\x1b[31m[/x]"  # of an arm, as a tag that somebody has set
    run_id = json.loads((folder / "runs" / "lb64" / "seed0" / "mlflow.json").read_text())["run_id"]
    uploader.client.set_tag(run_id, "arm", name)
    source = f"runs:/{json.loads((folder / 'mlflow.json').read_text())['run_id']}"
    back, problems = gather([source], tmp_path / "back", SourceNames("val/accuracy"), f"sqlite:///{mlflow_db}", "")
    assert (back.arms, problems) == (["sb8", name], [])
    assert {path.name for path in tmp_path.iterdir()} >= {"s", "back"}
    assert not [path for path in (tmp_path / "back").rglob("*") if CONTROL.search(path.name)]


NO_FOLDERS = [".", "..", "", " ", "a/b", "/abs", "../x", "n\0l", "a\n", "nul", "CON", "com1.txt", "dot.", "a\\b",
              "\u202ex", "x" * (MAX_BYTES + 1), "ö" * 128]  # fmt: skip


@pytest.mark.parametrize("name", NO_FOLDERS)
def test_a_name_that_is_no_folder_is_refused_before_the_first_run(name):
    arms = [{"name": "sb"}]
    for given in ({"name": name, "arms": arms}, {"name": "s", "arms": [*arms, {"name": name}]}):
        with pytest.raises(UsageError) as refused:
            validate(StudyConfig, {"study": given})
        said = str(refused.value)
        assert said.startswith(("study.name (", "study.arms, study.axes: the name of an arm ("))
        assert re.search(r"\) (is|has|contains|begins) .*: choose another, which can also be that of a folder", said)
        assert len(said) < 250
        assert not CONTROL.search(said)


def test_a_study_from_elsewhere_names_no_folder_outside(tmp_path):
    folder = write_study(tmp_path / "s", {"sb8": {}}, 1)
    text = (folder / "study.json").read_text()
    (folder / "study.json").write_text(text.replace('"arms": ["sb8"]', '"arms": ["sb8", "../../other"]'))
    with pytest.raises(UsageError, match=r"study.json is damaged: an arm \('../../other'\) contains /"):
        read_study(folder)
    run: Any = SimpleNamespace(info=SimpleNamespace(run_id="../../other"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gengap_dist.analysis.group_runs.connect_client", lambda uri: None)
        patch.setattr("gengap_dist.analysis.group_runs.find_runs", lambda client, source: [run])
        with pytest.raises(UsageError, match=r"the id of a run \('../../other'\) contains /"):
            next(_from_mlflow("experiments:/x", tmp_path / "c", SourceNames(), "http://e"))


def test_a_default_folder_has_no_place_in_its_name(tmp_path):
    config = validate(RunConfig, {"data": {"name": "../../x:y"}, "model": {"name": "a/b:" + "c" * 300}})
    folder = train._default_out(config)
    assert folder.parent == Path("runs")
    assert folder.name.startswith("......x.y-a.b.ccc")
    assert folder.is_dir()
    assert len(folder.name) < MAX_BYTES
