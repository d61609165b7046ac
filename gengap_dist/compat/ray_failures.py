"""Which ranks were killed, from the error of a Ray Train run: the class of that failure is internal (Ray 2.60).

Remove when ray.train exports WorkerHealthCheckFailedError.
"""


def killed_ranks(error: BaseException) -> dict[int, str]:
    """Ranks whose process was killed or whose node was lost, in ascending order, with Ray's reason in one line."""
    failures = sorted(getattr(error, "worker_failures", {}).items())
    killed = [(rank, cause) for rank, cause in failures if type(cause).__name__ == "WorkerHealthCheckFailedError"]
    return {rank: " ".join(str(cause).split()) for rank, cause in killed}
