"""Modules that a user names: where they are found, and what is said if they are not."""

import os
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path

import pytest

from gengap_dist.compat.daemon_children import allowing_children
from gengap_dist.config.own_code import call_own, load_own
from gengap_dist.distributed.cores import Threads
from gengap_dist.distributed.worker_pool import WorkerPool
from gengap_dist.errors import UsageError

ROOT = Path(__file__).parents[2]
MODULES = {
    "my_net.py": "from my_part import part\ndef make():\n    from my_late import late\n    return part, late\n",
    "my_part.py": "part = 'part'\n",
    "my_late.py": "late = 'late'\n",
    "folder/inside.py": "make = 'inside'\n",
    "random.py": "raise SystemExit('executed')\n",
    "needs.py": "import no_such_package\n",
    "wrong.py": "make = (\n",
    "leaves.py": "import sys\nsys.exit(3)\n",
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The current folder, which is not on the search path, as under the console script."""
    for name, text in MODULES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    known = {*sys.modules}
    yield tmp_path
    for name in {*sys.modules} - known:
        if getattr(sys.modules[name], "__file__", None) and str(sys.modules[name].__file__).startswith(str(tmp_path)):
            del sys.modules[name]


def test_modules_in_the_current_folder_are_found_after_all_others(folder):
    before = [*sys.path]
    assert load_own("model.name", "json:loads", "factory") is __import__("json").loads
    assert sys.path == before  # nothing was named that is here only
    assert load_own("model.name", "my_net:make", "factory")() == ("part", "late")
    assert load_own("data.name", "folder.inside:make", "factory") == "inside"
    assert sys.path == [*before, str(folder)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "my_nte:make",
            "cannot be imported (there is no module my_nte in {folder}, nor elsewhere): give modu",
        ),
        ("my_net.sub:make", "there is no module my_net.sub in"),
        ("my_net:mkae", "(my_net.py has no mkae (did you mean make?)): give module.path:factory"),
        ("my_net.py:make", "there is no module my_net.py in"),
        ("./my_net.py:make", "(it is no such name): give module.path:factory, such as my_net:make"),
        ("my_net:", "(it is no such name)"),
        ("random:net", "random.py is another module of this name, and is not read: rename it)"),
        ("needs:make", "(needs.py:1, ModuleNotFoundError: No module named 'no_such_package'): fix the module"),
        ("wrong:make", "(wrong.py:1, SyntaxError: '(' was never closed): fix the module"),
        ("leaves:make", "(leaves.py:2, SystemExit: 3): fix the module"),
    ],
)
def test_what_is_wrong_is_named(folder, name, message):
    with pytest.raises(UsageError) as error:
        load_own("model.name", name, "factory")
    assert message.format(folder=folder) in str(error.value)
    assert str(error.value).startswith(f"model.name ({name}) ")


def test_a_function_that_fails_is_named_with_its_line(folder):
    (folder / "my_fail.py").write_text("import json\ndef make():\n    return json.loads('{')\n")
    with pytest.raises(UsageError, match=r"^data.name \(my_fail:make\) failed \(my_fail.py:3, JSONDecodeError: Expe"):
        call_own("data.name", "my_fail:make", load_own("data.name", "my_fail:make", "factory"))


def children(worker):
    with allowing_children():
        child = get_context("fork").Process(target=bool)
        child.start()
        child.join()
    refused = False
    try:
        get_context("fork").Process(target=bool).start()
    except AssertionError:  # compat/daemon_children.py is needed
        refused = True
    return child.exitcode, refused, "PYTHONSAFEPATH" in os.environ


@pytest.mark.processes
def test_ranks_have_modules_of_python_the_environment_of_the_command_and_processes_that_read(folder):
    (folder / "pickle.py").write_text("open('executed', 'w')\nfrom _pickle import *\n")  # loaded before all else
    pool = WorkerPool(1, Threads(1, "test"))
    try:
        assert pool(children) == [(0, True, False)]
        assert not (folder / "executed").exists()
    finally:
        pool.close(kill=True)


@pytest.mark.processes
@pytest.mark.full
def test_the_console_script_finds_a_network_here_on_two_ranks_and_executes_nothing_else(folder):
    (folder / "random.py").write_text("open('executed', 'w')\n")
    (folder / "my_net.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))\n"
    )
    settings = {"model.name": "my_net:make", "data.image_size": 8, "train.steps": 2, "launch.num_processes": 2}
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(
        [Path(sys.executable).with_name("gengap"), "train", "--out", "run", *words],
        env=os.environ | {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "run/report.html").exists()
    assert not (folder / "executed").exists()
