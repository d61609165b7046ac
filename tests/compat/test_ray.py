"""Workarounds for Ray. A test that fails says which file of compat/ may go, or no longer works."""

from gengap_dist.compat.ray_failures import killed_ranks


def test_killed_ranks_are_told_from_ranks_that_raised():
    import ray.train
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    killed = WorkerHealthCheckFailedError("the actor\ndied", failure=RuntimeError("node lost"))
    error = ray.train.WorkerGroupError("2 ranks", {3: killed, 0: ValueError("a rank's own"), 1: killed})
    assert killed_ranks(error) == {1: "the actor died node lost", 3: "the actor died node lost"}
    assert killed_ranks(ValueError("of the driver")) == {}
    assert not hasattr(ray.train, "WorkerHealthCheckFailedError")
