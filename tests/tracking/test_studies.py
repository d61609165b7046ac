"""A study in MLflow: its runs, what they say, what the UI shows; on sqlite, on a server with PostgreSQL, refused."""

import fcntl
import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
import torch

from gengap_dist.analysis.group_runs import gather
from gengap_dist.analysis.study_data import read_study
from gengap_dist.cli.report import command as report_command
from gengap_dist.config.loading import validate
from gengap_dist.config.sections import MlflowConfig
from gengap_dist.config.study import StudyConfig
from gengap_dist.data import datasets
from gengap_dist.errors import UsageError
from gengap_dist.runs.json_lines import SYSTEM, read_lines
from gengap_dist.runs.run_folder import read_info, read_metrics, read_study_info, write_info
from gengap_dist.runs.schema import RunStatus
from gengap_dist.runs.system_metrics import sampling
from gengap_dist.study import runner
from gengap_dist.study.means import update_means
from gengap_dist.study.run_matrix import StudyCallback
from gengap_dist.tracking.mlflow.client import connect_client
from gengap_dist.tracking.mlflow.importer import SourceNames
from gengap_dist.tracking.mlflow.process import UploaderProcess, sync_now
from gengap_dist.tracking.mlflow.uploader import MlflowUploader, comparison_path, ui_paths
from tests.browser import NEEDS_CHROMIUM, page, pictures
from tests.conftest import FULL, ROOT, thinned, train
from tests.ranks import forked_ranks
from tests.tracking.servers import mlflow_server, postgresql, refusing

pytestmark = [pytest.mark.processes, pytest.mark.filterwarnings("default")]  # what MLflow warns of is not ours to mend

ARMS = [
    {"name": "sb32", "set": {"batch.global_size": 32}},
    {"name": "lb256-ema", "set": {"batch.global_size": 256, "algorithm.weight_averaging": "ema"}},
    {"name": "wild", "set": {"batch.global_size": 256, "optim.lr": 1e9}},
]
SETTINGS = {
    "train": {"steps": 12, "num_evals": 3},
    "probe": {"num_samples": 64, "max_time_fraction": None},
    "model": {"name": "lenet5"},
    "study": {"name": "tiny", "question": "Does it *work*?", "seeds": [0, 1], "arms": ARMS},
}


def run_study(out: Path) -> None:
    """What `gengap study` does without its report."""
    study = validate(StudyConfig, SETTINGS)
    out.mkdir()
    runner.prepare(study, out, pytest.fail)
    runner.run_study(study, out, StudyCallback(), driver=True)
    numbers = {"sb_lb_gap/lb256-ema/mean": 0.25, "sb_lb_gap/a+b/mean": 0.5}
    runner.conclude(out, RunStatus.FINISHED, numbers, ["A claim. undecided: too few seeds."])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "tiny"
    with warnings.catch_warnings(), forked_ranks():
        warnings.simplefilter("ignore")  # an arm diverges
        run_study(out)
    return out


@pytest.fixture
def study(trained, tmp_path):
    """A copy without checkpoints and models, which would be sent for each run."""
    return Path(shutil.copytree(trained, tmp_path / "tiny", ignore=shutil.ignore_patterns("checkpoints", "model")))


@pytest.fixture(scope="module")
def store(empty_store):
    """One sqlite store for all tests: each has its own experiment in it."""
    return f"sqlite:///{shutil.copy(empty_store, empty_store.with_name('studies.db'))}"


@pytest.fixture(scope="module")
def sent(trained, store, tmp_path_factory):
    """The mirror of a whole study, models and all, that tests only look at."""
    folder = tmp_path_factory.mktemp("sent")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # where a sqlite store keeps files
        mirror = MlflowUploader(Path(shutil.copytree(trained, folder / "tiny")), store, "sent")
        mirror.sync(closing=True)
    return mirror


def state(folder) -> dict:
    return json.loads((folder / "mlflow.json").read_text())


def everything(client, experiment, histories=None) -> dict:
    """All that MLflow has of an experiment, by run, with the histories of the metrics named, or of all."""
    return {
        run.info.run_id: (
            run.data.tags,
            run.data.params,
            run.info.status,
            run.data.metrics,
            [client.get_metric_history(run.info.run_id, name) for name in histories or run.data.metrics],
        )
        for run in client.search_runs([experiment], max_results=1000)
    }


