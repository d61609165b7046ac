"""What a start does not pay for: packages that it does not need, and processes that are there already."""

import gc
import importlib.util
import subprocess
import sys
from collections import Counter

import pytest

from gengap_dist.compat.fast_imports import fast_imports
from gengap_dist.runs.run_folder import read_info
from tests.conftest import thinned
from tests.study.tiny import start, write

pytestmark = pytest.mark.processes

COMMANDS = ["", "demo", "train", "study", "probe", "report", "compare", "clean", "plan", "doctor"]
SERVICES = {"ray", "mlflow", "deepspeed", "matplotlib", "scipy", "pandas", "torchvision", "transformers"}
COMPILER = {"torch._dynamo", "torch.distributed.tensor", "torch.distributed.fsdp"}


def imported(code: str, suspects: set[str]) -> tuple[set[str], str]:
    """Which of these modules a new interpreter has after `code`, and what was printed before."""
    code += f"\nimport sys; print(*sorted({suspects} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *said, found = done.stdout.split("\n")[:-1]
    return {*found.split()}, "\n".join(said)


@pytest.mark.parametrize("command", thinned(COMMANDS, lambda command: command in ("", "train", "compare", "doctor")))
def test_help_imports_nothing_heavy(command):
    code = (
        "import sys, runpy\n"
        f"sys.argv = {['x', *filter(None, [command]), '--help']}\n"
        "try: runpy.run_module('gengap_dist', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end: assert not end.code, end.code"
    )
    found, said = imported(code, SERVICES | {"torch", "numpy"})
    assert not found
    assert "gengap" in said


def test_a_rank_alone_imports_what_it_computes_with(tmp_path):
    words = ["--train.steps", "2", "--probe.num_samples", "32", "--out", "run"]
    code = (
        "import os\n"
        "os.sched_getaffinity = lambda pid: {0, 1}\n"  # on a single core, the report has no process of its own
        "from gengap_dist.cli.train import command\n"
        f"assert command({[*words, '--mlflow.log_model', 'false']}) == 0"  # to export a model is to compile it
    )
    found, _ = imported(code, SERVICES | COMPILER | {"torch", "jinja2"})
    assert found == {"torch"}
    assert (tmp_path / "run" / "report.html").exists()


def test_only_an_import_keeps_what_was_made_from_the_garbage_collector(tmp_path, monkeypatch):
    (tmp_path / "a_large_package.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "a_large_package", None)
    del sys.modules["a_large_package"]
    made, kept = [], [gc.get_freeze_count()]
    for _ in range(2):  # the second time it is there already, as where a lost server is called again and again
        made += [[] for _ in range(1000)]
        with fast_imports("a_package_to_hide"):
            assert not gc.isenabled()
            assert importlib.util.find_spec("a_package_to_hide") is None
            importlib.import_module("a_large_package")
        assert gc.isenabled()
        kept.append(gc.get_freeze_count())
    gc.unfreeze()
    assert kept[1] - kept[0] > 1000 > kept[2] - kept[1]


def test_the_driver_of_ranks_computes_nothing():
    found, _ = imported("import gengap_dist.cli.study, gengap_dist.cli.terminal", SERVICES | {"torch"})
    assert not found


def test_a_network_is_counted_without_the_compiler():
    """On the meta device torch would import it to draw normal numbers: 1 to 2 s of every start."""
    code = (
        "from functools import partial; from gengap_dist.models import MODELS, _check_memory\n"
        "for name, sizes in [('resnet20', {'num_classes': 2, 'in_channels': 1}),\n"
        "        ('gpt', {'input_shape': (8,), 'output_shape': (8, 5)})]:\n"
        "    _check_memory(name, partial(MODELS[name], **sizes))"
    )
    assert not imported(code, COMPILER)[0]


def test_the_runs_of_a_study_share_their_processes(tmp_path):
    (tmp_path / "telling.py").write_text(
        "import os\n"
        "from gengap_dist.models import lenet5\n"
        "def make(num_classes, in_channels):\n"
        "    with open('pids', 'a') as file:\n"
        "        file.write(f\"{os.environ['RANK']} {os.getpid()}\\n\")\n"
        "    return lenet5(num_classes=num_classes, in_channels=in_channels)\n"
    )
    study = {"baseline": "sb", "seeds": [0, 1], "arms": [{"name": "sb"}]}
    settings = {"data": {"name": "digits"}, "model": {"name": "telling:make"}, "train": {"steps": 2, "num_evals": 1}}
    done = start(
        write(tmp_path / "study.yaml", study, **settings),
        tmp_path / "out",
        "--launch.num_processes",
        2,
        "--study.concurrent",
        1,
    )
    assert done.returncode == 0, done.stderr
    assert len([*tmp_path.glob("out/runs/sb/*/report.html"), *tmp_path.glob("out/runs/sb/*/run.json")]) == 2
    commands = [read_info(path.parent).command for path in tmp_path.glob("out/runs/sb/*/run.json")]
    assert all("--launch.num_processes" in command for command in commands)  # the command's, not that of the ranks
    made = Counter((tmp_path / "pids").read_text().splitlines())  # "rank pid" to networks made
    assert sorted(line.split()[0] for line in made) == ["0", "1"]
    assert set(made.values()) == {3}  # to check the arm, and for each of its runs
