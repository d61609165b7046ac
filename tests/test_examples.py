"""The scripts of examples/ run as their first lines say, and print what they promise."""

import os
import re
from pathlib import Path

import pytest

from tests.ranks import start_script
from tests.study import tiny

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
ARMS = [{"name": f"b{size}", "set": {"batch.global_size": size}} for size in (64, 256)]

pytestmark = pytest.mark.processes


def printed(name: str, *words: object) -> str:
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = start_script(EXAMPLES / name, *words, cwd=Path.cwd(), env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_run_here_and_in_no_other_way():
    here = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f'"{path.name}"' in here
        assert f"python examples/{path.name}" in path.read_text()


def test_probe_any_model():
    text = printed("probe_any_model.py")
    ranks = re.findall(r"^(\S+) +(\d+\.\d\d) -> +(\d+\.\d\d)$", text, re.M)
    assert len(ranks) >= 17  # the non-linearities of ResNet-18
    assert all(1 <= float(before) <= 512 for _, before, _ in ranks)
    assert any(before != after for _, before, after in ranks)


def test_train_on_two_ranks(tmp_path):
    text = printed("train_on_two_ranks.py", tmp_path)
    assert float(text.split("difference of the test losses: ")[1]) < 1e-9
    assert text.count("test accuracy") == 2


def test_own_algorithm(tmp_path):
    assert re.search(r"Lookahead: test accuracy \d+\.\d% after 60 steps", printed("own_algorithm.py", tmp_path / "run"))
    assert (tmp_path / "run" / "run.json").exists()


def test_own_optimizer(tmp_path):
    accuracy = re.search(r"Lion: test accuracy (\d+\.\d)% after", printed("own_optimizer.py", tmp_path / "run"))
    assert accuracy
    assert float(accuracy[1]) > 60


OF_YOUR_OWN = ["own_optimizer.py", "own_tabular_data.py", "huggingface_dataset.py", "own_task.py"]


@pytest.mark.parametrize("name", OF_YOUR_OWN)
def test_what_shows_code_of_your_own_is_short(name):
    assert len((EXAMPLES / name).read_text().splitlines()) < 40


def test_own_tabular_data(tmp_path):
    accuracy = re.search(r"tumours: test accuracy (\d+\.\d)% after", printed("own_tabular_data.py", tmp_path / "run"))
    assert accuracy
    assert float(accuracy[1]) > 90


def test_huggingface_dataset(tmp_path):
    pytest.importorskip("datasets", reason="datasets is not installed: pip install 'gengap_dist[datasets]'")
    accuracy = re.search(
        r"spirals: test accuracy (\d+\.\d)% after", printed("huggingface_dataset.py", tmp_path / "run")
    )
    assert accuracy
    assert float(accuracy[1]) > 90


def test_own_task(tmp_path):
    error = re.search(r"regression: test error (\d\.\d+) m after", printed("own_task.py", tmp_path / "run"))
    assert error
    assert float(error[1]) < 0.3


def test_study_with_pandas(tmp_path):
    config = tiny.write(tmp_path / "tiny.yaml", {"seeds": [0, 1], "arms": ARMS})
    assert tiny.start(config, tmp_path / "out").returncode == 0
    text = printed("study_with_pandas.py", tmp_path / "out")
    assert len(re.findall(r"^\S+ +2$|\b2$", text, re.M)) >= 2  # two seeds in each arm
    assert "mean and standard deviation of test accuracy over seeds" in text
