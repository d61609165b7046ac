"""What is known of a study before its first run: every arm is checked, and its page says what can be decided."""

import pytest

from gengap_dist.analysis.decidable import outlook
from gengap_dist.cli.console import PlainConsole
from gengap_dist.cli.doctor import _check_arms
from gengap_dist.cli.plan import command as plan_command
from gengap_dist.cli.study import command
from gengap_dist.cli.study_page import _planned, forecast_line, study_page
from gengap_dist.cli.terminal import print_page
from gengap_dist.config.loading import resolve, validate
from gengap_dist.config.study import StudyConfig
from gengap_dist.distributed.runtime_context import RuntimeContext
from gengap_dist.errors import UsageError
from gengap_dist.study.run_matrix import Forecast, first_configs, planned_runs
from gengap_dist.training.arm_check import check_arms
from gengap_dist.training.run_cost import ArmFacts
from tests.conftest import ROOT
from tests.ranks import forked_ranks
from tests.study import tiny

DECISIVE = ["gap", "near_rank_loss_grows", "explains"]


def of(**study) -> StudyConfig:
    return validate(StudyConfig, tiny.SETTINGS | {"study": {"name": "tiny"} | study})


def facts_of(config: StudyConfig) -> dict[str, ArmFacts]:
    """As if of 2,048 samples, without reading any."""
    facts = {}
    for arm in config.arms:
        run = config.run_config(arm, 0)
        steps = -(-2048 // run.batch.global_size)
        base = -(-2048 // (run.optim.base_size or 64)) if run.train.length_unit == "updates" else steps
        num_steps = run.train.steps or run.train.epochs * base
        facts[arm.name] = ArmFacts(num_steps, num_steps / steps, disk_bytes=2**20)
    return facts


def shown(config: StudyConfig, capsys) -> str:
    page = [*study_page(config, facts_of(config)), forecast_line(config, Forecast(7000.0, {"sb": 2**29}))]
    print_page(page, PlainConsole(width=80))
    return capsys.readouterr().out


def missing(config: StudyConfig) -> dict[str, str]:
    found = outlook(_planned(config, facts_of(config)), config.baseline, config.study.seeds)
    return {claim.key: claim.missing for claim in found.claims}


def test_arms_may_have_lengths_in_tokens():
    tokens = {"data": {"name": "stdlib"}, "model": {}, "train": {"tokens": 2**20}}
    arms = [{"name": f"b{size}", "set": {"batch.global_size": size, "train.tokens": size * 2**18}} for size in (8, 64)]
    config = validate(StudyConfig, tiny.SETTINGS | tokens | {"study": {"name": "tiny", "arms": arms, "seeds": [0, 1]}})
    assert config.baseline == "b8"
    assert outlook(_planned(config, facts_of(config)), "b8", [0, 1]).role_of == {"b8": "baseline", "b64": "plain"}


def test_a_batch_larger_than_the_data_is_refused_before_the_first_run(tmp_path):
    study = tiny.write(tmp_path / "s.yaml", {"axes": {"batch.global_size": [32, 5000]}})
    done = tiny.start(study, tmp_path / "out")
    assert done.returncode == 2
    assert "study arm b5000: batch.global_size (5000) is larger than the training set of 1294 samples" in done.stderr
    assert not (tmp_path / "out" / "runs").exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"model.name": "lenet5"}, "study arm b: data.image_size (8) is too small for lenet5"),
        ({"probe.layers": ["fc9"]}, "study arm b: probe.layers (fc9)"),
        ({"algorithm": {"rank_penalty": 1.0, "rank_layers": ["fc9"]}}, "study arm b: algorithm.rank_layers (fc9)"),
        ({"data.num_train": 5000}, "study arm b: data.num_train (5,000)"),
        ({"launch.num_processes": 65}, "study arm b: batch.global_size (64) leaves 1 of 65 ranks"),
    ],
)
def test_every_arm_is_checked_against_data_and_network(settings, says):
    config = of(arms=[{"name": "a"}, {"name": "b", "set": settings}])
    arms = first_configs(planned_runs(config, ROOT, {}))
    with pytest.raises(UsageError) as error:
        check_arms(arms, RuntimeContext())
    assert says in str(error.value)
    assert _check_arms(arms).status == "fail"


def test_facts_of_arms_and_of_data_elsewhere():
    arms = first_configs(planned_runs(of(axes={"batch.global_size": [64, 1294]}), ROOT, {}))
    found = check_arms(arms, RuntimeContext())
    assert [(facts.num_steps, facts.num_epochs) for facts in found.values()] == [(42, 2.0), (2, 2.0)]
    assert found["b64"].num_parameters == 64 * 16 + 16 + 16 * 10 + 10 + 2 * 16
    elsewhere = of(arms=[{"name": "a", "set": {"data": {"name": "imagefolder", "root": "/nowhere"}}}])
    assert check_arms(first_configs(planned_runs(elsewhere, ROOT, {})), RuntimeContext(), data_here=False) == {}


