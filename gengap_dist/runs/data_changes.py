"""Whether two runs had the same data, from what their run.json says of them. Loads no torch."""

from collections.abc import Mapping
from typing import Any

COMPARED = (
    "python",
    "num_files",
    "num_classes",
    "classes",
    "num_train",
    "num_val",
    "num_test",
    "shape",
    "output_shape",
)


def data_changes(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> str:
    """What differs between the data of two runs with the same settings, as a clause; empty: nothing that is known.

    Args:
        before: `data` of the first run.json, see `data.datasets.summary`.
        after: that of the second. A folder of an older version lacks some entries, another program's may lack all.

    >>> old = {"digest": "a", "num_train": 9, "target_digests": {"train": "x", "test": "y"}}
    >>> data_changes(old, old | {"digest": "b", "num_train": 10}), data_changes(old, old | {"digest": "b"})
    ('num_train (10) was 9', 'the inputs have changed')
    >>> data_changes(old, old | {"digest": "b", "target_digests": {"train": "z", "test": "y"}})
    'the train targets have changed'
    """
    old, new = before or {}, after or {}
    if not old.get("digest") or not new.get("digest") or old["digest"] == new["digest"]:
        return ""
    changes = [
        f"{name} ({_shown(new[name])}) was {_shown(old[name])}"
        for name in COMPARED
        if old.get(name) is not None and new.get(name) is not None and old[name] != new[name]
    ]
    if new.get("num_val") and any(text.startswith("num_") for text in changes):
        changes.append("the validation split has moved")
    old_targets, new_targets = old.get("target_digests") or {}, new.get("target_digests") or {}
    if not changes:
        changes = [
            f"the {part} targets have changed"
            for part, digest in new_targets.items()
            if old_targets.get(part, digest) != digest
        ]
    if not changes and old.get("digest_of", new.get("digest_of")) == new.get("digest_of"):
        changes = ["the inputs have changed" if old_targets and new_targets else "inputs or targets have changed"]
    return " and ".join(changes)


def _shown(value: object) -> str:
    return f"{value!r:.60}"
