"""benchmarks/gpu.py, which waits for a GPU: on fake ones it runs, resumes and tells what is wrong."""

import doctest
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import fake_cuda
from tests.conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))  # as for a script that lies there
from gpu_parts import correctness, items
from gpu_parts.ledger import Ledger, read

from gengap_dist.errors import UsageError

FAKE = pytest.mark.skipif(bool(fake_cuda.missing()), reason=str(fake_cuda.missing()))
MACHINE = {"gpu": "A", "torch": "2", "sources": "abc"}


def gpu(*words: object, **env: str) -> "subprocess.CompletedProcess[str]":
    """`python benchmarks/gpu.py ...` as a user starts it, where mlflow and ray leave a file if they are imported."""
    folder = Path("unwanted")
    folder.mkdir(exist_ok=True)
    for name in ("mlflow", "ray"):
        (folder / f"{name}.py").write_text(f"import pathlib\npathlib.Path({str(folder.resolve())!r}, 'told').touch()\n")
    paths = [str(folder.resolve()), env.pop("PYTHONPATH", ""), str(ROOT), os.environ.get("PYTHONPATH", "")]
    found = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *map(str, words)],
        env=os.environ | env | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert not (folder / "told").exists(), "mlflow or ray was imported"
    return found


def on_fake(*words: object, mib: int = 4000) -> "subprocess.CompletedProcess[str]":
    return gpu(*words, "--out", "gpu.json", **fake_cuda.environment(1, mib=mib))


def recorded() -> dict[str, dict[str, dict[str, object]]]:
    (session,) = json.loads(Path("gpu.json").read_text())["sessions"]
    return session["parts"]


# -- commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.processes
def test_without_a_gpu_there_is_one_sentence():
    found = gpu("--part", "correctness", "--out", "gpu.json", CUDA_VISIBLE_DEVICES="")
    assert found.returncode == 2
    assert found.stdout == ""
    assert found.stderr.startswith("gpu: this machine shows torch ")
    assert found.stderr.count("\n") == 1
    assert not Path("gpu.json").exists()


@pytest.mark.processes
def test_the_list_needs_no_gpu():
    found = gpu("--list", CUDA_VISIBLE_DEVICES="")
    assert found.returncode == 0
    by_part = [line.split()[0] for line in found.stdout.splitlines()]
    assert list(dict.fromkeys(by_part)) == ["correctness", "sync", "memory", "speed", "compile"]
    assert by_part.count("correctness") >= 40


@pytest.mark.processes
@FAKE
@pytest.mark.full  # else: the test below runs items, and starts again
def test_items_of_all_parts_run_and_a_second_command_skips_them():
    only = ["--only", "no norm, float64", "control", "too large a micro_size, LeNet-5"]
    found = on_fake(*only)
    assert found.returncode == 0, found.stdout + found.stderr
    first = recorded()
    assert first["correctness"]["no norm, float64"]["num_judged"] > 300  # type: ignore[operator]
    assert first["correctness"]["no norm, float64"]["tolerance"] == 1e-8
    sentence = first["memory"]["too large a micro_size, LeNet-5"]["text"]
    assert str(sentence).startswith("rank 0 ran out of the memory of its GPU (")
    page = Path("gpu.md").read_text()
    assert "| no norm, float64 | yes | " in page
    assert str(sentence) in page
    assert "### Speed\n\nHow fast" in page

    whole = json.loads(Path("gpu.json").read_text())
    whole["sessions"][0]["parts"]["correctness"]["no norm, float64"]["seconds"] = 1234.5
    Path("gpu.json").write_text(json.dumps(whole))
    again = on_fake(*only)
    assert again.returncode == 0
    assert "ok    1/1 no norm, float64: " in again.stdout
    assert recorded() == whole["sessions"][0]["parts"]  # nothing was measured anew


@pytest.mark.full  # else: the next test, and cuda/test_memory.py for what is said
@pytest.mark.processes
@FAKE
def test_a_broken_item_is_told_and_stops_nobody():
    found = on_fake("--part", "correctness", "--only", "ResNet-20", "no norm, float64", mib=48)
    assert found.returncode == 1, found.stdout + found.stderr
    broken, whole = (recorded()["correctness"][name] for name in ("ResNet-20", "no norm, float64"))
    assert whole["good"]
    assert not broken["good"]
    assert "ran out of the memory of its GPU" in str(broken["error"])
    assert str(broken["at"][1]).startswith("gengap_dist/models/")  # type: ignore[index]
    assert "1 of 2 are not as they should be" in found.stdout
    assert "**ResNet-20** failed: OutOfMemory" in Path("gpu.md").read_text()


