"""Schedules against all possible ones."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gengap_dist.study.schedule import Layout, Option, Resources, best_schedule, length, placed


def option(cores: int, seconds: float, memory: int = 0) -> Option:
    return Option(Layout(cores, 1), cores, seconds, memory)


def shortest(runs, cores: int) -> float:
    """The length of the best list schedule over all orders and all options: a brute-force twin for a few runs."""

    def in_order(chosen) -> float:
        free = [0.0] * cores
        end = 0.0
        for each in chosen:
            free.sort()
            start = free[each.cores - 1]
            for core in range(each.cores):
                free[core] = start + each.seconds
            end = max(end, start + each.seconds)
        return end

    return min(
        in_order([chosen[number] for number in order])
        for chosen in itertools.product(*runs)
        for order in itertools.permutations(range(len(runs)))
    )


@st.composite
def studies(draw):
    """Up to 5 runs on up to 3 cores; more cores make a run faster, but not by more than their number."""
    cores = draw(st.integers(1, 3))
    runs = []
    for _ in range(draw(st.integers(1, 5))):
        seconds = float(draw(st.integers(1, 20)))
        runs.append([option(1, seconds)])
        for more in range(2, cores + 1):
            runs[-1].append(option(more, seconds / draw(st.floats(1, more))))
    return runs, cores


@given(studies())
def test_close_to_the_best_of_all_schedules(case):
    """List schedules are at most twice as long as the best one (Graham 1969); ours are nearly always the best."""
    runs, cores = case
    schedule = best_schedule(runs, Resources(cores))
    assert sorted(run.number for run in schedule) == [*range(len(runs))]
    assert length(schedule) <= 1.5 * shortest(runs, cores) + 1e-9


@given(studies(), st.integers(1, 3), st.integers(0, 3))
def test_never_more_than_there_is(case, slots, per_run):
    runs, cores = case
    runs = [[each._replace(memory=per_run * each.cores) for each in options] for options in runs]
    resources = Resources(cores, memory=4, slots=slots)
    schedule = best_schedule(runs, resources)
    for moment in [run.start for run in schedule]:
        active = [run.option for run in schedule if run.start <= moment < run.end]
        assert len(active) <= slots
        assert len(active) == 1 or sum(each.memory for each in active) <= 4
        assert sum(each.cores for each in active) <= cores


def test_long_runs_first_and_the_last_ones_spread():
    short, long = [option(1, 4.0), option(2, 2.5)], [option(1, 10.0), option(2, 6.0)]
    schedule = best_schedule([short, short, long], Resources(2))
    assert next(run.number for run in schedule if run.start == 0.0) == 2
    assert length(schedule) == 10.0
    alone = best_schedule([long], Resources(2))
    assert [run.option.cores for run in alone] == [2]


def test_what_runs_already_is_waited_for():
    running = [(5.0, option(1, 9.0))]
    (run,) = placed([option(2, 3.0)], Resources(2), running)
    assert (run.start, run.end) == (5.0, 8.0)
    assert length([], running) == 5.0


def test_a_run_that_is_too_large_runs_alone():
    schedule = placed([option(1, 2.0, memory=100), option(1, 1.0, memory=1)], Resources(2, memory=10))
    assert [(run.number, run.start) for run in schedule] in ([(0, 0.0), (1, 2.0)], [(1, 0.0), (0, 1.0)])


def test_runs_of_unknown_cost_start_one_after_another():
    schedule = placed([option(1, 0.0)] * 3, Resources(10**9, slots=1))
    assert [run.start > 0 for run in schedule] == [False, True, True]


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_a_number_of_runs_at_once_is_kept(slots):
    schedule = placed([option(1, 1.0)] * 6, Resources(10**9, slots=slots))
    assert length(schedule) == pytest.approx(6 / slots)
