"""Seeded hostile input for the commands: command lines, YAML files and damaged folders.

    python -m tests.fuzz [--seed 0] [--lines 1000] [--files 1000] [--processes 40] [--folders 200]

Whatever is given, a command ends within seconds, with 0, or with 2 and one sentence of at most 300 characters, and
names no exception of Python. Prints what does not hold, with the seed that repeats it; the exit code is then 1.
"""

import argparse
import contextlib
import io
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from gengap_dist.cli import compare, probe, report
from gengap_dist.cli.exit_codes import run_command
from gengap_dist.config import yaml_core
from gengap_dist.config.loading import RENAMED, field_names, load_yaml, merge, nested, validate
from gengap_dist.config.sections import RunConfig
from gengap_dist.config.study import StudyConfig
from gengap_dist.errors import MAX_SENTENCE

CONFIGS = Path(__file__).parent.parent / "configs"
SECONDS = 20
"""Longest time of a command that reads words and files only; several hundred times what one takes."""

NASTY = (
    "", " ", "null", "~", "true", "yes", "on", "off", "0", "-1", "-0", "1e-3", "-1e-3", "1e999", ".inf", "-.inf",
    ".nan", "nan", "inf", "0100", "0x10", "0o17", "1:00", "1_000", "9" * 30, "9" * 5000, "9" * 5000 + ".5", "1.5",
    "2026-01-01", "2026-13-45", "!!python/name:os.abort", "!!int 3", "&a [*a]", "*a", "[", "[]", "{}", "{a: 1}",
    "[1, 2]", "1,2", ",", "[[[[", "[" * 5000, "a." * 400, "{a: " * 100, "a: b: c", "- a", "...", "---", "%YAML 1.2",
    "a\0b", "\0", "caf\udce9", "\ud800", "\x1b[2J", "\u202e", "\U0001f600", "a\nb", "\r\n", "x" * 100_000,
    "x y " * 30_000, "..", "/", "/dev/zero", "/dev/null", "/proc/self/mem", "~nobody/x", "~", "-", "--", "--x", "-h",
    "@file", "%s%n", "$(x)", "os:abort", "{}[]", "GPU=1", "\\", "'", '"', '"\\ud800"', '"\\UFFFFFFFF"', "<<", "=",
    "auto", "lenet5", "mnist", "128", "64", "512", "[128, 128]",
)  # fmt: skip
"""Values; of some kinds of settings some are right."""

DEMO, STUDY = str(CONFIGS / "demo_train.yaml"), str(CONFIGS.parent / "gengap_dist/configs/demo.yaml")
LINES: dict[str, tuple[list[str], ...]] = {
    "train": (
        ["--config", DEMO, "--batch.global_size", "128", "--optim.lr=0.1", "--model.widths", "[3, 4]"],
        ["--data.name", "digits", "--train.steps", "3", "--mlflow.enabled", "false", "--out", "run", "--resume"],
        ["--launch.resources_per_rank", "{GPU: 0.5}", "--probe.at_losses", "1,0.1", "--profile", "--seed", "7"],
    ),
    "study": (
        ["--config", STUDY, "--study.seeds", "0,1", "--train.epochs", "2", "--out", "study"],
        ["--study.axes", "{batch.global_size: [64, 128], optim.lr: [0.1]}", "--study.length_units", "epochs"],
        ["--config", STUDY, "--study.tune.trials", "4", "--study.tune.space", "{optim.lr: {low: 0.1, high: 1}}"],
    ),
    "plan": (["--config", DEMO, "--nodes", "4", "--gpus-per-node", "8", "--json"], ["--config", STUDY, "--calibrate"]),
    "doctor": (["--config", DEMO, "--out", "run", "--json"], ["--launch.launcher", "ray", "--seed", "2"]),
    "probe": (
        ["--model", "lenet5", "--probe.num_samples", "128,256", "--probe.layers", "auto", "--data.root", "data"],
        ["--model", "run@best", "--probe.diagnostics", "hessian,keskar", "--out", "spectra", "--mlflow"],
    ),
    "compare": (["a", "b", "--baseline", "sb", "--out", "c"], ["runs:/x", "--mlflow.tracking_uri", "y", "--percent"]),
    "report": (["--pdf", "run"], ["run", "--mlflow.tracking_uri", "x"]),
}  # fmt: skip
NAMES = [*field_names(StudyConfig), *RENAMED, "config", "print_config", "model", "nodes", "runs", "study.tune.trials"]


