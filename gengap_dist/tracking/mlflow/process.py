"""The process that uploads the folder of a run or study to MLflow. The folder has all data: the rest can be sent later.

The process reads the folder repeatedly and ends when its standard input closes. So a slow server cannot delay a
training step, and a training rank never imports mlflow.
"""

import argparse
import contextlib
import fcntl
import os
import select
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from pydantic import ValidationError

from gengap_dist.compat.fast_imports import fast_imports
from gengap_dist.compat.safe_path import safe_path_variables
from gengap_dist.config.sections import MlflowConfig
from gengap_dist.credentials import without_logins
from gengap_dist.errors import UsageError
from gengap_dist.runs.run_folder import read_info, read_study_info
from gengap_dist.runs.schema import REMEDY, first_error
from gengap_dist.runs.upload_state import read_upload_state
from gengap_dist.tracking.mlflow.client import (
    describe,
    import_client,
    store_key,
    store_uri,
    store_variables,
    usable_store_uri,
)
from gengap_dist.tracking.mlflow.mlflow_run import Metrics, UploadProgress
from gengap_dist.tracking.mlflow.uploader import MlflowUploader

POLL_SECONDS = 1.0
START_POLL_SECONDS = 0.1  # until the run has begun: to connect to the store takes as long as a short run
REST_FACTOR = 20  # pause in multiples of the last upload's time, which is that of new lines and of every run.json
MAX_WAIT_SECONDS = 60.0  # between attempts to reach a server that fails
LOCK_TIMEOUT_SECONDS = 5.0  # for an uploader process that has reported its end to exit
DONE = b"done"
REASON_CHARACTERS = 300  # of an error


