"""train.channels_last=auto: an answer that all ranks share, and that changes nothing but the time."""

import json

import pytest

from gengap_dist.runs.run_folder import read_info
from gengap_dist.training.autotune.cache import micro_sizes_path
from tests.conftest import cut_after, thinned, train
from tests.training.autotune.test_micro_batch import go, timeless

AUTO = {"train__channels_last": "auto", "batch__global_size": 96, "train__steps": 4, "probe__num_samples": 64}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield micro_sizes_path()


@pytest.mark.parametrize("size", thinned([1, 2], lambda size: size == 2))
def test_it_is_the_run_with_the_order_it_found(pools, tmp_path, size):
    first = go(pools[size], tmp_path / "auto", **AUTO)
    found, order = first.channels_last_auto, first.channels_last
    assert found["by"] == "measurement"
    assert first.config["train"]["channels_last"] == "auto"
    contiguous, last = found["samples_per_second"]
    assert order == (last > 1.03 * contiguous)
    go(pools[size], tmp_path / "plain", **AUTO | {"train__channels_last": order})
    assert timeless(tmp_path / "auto") == timeless(tmp_path / "plain")
    again = go(pools[size], tmp_path / "again", **AUTO)
    assert again.channels_last_auto == found | {"by": "an earlier measurement"}


def test_a_resumed_run_goes_on_in_its_own_order(cache, tmp_path):
    """Also where the cache has come to another answer meanwhile."""
    settings = AUTO | {"checkpoint__every_steps": 2}
    train(tmp_path, **settings)
    order, before = read_info(tmp_path).channels_last, timeless(tmp_path)
    cut_after(tmp_path, 2)
    known = json.loads(cache.read_text())
    for entry in known["memory_formats"].values():
        entry["channels_last"] = not order
    cache.write_text(json.dumps(known))
    train(tmp_path, resume=True, **settings)
    assert read_info(tmp_path).channels_last == order
    assert read_info(tmp_path).channels_last_auto["by"] == "this run's record"
    assert timeless(tmp_path) == before


def test_nothing_is_measured_without_convolutions(tmp_path):
    train(tmp_path, **AUTO | {"model__name": "mlp", "model__widths": (8,)})
    assert read_info(tmp_path).channels_last_auto == {"by": "there is no choice", "channels_last": False}
