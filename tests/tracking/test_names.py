"""Names in MLflow: accepted, distinct, and read back."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from mlflow.utils.validation import MAX_ENTITY_KEY_LENGTH, _validate_metric_name, _validate_tag_name

from gengap_dist.config.metric_key import MetricKey
from gengap_dist.tracking.mlflow.names import mlflow_name, name_tags, own_name
from tests.config.test_metric_key import HOSTILE, KEYS

NAMES = KEYS.map(MetricKey.format) | st.text(min_size=1)


@given(NAMES)
@example("..")
@example("/".join(["x" * 140] * 3))
def test_a_name_is_accepted(name):
    sent = mlflow_name(name)
    _validate_metric_name(sent)
    assert sent.isascii()
    assert len(sent) <= MAX_ENTITY_KEY_LENGTH
    for tag in name_tags([name]):
        _validate_tag_name(tag)
        assert len(tag) <= MAX_ENTITY_KEY_LENGTH


@given(NAMES, NAMES)
@example("effective_rank/relu#2", "effective_rank/relu:2")
@example("effective_rank/a+b", "effective_rank/a_b")
@example("effective_rank/" + "x" * 300, "effective_rank/" + "x" * 301)
def test_two_names_are_sent_as_two(first, second):
    assert (mlflow_name(first) == mlflow_name(second)) == (first == second)


@given(KEYS)
def test_a_metric_of_a_layer_is_read_back(key):
    name = key.format()
    sent = mlflow_name(name)
    assert own_name(sent, name_tags([name])) == name
    assert len(f"{sent}/num_seeds") <= MAX_ENTITY_KEY_LENGTH
    assert MetricKey.parse(sent)._replace(layer="") == key._replace(layer="")  # what it measures is read without tags


@pytest.mark.parametrize(
    "name",
    ["near_rank_loss/layer1.0.relu/pool/centred/n64/rel_1e-2", "train/loss", "sb_lb_gap/lb256-ema/mean",
     "system/node-1/gpu_0_utilization_percentage", "optim.lr", "effective_rank/fc2.affine/weight/mean"],
)  # fmt: skip
def test_ordinary_names_are_sent_as_they_are(name):
    assert mlflow_name(name) == name
    assert not name_tags([name])


def test_every_second_call_of_a_module_is_sent_without_a_tag():
    assert mlflow_name("effective_rank/layer1.0.relu#2/pool") == "effective_rank/layer1.0.relu:2/pool"
    assert len({mlflow_name(f"effective_rank/{name}") for name in HOSTILE}) == len(HOSTILE)
    assert not name_tags(["effective_rank/layer1.0.relu#2/pool"])
