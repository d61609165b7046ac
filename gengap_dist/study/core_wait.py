"""Warns once, if the runs of a study wait for cores that other programs use."""

from collections.abc import Callable
from typing import final

from gengap_dist.study.run_matrix import PassOn, PlannedRun, StudyCallback


@final
class CoreWaitWarning(PassOn):
    """Passes every call on, and warns of the first run that waits."""

    def __init__(self, inner: StudyCallback, warn: Callable[[str], None]) -> None:
        """`warn` is called at most once, with a sentence."""
        super().__init__(inner)
        self._warn, self._has_warned = warn, False

    def on_core_wait(self, planned_run: PlannedRun, sentence: str) -> None:
        """Warn, unless a run before has waited."""
        self.inner.on_core_wait(planned_run, sentence)
        if not self._has_warned:
            self._has_warned = True
            self._warn(f"{planned_run.title}: {sentence}")
