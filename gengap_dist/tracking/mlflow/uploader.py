"""Uploads a run folder or a study folder to MLflow: sends what is there, and computes nothing.

A study is a parent run, its arms are children, their seeds grandchildren. `MlflowUploader.sync` may be interrupted at
any point and called again; nothing is sent twice, see `mlflow_run.py`.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote, urlencode

from gengap_dist.config.identity import treatment
from gengap_dist.config.loading import flat
from gengap_dist.errors import UsageError, visible
from gengap_dist.runs.arm_means import have_ended, read_means, read_runs, read_sources
from gengap_dist.runs.run_folder import read_info, read_study_info
from gengap_dist.runs.schema import RunInfo, RunStatus, StudyInfo, section, to_time
from gengap_dist.runs.upload_state import read_upload_state
from gengap_dist.tracking.mlflow.client import connect_experiment, describe, is_outage
from gengap_dist.tracking.mlflow.essential import essential
from gengap_dist.tracking.mlflow.mlflow_run import Described, Metrics, MlflowRun, Tags, UploadProgress, millis
from gengap_dist.tracking.mlflow.names import mlflow_name

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5a5a5a", "#8c510a")  # Okabe & Ito
SHARED_VIEW = "mlflow.sharedViewState."  # tag of an experiment: a state of its page, which a link names
WORST_FIRST = (RunStatus.RUNNING, RunStatus.KILLED, RunStatus.PREEMPTED, RunStatus.FAILED, RunStatus.DIVERGED)

Runs = Mapping[Path, RunInfo]
"""Folder to run.json."""


def ui_paths(folder: Path) -> dict[str, str]:
    """Paths in the UI, after its address: of the run, or of a study's table of arms and of their comparison."""
    state = read_upload_state(folder)
    if "run_id" not in state:
        return {}
    runs = f"#/experiments/{state['experiment_id']}/runs"
    if not (folder / "study.json").exists():
        return {"run": f"{runs}/{state['run_id']}"}
    wanted = {"viewStateShareKey": state["view"]} if "view" in state else {"searchFilter": _arms_of(state["run_id"])}
    paths = {"runs": f"{runs}?{urlencode(wanted, quote_via=quote)}", "compare": comparison_path(folder)}
    return {name: path for name, path in paths.items() if path}


def _arms_of(study_run_id: str) -> str:
    """A search for the arms of a study."""
    return f"tags.study_run_id = '{study_run_id}' and tags.level = 'arm'"


def comparison_path(folder: Path) -> str:
    """Path, after the host, of the UI's comparison of a study's arms; empty if there are no arms yet."""
    found = (read_upload_state(folder / "runs" / arm) for arm in read_study_info(folder).arms)
    states = [state for state in found if state.get("run_id")]
    if not states:
        return ""
    runs, experiments = ([*dict.fromkeys(s[key] for s in states)] for key in ("run_id", "experiment_id"))
    return f"#/compare-runs?runs={quote(json.dumps(runs))}&experiments={quote(json.dumps(experiments))}"


