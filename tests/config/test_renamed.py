"""Settings that had another name: refused everywhere, with the new name, and nothing is written."""

import pytest

from gengap_dist.config.loading import RENAMED, field_names, nested, renamed, validate
from gengap_dist.config.sections import RunConfig
from gengap_dist.config.study import StudyConfig
from gengap_dist.errors import UsageError

SETTINGS = {name: new for name, new in RENAMED.items() if "." in name} | {
    f"recipe.{name.partition('.')[2]}": name
    for name in field_names(RunConfig)
    if name.startswith("algorithm.") and name not in RENAMED.values()
}
SECTIONS = sorted(SETTINGS)


def test_every_new_name_is_a_setting_and_no_old_one():
    known = {*field_names(StudyConfig)}
    assert len(SETTINGS) > 15
    assert {*SETTINGS.values()} <= known
    assert not {*SETTINGS} & known


@pytest.mark.parametrize("old", SECTIONS)
def test_a_file(old):
    model = StudyConfig if old.startswith("study.") else RunConfig
    tree = nested({old: 1}) if model is RunConfig else nested({"study.arms": [{"name": "a"}], old: 1})
    with pytest.raises(UsageError) as error:
        validate(model, tree)
    assert str(error.value) == f"{old} is called {renamed(old)} now: use that name"


@pytest.mark.parametrize("old", ["recipe.sam_rho", "train.budget"])
def test_an_arm_and_an_axis(old):
    for block in ({"arms": [{"name": "a", "set": {old: 1}}]}, {"axes": {old: [1, 2]}}):
        config = validate(StudyConfig, {"study": {"seeds": [0]} | block})
        with pytest.raises(UsageError, match=f"{old} is called {renamed(old)} now: use that name"):
            config.run_config(config.candidates[0], seed=0)


def test_a_tuned_setting():
    tune = {"space": {"recipe.sam_rho": {"low": 0.01, "high": 0.1}}, "trials": 2}
    with pytest.raises(UsageError, match=r"space \(recipe.sam_rho\) is called algorithm.sam_rho now: use that name"):
        validate(StudyConfig, {"study": {"arms": [{"name": "a"}], "tune": tune}})


@pytest.mark.parametrize(
    ("command", "old", "new"),
    [
        *(("train", f"--{old}", f"--{new}") for old, new in SETTINGS.items() if not old.startswith("study.")),
        ("study", "--study.budgets", "--study.length_units"),
        ("plan", "--recipe.local", "--algorithm.local_sgd"),
        ("doctor", "--launch.backend", "--launch.launcher"),
        ("probe", "--rivals", "--probe.diagnostics"),
    ],
)
def test_the_command_line(command, old, new, tmp_path, capsys, monkeypatch):
    from importlib import import_module

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        import_module(f"gengap_dist.cli.{command}").main(
            [old, "1", *(["--model", "mlp"] if command == "probe" else [])]
        )
    assert end.value.code == 2
    assert capsys.readouterr().err == f"gengap {command}: {old} is called {new} now: use that name\n"
    assert not [*tmp_path.iterdir()]
