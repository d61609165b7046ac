"""`gengap compare`: runs from folders and from MLflow, whoever trained them."""

import json

import pytest

from gengap_dist.analysis.study_data import read_study
from gengap_dist.cli.compare import command
from gengap_dist.cli.exit_codes import run_command
from gengap_dist.distributed.worker_pool import free_port
from tests.conftest import config

pytestmark = pytest.mark.usefixtures("few_figures")


def run_folder(folder, size: int, seed: int, accuracy: float | None, **settings) -> None:
    """A run folder as a training run leaves it, as far as comparisons look."""
    folder.mkdir(parents=True)
    made = config(**{"batch__global_size": size, "seed": seed} | settings)
    trained = {"train_full/accuracy": 1.0, "train_full/loss": 0.001}
    result = {"num_steps": 10} | trained | ({} if accuracy is None else {"test/accuracy": accuracy})
    info = {"schema": 1, "status": "finished", "seed": seed, "config": made.model_dump(mode="json"), "num_steps": 10}
    info |= {"result": result, "versions": {}, "seconds": 1.0, "command": ["x"], "git": None}
    (folder / "run.json").write_text(json.dumps(info))
    line = {"step": 10, "epoch": 1.0, "seconds": 1.0, "probe_seconds/near_rank_loss": 0.1}
    (folder / "metrics.jsonl").write_text(json.dumps(line | {"near_rank_loss/fc2/rel_1e-2": size / 1000}) + "\n")


@pytest.fixture
def folders(tmp_path):
    for seed, luck in enumerate((0.0, 0.004, -0.003)):
        run_folder(tmp_path / f"mine/small{seed}", 64, seed, 0.95 + luck)
        run_folder(tmp_path / f"mine/large{seed}", 512, seed, 0.91 + luck + seed / 2000)
        run_folder(
            tmp_path / f"mine/scaled{seed}",
            512,
            seed,
            0.94 + luck - seed / 3000,
            optim__scaling="sqrt",
            optim__base_size=64,
        )
    return tmp_path / "mine"


def test_loose_run_folders_are_sorted_into_arms(folders, gengap, new_gengap):
    done = new_gengap("compare", "mine", "--out", "out", "--question", "Does it cost?")
    assert done.returncode == 0, done.stderr
    study = read_study(folders.parent / "out")
    assert study.arms == ["b64", "b512", "b512 optim.lr=0.0565685425"]
    assert study.baseline == "b64"
    gap = study.gap("b512")
    assert gap is not None
    assert gap.mean == pytest.approx(0.04 - 0.0005)
    claims = {claim.key: claim for claim in study.comparison.claims}
    assert claims["gap"].outcome == "supported"
    assert claims["scaling"].finding == "closes it partly"  # a point is still lost
    page = (folders.parent / "out" / "report.html").read_text()
    assert "Does it cost?" in page
    assert f"{100 * gap.mean:+.2f}" in done.stdout
    other = gengap("compare", "mine", "--out", "out", "--baseline", "b512")
    assert other.returncode == 0, other.stderr
    assert read_study(folders.parent / "out").baseline == "b512"


DATA = {"name": "digits", "digest": "a" * 32, "num_train": 1294, "target_digests": {"train": "x", "val": "y"}}
MIXTURES = {
    "another data set": ({"data__name": "mnist"}, DATA | {"name": "mnist"}, "different data (digits, mnist)"),
    "another network": ({"model__name": "mlp", "model__widths": [8]}, DATA, "different networks (lenet5, mlp [8])"),
    "more images": ({}, DATA | {"digest": "b", "num_train": 1300}, "num_train (1300) was 1294"),
    "other labels": ({}, DATA | {"digest": "b", "target_digests": {"train": "z"}}, "the train targets have changed"),
    "other pixels": ({}, DATA | {"digest": "b"}, "the inputs have changed"),
}  # fmt: skip


@pytest.mark.parametrize("case", MIXTURES)
def test_data_and_networks_are_not_mixed_without_a_word(folders, capsys, case):
    settings, data, says = MIXTURES[case]
    for path in sorted(folders.glob("*/run.json")):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"data": DATA}))
    run_folder(folders / "other", 512, 7, 0.9, **settings)
    info = json.loads((folders / "other" / "run.json").read_text())
    (folders / "other" / "run.json").write_text(json.dumps(info | {"data": data}))
    with pytest.raises(SystemExit) as exit_:
        run_command("gengap compare", command, ["mine", "--out", "out"])
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert says in said
    assert "add --across to compare them all the same" in said
    assert command(["mine", "--out", "out", "--across"]) == 0
    page = (folders.parent / "out" / "report.html").read_text()
    assert says.replace("'", "&#39;") in page


