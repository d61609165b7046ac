"""A study side by side on a real Ray cluster: interrupted, started again, and compared with one run after another."""

import signal
import subprocess

import pytest

from gengap_dist.tracking.record import read_info
from tests.ray_cluster import until
from tests.study import tiny

MOODY = """
from gengap_dist.models import build

def make(num_classes, in_channels):
    model = build("mlp", num_classes=num_classes, in_channels=in_channels, image_size=8, widths=(16,))
    def hook(module, args):
        if module.training: raise ArithmeticError("no mood")
    model.register_forward_pre_hook(hook)
    return model
"""
STUDY = {
    "seeds": [0],
    "concurrent": 2,  # of three: when the first has ended, there is one to come
    "arms": [{"name": "moody", "set": {"model.name": "moody:make"}}],
    "baseline": "b64",
    "axes": {"batch.global_size": [64, 512]},
}


@pytest.fixture(scope="module")
def both(cluster, tmp_path_factory):
    """Where the study ran one by one, and on Ray, interrupted by Ctrl-C; the processes."""
    folder = tmp_path_factory.mktemp("ray")
    (folder / "moody.py").write_text(MOODY)
    config = tiny.write(folder / "s.yaml", STUDY, launch={"max_failures": 0})
    alone = tiny.start(config, folder / "alone")
    env = cluster.env | {"RAY_ADDRESS": cluster.address}
    words = tiny.command(config, folder / "ray", "--launch.backend", "ray")
    first = subprocess.Popen(words, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until(lambda: any(tiny.ended(folder / "ray")) or first.poll() is not None)
    first.send_signal(signal.SIGINT)
    said, _ = first.communicate(timeout=60)
    before = tiny.ended(folder / "ray")
    assert not any(read_info(path.parent)["status"] == "running" for path in folder.glob("ray/*/*/*/run.json"))
    second = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=280)
    return folder, alone, (first.returncode, said, before), second


def test_side_by_side_gives_the_numbers_of_one_by_one(both):
    folder, alone, _, second = both
    assert alone.returncode == second.returncode == 1, second.stderr
    assert tiny.table(folder / "ray") == tiny.table(folder / "alone")
    assert tiny.scores(folder / "ray") == tiny.scores(folder / "alone")
    assert all(read_info(path.parent)["launcher"] == "ray" for path in folder.glob("ray/runs/*/*/run.json"))
    assert not list(folder.glob("ray/**/ray"))


def test_ctrl_c_ends_everything_and_the_next_start_goes_on(both):
    folder, _, (code, said, before), _ = both
    assert code == 130, said
    assert "Traceback" not in said
    assert before
    assert before.items() <= tiny.ended(folder / "ray").items()


def test_a_run_that_fails_does_not_stop_the_others(both):
    folder, alone, _, second = both
    for name, process in (("alone", alone), ("ray", second)):
        info = read_info(folder / name / "runs/moody/seed0")
        assert info["status"] == "failed"
        assert "ArithmeticError: no mood" in info["error"]
        assert "1 run(s) failed" in process.stderr


def test_ray_keeps_quiet(both):
    _, _, _, second = both
    assert "Trial " not in second.stdout + second.stderr
    assert "Traceback" not in second.stderr
