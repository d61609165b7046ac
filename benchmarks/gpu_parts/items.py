"""The contract between `gpu.py` and its parts: items, one after another, each with an answer for the JSON."""

import gc
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from gengap_dist.distributed.process_group import World

Answer = dict[str, Any]
"""What an item found, as JSON values. `good` says whether it is as it should be, `text` what it is in one line;
`error` and `at` tell of an exception."""
NUM_PLACES = 4


@dataclass(frozen=True)
class Item:
    """Something to measure."""

    name: str
    job: Callable[[World], Answer]
    """Pickled and sent to the process that has the GPU."""
    seconds: float
    """What it may take, until one has been timed."""
    needs: str = ""
    """A package that must be installed."""
    alone: bool = False
    """Whether nothing may run in its process after it: it leaves threads, compiled code or switches behind."""

    @property
    def missing(self) -> str:
        """The package that it needs and that is not there."""
        return self.needs if self.needs and find_spec(self.needs) is None else ""


@dataclass(frozen=True)
class Part:
    """Items that answer one question."""

    title: str
    question: str
    items: Sequence[Item]
    write: Callable[[Mapping[str, Answer]], str]
    """The section of the page, from the answers that are there."""


def attempt(world: World, job: Callable[[World], Answer]) -> Answer:
    """What `job` answers, or how it failed; the memory that it took is given back."""
    try:
        with quiet():
            return job(world)
    except Exception as error:
        return failure(error)
    finally:
        gc.collect()
        torch.cuda.empty_cache()


@contextmanager
def quiet() -> Iterator[None]:
    """Without warnings: a failure is told by its exception, and some items count the warnings of their own."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def failure(error: BaseException) -> Answer:
    """An exception as an answer, with the innermost places of the one that caused it."""
    said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    at = places(traceback.extract_tb(cause.__traceback__))
    return {"good": False, "text": f"failed: {said}", "error": said, "at": at}


def places(frames: Sequence[traceback.FrameSummary]) -> list[str]:
    """The innermost place, and the innermost ones of this project, from the inside out."""
    told = [f"{short(frame.filename)}:{frame.lineno} {frame.name}" for frame in frames]
    mine = [place for place in told if place.startswith(("gengap_dist/", "benchmarks/"))]
    return list(dict.fromkeys([*told[-1:], *mine[::-1][:NUM_PLACES]]))


def short(path: str) -> str:
    """A file by its path below the folder of packages, or of this project.

    >>> short("/x/lib/python3.12/site-packages/torch/nn/functional.py"), short(__file__)
    ('torch/nn/functional.py', 'benchmarks/gpu_parts/items.py')
    """
    root = str(Path(__file__).parents[2])
    return path.rpartition("site-packages/")[2].removeprefix(root).lstrip("/")
