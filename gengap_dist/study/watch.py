"""Who is told of a study's runs while they run."""

from gengap_dist.study.grid import Cell


class Watch:
    """Told of everything; this one keeps it to itself."""

    def step(self, cell: Cell, done: int, total: int, note: str) -> None:
        """`done` of `total` steps of a run, and a few words."""

    def over(self, cell: Cell, note: str) -> None:
        """A run has ended: a status of run.json, "already there", or why it failed."""