class UploaderProcess:
    """An uploader that runs in a process of its own beside a command, until `finish`.

    The process detaches from the command: `ray job stop` kills a job's whole process tree within 3 s, and the uploader
    still has to send the status of the killed run. It ends when its standard input closes, however the command ends.
    """

    def __init__(self, folder: Path, config: MlflowConfig) -> None:
        """Start to upload `folder`."""
        self.folder, self.config = folder, config
        uri = store_uri(config.tracking_uri)
        self.uri = without_logins(uri)
        with (folder / "mlflow.log").open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(folder), config.experiment, config.metrics],
                env=os.environ | safe_path_variables() | store_variables(uri),  # everybody can read a command line
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,  # only for DONE, or why it did not send everything
                stderr=log,
                start_new_session=True,  # Ctrl-C ends the command, which then ends this process
            )

    def finish(self) -> str | None:
        """Wait for the upload of the rest; None if all was sent, else one sentence with the reason and the remedy."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        with self._process.stdout as stdout:
            ended, _, _ = select.select([stdout], [], [], self.config.flush_timeout_seconds)
            if not ended:
                os.killpg(self._process.pid, signal.SIGKILL)
            output = stdout.read()
        self._process.wait()
        if ended and output == DONE:
            return None
        reason = output.decode(errors="replace") or f"its process was killed: see {self.folder / 'mlflow.log'}"
        if not ended:
            reason = f"it is slower than mlflow.flush_timeout_seconds ({self.config.flush_timeout_seconds:g})"
        command = ["gengap", "report", "sync", str(self.folder)]
        if store_key(self.uri) != store_key(store_uri(None)):
            command += ["--mlflow.tracking_uri", self.uri]
        return (
            f"MLflow at {self.uri} did not receive everything ({reason}); nothing is lost: "
            f"send the rest later with `{shlex.join(command)}`"
        )


def upload_until_closed(
    folder: Path, uri: str, experiment: str, pause: Callable[[float], bool], metrics: Metrics = "all"
) -> None:
    """Upload until `pause(seconds)` returns True (the command has ended), then once more to the end.

    MLflow is imported while the command prepares its first step.

    Raises:
        Exception: if the last attempt failed.
    """
    uploader, wait, over, problem = None, POLL_SECONDS, False, ""
    imports = threading.Thread(target=_import_all, daemon=True)
    imports.start()
    while not over and not _markers(folder):
        over = pause(START_POLL_SECONDS)
    if not _markers(folder):  # the command ended before the run began
        return
    imports.join()
    while True:
        try:
            uploader = uploader or MlflowUploader(folder, uri, experiment, metrics)
            start = time.monotonic()
            uploader.sync(closing=over)
            wait = min(MAX_WAIT_SECONDS, max(POLL_SECONDS, REST_FACTOR * (time.monotonic() - start)))
        except Exception as error:
            if over:
                raise
            if _describe(error) != problem:
                problem = _describe(error)
                print(problem, flush=True)
            wait = min(MAX_WAIT_SECONDS, 2 * wait)
        if over:
            return
        over = _wait_for_changes(wait, folder, pause)


def _import_all() -> None:
    """Import what is needed at the end, too, where the command would wait for it: see `model_files.py`."""
    import_client()
    with fast_imports():
        import mlflow.pyfunc  # noqa: F401  # pyright: ignore[reportUnusedImport]


def _markers(folder: Path) -> list[Path]:
    """run.json or study.json, if the run or study has begun."""
    return [path for path in (folder / "run.json", folder / "study.json") if path.exists()]


def _wait_for_changes(seconds: float, folder: Path, pause: Callable[[float], bool]) -> bool:
    """Pause, at most until run.json or study.json changes; whether the command has ended."""
    files = _markers(folder)
    before, deadline = [path.stat().st_mtime_ns for path in files], time.monotonic() + seconds
    while not (over := pause(min(POLL_SECONDS, seconds))):
        if time.monotonic() >= deadline or [path.stat().st_mtime_ns for path in files] != before:
            break
    return over


def _describe(error: Exception) -> str:
    """An error on one line."""
    return describe(error) if isinstance(error, UsageError) else f"{type(error).__name__}: {describe(error)}"


def _reason(error: Exception) -> str:
    """An error as a part of a sentence; one of a single word, such as a key, does not say what is wrong."""
    text = describe(error)
    return (text if " " in text else _describe(error))[:REASON_CHARACTERS]


def _stdin_closes_within(seconds: float) -> bool:
    ready, _, _ = select.select([sys.stdin], [], [], seconds)
    return bool(ready)


def main() -> None:
    """The main function of the process."""
    parser = argparse.ArgumentParser(description="Upload a run or study folder to MLflow until standard input closes.")
    for name in ("folder", "experiment", "metrics"):
        parser.add_argument(name)
    arguments = parser.parse_args()
    if os.fork():  # the command's child ends here, see UploaderProcess
        os._exit(0)
    report = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what MLflow prints goes to the log
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(sys.stderr.fileno(), fcntl.LOCK_EX)  # mlflow.log: the uploader of a killed command may still send
    os.nice(10)  # training comes first
    try:
        folder, uri = Path(arguments.folder), store_uri(None)
        upload_until_closed(folder, uri, arguments.experiment, _stdin_closes_within, arguments.metrics)
        os.write(report, DONE)
    except Exception as error:
        print(_describe(error), flush=True)
        os.write(report, _reason(error).encode())
    os._exit(0)  # also during an import


def sync_now(folder: Path, uri: str | None, progress: UploadProgress, metrics: Metrics | None = None) -> str:
    """Send what its MLflow store does not have yet of a folder; returns the store's address.

    Args:
        folder: of a run or study.
        uri: the store; None: see `store_uri`.
        progress: called while it sends.
        metrics: what to send; None: as configured in the folder.

    Raises:
        UsageError: if the folder is not a run or study, is being uploaded, the store does not receive everything, or
            only the folder names the store.
    """
    info = read_study_info(folder) if (folder / "study.json").exists() else read_info(folder)
    if "mlflow" not in info.config:
        raise UsageError(f"{folder} was not written by a run or study of this package: give the folder of one")
    try:
        config = MlflowConfig.model_validate(info.config["mlflow"])
    except ValidationError as error:
        path = folder / info.file_name
        raise UsageError(f"{path} is damaged: in config.mlflow, {first_error(error)}; {REMEDY}") from None
    known = read_upload_state(folder).get("uri")
    named = uri or os.environ.get("MLFLOW_TRACKING_URI")
    target = usable_store_uri(uri if named else known or config.tracking_uri)
    address = without_logins(target)
    if not named and store_key(target) != store_key(store_uri(None)):
        raise UsageError(
            f"{folder} names the MLflow store {address}, and nothing is sent where only a folder says so: if it is "
            f"yours, add --mlflow.tracking_uri {shlex.quote(address)}"
        )
    with (folder / "mlflow.log").open("a", encoding="utf-8") as log:  # the same lock as that of an uploader process
        if not _acquire_lock(log, time.monotonic() + LOCK_TIMEOUT_SECONDS):
            raise UsageError(f"{folder} is being sent to MLflow by another process: wait until it has ended")
        try:
            uploader = MlflowUploader(folder, target, config.experiment, metrics or config.metrics)
        except Exception as error:
            raise UsageError(
                f"MLflow at {address} cannot be reached ({_reason(error)}): check the address, or start the server"
            ) from None
        try:
            uploader.sync(closing=True, progress=progress)
        except Exception as error:
            raise UsageError(
                f"MLflow at {address} did not receive everything ({_reason(error)}): fix this, and repeat the command"
            ) from None
    return address


def _acquire_lock(file: IO[str], deadline: float) -> bool:
    """Acquire the lock on a file; whether that succeeded before `deadline`."""
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        except OSError:  # a file system without locks
            return True


if __name__ == "__main__":
    main()