def test_a_treated_arm_never_becomes_the_baseline_by_itself():
    penalty = {"algorithm.rank_penalty": 0.1}
    arms = [{"name": "b64-rank", "set": penalty}, {"name": "b64"}, {"name": "b512", "set": {"batch.global_size": 512}}]
    assert of(arms=arms).baseline == "b64"
    longer = {"name": "b32", "set": {"batch.global_size": 32, "train.epochs": 9, "optim.warmup_epochs": 1}}
    assert of(arms=[*arms, longer]).baseline == "b32"
    config = of(arms=arms[:1])
    with pytest.raises(UsageError, match=r"study.baseline is not given.*b64-rank sets algorithm.rank_penalty") as error:
        config.baseline  # noqa: B018
    assert len(str(error.value)) <= 300
    assert of(arms=arms[:1], baseline="b64-rank").baseline == "b64-rank"
    scaled = of(axes={"batch.global_size": [64, 512], "optim.scaling": ["sqrt", "linear"]})  # at optim.base_size
    assert scaled.baseline == "b64-scaling-sqrt"


def test_a_study_without_a_plain_arm_writes_nothing(tmp_path):
    study = tiny.write(tmp_path / "s.yaml", {"arms": [{"name": "warm", "set": {"optim.lr": 1.0}}]})
    with pytest.raises(UsageError, match=r"warm sets optim.lr"):
        command(["--config", str(study), "--out", "out"])
    assert not (tmp_path / "out" / "study.json").exists()


def test_what_the_registered_studies_can_decide():
    for path in ("decisive_mlp_fashionmnist", "decisive_lenet5_fashionmnist"):
        found = missing(resolve(StudyConfig, [ROOT / f"configs/{path}.yaml"], {}))
        assert [key for key, lacks in found.items() if not lacks] == DECISIVE
    small = missing(resolve(StudyConfig, [ROOT / "gengap_dist/configs/demo.yaml"], {}))
    assert "sb16-lowered has no placebo" in small["explains"]


def test_what_a_study_lacks_is_said():
    plain = {"batch.global_size": [64, 512]}
    found = missing(of(axes=plain))
    assert [key for key, lacks in found.items() if not lacks] == DECISIVE[:2]
    assert "optim.scaling" in found["scaling"]
    assert "train.length_unit=updates" in found["longer_training"]
    more = missing(of(axes=plain | {"optim.scaling": ["none", "sqrt"]}, length_units=["epochs", "updates"]))
    assert more["scaling"] == more["longer_training"] == ""
    assert set(missing(of(axes=plain, seeds=[3])).values()) == {"a second seed: pairs of one seed have no interval"}
    assert missing(of(axes=plain | {"probe.enabled": [False]}))["gap"] == ""
    assert "probe.enabled" in missing(of(axes=plain | {"probe.enabled": [False]}))["explains"]


def test_the_page_says_why_and_fits_a_terminal(capsys):
    said = shown(of(axes={"batch.global_size": [64, 512], "optim.scaling": ["none", "sqrt"]}), capsys)
    because = "b64-scaling-none: the smallest batch of the arms that set only batch and length"
    assert because in " ".join(said.split())
    roles = said.partition("updates\n")[2].splitlines()[:3]
    assert [line.split()[0] for line in roles] == ["baseline", "plain", "scaled"]
    assert "time     about 1.9 h of training here, without start, reports and MLflow\n" in said
    assert "memory   up to 512 MiB a run (arm sb)\n" in said
    assert "about 9 MiB" in said  # 3 arms x 3 seeds
    named = shown(of(arms=[{"name": "warm", "set": {"optim.lr": 1.0}}], baseline="warm"), capsys)
    assert "warm: study.baseline names it, although it sets optim.lr" in named
    many = of(axes={"batch.global_size": [*range(64, 164)], "algorithm.label_smoothing": [0.0, 0.1]})
    said = shown(many, capsys)
    assert len(said.splitlines()) < 25
    assert "99 arms: b65-label_smoothing0.0," in said
    assert max(map(len, said.splitlines())) <= 80


def test_dry_run_trains_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    axes = {"batch.global_size": [64, 512], "optim.scaling": ["none", "linear", "sqrt"]}  # the same at 64
    study = tiny.write(tmp_path / "s.yaml", {"axes": axes})
    with forked_ranks():
        assert command(["--config", str(study), "--out", "out", "--dry-run"]) == 0
    said, problems = capsys.readouterr()
    assert "baseline b64" in said
    note = "arms b64-scaling-linear, b64-scaling-sqrt have the same settings as b64-scaling-none, so they are not run"
    assert f"note     {note} again" in " ".join(said.split("\n")).replace(" " * 9, " ")
    assert "warning" not in problems
    assert "without start, reports and MLflow\nmemory   up to" in said
    assert said.splitlines()[-1] == f"start    gengap study --config {study} --out out"
    assert not (tmp_path / "out").exists()
    assert plan_command(["--config", str(study)]) == 0
    assert "+ near-rank loss grows with the batch" in capsys.readouterr().out