def named(client, experiment, text) -> list[str]:
    return sorted(run.info.run_name for run in client.search_runs([experiment], text))


def test_a_study_is_a_parent_its_arms_and_their_seeds(sent, store):
    study, client, experiment = sent.folder, sent.client, sent.experiment
    parent = state(study)["run_id"]
    assert named(client, experiment, "tags.level = 'study'") == [client.get_run(parent).info.run_name]
    arms = client.search_runs([experiment], f"tags.mlflow.parentRunId = '{parent}'")
    assert {run.info.run_name: run.data.tags["role"] for run in arms} == {
        "sb32": "baseline", "lb256-ema": "arm", "wild": "arm",
    }  # fmt: skip
    for arm in arms:
        below = named(client, experiment, f"tags.mlflow.parentRunId = '{arm.info.run_id}'")
        assert below == [f"{arm.info.run_name}/seed{seed}" for seed in (0, 1)]
        assert arm.inputs.dataset_inputs[0].dataset.digest
        assert "seed" not in arm.data.params
    wanted = "tags.\"batch.global_size\" = '256' and tags.role = 'arm' and tags.level = 'arm'"
    assert named(client, experiment, wanted) == ["lb256-ema", "wild"]
    assert named(client, experiment, "tags.treatment LIKE '%weight_averaging=ema%' and tags.seed = '1'") == [
        "lb256-ema/seed1"
    ]
    assert named(client, experiment, "tags.status = 'diverged' and tags.level = 'arm'") == ["wild"]
    assert named(client, experiment, "tags.treatment = 'plain' and tags.level = 'arm'") == ["sb32"]
    assert {run.info.status for run in arms} == {"FINISHED"}
    note = client.get_run(parent).data.tags["mlflow.note.content"]
    verdict = "- A claim. undecided: too few seeds."
    assert note == f"Does it \\*work\\*?\n\n{verdict}\n\n[Compare the arms]({comparison_path(study)})"
    view = json.loads(client.get_experiment(experiment).tags[f"mlflow.sharedViewState.{parent}"])
    assert {run.info.run_name for run in client.search_runs([experiment], view["searchFilter"])} == {
        arm["name"] for arm in ARMS
    }
    assert view["selectedColumns"][:2] == ["tags.`batch.global_size`", "metrics.`test/accuracy/mean`"]
    assert ui_paths(study)["runs"] == f"#/experiments/{experiment}/runs?viewStateShareKey={parent}"
    assert len({run.data.tags["mlflow.runColor"] for run in arms}) == 3
    assert client.get_run(parent).data.metrics == {"sb_lb_gap/lb256-ema/mean": 0.25, "sb_lb_gap/a_b-300273da/mean": 0.5}

    before = everything(client, experiment)  # a second start, and a catch-up: nothing is sent twice
    MlflowUploader(study, store, "sent").sync()
    MlflowUploader(study, store, "sent").sync(closing=True)
    assert everything(client, experiment) == before


def test_by_default_about_twenty_metrics_are_sent(study, store):
    mirror = MlflowUploader(study, store, "few", "essential")
    mirror.sync(closing=True)
    runs = {run.info.run_name: run for run in mirror.client.search_runs([mirror.experiment])}
    assert max(len(run.data.metrics) for run in runs.values()) <= 25
    arm = runs["lb256-ema"].data.metrics
    assert {"test/accuracy/ci_high", "sb_lb_gap/mean", "near_rank_loss/fc2/centred/rel_1e-2/mean"} <= arm.keys()
    ranks = [name for name in runs["lb256-ema/seed0"].data.metrics if "rank" in name]
    assert sorted(name.split("/")[1] for name in ranks) == ["conv1", "conv2", "fc1", "fc2"]
    assert not mirror.client.list_artifacts(runs["lb256-ema/seed0"].info.run_id, "spectra")
    (parent,) = (run for run in runs.values() if run.data.tags["level"] == "study")
    assert parent.data.metrics.keys() == {"sb_lb_gap/lb256-ema/mean", "sb_lb_gap/a_b-300273da/mean"}