def test_other_data_by_other_settings_are_no_mixture(folders):
    """Shuffled labels are a control of the same study."""
    for path in sorted(folders.glob("*/run.json")):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"data": DATA}))
    run_folder(folders / "control", 512, 7, 0.1, data__shuffle_labels=True)
    info = json.loads((folders / "control" / "run.json").read_text())
    (folders / "control" / "run.json").write_text(json.dumps(info | {"data": DATA | {"digest": "c"}}))
    assert command(["mine", "--out", "out"]) == 0


def test_what_cannot_be_read_is_named_and_the_rest_compared(folders, gengap):
    (folders / "large1/run.json").write_text('{"status": "finis')
    (folders / "large2/metrics.jsonl").write_text("")
    run_folder(folders / "twin", 64, 0, 0.94)
    run_folder(folders / "percent", 64, 1, 95.0)
    run_folder(folders / "torn", 64, 2, 0.9)
    (folders / "torn/metrics.jsonl").write_text('{"step": 1, "ep\n{"step": 2}\n')
    done = gengap("compare", "mine", "--out", "out")
    assert done.returncode == 0, done.stderr
    assert "large1 is left out" in done.stderr
    assert "test accuracy (95.0) is not between 0 and 1" in done.stderr
    assert "torn is left out" in done.stderr
    assert "same arm and seed" in done.stderr
    assert sorted(read_study(folders.parent / "out").gap("b512").differences) == [0, 2]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nowhere"], "contains no run.json"),
        (["mine", "--baseline", "b65"], "--baseline (b65) is not an arm (did you mean b64?)"),
        (["ftp:/x"], "is neither a folder nor an MLflow run"),
        (["blank"], "none of the 1 runs has test/accuracy"),
        (["experiments:/nothing"], "is not an experiment in this store"),
        (["runs:/0123"], "is not a run in this store"),
    ],
)
@pytest.mark.filterwarnings("default")  # what MLflow warns of is not ours to mend
def test_bad_input(folders, mlflow_db, capsys, words, says):
    (folders.parent / "nowhere").mkdir()
    run_folder(folders.parent / "blank" / "one", 8, 0, None)
    store = f"sqlite:///{mlflow_db}"
    with pytest.raises(SystemExit) as exit_:
        run_command("gengap compare", command, [*words, "--out", "out", "--mlflow.tracking_uri", store])
    assert exit_.value.code == 2
    assert says in capsys.readouterr().err.splitlines()[-1]
    assert not (folders.parent / "out").exists()


@pytest.mark.filterwarnings("default")  # what MLflow warns of is not ours to mend
def test_a_server_that_is_away_does_not_lack_the_run(tmp_path, capsys):
    words = ["runs:/0123", "--out", str(tmp_path / "out"), "--mlflow.tracking_uri", f"http://127.0.0.1:{free_port()}"]
    with pytest.raises(SystemExit) as exit_:
        run_command("gengap compare", command, words)
    said = capsys.readouterr().err
    assert exit_.value.code == 2
    assert "cannot be read" in said
    assert "is not a run" not in said


@pytest.mark.filterwarnings("default")  # what MLflow warns of is not ours to mend
def test_runs_that_something_else_logged_to_mlflow(tmp_path, mlflow_db, gengap):
    from mlflow import MlflowClient

    store = f"sqlite:///{mlflow_db}"
    client = MlflowClient(store)
    experiment = client.create_experiment("theirs", (tmp_path / "artifacts").as_uri())
    for size, accuracy in ((32, 97.0), (2048, 91.5)):
        for seed in (5, 6, 7):
            run = client.create_run(experiment).info.run_id
            for name, value in (("batch_size", size), ("random_state", seed), ("opt", "{1: 2}"), ("acc_steps", 7)):
                client.log_param(run, name, value)
            for step in (1, 2):
                client.log_metric(run, "acc", accuracy - 2 + step + seed / 10, step=step)
                client.log_metric(run, "noise_scale", 100.0 * step, step=step)
            client.set_terminated(run)
    words = ["compare", "experiments:/theirs", "--mlflow.tracking_uri", store, "--out", "out", "--accuracy", "acc"]
    names = ["--size", "batch_size", "--seed", "random_state", "--updates", "acc_steps"]
    refused = gengap(*words, *names)
    assert refused.returncode == 2
    assert "add --percent" in refused.stderr
    lost = gengap(*words, "--percent")
    assert lost.returncode == 2
    assert "has no parameter or tag batch.global_size" in lost.stderr
    done = gengap(*words, *names, "--percent")
    assert done.returncode == 0, done.stderr
    study = read_study(tmp_path / "out")
    assert study.arms == ["b32", "b2048"]
    gap = study.gap("b2048")
    assert gap is not None
    assert gap.differences == pytest.approx({5: 0.055, 6: 0.055, 7: 0.055})
    assert [run.info["num_steps"] for run in study.runs] == [7] * 6
    assert {run.explanation("noise_scale") for run in study.runs} == {200.0}
