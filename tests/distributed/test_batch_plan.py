from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gengap_dist.distributed.batch_plan import BatchPlan, split

sizes = st.integers(1, 200)


@given(global_size=sizes, world_size=st.integers(1, 9), micro_size=sizes)
def test_every_position_is_dealt_exactly_once(global_size, world_size, micro_size):
    plan = BatchPlan(global_size, world_size, micro_size)
    spans = [span for rank in range(world_size) for span in plan.micro_batches(rank)]
    assert [p for span in spans for p in range(*span)] == list(range(global_size))
    assert all(span.size <= micro_size for span in spans)


@given(global_size=sizes, world_size=st.integers(1, 9), micro_size=sizes)
def test_shares_are_even(global_size, world_size, micro_size):
    plan = BatchPlan(global_size, world_size, micro_size)
    shares = [sum(span.size for span in plan.micro_batches(rank)) for rank in range(world_size)]
    assert max(shares) - min(shares) <= 1
    for rank in range(world_size):
        micro = [span.size for span in plan.micro_batches(rank)]
        assert max(micro) - min(micro) <= 1
        assert micro == [0] or min(micro) > 0


@given(
    ghost=st.integers(2, 20), groups=st.integers(1, 30), extra=st.integers(0, 19), world=st.integers(1, 6),
    micro=st.integers(2, 200),
)  # fmt: skip
def test_no_ghost_group_is_cut(ghost, groups, extra, world, micro):
    total = groups * ghost + extra % ghost
    if micro < ghost:
        with pytest.raises(ValueError, match=f"ghost group of {ghost}"):
            BatchPlan(total, world, micro, ghost).micro_batches(0)
        return
    spans = [s for rank in range(world) for s in BatchPlan(total, world, micro, ghost).micro_batches(rank) if s.size]
    assert [p for span in spans for p in range(*span)] == list(range(total))
    assert all(span.start % ghost == 0 and span.size <= micro for span in spans)
    assert all(span.stop % ghost == 0 or span.stop == total for span in spans)


def test_more_ranks_than_samples_leaves_empty_spans_that_still_take_part():
    plan = BatchPlan(global_size=1, world_size=3, micro_size=8)
    assert [[s.size for s in plan.micro_batches(rank)] for rank in range(3)] == [[0], [0], [1]]


def test_norm_sizes_see_ragged_groups():
    assert BatchPlan(10, 1, 100, ghost_size=4).norm_sizes() == {4, 2}
    assert BatchPlan(7, 2, 2).norm_sizes() == {1, 2}


@pytest.mark.parametrize(("name", "bad"), [("global_size", 0), ("world_size", 0), ("micro_size", -1)])
def test_sizes_must_be_positive(name, bad):
    sizes = {"global_size": 4, "world_size": 1, "micro_size": 4} | {name: bad}
    with pytest.raises(ValueError, match=rf"{name} \({bad}\)"):
        BatchPlan(**sizes).micro_batches(0)


def test_rank_must_be_in_the_world():
    with pytest.raises(ValueError, match=r"rank \(2\)"):
        BatchPlan(4, 2, 4).micro_batches(2)


def test_split_covers_everything():
    assert [span.size for span in split(10, 4)] == [2, 3, 2, 3]


@given(global_size=sizes, world_size=st.integers(1, 9), micro_size=st.integers(4, 99), ghost=st.sampled_from([None, 4]))
def test_in_lockstep_all_ranks_have_as_many_as_any(global_size, world_size, micro_size, ghost):
    plan = BatchPlan(global_size, world_size, micro_size, ghost)
    own = [plan.micro_batches(rank) for rank in range(world_size)]
    padded = [plan.micro_batches(rank, equal_counts=True) for rank in range(world_size)]
    assert {len(spans) for spans in padded} == {max(map(len, own))}
    for spans, more in zip(own, padded, strict=True):
        assert more[: len(spans)] == spans
        assert all(span.size == 0 for span in more[len(spans) :])


@given(total=st.integers(1, 300), world=st.integers(1, 12), micro=st.integers(1, 40), ghost=st.integers(0, 12))
def test_kinds_of_ranks_are_those_of_all_ranks(total, world, micro, ghost):
    plan = BatchPlan(total, world, micro + ghost, ghost or None)
    found: Counter[tuple[int, int, frozenset[int]]] = Counter()
    for spans in map(plan.micro_batches, range(world)):
        found[spans[-1].stop - spans[0].start, len(spans), frozenset(span.size for span in spans)] += 1
    kinds: Counter[tuple[int, int, frozenset[int]]] = Counter()
    for kind in plan.rank_kinds():
        kinds[kind.num_samples, kind.num_micro_batches, frozenset(kind.micro_sizes)] += kind.num_ranks
    assert kinds == found
    spans = [span for rank in range(world) for span in plan.micro_batches(rank)]
    groups = {min(ghost, stop - at) for start, stop in spans for at in range(start, stop, ghost)} if ghost else set()
    assert plan.norm_sizes() == (groups or {span.size for span in spans if span.size})


def test_kinds_of_ranks_take_no_time():
    kinds = BatchPlan(10**15 + 7, 10**9, 4, 2).rank_kinds()
    assert sum(kind.num_ranks for kind in kinds) == 10**9
    assert sum(kind.num_ranks * kind.num_samples for kind in kinds) == 10**15 + 7
