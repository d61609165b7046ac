"""Ends a study whose data change between its runs: pairs of them would not be pairs."""

from pathlib import Path
from typing import Any

from gengap_dist.errors import UsageError
from gengap_dist.runs.mixtures import changed_data, data_key
from gengap_dist.runs.run_folder import describe_damage, read_info
from gengap_dist.study.run_matrix import PassOn, PlannedRun, StudyCallback


class DataCheck(PassOn):
    """Passes every call on, and compares the data of each run that has ended with those of the first."""

    def __init__(self, inner: StudyCallback) -> None:
        """Checks before the calls of `inner` return."""
        super().__init__(inner)
        self._first: dict[str, tuple[Path, dict[str, Any]]] = {}  # by data settings

    def on_run_end(self, planned_run: PlannedRun, note: str) -> None:
        """Compare the data of the run.

        Raises:
            UsageError: if they are not those of the first run with the same data settings.
        """
        self.inner.on_run_end(planned_run, note)
        folder = planned_run.folder
        if not (folder / "run.json").exists() or describe_damage(folder):
            return
        info = read_info(folder).content()
        first = self._first.setdefault(data_key(info["config"]), (folder, info))
        if changed := changed_data({str(path): content for path, content in (first, (folder, info))}):
            raise UsageError(
                f"{changed[0]}; restore the data, remove the folder of the run that is wrong, and start the study again"
            )