class MlflowUploader:
    """Uploads one folder, of a run or of a study."""

    def __init__(self, folder: Path, uri: str, experiment: str, metrics: Metrics = "all") -> None:
        """Connect, and create the experiment if it does not exist.

        Args:
            folder: of the run or study.
            uri: address of the store.
            experiment: its name.
            metrics: see `MlflowRun`.

        Raises:
            Exception: any error of the MLflow client.
        """
        self.folder, self.uri = folder, uri
        self.metrics: Metrics = metrics
        self.client, self.experiment = connect_experiment(uri, experiment)
        self._left_out: set[str] = set()
        self._keys: dict[str, str] = {}
        self._problems: list[Exception] = []

    def sync(self, *, closing: bool = False, progress: UploadProgress = lambda name, done, total: None) -> None:
        """Send what is new; with `closing`, also artifacts and final status, which a study's runs get when they end.

        Raises:
            Exception: if something was not received; unless the store takes nothing at all, all else was sent before.
        """
        self._problems = []
        if (self.folder / "run.json").exists():
            self._sync_run(self.folder, read_info(self.folder), {"mlflow.runName": self.folder.name}, closing, progress)
        if (self.folder / "study.json").exists():
            self._sync_study(read_study_info(self.folder), closing, progress)
        if self._problems:
            raise self._problems[0]

    @contextmanager
    def _postponing_errors(self, *, of_files: bool = False) -> Iterator[None]:
        """Context whose error is raised when all else has been sent.

        Args:
            of_files: whether it sends files, which MLflow may keep in another place than all else.
        """
        try:
            yield
        except Exception as error:
            if is_outage(error) and not of_files:
                raise
            self._problems.append(error)

    def _leave_out(self, name: str, error: Exception) -> None:
        if name not in self._left_out:
            self._left_out.add(name)
            print(f"{name} is left out: {describe(error)[:300]}", flush=True)

    def _run_of(self, folder: Path) -> MlflowRun:
        return MlflowRun(self.client, self.uri, self.experiment, folder, self._leave_out, self._keys, self.metrics)

    def _sync_run(self, folder: Path, info: RunInfo, tags: Tags, closing: bool, progress: UploadProgress) -> None:
        run, described = self._run_of(folder), Described.of(info)
        run.open(described, {"level": "run"} | _run_tags(info) | tags)
        if info.status != RunStatus.RUNNING and run.is_closed(info.ended):
            return
        num_problems = len(self._problems)
        with self._postponing_errors():
            run.send_metrics(described.started, progress)
        run.send_system()
        if closing:
            run.terminate(described)
        with self._postponing_errors(of_files=True):
            run.send_model(info)
        if closing:
            with self._postponing_errors(of_files=True):
                run.send_files()
            if len(self._problems) == num_problems:
                run.mark_closed(described)

    def _sync_study(self, study: StudyInfo, closing: bool, progress: UploadProgress) -> None:
        parent, described = self._run_of(self.folder), Described.of(study)
        tune = section(study.config, "study").get("tune") or {}
        shared: Tags = {"study": study.name, "tuned": ",".join(tune.get("space", ())) or None}
        # with the time, because names of studies need not be unique
        name = f"{study.name} {to_time(described.started):%Y-%m-%d %H:%M:%S}"
        parent.open(described, shared | {"mlflow.runName": name, "level": "study", "status": study.status})
        shared["study_run_id"] = parent.id

        def damaged(error: UsageError) -> None:
            if closing:
                print(visible(str(error)), flush=True)

        arms = {arm: read_runs(self.folder / "runs" / arm, study.seeds, damaged) for arm in study.arms}
        reference = next((flat(info.config) for info in arms.get(study.baseline, {}).values()), None)
        for number, (arm, runs) in enumerate(arms.items()):
            if not runs:
                continue
            first = next(iter(runs.values()))
            tags = shared | {
                "arm": arm,
                "role": "baseline" if arm == study.baseline else "arm",
                "batch.global_size": first.global_size,
                "mlflow.runColor": COLOURS[number % len(COLOURS)],  # the UI's own may be equal
                "treatment": treatment(flat(first.config), reference) if reference else None,
            }
            with self._postponing_errors():
                arm_run_id = self._sync_arm(runs, study, tags, closing)
                for path, info in runs.items():
                    own = {"mlflow.runName": f"{arm}/{path.name}", "mlflow.parentRunId": arm_run_id, "level": "seed"}
                    with self._postponing_errors():
                        self._sync_run(path, info, tags | own, closing or info.status != RunStatus.RUNNING, progress)
        parent.set_tags({"mlflow.note.content": _study_note(study, comparison_path(self.folder))})
        if closing:
            _send_headline(parent, study)
            with self._postponing_errors():
                self._share_view(parent, study)
            parent.terminate(described)
            with self._postponing_errors(of_files=True):
                parent.send_files()
            parent.mark_closed(described)

    def _share_view(self, parent: MlflowRun, study: StudyInfo) -> None:
        """Keep in the experiment which runs and columns `ui_paths` shows: the arms, with what matters first."""
        folder = self.folder / "runs" / study.baseline
        *_, last = read_means(folder) if read_sources(folder) else ({},)
        ranks = [name for name in essential(last) if name.startswith("near_rank_loss/")]
        results = [
            name for name in last if name.startswith("test/") and name.endswith(("/mean", "/ci_low", "/ci_high"))
        ]
        results.sort(key=lambda name: name.startswith("test/loss/"))
        metrics = [*results[:3], "sb_lb_gap/mean", *sorted(ranks)[-1:], "train_full/loss/mean", "train/loss/mean"]
        tags = [f"tags.`{name}`" for name in ("batch.global_size", "runs", "treatment")]
        columns = [tags[0], *(f"metrics.`{mlflow_name(name)}`" for name in metrics), *tags[1:]]
        order = {"orderByKey": "metrics.`sb_lb_gap/mean`", "orderByAsc": False}  # by time, arms would be folded
        view = {"searchFilter": _arms_of(parent.id), **order, "selectedColumns": columns}
        if parent.state.get("shared") != view:
            self.client.set_experiment_tag(self.experiment, f"{SHARED_VIEW}{parent.id}", json.dumps(view))
            parent.save(view=parent.id, shared=view)

    def _sync_arm(self, runs: Runs, study: StudyInfo, tags: Tags, closing: bool) -> str:
        """Send the means over an arm's seeds, if the study has written them; returns the id of the arm's MLflow run.

        MLflow keeps the history of sent values, so they cannot be replaced. If seeds change later, the arm gets a new
        MLflow run with the old one's tags, and the old run is deleted (moved to MLflow's trash).
        """
        folder = next(iter(runs)).parent
        num_missing = len(study.seeds) - len(runs)
        over = closing or study.status != RunStatus.RUNNING or have_ended(runs, study.seeds)
        described = _describe_arm(runs, over=over, complete=num_missing <= 0)
        counts = Counter(str(info.status) for info in runs.values()) + Counter({"not started": num_missing})
        own = {
            "mlflow.runName": folder.name,
            "mlflow.parentRunId": tags["study_run_id"],
            "level": "arm",
            "status": described.status,
            "runs": ", ".join(f"{number} {status}" for status, number in sorted(counts.items())),
        }
        run = self._run_of(folder)
        run.open(described, tags | own)
        if made_of := read_sources(folder):
            if run.state.get("made_of", made_of) != made_of:
                run.replace(described)
            if run.state.get("made_of") != made_of:
                run.save(made_of=made_of, summed=False)
            if not run.state["summed"]:
                run.send_lines(read_means(folder), described.started)
                run.save(summed=True)
        if over and not run.is_closed(described.ended):
            run.terminate(described)
            run.mark_closed(described)
        return run.id