def test_an_arm_has_means_and_intervals_over_its_seeds(sent):
    mirror, study = sent, sent.folder
    arm = state(study / "runs/lb256-ema")["run_id"]
    found = mirror.client.get_run(arm).data.metrics
    results = [read_info(study / f"runs/lb256-ema/seed{seed}").result for seed in (0, 1)]
    baseline = [read_info(study / f"runs/sb32/seed{seed}").result for seed in (0, 1)]
    accuracies = np.array([result["test/accuracy"] for result in results])
    half = 12.706204736 * accuracies.std(ddof=1) / 2**0.5  # Student's t, one degree of freedom
    assert found["test/accuracy/mean"] == pytest.approx(accuracies.mean())
    assert found["test/accuracy/ci_low"] == pytest.approx(max(accuracies.mean() - half, 0.0))
    assert found["test/accuracy/ci_high"] == pytest.approx(min(accuracies.mean() + half, 1.0))
    assert found["sb_lb_gap/mean"] == pytest.approx(np.mean([b["test/accuracy"] for b in baseline]) - accuracies.mean())
    curves = [{line["step"]: line for line in read_metrics(study / f"runs/lb256-ema/seed{seed}")} for seed in (0, 1)]
    for name in ("val/accuracy", "val/loss", "train/loss", "near_rank_loss/fc2/rel_1e-2", "effective_rank/fc1"):
        history = {m.step: m.value for m in mirror.client.get_metric_history(arm, f"{name}/mean")}
        steps = [s for s in curves[0] if name in curves[0][s] and (name != "train/loss" or "val/loss" in curves[0][s])]
        assert history == pytest.approx({s: (curves[0][s][name] + curves[1][s][name]) / 2 for s in steps}), name
    wild = mirror.client.get_run(state(study / "runs/wild")["run_id"])
    assert wild.data.metrics["num_runs/diverged"] == 2
    assert wild.data.tags["runs"] == "2 diverged"
    assert "test/accuracy/mean" not in wild.data.metrics


def test_a_seed_that_the_study_does_without_is_in_no_mean(study, store):
    write_info(study, read_study_info(study).with_fields(seeds=[1]))
    assert not update_means(study)
    mirror = MlflowUploader(study, store, "fewer")
    mirror.sync(closing=True)
    arm = mirror.client.get_run(state(study / "runs/sb32")["run_id"])
    assert arm.data.metrics["test/accuracy/num_seeds"] == 1
    assert arm.data.metrics["test/accuracy/mean"] == read_info(study / "runs/sb32/seed1").result["test/accuracy"]


def test_a_folder_is_sent_by_one_at_a_time(study, store, monkeypatch):
    monkeypatch.setattr("gengap_dist.tracking.mlflow.process.LOCK_TIMEOUT_SECONDS", 0.2)
    with (study / "mlflow.log").open("w") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="is being sent to MLflow by another process"):
            sync_now(study, store, lambda name, done, total: None)
    assert sync_now(study, store, lambda name, done, total: None) == store


def test_a_study_read_back_from_mlflow_compares_as_its_folder(sent, store, tmp_path):
    study = sent.folder
    source = f"runs:/{state(study)['run_id']}"
    found, problems = gather([source], tmp_path / "out", SourceNames(), store, "")
    assert problems == []
    assert (sorted(found.arms), found.baseline) == (
        ["lb256-ema", "sb32", "wild"],
        "sb32",
    )  # in the order of their starts
    here = read_study(study)
    for arm in here.arms:
        assert found.results(arm, "test/accuracy") == here.results(arm, "test/accuracy")
        for one, other in zip(found.runs_of(arm), here.runs_of(arm), strict=True):
            assert one.info["status"] == other.info["status"]
            assert one.untrained_and_trained("effective_rank/fc2") == other.untrained_and_trained("effective_rank/fc2")
    assert found.comparison.claims == here.comparison.claims
    by_name, _ = gather(["experiments:/sent"], tmp_path / "again", SourceNames(), store, "")
    assert by_name.arms == found.arms


