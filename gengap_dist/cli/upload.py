"""The process that uploads a folder to MLflow while a command runs: `python -m gengap_dist.cli.upload FOLDER ...`.

It is started by `tracking.mlflow.process`, not by users; `gengap report sync` uploads a complete folder.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gengap_dist.runs.run_folder import SeedRun
from gengap_dist.tracking.mlflow.uploader import Computed


def _over_seeds(arm: Sequence[SeedRun], baseline: Sequence[SeedRun]) -> list[dict[str, Any]]:
    from gengap_dist.analysis.seed_aggregates import over_seeds  # scipy is slow to import

    return over_seeds(arm, baseline)


def _export_model(folder: Path, info: dict[str, Any], to: Path, **about: Any) -> None:
    from gengap_dist.training.export import export  # imports torch

    export(folder, info, to, **about)


def _prepare_export() -> None:
    from gengap_dist.compat.fast_imports import fast_imports

    with fast_imports():
        from gengap_dist.training import export
    export.prepare()


COMPUTED = Computed(_over_seeds, _export_model, _prepare_export)
"""Functions that the uploader needs from packages that it must not import."""

if __name__ == "__main__":
    from gengap_dist.tracking.mlflow.process import main

    main(COMPUTED)
