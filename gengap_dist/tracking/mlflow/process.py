"""The process that mirrors the folder of a run or study to MLflow. Folders are the truth: what it missed is sent later.

`python -m gengap_dist.tracking.mlflow.process FOLDER ...` tails the folder and ends when its standard input closes. So
no server can ever hold up a training step, and a training rank never imports mlflow.
"""

import argparse
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from gengap_dist.config.sections import MlflowConfig
from gengap_dist.errors import UsageError
from gengap_dist.runs.run_folder import read_info
from gengap_dist.tracking.mlflow.uploader import Computed, MlflowUploader, Sent, comparison, import_client, store_uri

POLL_SECONDS = 1.0
REST = 20  # times as long as a look at the folder took: a long record is read again at every look
LONGEST_WAIT = 60.0  # between tries to reach a server that refuses
UI = "http://127.0.0.1:5000/"  # where `mlflow ui` shows a store that has no server
LOCK_SECONDS = 5.0  # for a follower that has said its last word to be gone
DONE = b"done"


class UploaderProcess:
    """A mirror that runs beside a command, from `start` to `finish`.

    It is no child of the command for long: `ray job stop` kills a job's whole tree within 3 s, and the mirror still has
    to say that the run was killed. It ends when its standard input closes, however the command ends.
    """

    def __init__(self, folder: Path, config: MlflowConfig, module: str) -> None:
        """Start mirroring `folder` in a process of its own, whose module calls `main`."""
        self.folder, self.config, self.uri = folder, config, store_uri(config.tracking_uri)
        words = [str(folder), self.uri, config.experiment] + ["--model"] * config.log_model
        with (folder / "mlflow.log").open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,  # only for its last word
                stderr=log,
                start_new_session=True,  # Ctrl-C ends the command, and the command ends this
            )

    def comparison(self) -> str:
        """Where the UI compares the arms of a study; empty if nothing is there yet."""
        path = comparison(self.folder)
        server = f"{self.uri.rstrip('/')}/" if self.uri.startswith("http") else UI
        return server + path if path else ""

    def finish(self) -> str | None:
        """Let it send the rest; None if all is there, else one sentence on what to do."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        with self._process.stdout as stdout:
            over, _, _ = select.select([stdout], [], [], self.config.flush_timeout_seconds)
            if not over:
                os.killpg(self._process.pid, signal.SIGKILL)
            last_word = stdout.read()
        self._process.wait()
        if over and last_word == DONE:
            return None
        reason = (self.folder / "mlflow.log").read_text().strip().splitlines()[-1:] or ["it gave no reason"]
        if not over:
            reason = [f"it is slower than mlflow.flush_timeout_seconds ({self.config.flush_timeout_seconds:g})"]
        return (
            f"MLflow at {self.uri} did not take everything ({reason[0][:200]}); nothing is lost: "
            f"send the rest later with `gengap report sync {self.folder}`"
        )


def upload_until_closed(
    folder: Path, uri: str, experiment: str, computed: Computed, *, log_model: bool, pause: Callable[[float], bool]
) -> None:
    """Mirror until `pause(seconds)` says that the command is over, then once more, to the end.

    What that needs is imported while the command is still on its way to its first step.

    Raises:
        Exception: what the last try met, if it failed.
    """
    mirror, wait, over = None, POLL_SECONDS, False
    imports = threading.Thread(target=_import, args=(computed if log_model else None,), daemon=True)
    imports.start()
    while not ((folder / "run.json").exists() or (folder / "study.json").exists()):
        if pause(POLL_SECONDS):
            return  # the command found something wrong before it began
    imports.join()
    while True:
        try:
            mirror = mirror or MlflowUploader(folder, uri, experiment, computed)
            began = time.monotonic()
            mirror.sync(closing=over)
            wait = min(LONGEST_WAIT, max(POLL_SECONDS, REST * (time.monotonic() - began)))
        except Exception as error:
            if over:
                raise
            print(f"{type(error).__name__}: {_line(error)}", flush=True)
            wait = min(LONGEST_WAIT, 2 * wait)
        if over:
            return
        over = _rest(wait, folder, pause)


def _import(computed: Computed | None) -> None:
    import_client()
    if computed:
        computed.prepare_export()


def _rest(seconds: float, folder: Path, pause: Callable[[float], bool]) -> bool:
    """Pause, until the folder's run or study comes to its end; whether the command is over."""
    files = [path for path in (folder / "run.json", folder / "study.json") if path.exists()]
    before, until = [path.stat().st_mtime_ns for path in files], time.monotonic() + seconds
    while not (over := pause(min(POLL_SECONDS, seconds))):
        if time.monotonic() >= until or [path.stat().st_mtime_ns for path in files] != before:
            break
    return over


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _stdin_closes_within(seconds: float) -> bool:
    ready, _, _ = select.select([sys.stdin], [], [], seconds)
    return bool(ready)


def main(computed: Computed) -> None:
    """The whole process."""
    parser = argparse.ArgumentParser(description="Mirror a run or study folder to MLflow until standard input closes.")
    for name in ("folder", "uri", "experiment"):
        parser.add_argument(name)
    parser.add_argument("--model", action="store_true", help="finished runs' networks are logged")
    arguments = parser.parse_args()
    if os.fork():  # the command's child ends here, see Follower
        os._exit(0)
    last_word = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what MLflow prints goes to the log
    fcntl.flock(sys.stderr.fileno(), fcntl.LOCK_EX)  # mlflow.log: the follower of a killed command may still be sending
    os.nice(10)  # training comes first
    try:
        words = (Path(arguments.folder), arguments.uri, arguments.experiment)
        upload_until_closed(*words, computed, log_model=arguments.model, pause=_stdin_closes_within)
        os.write(last_word, DONE)
    except Exception as error:
        print(f"{type(error).__name__}: {_line(error)}", flush=True)
    os._exit(0)  # also in the midst of an import


def sync_now(folder: Path, uri: str | None, computed: Computed, sent: Sent) -> str:
    """Send everything a folder holds that its MLflow store has not seen; the store's address.

    Raises:
        UsageError: if the folder is not a run or study, is being mirrored just now, or the store cannot be reached.
    """
    info = read_info(folder / "study.json" if (folder / "study.json").exists() else folder)
    config = MlflowConfig.model_validate(info["config"]["mlflow"])
    kept = folder / "mlflow.json"
    known = json.loads(kept.read_text())["uri"] if kept.exists() else None
    target: str = uri or os.environ.get("MLFLOW_TRACKING_URI") or known or store_uri(config.tracking_uri)
    with (folder / "mlflow.log").open("a") as log:  # as the followers of commands do
        if not _locked(log, time.monotonic() + LOCK_SECONDS):
            raise UsageError(f"{folder} is being sent to MLflow just now: wait for the end of what sends it")
        return _send_all(folder, target, config.experiment, computed, sent)


def _locked(file: IO[str], until: float) -> bool:
    """Take the lock on a file; whether that came about in time."""
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > until:
                return False
            time.sleep(0.1)


def _send_all(folder: Path, target: str, experiment: str, computed: Computed, sent: Sent) -> str:
    try:
        MlflowUploader(folder, target, experiment, computed).sync(closing=True, sent=sent)
    except Exception as error:
        raise UsageError(
            f"MLflow at {target} cannot be reached ({_line(error)[:300]}): check the address, or start the server"
        ) from None
    return target