def test_an_arm_waits_for_its_seeds_and_is_made_anew_when_one_is_done_again(study, store):
    late = study / "runs/lb256-ema/seed1"
    info = read_info(late)
    write_info(late, info.with_fields(status="running"))
    whole = read_study_info(study)
    write_info(study, whole.with_fields(status="running", ended=None, metrics={}))
    for path in study.glob("runs/*/mean.jsonl"):
        path.unlink()
    update_means(study, whole.arms)
    mirror = MlflowUploader(study, store, "again")
    client = mirror.client
    mirror.sync()
    first = state(study / "runs/lb256-ema")["run_id"]
    assert client.get_run(first).info.status == "RUNNING"
    assert not client.get_run(first).data.metrics
    assert client.get_run(state(study / "runs/sb32")["run_id"]).data.metrics["num_runs/finished"] == 2
    write_info(late, info)
    write_info(study, whole)
    update_means(study)
    mirror.sync(closing=True)
    assert state(study / "runs/lb256-ema")["run_id"] == first
    assert client.get_run(first).info.status == "FINISHED"
    client.set_tag(first, "seen_by", "a reviewer")

    old_seed = state(late)["run_id"]
    (late / "mlflow.json").unlink()  # as if the run's folder had been removed, and the study started again
    result = info.result | {"test/accuracy": 1.0}
    write_info(late, info.with_fields(ended="2030-01-01T00:00:00+00:00", result=result))
    update_means(study)
    others = [state(study / name)["run_id"] for name in ("", "runs/sb32", "runs/sb32/seed0", "runs/lb256-ema/seed0")]
    mirror.sync(closing=True)
    assert state(late)["run_id"] != old_seed
    arm = state(study / "runs/lb256-ema")["run_id"]
    assert arm != first
    assert client.get_run(first).info.lifecycle_stage == "deleted"
    (point,) = client.get_metric_history(arm, "test/accuracy/mean")
    assert point.value == pytest.approx((1.0 + read_info(late.parent / "seed0").result["test/accuracy"]) / 2)
    assert client.get_run(arm).data.tags["seen_by"] == "a reviewer"
    assert client.get_run(state(late)["run_id"]).data.tags["mlflow.parentRunId"] == arm
    assert client.get_run(state(late.parent / "seed0")["run_id"]).data.tags["mlflow.parentRunId"] == arm
    assert [state(study / n)["run_id"] for n in ("", "runs/sb32", "runs/sb32/seed0", "runs/lb256-ema/seed0")] == others


def test_a_mirror_that_broke_off_anywhere_sends_an_arm_once(study, store, monkeypatch):
    mirror = MlflowUploader(study, store, "broken")
    send, sent = mirror.client.log_batch, 0

    def lossy(run_id, metrics=(), params=(), tags=()):
        nonlocal sent
        send(run_id, metrics=metrics, params=params, tags=tags)
        if any(metric.key.endswith("/ci_low") for metric in metrics):
            sent += 1
            raise ConnectionError  # its answer was lost

    monkeypatch.setattr(mirror.client, "log_batch", lossy)
    with pytest.raises(ConnectionError):
        mirror.sync(closing=True)
    assert sent == 1
    again = MlflowUploader(study, store, "broken")
    again.sync(closing=True)
    arm = state(study / "runs/sb32")["run_id"]
    for name in again.client.get_run(arm).data.metrics:
        steps = [point.step for point in again.client.get_metric_history(arm, name)]
        assert len(steps) == len(set(steps)), name


