"""How a command ends: exit codes, and one sentence on stderr."""

import io
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Never

from gengap_dist.compat.hard_exit import hard_exit
from gengap_dist.compat.standard_streams import keep_streams, lost_output
from gengap_dist.compat.warnings_as_text import format_warnings
from gengap_dist.credentials import printable, without_logins
from gengap_dist.distributed.launchers.base import started_externally
from gengap_dist.distributed.preemption import Preempted
from gengap_dist.errors import OutOfMemory, UsageError, explaining_full_disk, one_sentence

FIRST_RANK_SECONDS = 15.0  # the first rank of a machine prints an error; the others wait this long for it


OK, FAILED, USAGE, PREEMPTED, INTERRUPTED = 0, 1, 2, 75, 130  # 75: EX_TEMPFAIL, restart with --resume


def run_command(
    prog: str,
    command: Callable[[Sequence[str]], int],
    argv: Sequence[str] | None = None,
    *,
    result_is_printed: bool = True,
) -> Never:
    """Run a command and exit: 0 done, 1 failed, 2 usage error, 75 preempted, 130 interrupted.

    A command whose result is not only in files has failed if stdout could not be written, as on a full disk.
    """
    argv = sys.argv[1:] if argv is None else argv
    _ensure_home(prog)
    if isinstance(sys.stdout, io.TextIOWrapper):  # in many locales not every name can be printed
        sys.stdout.reconfigure(errors="replace")
    keep_streams()
    format_warnings(printable)
    if os.environ.get("RANK", "0") == "0" and any(without_logins(word) != word for word in argv):
        warn(prog, "a password on a command line can be read by all users of this machine: give it by the environment")
    code = _outcome(prog, command, argv)
    if (error := lost_output()) and code == OK and result_is_printed:
        _print_error(prog, f"the output could not be written ({error.strerror})", debug=False)
        code = FAILED
    if started_externally():
        hard_exit(code)
    sys.exit(code)


def _ensure_home(prog: str) -> None:
    """Give a user without a home folder, as in many containers, a temporary one: MLflow and others ask for it."""
    try:
        Path.home()
    except RuntimeError:
        home = Path(tempfile.gettempdir()) / f"home-{os.getuid()}"
        home.mkdir(mode=0o700, exist_ok=True)
        mine = home.lstat().st_uid == os.getuid()
        os.environ["HOME"] = str(home) if mine else tempfile.mkdtemp(prefix="home-")
        warn(prog, f"this user has no home folder: {os.environ['HOME']} is used")


def warn(prog: str, text: str) -> None:
    """Print one sentence on stderr; the command goes on."""
    print(printable(f"{prog}: warning: {text}"), file=sys.stderr, flush=True)


@contextmanager
def continues_with(how: str) -> Iterator[None]:
    """Context in which a signal ends the command with a sentence that says how to continue, such as `--resume`."""
    try:
        yield
    except Preempted as error:
        error.args = (f"{error.what}. Continue with {how}.",)
        raise
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted. Continue with {how}.") from None


def _outcome(prog: str, command: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    debug = "--debug" in argv
    try:
        with explaining_full_disk("repeat the command"):
            return command(argv)
    except OutOfMemory as error:
        if not error.reported_elsewhere:
            _print_error(prog, str(error), debug, every_rank=True)
        return USAGE
    except UsageError as error:
        sentence = str(error) if debug else one_sentence(str(error))
        _print_error(prog, sentence, debug, wait_seconds=0.0 if error.was_told_to_end else FIRST_RANK_SECONDS)
        return USAGE
    except Preempted as error:
        _print_error(prog, str(error), debug)
        return PREEMPTED
    except KeyboardInterrupt as error:
        _print_error(prog, str(error) or "interrupted", debug)
        return INTERRUPTED
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        if isinstance(error, OSError) and error.filename:
            text = f"{error.filename} cannot be used ({error.strerror})"
        text = text if debug else one_sentence(text) + "; --debug shows the traceback"
        _print_error(prog, text, debug, every_rank=True)
        return FAILED


def _print_error(prog: str, message: str, debug: bool, *, every_rank: bool = False, wait_seconds: float = 0.0) -> None:
    """Print the error on stderr, once on each machine, or on every rank if `every_rank`.

    torchrun ends all ranks as soon as one has ended, including the rank that should print the error of its machine. So
    the other ranks wait `wait_seconds` for it. A rank that is still alive after that is the only one with an error.
    """
    rank = os.environ.get("RANK", "0")
    if started_externally() and rank != "0":
        if not every_rank and os.environ.get("LOCAL_RANK", "0") != "0":
            if not wait_seconds:
                return  # one rank prints for its machine; machines may differ in what is missing
            time.sleep(wait_seconds)
        prog = f"{prog}, rank {rank}"  # the error may concern only this rank
    if debug:
        print(printable(traceback.format_exc()), end="", file=sys.stderr)
    print(printable(f"{prog}: {message}"), file=sys.stderr)