class Hang(BaseException):
    """A command took longer than SECONDS."""


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Context that raises Hang after some seconds."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def complaint(code: object, error: str, *, lines: bool = False) -> str:
    """What is wrong with the end of a command; empty if nothing is. With `lines` it may also say other things."""
    if code not in (0, 2):
        return f"exit code {code}"
    if found := re.search(r"Traceback|\b[A-Z]\w*(Error|Exception)\b", error):
        return f"names {found[0]}"
    said = error.rstrip("\n").split("\n")
    if code == 2 and not lines and len(said) != 1:
        return f"says {len(said)} lines"
    if code == 2 and len(said[-1].partition(": ")[2]) > MAX_SENTENCE:
        return f"says a sentence of {len(said[-1])} characters"
    return "" if code == 0 or re.match(r"gengap( \w+)?: .", said[-1]) else "says nothing"


def run_here(
    name: str, command: Callable[[Sequence[str]], int], words: Sequence[str], seconds: float
) -> tuple[Any, str, str]:
    """Exit code, stdout and stderr of a command in this process; the code is "hang" if it does not end."""
    out, err = io.StringIO(), io.StringIO()
    code: Any = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            with limited(seconds):
                run_command(f"gengap {name}", command, words)
        except SystemExit as end:
            code = end.code
        except Hang:
            code = "hang"
    return code, out.getvalue(), err.getvalue()


# -- command lines ----------------------------------------------------------------------------------------------------


def a_line(rng: random.Random) -> tuple[str, list[str]]:
    """A command and its words, one to four of them changed."""
    name = rng.choice([*LINES])
    words = list(rng.choice(LINES[name]))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        change_words(words, rng)
    return name, words


def change_words(words: list[str], rng: random.Random) -> None:
    """One change of a command line."""
    place = rng.randrange(len(words) + 1)
    if place == len(words) or rng.random() < 0.4:
        setting, value = f"--{rng.choice(NAMES)}", rng.choice(NASTY)
        words[place:place] = [f"{setting}={value}"] if rng.random() < 0.5 else [setting, value]
        return
    word = words[place]
    match rng.randrange(8):
        case 0:
            del words[place]
        case 1:
            words.insert(place, word)
        case 2 | 3:
            words[place] = rng.choice(NASTY)
        case 4:
            words.insert(place, rng.choice(NASTY))
        case 5:
            words[place] = changed_text(word, rng)
        case 6:
            rng.shuffle(words)
        case _:
            words[place : place + 2] = ["=".join(words[place : place + 2])]


def changed_text(text: str, rng: random.Random) -> str:
    """A text with a few characters changed, left out, or put in."""
    characters = list(text)
    for _ in range(rng.choice((1, 1, 2, 5))):
        place = rng.randrange(len(characters) + 1)
        more = rng.choice(["", "", "\0", "\t", "\n", "é", "\ud800", "\x1b", *"-=:.,[]{}&*!|>'\"%@`#~ 019eE_aZ"])
        characters[place : place + rng.choice((0, 1, 1, 3))] = [more]
    return "".join(characters)


def checked_line(name: str, words: Sequence[str]) -> str:
    """What is wrong with how a command reads its words and files; empty if nothing is."""

    def read_probe(argv: Sequence[str]) -> int:
        options, settings = probe.read_options(argv)
        validate(RunConfig, merge({"model": {"name": options.model}}, settings))
        return 0

    reading: dict[str, Callable[[Sequence[str]], int]] = {
        "probe": read_probe,
        "compare": lambda argv: bool(compare.read_options(argv)) - 1,
        "report": lambda argv: bool(report.read_options(argv, copying=False)) - 1,
    }
    command = reading.get(name) or import_module(f"gengap_dist.cli.{name}").command
    printing = [] if name in reading else ["--print_config"]
    code, printed, error = run_here(name, command, [*printing, *words], SECONDS)
    found = complaint(code, error)
    if not found and code == 0 and printed.startswith("seed:"):
        found = checked_settings(printed)
    return found and f"{found}: {error[:2000]}"


def checked_settings(printed: str) -> str:
    """What is wrong with settings that were printed: they are read back the same, and arms are right or refused."""
    tree = yaml_core.read(printed)
    model = StudyConfig if "study" in tree else RunConfig
    config = validate(model, nested(tree))
    if yaml_core.write(config.model_dump(mode="json")) != printed:
        return "what is printed is not read back the same"
    if isinstance(config, StudyConfig):
        code, _, error = run_here("study", lambda argv: bool(config.arms and config.baseline) - 1, [], SECONDS)
        return complaint(code, error)
    return ""


# -- YAML files -------------------------------------------------------------------------------------------------------


