"""The JSON of `gpu.py`: sessions, one for each GPU, torch version and state of the code, and what was found in each."""

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import chdir
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.cuda import nccl

from gengap_dist.distributed.process_group import World
from gengap_dist.errors import UsageError
from gengap_dist.runs.run_folder import git_state, now, versions, write_atomically
from gengap_dist.training.autotune.micro_batch import device_name

from .items import Answer

ROOT = Path(__file__).parents[2]
SOURCES = ("gengap_dist", "benchmarks")
MARK = ("gpu", "torch", "sources")  # of a session
PEERS = ("deepspeed", "lightning", "timm")


def machine(world: World) -> dict[str, Any]:
    """What answers hold for: GPU, driver and libraries, and the code. To be called where the GPU is."""
    properties = torch.cuda.get_device_properties(world.device)
    return {
        "gpu": properties.name,
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, nccl.version())),  # pyright: ignore[reportArgumentType]
        "torch": torch.__version__,
        "cpu": device_name(torch.device("cpu")),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": versions()["python"],
        "gengap_dist": versions().get("gengap_dist"),
        "git": _git(),
        "sources": sources(),
    } | {name: _version(name) for name in PEERS}


def sources() -> str:
    """A digest of the code that is measured: the package's and the benchmarks', committed or not."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in SOURCES for path in (ROOT / folder).rglob("*.py")):
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _git() -> dict[str, Any] | None:
    with chdir(ROOT):
        return git_state()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout.splitlines()
    return told[0].strip() if told else None


class Ledger:
    """The file, and in it the session of this machine."""

    def __init__(self, path: Path, machine: Mapping[str, Any]) -> None:
        """The session of `machine` in the file at `path`, both made if they are not there.

        Raises:
            UsageError: if the file cannot be read or written, or is another one.
        """
        self.path, self.sessions = path, read(path)
        mark = {name: machine[name] for name in MARK}
        found = [session for session in self.sessions if mark.items() <= session["machine"].items()]
        self.session = found[-1] if found else {"began": now(), "machine": dict(machine), "parts": {}}
        if not found:
            self.sessions.append(self.session)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write()
        except OSError as error:
            raise UsageError(f"--out ({path}) cannot be written ({error.strerror}): choose another file") from None

    def answer(self, part: str, name: str) -> Answer | None:
        """What was found of an item in this session; None if it is to be measured yet."""
        found = self.session["parts"].get(part, {}).get(name)
        return None if found is None or "cut_off" in found else found

    def answers(self, part: str) -> dict[str, Answer]:
        """What was found of a part in this session, by item."""
        return {name: found for name, found in self.session["parts"].get(part, {}).items() if "cut_off" not in found}

    def keep(self, part: str, name: str, answer: Answer) -> None:
        """Write an answer down, at once."""
        self.session["parts"].setdefault(part, {})[name] = answer
        self._write()

    def seconds(self, part: str, name: str) -> float | None:
        """What an item took when it was last done, in whatever session; or had taken when it was cut off."""
        known = [session["parts"].get(part, {}).get(name, {}) for session in (*self.sessions, self.session)]
        took = [answer["seconds"] for answer in known if "seconds" in answer]
        return took[-1] if took else None

    def _write(self) -> None:
        write_atomically(self.path, json.dumps({"sessions": self.sessions}, indent=1, allow_nan=False) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The sessions of a file, oldest first; none if there is no file.

    Raises:
        UsageError: if it cannot be read, or is another one.
    """
    if not path.exists():
        return []
    try:
        return json.loads(path.read_text())["sessions"]
    except OSError as error:
        raise UsageError(f"--out ({path}) cannot be read ({error.strerror}): choose another file") from None
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"--out ({path}) is not a file of this command: choose another one") from None
