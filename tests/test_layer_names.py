"""Layers with any name, from training to the comparison, the report, MLflow, and back."""

import io
import json
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

from gengap_dist.analysis.group_runs import gather
from gengap_dist.analysis.report.html import write_report
from gengap_dist.analysis.study_data import comparison_run, read_study
from gengap_dist.cli.console import PlainConsole
from gengap_dist.cli.terminal import layer_table
from gengap_dist.config.loading import validate
from gengap_dist.config.metric_key import LayerKey, MetricKey, layer_metric
from gengap_dist.config.study import StudyConfig
from gengap_dist.runs.run_folder import load_spectra, read_metrics
from gengap_dist.runs.schema import RunStatus
from gengap_dist.study import runner
from gengap_dist.study.run_matrix import StudyCallback
from gengap_dist.tracking.mlflow.importer import SourceNames
from gengap_dist.tracking.mlflow.names import mlflow_name
from gengap_dist.tracking.mlflow.uploader import MlflowUploader

pytestmark = [pytest.mark.processes, pytest.mark.filterwarnings("default")]  # MLflow's warnings are not ours

UNITS = [
    "n1", "own_batch", "weight", "centred", "file", "meta", "rel_1e-2", "a/b@größe", "a_b", "a:b", "a%2Fb", "[red]",
    "$a_$", "x" * 300, "x" * 299 + "y",
]  # fmt: skip
LAYERS = ["pool", *UNITS, "relu", "relu#2"]
SETTINGS = {
    "data": {"name": "digits", "image_size": 8},
    "model": {"name": "tests.test_layer_names:oddly_named"},
    "train": {"steps": 4, "num_evals": 1},
    "probe": {"num_samples": [16, 32], "own_batch": True, "per_decade": 1, "max_time_fraction": None},
    "mlflow": {"enabled": False, "log_model": False, "system_seconds": None},
    "study": {"name": "odd", "seeds": [0], "axes": {"batch.global_size": [8, 24]}},
}


class _Oddly(nn.Module):
    """Units with the names in UNITS, and one ReLU that is called twice."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.add_module("pool", unit(nn.Conv2d(in_channels, 4, 3, stride=2)))
        for name in UNITS:
            self.add_module(name, unit(nn.Linear(36, 6)))
        self.relu, self.between, self.head = nn.ReLU(), nn.Linear(6 * len(UNITS), 16), nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        children = dict(self.named_children())
        x = children["pool"](x).flatten(1)
        x = torch.cat([children[name](x) for name in UNITS], 1)
        return self.head(self.relu(self.between(self.relu(x))))


def unit(affine: nn.Module) -> nn.Module:
    return nn.Sequential(OrderedDict(affine=affine, act=nn.ReLU()))


def oddly_named(num_classes: int, in_channels: int) -> nn.Module:
    return _Oddly(num_classes, in_channels)


def test_layers_with_odd_names_are_measured_compared_reported_and_read_back(tmp_path):
    study, out = validate(StudyConfig, SETTINGS), tmp_path / "odd"
    out.mkdir()
    runner.prepare(study, out, pytest.fail)
    runner.run_study(study, out, StudyCallback(), driver=True)
    runner.conclude(out, RunStatus.FINISHED, {}, [])

    here = read_study(out)
    assert [run.info["status"] for run in here.runs] == [RunStatus.FINISHED] * 2
    compared = {run.folder: comparison_run(run, ()) for run in here.runs}
    for run in here.runs:
        for probe_set, measures in (("", compared[run.folder].measures), ("own_batch", compared[run.folder].own_batch)):
            of_layers = {name for name in measures if MetricKey.parse(name).measure == "near_rank_loss"}
            spectra = load_spectra(run.folder / "spectra" / probe_set / "step_00000004.npz")
            assert list(dict.fromkeys(facts["layer"] for _, facts in spectra.values())) == LAYERS
            for key, (values, facts) in spectra.items():
                assert LayerKey.parse(key)[:3] == (facts["layer"], facts["view"], facts["centred"])
                name = layer_metric("near_rank_loss/rel_1e-2", key)
                small = (values < 0.01 * values[0]) | (values == 0)
                assert measures[name] == small.mean(), name
                of_layers.discard(name)
            assert not of_layers
    console = PlainConsole(width=900, file=io.StringIO(), record=True)
    console.print(layer_table(here.runs[0]))
    table = console.export_text(clear=False)
    assert "[red]" in table
    measure = MetricKey.parse(str(here.runs[0].primary_measure))
    key = LayerKey(measure.layer, measure.view, measure.centred).format()
    assert [line for line in table.splitlines() if f"{key} (primary)" in line]
    assert table.count("(primary)") == 1
    assert f"verdicts are about {here.runs[0].primary_measure}" in table
    page = write_report(here)
    assert page.name == "report.html"
    assert "a%2Fb@größe" in page.read_text()

    uri = f"sqlite:///{tmp_path}/m.db"
    uploader = MlflowUploader(out, uri, "odd")
    uploader.sync(closing=True)
    for run in here.runs:
        sent = uploader.client.get_run(json.loads((run.folder / "mlflow.json").read_text())["run_id"]).data.metrics
        recorded = {name: value for line in read_metrics(run.folder) for name, value in line.items()}
        names = recorded.keys() - {"step", "seconds"}
        assert len({mlflow_name(name) for name in names}) == len(names)
        assert sent == {mlflow_name(name): recorded[name] for name in names}

    source = f"runs:/{json.loads((out / 'mlflow.json').read_text())['run_id']}"
    back, problems = gather([source], tmp_path / "back", SourceNames(), uri, "")
    assert (problems, back.arms, back.baseline) == ([], here.arms, here.baseline)
    for arm in here.arms:
        for one, other in zip(back.runs_of(arm), here.runs_of(arm), strict=True):
            imported = comparison_run(one, ())
            assert imported.measures == compared[other.folder].measures
            assert imported.own_batch == compared[other.folder].own_batch
            assert imported.own_batch_untrained == compared[other.folder].own_batch_untrained
    assert back.comparison.claims == here.comparison.claims