@pytest.mark.parametrize("arm", ["sb32", "lb256-ema"])
def test_a_model_scores_as_its_run_did(sent, store, arm):
    import mlflow

    folder = sent.folder / "runs" / arm / "seed0"
    kept = state(folder)
    mlflow.set_tracking_uri(store)
    model = mlflow.pytorch.load_model(f"runs:/{kept['run_id']}/model")
    test = datasets.load(read_config(folder).data).test
    logits = model(test.inputs.float())
    result = read_info(folder).result
    assert (logits.argmax(1) == test.targets).double().mean().item() == result["test/accuracy"]
    assert torch.nn.functional.cross_entropy(logits, test.targets).item() == pytest.approx(result["test/loss"], 1e-5)
    assert model(test.inputs[:1].float()).shape == (1, 10)  # any number of images
    info = mlflow.models.get_model_info(f"models:/{kept['model_id']}")
    assert [tuple(spec.shape) for spec in info.signature.inputs.inputs] == [(-1, 1, 32, 32)]
    assert [tuple(spec.shape) for spec in info.signature.outputs.inputs] == [(-1, 10)]
    assert mlflow.pyfunc.load_model(f"models:/{kept['model_id']}").predict(test.inputs[:3].float().numpy()).shape == (
        3,
        10,
    )
    (logged,) = sent.client.get_run(kept["run_id"]).outputs.model_outputs
    assert logged.model_id == kept["model_id"]


def read_config(folder):
    from gengap_dist.config.sections import RunConfig

    return RunConfig.model_validate(read_info(folder).config)


