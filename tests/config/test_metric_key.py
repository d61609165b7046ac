"""Names of metrics: put together and taken apart without loss, whatever a layer is called."""

import ast

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gengap_dist.config.measures import LAYER_MEASURES, MEASURES, VIEWS, WEIGHT_VIEW
from gengap_dist.config.metric_key import LayerKey, MetricKey, layer_metric
from gengap_dist.errors import UsageError
from tests.conftest import ROOT

HOSTILE = [
    "n1", "n64", "own_batch", "weight", "pool", "centred", "rel_1e-2", "abs_1e-2", "file", "meta", "relu#2", "a/b",
    "a/pool", "/", "//", "%", "%2F", "a%2Fb", "..", ".", " ", "layer1.0", "stem@2", "größe λ", "\n", "\x00", "\x85",
    "near_rank_loss", "near_rank_loss/fc2/rel_1e-2", "x" * 300,
]  # fmt: skip
LAYERS = st.sampled_from(HOSTILE) | st.text(min_size=1)
VIEW = st.sampled_from(["", *VIEWS, WEIGHT_VIEW])
PROBE_SET = st.just("") | st.just("own_batch") | st.integers(2, 10**6).map("n{}".format)
THRESHOLD = st.sampled_from(["", "rel_1e-1", "rel_1e-2", "abs_1e-3"])
KEYS = st.builds(
    MetricKey, st.sampled_from(sorted(LAYER_MEASURES)), LAYERS, VIEW, st.booleans(), PROBE_SET, THRESHOLD
)  # fmt: skip


@given(KEYS)
def test_a_metric_of_a_layer_is_read_as_it_was_written(key):
    name = key.format()
    assert MetricKey.parse(name) == key
    assert not {*name} & {*map(chr, (*range(32), *range(127, 160)))}  # control characters
    layer = LayerKey(key.layer, key.view, key.centred)
    assert LayerKey.parse(layer.format()) == layer
    measure = f"{key.measure}/{key.threshold}" if key.threshold else key.measure
    assert layer_metric(measure, layer.format(), key.probe_set) == name


@given(KEYS, KEYS)
@example(MetricKey("effective_rank", "a/pool"), MetricKey("effective_rank", "a", "pool"))
@example(MetricKey("effective_rank", "a%2Fb"), MetricKey("effective_rank", "a/b"))
@example(MetricKey("effective_rank", "a", probe_set="n64"), MetricKey("effective_rank", "a/n64"))
def test_two_metrics_have_two_names(first, second):
    assert (first.format() == second.format()) == (first == second)


@given(st.text(min_size=1) | st.text("abn/1%2_ ", min_size=1) | st.lists(st.sampled_from(HOSTILE)).map("/".join))
def test_any_other_name_is_kept_or_refused(name):
    for text in (name, f"near_rank_loss/{name}", f"effective_rank/{name}"):
        try:
            key = MetricKey.parse(text)
        except UsageError:
            continue
        assert MetricKey.parse(key.format()) == key
        if not key.layer:
            assert key.format() == text


@pytest.mark.parametrize(
    "name",
    ["nc1", "noise_scale", "hessian/trace", "train/loss", "probe_seconds/near_rank_loss", "probe_seconds/control/n64",
     "sb_lb_gap/a+b/mean", "step", "near_rank_loss", "near_ranked/fc2/rel_1e-2"],
)  # fmt: skip
def test_a_measure_without_a_layer_stays_as_it_is(name):
    assert MetricKey.parse(name) == MetricKey(name)
    assert MetricKey(name).format() == name


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("near_rank_loss/fc2/rel_1e-2", MetricKey("near_rank_loss", "fc2", threshold="rel_1e-2")),
        ("near_rank_loss/layer1.0.relu#2/pool/centred/n64/abs_1e-1",
         MetricKey("near_rank_loss", "layer1.0.relu#2", "pool", True, "n64", "abs_1e-1")),
        ("effective_rank/fc2/own_batch", MetricKey("effective_rank", "fc2", probe_set="own_batch")),
        ("sigma_max/fc2.affine/weight", MetricKey("sigma_max", "fc2.affine", "weight")),
    ],
)  # fmt: skip
def test_ordinary_names_are_those_of_old_folders(name, key):
    assert (MetricKey.parse(name), key.format()) == (key, name)


def test_an_old_name_with_a_slash_in_its_layer_is_read():
    old = MetricKey.parse("near_rank_loss/left/right/pool/rel_1e-2")
    assert old == MetricKey("near_rank_loss", "left/right", "pool", threshold="rel_1e-2")


@pytest.mark.parametrize(
    "key",
    [
        MetricKey(""), MetricKey("nc1", "fc2"), MetricKey("effective_rank", "", "pool"),
        MetricKey("effective_rank", "fc2", "side"), MetricKey("effective_rank", "fc2", probe_set="big"),
        MetricKey("effective_rank/fc2"), MetricKey("near_rank_loss", "fc2", threshold="rel"),
    ],
)  # fmt: skip
def test_what_no_metric_has_is_refused(key):
    with pytest.raises(UsageError, match="has a part that no metric has"):
        key.format()


@pytest.mark.parametrize("name", ["", "near_rank_loss/"])
def test_a_name_without_a_layer_is_refused(name):
    with pytest.raises(UsageError, match="metric name"):
        MetricKey.parse(name)


def explains(name: str) -> bool:
    key = MetricKey.parse(name)
    return key.known.is_explanation and not key.is_control


@pytest.mark.parametrize("layer", HOSTILE)
def test_what_explains_a_gap_does_not_depend_on_the_layers_name(layer):
    key = LayerKey(layer).format()
    assert explains(layer_metric("near_rank_loss/rel_1e-2", key))
    assert explains(layer_metric("near_rank_loss/rel_1e-2", f"{key}/pool"))
    assert explains(layer_metric("effective_rank", key))
    for other in ("near_rank_loss/rel_1e-3", "near_rank_loss/abs_1e-2", "near_rank_count/rel_1e-2", "stable_rank"):
        assert not explains(layer_metric(other, key))
    for control in ("centred", "weight"):
        assert not explains(layer_metric("effective_rank", f"{key}/{control}"))
    for probe_set in ("n64", "own_batch"):
        assert not explains(layer_metric("near_rank_loss/rel_1e-2", key, probe_set))


def test_what_explains_a_gap_besides_layers():
    assert {name for name, known in MEASURES.items() if known.is_explanation and not known.per_layer} == {
        "noise_scale", "relative_distance_from_init", "nc1", "hessian/eigenvalue_1", "hessian/trace",
        "keskar_sharpness",
    }  # fmt: skip


def test_nobody_else_takes_a_metric_apart():
    """Text is split at slashes in these files only."""
    allowed = {"config/measures.py", "config/metric_key.py", "tracking/mlflow/names.py"}
    found = set()
    for path in (ROOT / "gengap_dist").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
                splits = node.func.attr in {"split", "rsplit", "partition", "rpartition"}
                if splits and isinstance(node.args[0], ast.Constant) and node.args[0].value == "/":
                    found.add(path.relative_to(ROOT / "gengap_dist").as_posix())
    assert found == allowed