def _describe_arm(runs: Runs, *, over: bool, complete: bool) -> Described:
    """An arm that is over has the worst status of its seeds."""
    described = [Described.of(info) for info in runs.values()]
    statuses = {run.status for run in described}
    worst = next((status for status in WORST_FIRST if status in statuses), RunStatus.FINISHED)
    return Described(
        status=RunStatus.RUNNING if not over else worst if complete else RunStatus.KILLED,
        started=min(run.started for run in described),
        ended=max(run.ended or "" for run in described) or None,
        config={key: value for key, value in described[0].config.items() if key != "seed"},
        data=described[0].data,
    )


def _send_headline(parent: MlflowRun, study: StudyInfo) -> None:
    """Send the study's own metrics; MLflow shows the last value sent."""
    from mlflow.entities import Metric

    is_sent = (lambda name: True) if parent.sends_all else re.compile("sb_lb_gap/.+/mean").fullmatch
    metrics = {mlflow_name(name): value for name, value in study.metrics.items() if is_sent(name)}
    before, timestamp = parent.state.get("metrics", {}), millis(study.ended) if study.ended else 0
    parent.send_points([Metric(k, v, timestamp, 0) for k, v in metrics.items() if before.get(k) != v])
    parent.save(metrics=metrics)


def _run_tags(info: RunInfo) -> dict[str, object]:
    """Tags that describe this start of a run; a later start may have other ranks."""
    return {
        "status": info.status,
        "metric": info.metric.model_dump_json(),
        "num_probe_samples": info.num_probe_samples,
        "world_size": info.world_size,
        "launcher": info.launcher,
        "strategy": info.strategy,
        "device": info.device,
        "seed": info.seed,
        "norm_size": info.norm_size,
        "mlflow.source.git.commit": (info.git or {}).get("commit"),
        "batch.global_size": info.global_size,
    }


def _study_note(study: StudyInfo, link: str) -> str:
    """The description of a study in the UI, in Markdown: question, verdicts, and link to the comparison of arms."""
    verdicts = "\n".join(f"- {_as_markdown(sentence)}" for sentence in study.verdicts)
    compared = f"[Compare the arms]({link})" if link else ""
    return "\n\n".join(filter(None, (_as_markdown(study.question), verdicts, compared)))


def _as_markdown(text: str) -> str:
    r"""A text on one line that Markdown shows as it is: no links, images, tables or HTML.

    >>> _as_markdown("[a](http://b)\n<img> lb_64 loses 0.5")
    '\\[a\\](http\\://b) \\<img\\> lb\\_64 loses 0.5'
    """
    return re.sub(r"[\\`*_\[\]<>|#~&!]|:(?=//)", r"\\\g<0>", visible(" ".join(text.split())))
