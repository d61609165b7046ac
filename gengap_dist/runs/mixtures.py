"""Whether runs that are to be compared had the same data and the same network. Loads no torch."""

import json
from collections.abc import Mapping
from typing import Any

from gengap_dist.config.identity import complete_settings, declared_effect
from gengap_dist.config.loading import flat
from gengap_dist.runs.data_changes import data_changes

Infos = Mapping[str, Mapping[str, Any]]
"""What a reader knows a run by, to the content of its run.json."""


def data_key(config: Mapping[str, Any]) -> str:
    """The settings of a run that decide which data it has: equal where the data must be equal."""
    settings = complete_settings(config)
    names = {n: v for n, v in settings.items() if n.startswith("data.") and declared_effect(n) == "result"}
    size, drawn_by = names.pop("data.num_train", None), names.pop("data.subset", None)
    if size is not None:  # without a subset the key is that of runs that knew none
        names |= {"data.num_train": size, "seed": settings.get("seed") if drawn_by == "per_seed" else None}
    return json.dumps(names, sort_keys=True, default=str)


def changed_data(runs: Infos) -> list[str]:
    """One sentence for each run whose data differ from those of the first run with the same data settings."""
    first: dict[str, str] = {}
    out = []
    for label, info in runs.items():
        if not (info.get("data") or {}).get("digest"):
            continue
        other = first.setdefault(data_key(info["config"]), label)
        if changes := data_changes(runs[other].get("data"), info.get("data")):
            out.append(f"the data of {label} are not those of {other}, although the settings are the same: {changes}")
    return out


def different_kinds(runs: Infos) -> list[str]:
    """One sentence if the runs have different data sets, one if they have different networks."""
    datasets, models = set(), set()
    for info in runs.values():
        settings = flat(info["config"])
        datasets.add(str((info.get("data") or {}).get("name") or settings.get("data.name")))
        name = settings.get("model.name", settings.get("model"))
        models.add(f"{name} {settings.get('model.widths')}" if name == "mlp" else str(name))
    out = []
    if len(datasets) > 1:
        out.append(f"the runs are of different data ({', '.join(sorted(datasets))})")
    if len(models) > 1:
        out.append(f"the runs are of different networks ({', '.join(sorted(models))})")
    return out
