"""The JSON of `gpu.py`: sessions, one for each GPU, torch version and state of the code, and their answers."""

import hashlib
import json
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import chdir
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.cuda import nccl

from gengap_dist.distributed.cores import available_cores
from gengap_dist.distributed.process_group import World
from gengap_dist.errors import UsageError
from gengap_dist.runs.run_folder import git_state, now, versions, write_atomically
from gengap_dist.training.autotune.micro_batch import device_name

from .items import Answer

ROOT = Path(__file__).parents[2]
SOURCES = ("gengap_dist", "benchmarks")
MARK = ("gpu", "torch", "sources")  # identify a session
PEERS = ("deepspeed", "lightning", "timm")


def machine(world: World) -> dict[str, Any]:
    """GPU, driver, libraries and code of a session. Call it in the process that uses the GPU."""
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
        "cores": available_cores().whole,
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
    lines = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout.splitlines()
    return lines[0].strip() if lines else None


class Ledger:
    """The JSON file, and the session of this machine in it."""

    def __init__(self, path: Path, machine: Mapping[str, Any]) -> None:
        """The session of `machine` in the file at `path`, both are created if missing.

        Raises:
            UsageError: if the file cannot be read or written, or is not a file of this command.
        """
        self.path, self.sessions = path, read(path)
        identity = {name: machine[name] for name in MARK}
        matching = [session for session in self.sessions if identity.items() <= session["machine"].items()]
        self.session = matching[-1] if matching else {"began": now(), "machine": dict(machine), "parts": {}}
        if not matching:
            self.sessions.append(self.session)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write()
        except OSError as error:
            raise UsageError(f"--out ({path}) cannot be written ({error.strerror}): choose another file") from None

    def answer(self, part: str, name: str) -> Answer | None:
        """The answer of an item in this session; None if it is not measured yet."""
        answer = self.session["parts"].get(part, {}).get(name)
        return None if answer is None or "cut_off" in answer else answer

    def answers(self, part: str) -> dict[str, Answer]:
        """The answers of a part in this session, by item."""
        return {name: answer for name, answer in self.session["parts"].get(part, {}).items() if "cut_off" not in answer}

    def keep(self, part: str, name: str, answer: Answer) -> None:
        """Write an answer to the file immediately."""
        self.session["parts"].setdefault(part, {})[name] = answer
        self._write()

    def seconds(self, part: str, name: str) -> float | None:
        """Seconds of an item at its last measurement in any session, or until it was stopped by the time limit."""
        known = [session["parts"].get(part, {}).get(name, {}) for session in (*self.sessions, self.session)]
        took = [answer["seconds"] for answer in known if "seconds" in answer]
        return took[-1] if took else None

    def _write(self) -> None:
        write_atomically(self.path, json.dumps({"sessions": self.sessions}, indent=1, allow_nan=False) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The sessions of a file, oldest first; none if there is no file.

    Raises:
        UsageError: if it cannot be read, or is not a file of this command.
    """
    if not path.exists():
        return []
    try:
        return json.loads(path.read_text())["sessions"]
    except OSError as error:
        raise UsageError(f"--out ({path}) cannot be read ({error.strerror}): choose another file") from None
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"--out ({path}) is not a file of this command: choose another one") from None
