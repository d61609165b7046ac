"""The process that writes the report of one run, beside the command that trains it.

It imports matplotlib while the run prepares its first step, and draws the figures while the model is exported.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self, final

from gengap_dist.compat.fast_imports import fast_imports
from gengap_dist.compat.safe_path import safe_path_variables
from gengap_dist.distributed.cores import available_cores

DRAW, WRITE = b"d", b"w"


@final
class ReportProcess:
    """A context with a process that can draw the figures of a run and write its page; it has ended at the end."""

    def __init__(self, folder: Path) -> None:
        """`folder`: of the run; it may be empty until `draw`."""
        self.folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Start the process, unless it would only take time from the run: on a single core there is none."""
        if available_cores().number > 1:
            command = [sys.executable, "-m", __name__, str(self.folder)]
            # Ctrl-C ends the command, which then ends this process
            env = os.environ | safe_path_variables()
            self._process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, start_new_session=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self._process:
            self._process.kill()
            self._process.communicate()

    def draw(self) -> None:
        """Begin to draw the figures: the metrics and spectra of the run are complete."""
        if self._process:
            self._tell(self._process, DRAW)

    def write(self) -> Path:
        """Write the page of the run, which has ended, after its figures; returns its path.

        A process that has failed is replaced by this one, which raises the same error.
        """
        if self._process:
            self._tell(self._process, WRITE)
            if self._process.wait() == 0:
                return self.folder / "report.html"
        with fast_imports():
            from gengap_dist.analysis.report.html import write_report
            from gengap_dist.analysis.study_data import read_study

        return write_report(read_study(self.folder))

    @staticmethod
    def _tell(process: "subprocess.Popen[bytes]", word: bytes) -> None:
        assert process.stdin is not None
        try:
            process.stdin.write(word)
            process.stdin.flush()
        except BrokenPipeError:  # it has failed, see `write`
            pass


def main() -> None:
    """The main function of the process: it ends when the page is written, or when standard input closes."""
    os.nice(5)  # training comes first, and the upload to MLflow last
    with fast_imports():
        from gengap_dist.analysis.report.html import draw_figures, write_page
        from gengap_dist.analysis.study_data import read_study

    folder, figures = Path(sys.argv[1]), None
    while word := os.read(sys.stdin.fileno(), 1):
        try:
            figures = draw_figures(read_study(folder)) if figures is None else figures
            if word == WRITE:
                write_page(read_study(folder), figures)
                os._exit(0)
        except Exception:  # the command tries again, and reports it
            break
    os._exit(1)


if __name__ == "__main__":
    main()