def a_file(rng: random.Random) -> bytes:
    """A YAML file: one of configs/, changed in its text or in its values, or of words without sense."""
    path = Path(rng.choice((DEMO, STUDY)))
    text = path.read_text(encoding="utf-8")
    kind = rng.randrange(4)
    if kind == 0:
        text = tree_with_nasty_values(load_yaml(path), rng)
    for _ in range(rng.choice((1, 2, 4)) if kind else 0):
        lines = text.split("\n")
        place = rng.randrange(len(lines))
        match rng.randrange(6):
            case 0:
                lines.insert(place, lines[rng.randrange(len(lines))])
            case 1:
                del lines[place]
            case 2:
                lines[place] = " " * rng.randrange(6) + lines[place].lstrip()
            case 3:
                lines.insert(place, f"{rng.choice([*NAMES, *NASTY])}: {rng.choice(NASTY)}")
            case 4:
                lines[place] = lines[place].partition(":")[0] + ": " + rng.choice(NASTY)
            case _:
                lines[place] = changed_text(lines[place], rng)
        text = "\n".join(lines)
    data = text.encode("utf-8", "surrogatepass")
    if kind == 3 and rng.random() < 0.3:
        place = rng.randrange(len(data) + 1)
        data = data[:place] + rng.randbytes(3) + data[place + rng.randrange(3) :]
    return data


def tree_with_nasty_values(tree: dict[str, Any], rng: random.Random) -> str:
    """Settings with one to three values replaced, written as YAML 1.1 writes them."""
    for _ in range(rng.choice((1, 2, 3))):
        inner: Any = tree
        while True:
            places = [*inner] if isinstance(inner, dict) else [*range(len(inner))]
            key = rng.choice(places)
            if isinstance(inner[key], dict | list) and inner[key] and rng.random() < 0.8:
                inner = inner[key]
                continue
            inner[key] = rng.choice([*NASTY, None, True, -1, 10**30, 1e300, [], {}, [[]], {"a": {}}, [None]])
            break
    return yaml.safe_dump(tree, allow_unicode=True)


# -- damaged folders --------------------------------------------------------------------------------------------------


def checked_folder(seed: int, whole: Path, folder: Path) -> str:
    """What is wrong with a command that is given a damaged copy of a study; empty if nothing is."""
    from tests import damaged

    shutil.copytree(whole, folder / "study")
    rng = random.Random(seed)
    where = damaged.fuzz(folder / "study", seed)
    name, words = rng.choice(
        [
            ("report", [str(folder / "study")]),
            ("compare", [str(folder / "study"), "--out", str(folder / "out")]),
            ("report", ["slim", str(folder / "study"), str(folder / "slim")]),
            ("probe", ["--model", str(next(iter(where)))]),
        ]
    )
    code, _, error = run_here(name, import_module(f"gengap_dist.cli.{name}").command, words, 10 * SECONDS)
    found = complaint(code, error, lines=True)
    return found and f"{found}: {name}: {error[:2000]}"


# -- all of it --------------------------------------------------------------------------------------------------------


def complaints(seed: int, *, lines: int = 0, files: int = 0, processes: int = 0, folders: int = 0) -> Iterator[str]:
    """What is wrong, and the kind and the seed of each."""
    here = Path.cwd()
    for number in range(seed, seed + lines):
        name, words = a_line(random.Random(f"line {number}"))
        if found := checked_line(name, words):
            yield f"line {number}: {found}\n    {name} {[word[:200] for word in words]}"
    for number in range(seed, seed + files):
        rng = random.Random(f"file {number}")
        (here / "fuzz.yaml").write_bytes(a_file(rng))
        if found := checked_line(rng.choice(("train", "study", "plan", "doctor")), ["--config", "fuzz.yaml"]):
            yield f"file {number}: {found}"
    for number in range(seed, seed + processes):
        name, words = a_line(random.Random(f"process {number}"))
        words = [word.replace("\0", "").replace("\ud800", "") for word in words]
        printing = ["--print_config"] if name in ("train", "study", "plan", "doctor") else []
        done = subprocess.run(
            [sys.executable, "-m", "gengap_dist", name, *printing, *words],
            capture_output=True, text=True, timeout=300, errors="backslashreplace",
        )  # fmt: skip
        if found := complaint(done.returncode, done.stderr):
            yield f"process {number}: {found}: {done.stderr[:2000]}\n    {name} {[word[:200] for word in words]}"
    if folders:
        from tests.analysis.report.folders import ARMS, write_study

        arms = {name: ARMS[name] for name in ("sb8", "lb64")}
        whole = write_study(here / "whole", arms, seeds=2)
        for number in range(seed, seed + folders):
            if found := checked_folder(number, whole, here / str(number)):
                yield f"folder {number}: {found}"
            shutil.rmtree(here / str(number))


def main() -> int:
    """Print what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"seed": 0, "lines": 1000, "files": 1000, "processes": 40, "folders": 200}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    started, number = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for found in complaints(**vars(options)):
            number += 1
            print(found, flush=True)
    print(f"{number} complaints in {time.monotonic() - started:.0f} s")
    return int(number > 0)


if __name__ == "__main__":
    os.environ.setdefault("XDG_CACHE_HOME", tempfile.mkdtemp(prefix="gengap-cache-"))
    sys.exit(main())
