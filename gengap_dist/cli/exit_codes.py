"""How a command ends: exit codes, and one sentence on stderr."""

import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Never

from gengap_dist.distributed.launchers.base import hard_exit, started_externally
from gengap_dist.distributed.preemption import Preempted
from gengap_dist.errors import OutOfMemory, UsageError

FIRST_RANK_SECONDS = 15.0  # for the first rank of a machine to say what is wrong there, before the others say it


OK, FAILED, USAGE, PREEMPTED, INTERRUPTED = 0, 1, 2, 75, 130  # 75: EX_TEMPFAIL, "start me again"


def run_command(prog: str, command: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> Never:
    """Run a command and exit: 0 done, 1 broken, 2 the user can mend it, 75 resume me, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        code = _outcome(prog, command, argv)
        sys.stdout.flush()
    except BrokenPipeError:  # somebody closed our output: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = OK
    if started_externally():
        hard_exit(code)
    sys.exit(code)


def _outcome(prog: str, command: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    debug = "--debug" in argv
    try:
        return command(argv)
    except OutOfMemory as error:
        if not error.reported_elsewhere:
            _complain(prog, str(error), debug, every_rank=True)
        return USAGE
    except UsageError as error:
        _complain(prog, str(error), debug, patience=FIRST_RANK_SECONDS)
        return USAGE
    except Preempted as error:
        _complain(prog, str(error), debug)
        return PREEMPTED
    except KeyboardInterrupt:
        _complain(prog, "interrupted; add --resume to go on", debug)
        return INTERRUPTED
    except BrokenPipeError:
        raise
    except Exception as error:
        text = str(error) if debug else " ".join(str(error).split()) + "; --debug shows where"
        _complain(prog, f"{type(error).__name__}: {text}", debug, every_rank=True)
        return FAILED


def _complain(prog: str, message: str, debug: bool, *, every_rank: bool = False, patience: float = 0.0) -> None:
    """Say on stderr what ended the command, once on each machine unless every rank has something of its own to say.

    torchrun ends all ranks when one has ended, also one that was about to speak for them. So the others wait for it,
    for `patience` seconds if it may be; a rank that is still there then is the only one that found something wrong.
    """
    rank = os.environ.get("RANK", "0")
    if started_externally() and rank != "0":
        if not every_rank and os.environ.get("LOCAL_RANK", "0") != "0":
            if not patience:
                return  # one rank of each machine speaks for all there: what one lacks, another may have
            time.sleep(patience)
        prog = f"{prog}, rank {rank}"  # nobody else knows what happened here
    if debug:
        traceback.print_exc()
    print(f"{prog}: {message}", file=sys.stderr)
