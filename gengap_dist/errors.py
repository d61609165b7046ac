"""Errors that end a command with one sentence for the user: name, value, rule and remedy."""

import difflib
import errno
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

MAX_SENTENCE = 300
CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f"  # all but tabs and ends of lines
    r"\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\U000e0000-\U000e007f"  # they reorder or hide what follows
    r"\ud800-\udfff\ufeff\ufff9-\ufffb\ufffe\uffff]"  # no characters, in files of UTF-8 or XML
)
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # EFBIG: the limit of a file


class UsageError(ValueError):
    """An input of the user is invalid: one sentence with name, value, rule and remedy. Commands exit with code 2."""

    was_told_to_end = False
    """Whether a signal told the process to end while it cleaned up: torchrun sends it to the peers of a failed rank."""


class OutOfMemory(UsageError):
    """A rank's GPU has too little memory for the run."""

    def __init__(self, message: str, *, reported_elsewhere: bool = False) -> None:
        """`reported_elsewhere`: whether another rank reports it."""
        super().__init__(message)
        self.reported_elsewhere = reported_elsewhere


@contextmanager
def explaining_full_disk(remedy: str, file: str = "a file") -> Iterator[None]:
    """Context in which a full disk raises a UsageError, which names the file that could not be written.

    Args:
        remedy: what to do when there is space.
        file: what it was, if the error does not name it.

    >>> with explaining_full_disk("try again"):
    ...     raise OSError(errno.ENOSPC, "No space left", "run.json")
    Traceback (most recent call last):
    gengap_dist.errors.UsageError: run.json could not be written (No space left): free disk space, then try again
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise UsageError(
            f"{error.filename or file} could not be written ({error.strerror}): free disk space, then {remedy}"
        ) from error


def did_you_mean(given: str, known: list[str] | tuple[str, ...]) -> str:
    """A hint with the most similar known word; empty if there is none.

    >>> did_you_mean("batch.globl_size", ["batch.global_size", "optim.lr"])
    ' (did you mean batch.global_size?)'
    """
    near = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
    return f" (did you mean {near[0]}?)" if near else ""


def first_of(names: Sequence[str], num: int = 5) -> str:
    """The first names of a list, for a sentence.

    >>> first_of(["a", "b", "c"], 2), first_of(["a", "b"], 2)
    ('a, b, ...', 'a, b')
    """
    return ", ".join(names[:num]) + ", ..." * (len(names) > num)


def visible(text: str) -> str:
    r"""A text of names from anywhere, with control characters as Python writes them: they act on terminals and readers.

    >>> visible("\x1b[31mred\n"), visible("a\u202eb"), visible("größe\t1")
    ('\\x1b[31mred\n', 'a\\u202eb', 'größe\t1')
    """
    return CONTROL.sub(lambda char: char[0].encode("unicode_escape").decode(), text)


def shortened(text: str, limit: int) -> str:
    """The text with at most `limit` characters: a longer one loses its middle.

    >>> shortened("abcdefghijklmnop", 11), shortened("abc", 11)
    ('abc ... nop', 'abc')
    """
    end = (limit - 5) // 2
    return text if len(text) <= limit else f"{text[: limit - 5 - end]} ... {text[-end:]}"


def one_sentence(text: str) -> str:
    r"""A message on one line, of at most MAX_SENTENCE characters: its longest words, as paths, are shortened if needed.

    >>> one_sentence("seed (\x1b[2J)\nis  odd")
    'seed (\\x1b[2J) is odd'
    >>> one_sentence(f"the data of /{'a' * 400} are not those of /{'b' * 400}").count("aaaa ... aaaa")
    1
    """
    words = visible(text).split()
    for limit in (120, 80, 60, 40):
        if len(" ".join(words)) > MAX_SENTENCE:
            words = [shortened(word, limit) for word in words]
    return shortened(" ".join(words), MAX_SENTENCE)
