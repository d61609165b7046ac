"""`gengap probe` says what a measurement will cost, after its first steps; weights are left out unless asked for."""

import pytest

from gengap_dist.cli import probe, terminal
from gengap_dist.cli.terminal import MeasurementProgress


def test_the_estimate_is_that_of_the_measured_steps(monkeypatch, capsys):
    now = [50.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    with MeasurementProgress(enabled=True) as progress:
        now[0] += 99  # reading data is not part of a measurement
        progress("spectra", 0.0, 1.0)
        now[0] += 1
        progress("spectra", 1, 1000)  # too small a part
        now[0] += 2
        progress("spectra", 20, 1000)
        now[0] += 100
        progress("spectra", 1000, 1000)
        progress("sharpness", 0.0, 1.0)
        now[0] += 4
        progress("sharpness", 2, 4)
    assert capsys.readouterr().err.splitlines() == ["spectra: about 2 min", "sharpness: about 8 s"]


def test_other_ranks_say_nothing(capsys):
    with MeasurementProgress(enabled=False) as progress:
        progress("spectra", 0.0, 1.0)
        progress("spectra", 1, 2)
    assert not capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:few samples")
@pytest.mark.parametrize("asked", [True, False])
def test_weights_are_measured_if_asked_for(tmp_path, capsys, asked):
    words = ["--model", "lenet5", "--probe.num_samples", "32", "--probe.layers", "fc2", "--out", str(tmp_path / "out")]
    assert probe.command([*words, *(["--probe.diagnostics", "weights"] if asked else [])]) == 0
    stages = [line.partition(":")[0] for line in capsys.readouterr().err.splitlines() if ": about" in line]
    assert stages == ["near-rank loss of 32 samples", *(["spectra of weights"] if asked else [])]
    assert (tmp_path / "out" / "spectra" / "weights").exists() == asked
