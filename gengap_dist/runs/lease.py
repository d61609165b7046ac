"""One writer per folder: the process that executes the run or study in a folder holds its lease.

The lease is a file `.lease.N` in the folder. It is made exclusively, so that one of several processes succeeds, on
every file system: nothing is locked. Its first line names the owner, the second is a counter that the owner raises. N
is the fencing number: who takes over a lease that was left makes `.lease.N+1` and then removes the older one, so an
owner that was only suspended finds that its own is gone.
"""

import json
import os
import random
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from gengap_dist.config.regular_file import read_regular
from gengap_dist.errors import FULL_DISK, UsageError
from gengap_dist.runs.schema import OF_STUDY

PREFIX = ".lease."
COUNT_SECONDS = 1.0  # between two counts of an owner
STALE_SECONDS = 10.0  # without a count, by the clock of who waits: the owner has ended
POLL_SECONDS = 0.1

Say = Callable[[str], None]
"""Called with a sentence for the user."""


class Owner(NamedTuple):
    """The process that holds a lease."""

    host: str = ""
    machine: str = ""
    """This boot of its machine and its namespace of process numbers; "" where that is not known."""
    pid: int = 0
    started: str = ""
    """When it started, in ticks since the boot: a later process with the same number has another."""
    token: str = ""
    """Random."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" if self.pid else "another process"

    @property
    def is_this_process(self) -> bool:
        """Whether it is the process that asks."""
        return self[1:4] == (_machine(), os.getpid(), _started(os.getpid())) and (
            bool(self.machine) or self.host == socket.gethostname()
        )

    @property
    def has_ended(self) -> bool | None:
        """Whether it has; None: it is on another machine, or hidden from this user, and only its counter can tell."""
        if not self.machine or self.machine != _machine():
            return None
        started = _started(self.pid)
        return None if not started and _is_hidden(self.pid) else started != self.started


class NotWritable(UsageError):
    """The lease of a folder cannot be written."""

    def __init__(self, out: Path, error: OSError) -> None:
        """Of the folder `out`, because of `error`."""
        super().__init__(f"--out ({out}) cannot be written ({error.strerror}): choose another folder")
        self.disk_is_full = error.errno in FULL_DISK


def this_process() -> Owner:
    """This process, with a new token."""
    return Owner(socket.gethostname(), _machine(), os.getpid(), _started(os.getpid()), uuid.uuid4().hex)


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """`Owner.started` of a process; "" if there is none with this number, or it is a zombie."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else fields[18]


