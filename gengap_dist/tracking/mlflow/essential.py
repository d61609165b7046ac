"""The few metrics that MLflow is sent by default, see `mlflow.metrics`."""

from collections.abc import Iterable

from gengap_dist.config.measures import PRIMARY, PRIMARY_VIEWS
from gengap_dist.config.metric_key import MetricKey

SPLITS = ("val/", "test/", "train_full/", "num_runs/")
METRICS = ("train/loss", "train/lr", "probe/loss", "train_test_gap", "sb_lb_gap", "updates_to_target")
STATISTICS = ("/mean", "/ci_low", "/ci_high", "/num_seeds")  # over seeds, of an arm


def essential(names: Iterable[str]) -> set[str]:
    """Those of the names of one line of metrics that are sent.

    They are losses, metrics, gaps, and of each layer one near-rank loss: of centred activations if it was measured, in
    the view that verdicts are about. An arm has the means of these, with intervals of its results on test samples.

    >>> rank = [f"near_rank_loss/fc1{key}/rel_1e-2" for key in ("", "/centred", "/weight", "/centred/n64")]
    >>> sorted(essential(["val/loss", "val/accuracy", "train/grad_norm", "time/data", "nc1", *rank]))
    ['near_rank_loss/fc1/centred/rel_1e-2', 'val/accuracy', 'val/loss']
    >>> sorted(essential(["val/loss/mean", "val/loss/ci_low", "test/loss/ci_low", "test/loss/num_seeds"]))
    ['test/loss/ci_low', 'val/loss/mean']
    """
    chosen: set[str] = set()
    of_layer: dict[str, tuple[bool, int, str]] = {}
    for name in names:
        statistic = next(filter(name.endswith, STATISTICS), "")
        base = name.removesuffix(statistic)
        has_interval = base.startswith("test/") or base == "sb_lb_gap"
        if statistic == "/num_seeds" or (statistic.startswith("/ci") and not has_interval):
            continue
        key = MetricKey.parse(base)
        if base in METRICS or base.startswith(SPLITS):
            chosen.add(name)
        elif f"{key.measure}/{key.threshold}" == PRIMARY and not key.probe_set and key.view in PRIMARY_VIEWS:
            found = (not key.centred, PRIMARY_VIEWS.index(key.view), name)
            of_layer[key.layer] = min(found, of_layer.get(key.layer, found))
    return chosen | {name for _, _, name in of_layer.values()}