class Undecided(torch.nn.Module):
    """Takes another path for other images, which no graph can say."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.flat, self.linear = torch.nn.Flatten(), torch.nn.Linear(64 * in_channels, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = self.linear(self.flat(images))
        return logits if float(logits.sum()) > 0 else logits.relu()


def test_a_model_that_cannot_be_exported_is_no_failure(tmp_path, store):
    run = tmp_path / "run"
    settings = {"data__image_size": 8, "train__steps": 2, "probe__enabled": False, "mlflow__enabled": True}
    train(run, model__name="tests.tracking.test_studies:Undecided", **settings)
    info = read_info(run)
    assert (info.status, info.model) == ("finished", None)
    mirror = MlflowUploader(run, store, "none")
    mirror.sync(closing=True)
    found = mirror.client.get_run(state(run)["run_id"])
    assert found.info.status == "FINISHED"
    assert found.data.tags["model"] == f"not logged: {info.model_error[:400]}"
    assert not mirror.client.search_logged_models([mirror.experiment])


def test_the_uploader_sends_a_model_and_loads_no_torch(trained, study, store):
    run = study / "runs/sb32/seed0"
    (run / "model").mkdir()
    shutil.copyfile(trained / "runs/sb32/seed0/model/model.pt2", run / "model/model.pt2")
    code = (
        "import sys; from pathlib import Path; from gengap_dist.tracking.mlflow.process import sync_now; "
        "sync_now(Path(sys.argv[1]), sys.argv[2], lambda *_: None); print(*{'torch'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code, run, store], capture_output=True, text=True, check=True)
    assert not done.stdout.strip()
    assert state(run)["model_logged"]
    other = MlflowUploader(study / "runs/sb32/seed1", store, "lost")
    other.sync(closing=True)
    tags = other.client.get_run(state(other.folder)["run_id"]).data.tags
    assert tags["model"] == "not logged: model/model.pt2 is missing"


def test_what_the_folders_of_an_earlier_version_lack_is_written_before_they_are_sent(tmp_path, store):
    study, run = tmp_path / "old", tmp_path / "run"
    shutil.copytree(ROOT / "tests/runs/schema_1/study", study)
    train(run, model__name="mlp", data__image_size=8, train__steps=2, probe__enabled=False)  # without MLflow
    assert read_info(run).model is None
    for folder in (study, run):
        assert report_command(["sync", str(folder), "--mlflow.tracking_uri", store]) == 0
    client = connect_client(store)
    arm = client.get_run(state(study / "runs/lb128")["run_id"]).data.metrics
    assert arm["sb_lb_gap/mean"] == pytest.approx((0.10277777777777777 - 0.10555555555555556 + 0.14444444444444443
                                                   - 0.17222222222222222) / 2)  # fmt: skip
    seed = client.get_run(state(study / "runs/lb128/seed0")["run_id"]).data
    assert seed.params["batch.global_size"] == "128"
    assert "has no complete checkpoint of its last step" in seed.tags["model"]
    assert client.get_logged_model(state(run)["model_id"]).status == "READY"


def test_machines_are_watched_in_the_folder_and_sent_once(study, store):
    run = study / "runs/sb32/seed0"
    samples = list(read_lines(run / "system.jsonl", SYSTEM))
    assert samples
    assert all(0 <= sample["system_memory_usage_percentage"] <= 100 for sample in samples)
    with sampling(run, 0.05, num_nodes=2):
        torch.randn(400, 400).matmul(torch.randn(400, 400))
    (node,) = run.glob("system_*.jsonl")
    mirror = MlflowUploader(run, store, "system")
    mirror.sync(closing=True)
    metrics = mirror.client.get_run(state(run)["run_id"]).data.metrics
    name = node.stem.removeprefix("system_")
    assert {"system/cpu_utilization_percentage", f"system/{name}/disk_usage_percentage"} <= metrics.keys()
    history = mirror.client.get_metric_history(state(run)["run_id"], "system/cpu_utilization_percentage")
    assert [(m.step, m.timestamp) for m in history] == [(step, line["time"]) for step, line in enumerate(samples)]


def test_two_studies_of_one_name_are_told_apart(study, store):
    if not FULL:
        for folder in study.glob("runs/*/seed1"):
            shutil.rmtree(folder)
    other = Path(shutil.copytree(study, study.with_name("elsewhere")))
    write_info(other, read_study_info(other).with_fields(started="2030-01-01T00:00:00+00:00"))
    for folder in (study, other):
        mirror = MlflowUploader(folder, store, "twice")
        mirror.sync(closing=True)
    parents = mirror.client.search_runs([mirror.experiment], "tags.level = 'study' and tags.study = 'tiny'")
    assert len({run.info.run_name for run in parents}) == len({run.data.tags["folder"] for run in parents}) == 2
    for run in parents:
        own = f"tags.study_run_id = '{run.info.run_id}' and tags.level = 'arm'"
        assert named(mirror.client, mirror.experiment, own) == ["lb256-ema", "sb32", "wild"]


def test_half_a_folder_does_not_keep_the_others_back(study, store):
    (study / "runs/lb256-ema/seed1/run.json").write_text('{"status": "fin')
    with (study / "runs/sb32/seed0/metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "val/acc')
    for path in study.glob("runs/*/mean.jsonl"):
        path.unlink()
    assert not update_means(study)
    (study / "runs/sb32/seed0/metrics.jsonl").write_text("damaged\n")
    mirror = MlflowUploader(study, store, "half")
    with pytest.raises(ValueError, match=r"sb32/seed0/metrics.jsonl is damaged in line 1"):
        mirror.sync(closing=True)
    arm = mirror.client.get_run(state(study / "runs/lb256-ema")["run_id"])
    assert arm.data.tags["runs"] == "1 finished, 1 not started"
    assert not arm.data.metrics
    assert mirror.client.get_run(state(study / "runs/sb32")["run_id"]).data.metrics["num_runs/finished"] == 2
    assert mirror.client.get_run(state(study / "runs/wild/seed1")["run_id"]).info.status == "FINISHED"
    assert mirror.client.get_run(state(study)["run_id"]).info.status == "FINISHED"


REFUSALS = [
    (401, '{"error_code": "UNAUTHENTICATED"}'),
    (403, "<html>\n<h1>Forbidden</h1>"),
    (500, "oh\nno"),
    (200, "<p>"),
]


@pytest.mark.parametrize(("status", "body"), thinned(REFUSALS, lambda status, _: status in (403, 200)))
def test_a_server_that_refuses_costs_one_sentence(study, status, body):
    run = study / "runs/sb32/seed0"
    with refusing(status, body) as uri:
        behind = UploaderProcess(run, MlflowConfig(tracking_uri=uri)).finish()
        assert behind is not None
        assert "\n" not in behind
        assert f"gengap report sync {run}" in behind
        with pytest.raises(UsageError, match=re.escape(uri)) as refused:
            sync_now(run, uri, lambda name, done, total: None)
    assert "\n" not in str(refused.value)


@pytest.mark.full  # else: the same study in a local store, above; a real server in test_mlflow.py
def test_a_server_on_postgresql_takes_a_whole_study(trained, study, tmp_path):
    import mlflow

    if FULL:
        shutil.copytree(trained, study, dirs_exist_ok=True)
    else:  # a model of one run
        shutil.copytree(trained / "runs/sb32/seed0", study / "runs/sb32/seed0", dirs_exist_ok=True)

    with postgresql() as database, mlflow_server(database, tmp_path) as uri:
        follower = UploaderProcess(study, MlflowConfig(tracking_uri=uri, experiment="pg", flush_timeout_seconds=300))
        assert follower.finish() is None, (study / "mlflow.log").read_text()
        client = mlflow.MlflowClient(uri)
        arm = client.get_run(state(study / "runs/lb256-ema")["run_id"])
        assert arm.data.metrics["test/accuracy/num_seeds"] == 2
        experiment = arm.info.experiment_id
        wanted = "tags.\"batch.global_size\" = '256' and tags.role = 'arm' and tags.level = 'arm'"
        assert named(client, experiment, wanted) == ["lb256-ema", "wild"]
        names = ("test/accuracy", "test/accuracy/mean", "val/loss/mean", "train/loss")
        before = everything(client, experiment, names)
        assert len(before) == 1 + 3 + 6
        sync_now(study, uri, lambda name, done, total: None)
        assert everything(client, experiment, names) == before
        mlflow.set_tracking_uri(uri)
        seed = state(study / "runs/sb32/seed0")["run_id"]
        assert mlflow.pytorch.load_model(f"runs:/{seed}/model")(torch.zeros(4, 1, 32, 32)).shape == (4, 10)


@NEEDS_CHROMIUM
@pytest.mark.full  # else: the tests above read from the store what the pages show
def test_the_ui_shows_the_study_its_arms_their_means_and_charts(sent, store, tmp_path):
    study = sent.folder
    runs, title = f"#/experiments/{sent.experiment}/runs", state(study)["tags"]["mlflow.runName"]
    seed = state(study / "runs/sb32/seed0")["run_id"]
    ours = quote(f"tags.study_run_id = '{state(study)['run_id']}' and tags.level = 'arm'")
    with mlflow_server(store, tmp_path, "ui") as uri, page(viewport={"width": 1500, "height": 1000}) as ui:
        ui.set_default_timeout(90_000)

        def visit(path: str, text: str) -> None:
            ui.goto("about:blank")
            ui.goto(f"{uri}/{path}", wait_until="domcontentloaded")
            ui.get_by_text(text).first.wait_for()

        def unfold(name: str, below: str) -> None:
            ui.wait_for_timeout(2000)  # the page remembers what was unfolded before
            if not ui.get_by_text(below, exact=True).count():
                row = ui.locator(".ag-row", has_text=name).first
                row.locator("button[data-component-id*=runnamecell]").click()
            ui.get_by_text(below, exact=True).first.wait_for()

        def keep(name: str) -> None:
            ui.wait_for_timeout(1500)  # charts grow
            ui.screenshot(path=pictures() / f"mlflow_{name}.png")

        visit(f"{runs}?workflowType=machine_learning", title)
        ui.get_by_role("button", name="Close").click()  # the assistant
        unfold(title, "lb256-ema")
        unfold("lb256-ema", "lb256-ema/seed1")
        keep("runs")
        visit(f"{runs}?searchFilter={ours}&compareRunsMode=CHART", title)
        unfold(title, "lb256-ema")
        ui.get_by_placeholder("Search metric charts").fill("^val/accuracy/")
        ui.locator(".js-plotly-plot .scatterlayer .trace").first.wait_for()
        keep("charts")
        assert ui.locator(".js-plotly-plot").count() == 3  # the mean, and both ends of its interval
        visit(f"{runs}/{state(study)['run_id']}", "Does it")
        keep("study")
        link = ui.get_by_role("link", name="Compare the arms").get_attribute("href")
        visit(link[link.index("#") :], "Comparing 3 Runs")
        ui.locator(".js-plotly-plot").first.wait_for()
        keep("comparison")
        if FULL:
            visit(f"{runs}/{state(study / 'runs/lb256-ema')['run_id']}", "test/accuracy/ci_high")
            keep("arm")
            visit(f"{runs}/{seed}/system-metrics", "cpu_utilization_percentage")
            keep("system")