def _is_hidden(pid: int) -> bool:
    """Whether there is a process of another user that /proc does not show, as with its option hidepid."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return not Path(f"/proc/{pid}").exists()
    except OSError:
        pass
    return False


@contextmanager
def holding(out: Path, say: Say) -> Iterator[None]:
    """Context in which this process holds the lease of a folder, which is made if it is missing.

    If it loses the lease, because it was suspended for so long that another process took over, it gets SIGTERM, and
    who writes for it finds out by a `guard`. At the end, a folder with nothing in it is removed.

    Args:
        out: the folder of a run or study.
        say: called when this process waits for a lease, or takes one over.

    Raises:
        UsageError: if another process holds it, or the lease of the study to which the run belongs, or that of a run
            of this study; or if the folder cannot be written.
    """
    owner, stop = this_process(), threading.Event()
    _wait_for_relatives(out)  # before anything is made in the folder
    try:
        path = _take(out, owner, say)
    except OSError as error:
        raise NotWritable(out, error) from None
    thread = threading.Thread(target=_count, args=(path, owner, stop), name="lease", daemon=True)
    thread.start()
    try:
        for relative in _wait_for_relatives(out):
            if out in relative.parents:  # that of a run: from now on the study's counts
                relative.unlink(missing_ok=True)
        yield
    finally:
        stop.set()
        thread.join(COUNT_SECONDS)  # it may wait for a server that is away
        if _is_of(path, owner.token):
            path.unlink(missing_ok=True)
        with suppress(OSError):
            out.rmdir()


def guard(out: Path) -> Callable[[], None]:
    """A function to call before each write for the process that holds the lease of `out` now, or that of its study.

    It raises a UsageError once another process has taken over. Where nobody holds a lease, it does nothing.
    """
    path = _latest(out)
    if path is None:
        return lambda: None
    token = _read(path).token

    def check() -> None:
        if not _is_of(path, token):
            now = _latest(out)
            reason = f"{_read(now)} writes there now" if now else "its lease is gone"
            raise UsageError(f"{out} does not belong to this run any more ({reason}): this run stops")

    return check


def is_of_another(out: Path) -> bool:
    """Whether another process than this one holds the lease of `out`, or that of its study."""
    path = _latest(out)
    owner = _read(path) if path else Owner()
    return bool(owner.token) and not owner.is_this_process


def other_writer(out: Path) -> Owner | None:
    """Another process that holds the lease of `out`, or that of its study, and has not ended, as far as is known here.

    Nothing is written, and nobody waited for: None says that `holding` need not wait, either.
    """
    paths = [_path(folder, number) for folder in (out, *_study_of(out)) for number in _numbers(folder)]
    owners = (_read(path) for path in paths)
    return next((owner for owner in owners if not (owner.is_this_process or owner.has_ended)), None)


def _take(out: Path, owner: Owner, say: Say) -> Path:
    while True:
        out.mkdir(parents=True, exist_ok=True)  # another process may just have removed it, empty
        older = _numbers(out)
        if older:
            _wait_until_left(_path(out, older[-1]), say)
        number = max(older, default=0) + 1
        path = _path(out, number)
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(f"{json.dumps(owner)}\n0\n")
        except (FileExistsError, FileNotFoundError):
            continue  # another process was faster
        except OSError:
            path.unlink(missing_ok=True)
            raise
        if {*_numbers(out)} - {number, *older}:  # another one, made meanwhile: nobody saw both
            path.unlink(missing_ok=True)
            time.sleep(random.random() * POLL_SECONDS)
            continue
        for before in older:
            _path(out, before).unlink(missing_ok=True)
        return path


def _wait_until_left(path: Path, say: Say) -> None:
    """Return when the owner of a lease has ended, or has not counted for STALE_SECONDS.

    Raises:
        UsageError: if it is alive.
    """
    owner, out = _read(path), path.parent
    if path.exists() and not os.access(path, os.R_OK):
        raise UsageError(f"--out ({out}) may be in use, and {path} cannot be read: choose another folder")
    ended = owner.has_ended
    if ended is None:
        say(f"{owner} may still write to {out}: waiting up to {STALE_SECONDS:g} s for a sign of it")
        first, deadline = _content(path), time.monotonic() + STALE_SECONDS
        while not (ended := time.monotonic() > deadline):
            time.sleep(POLL_SECONDS)
            before = time.monotonic()
            if (now := _content(path)) is None:
                return
            if now != first:
                break
            if time.monotonic() - before > COUNT_SECONDS:  # the file server was away, also for the owner
                deadline = time.monotonic() + STALE_SECONDS
    if not ended:
        raise UsageError(
            f"--out ({out}) is being written by {_read(path)}: wait until it has ended, or choose another folder"
        )
    say(f"{owner}, which was writing to {out}, ended without a word: this process takes over")


def _count(path: Path, owner: Owner, stop: threading.Event) -> None:
    """Raise the counter until the end; the main function of a thread."""
    first_line, count = f"{json.dumps(owner)}\n".encode(), 0
    while not stop.wait(COUNT_SECONDS):
        count += 1
        try:
            with path.open("r+b", buffering=0) as file:  # never made anew
                if file.read(len(first_line)) == first_line:
                    file.write(f"{count}\n".encode())
                    continue
        except FileNotFoundError:
            pass
        except OSError:  # a disk that is full, or a server that is away
            continue
        if is_of_another(path.parent):
            os.kill(os.getpid(), signal.SIGTERM)
        return


def _content(path: Path) -> bytes | None:
    """The content of a lease, b"" if it cannot be read at the moment; None if it is gone."""
    try:
        return read_regular(path)
    except FileNotFoundError:
        return None
    except OSError:
        return b""


def _is_of(path: Path, token: str) -> bool:
    """Whether a lease is there and has this token, or cannot be read at the moment."""
    try:
        return token.encode() in read_regular(path)
    except FileNotFoundError:
        return False
    except OSError:
        return True


def _read(path: Path) -> Owner:
    """The owner of a lease; an unknown one if the lease is gone, or being made."""
    try:
        return Owner(*json.loads((_content(path) or b"").partition(b"\n")[0]))
    except ValueError:
        return Owner()


def _path(out: Path, number: int) -> Path:
    return out / f"{PREFIX}{number}"


def _numbers(out: Path) -> list[int]:
    """The numbers of the leases in a folder, in order."""
    ends = (path.name.removeprefix(PREFIX) for path in out.glob(f"{PREFIX}*"))
    return sorted(int(end) for end in ends if end.isdecimal())


def _latest(out: Path) -> Path | None:
    """The lease under which a folder is written: its own, or that of the study to which the run belongs."""
    folders = [out, *_study_of(out)]
    return next((_path(folder, numbers[-1]) for folder in folders if (numbers := _numbers(folder))), None)


def _study_of(out: Path) -> list[Path]:
    """The folder of the study to which a run in STUDY/{runs,tune,match}/ARM/NAME belongs, if it belongs to one."""
    return [folder for folder in out.parents[2:3] if (folder / "study.json").exists()]


def _wait_for_relatives(out: Path) -> list[Path]:
    """Return the leases of `_relatives` when their owners have ended; raises what `_wait_until_left` does."""
    found = _relatives(out)
    for path in found:
        _wait_until_left(path, say=lambda text: None)
    return found


def _relatives(out: Path) -> list[Path]:
    """The lease of the study to which a run belongs, or those of single runs of a study."""
    of_study = [_path(study, number) for study in _study_of(out) for number in _numbers(study)]
    return of_study + [path for part in OF_STUDY for path in out.glob(f"{part}/*/*/{PREFIX}*")]