MINE = """
import os, time
from gpu_parts.items import Item, Part

def dies(world):
    os._exit(3)

def answers(world):
    return {"good": True, "text": str(world.device)}

def hangs(world):
    time.sleep(600)

PART = Part("Mine", "Is it so?", [
    Item("dies", dies, 0.1), Item("long", answers, 1e6), Item("answers", answers, 0.1), Item("hangs", hangs, 0.1),
], lambda found: f"found: {', '.join(found)}")
"""


@pytest.mark.processes
@FAKE
def test_items_that_die_hang_or_take_too_long():
    Path("mine.py").write_text(MINE)
    code = "import gpu; gpu.PARTS = {'mine': 'mine'}; gpu.main()"
    environment = fake_cuda.environment()
    paths = [str(Path.cwd()), str(ROOT / "benchmarks"), environment.pop("PYTHONPATH")]

    def command(*words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-c", code, "--out", "gpu.json", *words],
            env=os.environ | environment | {"PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip

    found = command("--only", "dies", "long", "answers")
    assert found.returncode == 1, found.stdout + found.stderr
    assert recorded()["mine"]["dies"]["error"] == "its process died"
    assert recorded()["mine"]["answers"]["text"] == "cuda:0"  # in a new process
    assert "long: takes 1000000 s, and " in found.stdout
    assert "1 of 3 items are left: run the same command again" in found.stdout

    found = command("--only", "hangs", "--seconds", "2")
    assert found.returncode == 0, found.stdout + found.stderr
    assert recorded()["mine"]["hangs"]["cut_off"]
    assert "hangs: was cut off after 2" in found.stdout
    page = Path("gpu.md").read_text()
    assert "found: answers\n\nNot measured yet: long, hangs." in page
    assert "**dies** its process died" in page


# -- what they are made of --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [items, correctness])
def test_examples_hold(module):
    found = doctest.testmod(module)
    assert found.attempted
    assert not found.failed


def numbers(**more: float) -> correctness.Numbers:
    return {(4, "train/loss"): 2.0, (4, "train/accuracy"): 0.5, **{(4, name): value for name, value in more.items()}}


def test_a_different_number_is_found_where_it_is_judged():
    twin, found = numbers(weight_norm=1.0), numbers(weight_norm=1.01)
    answer = correctness.compare(found, twin, 1e-3, "smooth numbers")
    assert not answer["good"]
    assert answer["worst"] == {
        "difference": pytest.approx(0.01 / 1.01), "gpu": 1.01, "twin": 1.0, "step": 4, "name": "weight_norm",
    }  # fmt: skip
    assert correctness.compare(found, twin, 1e-1, "smooth numbers")["good"]
    assert correctness.compare(found, twin, 1e-3, "losses and gradient norms")["good"]


def test_counts_decide_in_float64_only():
    twin, found = numbers(), numbers() | {(4, "train/accuracy"): 0.75}
    assert correctness.compare(found, twin, 1e-3, "smooth numbers")["good"]
    answer = correctness.compare(found, twin, 1e-3, "every number")
    assert not answer["good"]
    assert answer["worst"]["name"] == "train/accuracy"


@pytest.mark.parametrize("odd", [{(4, "nc1"): 1.0}, {(4, "train/loss"): float("nan")}])
def test_a_number_that_is_missing_or_none_is_no_agreement(odd):
    answer = correctness.compare(numbers() | odd, numbers(), 1e-1, "smooth numbers")
    assert not answer["good"]
    json.dumps(answer, allow_nan=False)


def test_other_code_is_another_session(tmp_path):
    path = tmp_path / "gpu.json"
    Ledger(path, MACHINE).keep("sync", "a", {"good": True, "seconds": 7.0})
    assert Ledger(path, MACHINE).answer("sync", "a") == {"good": True, "seconds": 7.0}
    other = Ledger(path, MACHINE | {"sources": "abd"})
    assert other.answer("sync", "a") is None
    assert other.seconds("sync", "a") == 7.0  # but what it took is known
    assert len(read(path)) == 2


def test_what_was_cut_off_is_measured_again(tmp_path):
    ledger = Ledger(tmp_path / "gpu.json", MACHINE)
    ledger.keep("sync", "a", {"cut_off": True, "seconds": 90.0})
    assert ledger.answer("sync", "a") is None
    assert ledger.answers("sync") == {}
    assert ledger.seconds("sync", "a") == 90.0


def test_somebody_elses_file_is_left_alone(tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"a": 1}')
    with pytest.raises(UsageError, match="is not a file of this command"):
        Ledger(path, MACHINE)
    assert path.read_text() == '{"a": 1}'
