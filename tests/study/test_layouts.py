"""Which layouts a run may have, and what stays the same in all of them."""

import pytest

from gengap_dist.config.identity import differences
from gengap_dist.study.layouts import keeps_ranks, possible_layouts, with_ranks
from gengap_dist.study.schedule import Layout
from tests.conftest import config


@pytest.fixture(autouse=True)
def no_threads_given(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"launch__num_processes": 2}, False),
        ({"launch__strategy": "ddp", "launch__num_processes": 2}, False),
        ({"launch__strategy": "zero3", "launch__num_processes": 2}, True),
        ({"launch__strategy": "fsdp", "launch__num_processes": 2}, True),
        ({"profile": True}, True),
        ({"batch__micro_size": "auto"}, True),
        ({"batch__micro_size": "auto", "probe__diagnostics": []}, False),
    ],
)
def test_what_keeps_its_ranks(settings, kept):
    assert keeps_ranks(config(**settings)) is kept


def test_layouts_use_at_most_the_machine():
    run = config(launch__num_processes=3)
    for cores in (1, 2, 3, 6, 16):
        layouts = possible_layouts(run, cores, fixed=False)
        assert layouts[0] == (1, 1)
        assert len(set(layouts)) == len(layouts)
        assert all(layout.cores <= cores for layout in layouts)
        assert Layout(1, cores) in layouts
        assert Layout(cores, 1) in layouts
    assert possible_layouts(run, 6, fixed=True) == [(3, 1), (3, 2)]
    assert possible_layouts(run, 2, fixed=True) == [(3, 1)]  # more ranks than cores, as the user wants
    assert possible_layouts(run, 4, fixed=False, threads_beside_gpu=3) == [(1, 3), (2, 3), (4, 3)]
    assert possible_layouts(config(batch__global_size=3), 4, fixed=False, threads_beside_gpu=3) == [(1, 3), (2, 3)]


def test_threads_that_the_user_has_set_stay(monkeypatch):
    assert possible_layouts(config(launch__threads_per_rank=2), 8, fixed=False) == [
        (1, 2),
        (2, 2),
        (4, 2),
    ]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert possible_layouts(config(), 4, fixed=False) == [(1, 1), (2, 1), (4, 1)]


@pytest.mark.parametrize(("size", "micro", "expected"), [(32, 128, 16), (1294, 128, 128), (33, 128, 17), (64, 8, 8)])
def test_another_number_of_ranks_is_the_same_experiment_with_the_same_small_batch(size, micro, expected):
    run = config(launch__num_processes=2, batch__global_size=size, batch__micro_size=micro)
    other = with_ranks(run, 1)
    assert not differences(run.model_dump(mode="json"), other)
    assert other.batch.micro_size == expected
    assert other.launch.num_processes == 1
    assert with_ranks(run, 2) == run
    without = config(launch__num_processes=2, batch__global_size=size, batch__micro_size=micro, probe__diagnostics=[])
    assert with_ranks(without, 1).batch.micro_size == micro
