"""The contract between `gpu.py` and its parts: items, measured one after another, each with an answer for the JSON."""

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
"""The result of an item, as JSON values: `good` is whether it passed, `text` is one line of text, `error` and `at`
describe an exception."""
NUM_PLACES = 4


@dataclass(frozen=True)
class Item:
    """One measurement."""

    name: str
    job: Callable[[World], Answer]
    """Pickled and sent to the process that uses the GPU."""
    seconds: float
    """Estimated time, until it has been measured."""
    needs: str = ""
    """A package that must be installed."""
    alone: bool = False
    """Whether its process is ended afterwards, because it leaves threads, compiled code or settings behind."""

    @property
    def missing(self) -> str:
        """The needed package if it is not installed, else ""."""
        return self.needs if self.needs and find_spec(self.needs) is None else ""


@dataclass(frozen=True)
class Part:
    """Items that answer one question."""

    title: str
    question: str
    items: Sequence[Item]
    write: Callable[[Mapping[str, Answer]], str]
    """Returns the section of the page from the available answers."""


def attempt(world: World, job: Callable[[World], Answer]) -> Answer:
    """The answer of `job`, or its failure; its memory is released."""
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
    """Suppress warnings: a failure raises an exception, and some items count warnings themselves."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def failure(error: BaseException) -> Answer:
    """An exception as an answer, with the innermost stack frames of its cause."""
    message = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    at = places(traceback.extract_tb(cause.__traceback__))
    return {"good": False, "text": f"failed: {message}", "error": message, "at": at}


def places(frames: Sequence[traceback.FrameSummary]) -> list[str]:
    """The innermost frame, and the innermost frames of this project, from the inside out."""
    all_places = [f"{short(frame.filename)}:{frame.lineno} {frame.name}" for frame in frames]
    own_places = [place for place in all_places if place.startswith(("gengap_dist/", "benchmarks/"))]
    return list(dict.fromkeys([*all_places[-1:], *own_places[::-1][:NUM_PLACES]]))


def short(path: str) -> str:
    """Path of a file relative to site-packages, or to this project.

    >>> short("/x/lib/python3.12/site-packages/torch/nn/functional.py"), short(__file__)
    ('torch/nn/functional.py', 'benchmarks/gpu_parts/items.py')
    """
    root = str(Path(__file__).parents[2])
    return path.rpartition("site-packages/")[2].removeprefix(root).lstrip("/")
