"""Checks whether a machine can run a config: each check tests one part and gives a remedy for a problem.

Everything that may hang or crash (torch, a server, a name that does not resolve) runs in a separate process or thread
with a time limit, with the same code as a run. No file is left behind.
"""

import importlib
import importlib.metadata
import json
import os
import platform
import queue
import re
import resource
import shutil
import socket
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from gengap_dist.compat.ray_job import started_by_job
from gengap_dist.config.sections import RunConfig
from gengap_dist.credentials import redacted, without_logins
from gengap_dist.data import TORCHVISION
from gengap_dist.distributed.cgroups import memory_limits
from gengap_dist.distributed.cores import available_cores
from gengap_dist.distributed.launchers.ray import check_address
from gengap_dist.distributed.launchers.torchrun import uses_torchrun
from gengap_dist.errors import UsageError
from gengap_dist.parallel.capabilities import CAPABILITIES
from gengap_dist.preflight.doctor_subprocess import (
    GIB,
    IMPORT_SECONDS,
    Facts,
    first_line,
    run_in_subprocess,
    run_two_ranks,
)
from gengap_dist.preflight.listeners import open_listeners
from gengap_dist.tracking.mlflow.client import sqlite_path, store_variables, usable_store_uri
from gengap_dist.training.autotune.cache import micro_sizes_path, read_micro_sizes

OK, WARN, FAIL, ABSENT = "ok", "warn", "fail", "absent"
SERVER_SECONDS = 5
MAX_ANSWER_BYTES = 1 << 16


class CheckResult(NamedTuple):
    """The result of one check."""

    status: str
    """ok; warn: works with a limitation; fail: needed by the config, and broken; absent: missing, and not needed."""
    found: str
    remedy: str = ""

    @classmethod
    def refusal(cls, error: UsageError) -> "CheckResult":
        """The failure that an error says: what is wrong, and after its last colon what to do.

        >>> CheckResult.refusal(UsageError("optim.lr (-1.0) is negative: choose a positive one"))
        CheckResult(status='fail', found='optim.lr (-1.0) is negative', remedy='choose a positive one')
        """
        found, _, remedy = redacted(str(error)).rpartition(": ")
        return cls(FAIL, found, remedy)

    def if_needed(self, needed: bool) -> "CheckResult":
        """This result, with a failure reduced to a warning unless `needed`."""
        return self if needed or self.status != FAIL else self._replace(status=WARN)


class CheckRequest(NamedTuple):
    """The run that the machine is checked for."""

    config: RunConfig
    out: Path
    """Output folder of the run."""

    @property
    def uses_ray(self) -> bool:
        """Whether Ray starts the ranks."""
        launcher = self.config.launch.launcher
        return launcher == "ray" or (launcher == "auto" and started_by_job())

    @property
    def uses_deepspeed(self) -> bool:
        """Whether the run uses DeepSpeed."""
        strategy = self.config.launch.strategy
        return strategy != "auto" and CAPABILITIES[strategy].package == "deepspeed"

    @property
    def may_span_nodes(self) -> bool:
        """Whether the ranks may run on several machines."""
        return self.uses_ray or uses_torchrun(self.config.launch)


CheckResults = dict[str, CheckResult]


def run_checks(request: CheckRequest, on_waiting: Callable[[list[str]], None] = lambda waiting: None) -> CheckResults:
    """All results, in the order of CHECKS; `on_waiting` is called with the names of the unfinished checks.

    The checks run in parallel; a check that exceeds its time limit is reported as a failure and not awaited.
    """
    began = time.monotonic()
    answers: queue.Queue[tuple[tuple[str, ...], CheckResults]] = queue.Queue()

    def run_check(names: tuple[str, ...], check: Callable[[CheckRequest], CheckResults]) -> None:
        try:
            answers.put((names, check(request)))
        except Exception as error:
            reason = f"cannot be checked ({type(error).__name__}: {first_line(error)})"
            answers.put((names, dict.fromkeys(names, CheckResult(FAIL, reason, "fix the error in the message"))))

    for names, (_, check) in CHECKS.items():  # daemon threads, so that a hanging check does not block the exit
        threading.Thread(target=run_check, args=(names, check), daemon=True).start()
    waiting = {names: began + seconds for names, (seconds, _) in CHECKS.items()}
    all_results: CheckResults = {}
    while waiting:
        on_waiting([name for names in waiting for name in names])
        try:
            names, results = answers.get(timeout=max(0.0, min(waiting.values()) - time.monotonic()))
            if waiting.pop(names, None):
                all_results |= results
        except queue.Empty:
            for names in [names for names, deadline in waiting.items() if deadline <= time.monotonic()]:
                del waiting[names]
                timed_out = CheckResult(
                    FAIL, f"no answer within {CHECKS[names][0]} s", "check whether a disk or the network hangs"
                )
                all_results |= dict.fromkeys(names, timed_out)
    return {name: _without_secrets(all_results[name]) for names in CHECKS for name in names}


def _without_secrets(result: CheckResult) -> CheckResult:
    return result._replace(found=redacted(result.found), remedy=redacted(result.remedy))


# -- this machine -----------------------------------------------------------------------------------------------------


def python(request: CheckRequest) -> CheckResults:
    """The Python version, and the platform."""
    found = f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    if not (3, 11) <= sys.version_info < (3, 14):
        return {"python": CheckResult(WARN, found, "not tested with gengap_dist: use Python 3.11 to 3.13")}
    return {"python": CheckResult(OK, found)}


def processors(request: CheckRequest) -> CheckResults:
    """Cores and memory that this process may use, including container limits."""
    cores = available_cores()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    memory = min([memory, *(limit for limit, _ in memory_limits())])
    found = f"{cores.number:.3g} cores ({cores.source}), {memory / GIB:.1f} GiB of memory"
    launch = request.config.launch
    if not request.may_span_nodes and launch.device == "cpu" and launch.num_processes > cores.number:
        remedy = (
            f"launch.num_processes ({launch.num_processes}) ranks share these cores: start fewer ranks to be faster"
        )
        return {"cpu": CheckResult(WARN, found, remedy)}
    return {"cpu": CheckResult(OK, found)}


def network(request: CheckRequest) -> CheckResults:
    """Whether gloo finds an address that other machines can reach: a named interface, or the host name."""
    interfaces = [name for _, name in socket.if_nameindex()]
    pin = f"export GLOO_SOCKET_IFNAME={' or '.join(filter(_is_up, interfaces)) or 'an interface that is up'}"
    if pinned := os.environ.get("GLOO_SOCKET_IFNAME"):
        if wrong := set(pinned.split(",")) - set(interfaces):
            return {"network": CheckResult(FAIL, f"GLOO_SOCKET_IFNAME={pinned}: no interface {min(wrong)} here", pin)}
        return {"network": CheckResult(OK, f"interface {pinned} (GLOO_SOCKET_IFNAME)")}
    host = socket.gethostname()
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe_socket:
            probe_socket.bind(address)
    except OSError as error:
        return {
            "network": CheckResult(
                WARN, f"host name {host} is not an address of this machine ({first_line(error)})", pin
            )
        }
    if request.may_span_nodes and str(address[0]).startswith(("127.", "::1")):
        return {"network": CheckResult(WARN, f"{host} is {address[0]}, which other nodes cannot reach", pin)}
    return {"network": CheckResult(OK, f"{host} is {address[0]}")}


def _is_up(interface: str) -> bool:
    """Whether a network interface may lead to other machines."""
    state = Path("/sys/class/net") / interface / "operstate"
    return interface != "lo" and not (state.exists() and state.read_text(encoding="utf-8").strip() == "down")


def disk(request: CheckRequest) -> CheckResults:
    """Free space and write access of the output folder, and shared memory for Ray and NCCL."""
    folder = _existing(request.out)
    free = shutil.disk_usage(folder).free / GIB
    found = f"{free:.1f} GiB free in {folder}"
    if error := _unwritable(folder):
        here = CheckResult(FAIL, f"{folder} cannot be written ({error})", "give another --out")
    elif free < 2:
        here = CheckResult(WARN if free > 0.2 else FAIL, found, "free disk space, or give another --out")
    else:
        here = CheckResult(OK, found)
    shm = Path("/dev/shm")
    if not shm.is_dir():
        return {"disk": here, "shm": CheckResult(ABSENT, "no /dev/shm on this system")}
    shared = shutil.disk_usage(shm).free / GIB
    found = f"{shared:.1f} GiB free in {shm}"
    if shared < 1 and (request.uses_ray or request.config.launch.device == "cuda"):
        return {"disk": here, "shm": CheckResult(WARN, found, "Ray and NCCL use it: in a container, --shm-size=8g")}
    return {"disk": here, "shm": CheckResult(OK, found)}


def _existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _unwritable(folder: Path) -> str:
    """Why no file can be created in a folder; "" if it can."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:  # unnamed, where the system supports it
            file.write(b"1")
    except OSError as error:
        return error.strerror or str(error)
    return ""


def micro_sizes(request: CheckRequest) -> CheckResults:
    """The cache of batch.micro_size=auto."""
    path, size = micro_sizes_path(), request.config.batch.micro_size
    if size != "auto":
        return {"micro sizes": CheckResult(ABSENT, f"batch.micro_size is {size}")}
    remedy = f"make {path} writable, or delete it: until then every run measures again"
    try:
        known = read_micro_sizes()
    except ValueError as error:
        return {"micro sizes": CheckResult(WARN, f"damaged ({error})", remedy)}
    if error := _unwritable(_existing(path.parent)):
        return {"micro sizes": CheckResult(WARN, f"{path.parent} cannot be written ({error})", remedy)}
    return {"micro sizes": CheckResult(OK, f"{len(known.found)} known, in {path}; a run measures the others")}


def open_files(request: CheckRequest) -> CheckResults:
    """Limit of open files: each rank and each Ray worker has a socket for every other."""
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4096 if request.uses_ray else 1024
    if limit < wanted:
        return {"open files": CheckResult(WARN, f"{limit:,} at once", f"ulimit -n {min(65536, max(most, wanted))}")}
    return {"open files": CheckResult(OK, f"{limit:,} at once")}


def listeners(request: CheckRequest) -> CheckResults:
    """What of MLflow and Ray other machines can reach here without a password; Ray executes what it is sent."""
    if found := open_listeners():
        names = ", ".join(f"{service.name} ({address})" for service, address in found)
        remedy = "; ".join(dict.fromkeys(service.remedy for service, _ in found))
        return {"listeners": CheckResult(WARN, f"{names}: open to all machines that reach this one", remedy)}
    return {"listeners": CheckResult(OK, "no MLflow or Ray of this user is open to other machines")}


# -- torch and two ranks ----------------------------------------------------------------------------------------------


def ranks(request: CheckRequest) -> CheckResults:
    """Torch, its GPUs, and two ranks on this machine that connect over gloo and, with GPUs, NCCL."""
    first, second = run_two_ranks()
    launch = request.config.launch
    error = first.get("error") or second.get("error") or "no answer"
    if "torch" not in first:
        broken = CheckResult(FAIL, f"cannot be imported ({error})", "pip install --force-reinstall torch torchvision")
        none = CheckResult(WARN, "not known without torch")
        return {"torch": broken, "gpu": none, "gloo": none, "nccl": none}
    if "gloo" in first and "gloo" in second:
        gloo = CheckResult(OK, f"two ranks on this machine connected in {first['gloo']:.1f} s")
    else:
        remedy = "export GLOO_SOCKET_IFNAME=lo (one machine) or its network interface; check the firewall"
        gloo = CheckResult(FAIL, f"two ranks on this machine cannot connect ({error})", remedy).if_needed(
            launch.num_processes > 1 or request.may_span_nodes
        )
    return {
        "torch": _torch(request, first),
        "gpu": _gpu(request, first["gpus"]),
        "gloo": gloo,
        "nccl": _nccl(request, first, error),
    }


def _torch(request: CheckRequest, facts: Facts) -> CheckResult:
    version, vision = facts["torch"], facts.get("torchvision")
    if tuple(map(int, version.split(".")[:2])) < (2, 11):
        return CheckResult(FAIL, version, "pip install 'torch>=2.11' torchvision")
    if vision:
        return CheckResult(OK, f"{version} with torchvision {vision}")
    name = request.config.model.name
    error = facts.get("torchvision_error", "it crashes the process")
    return CheckResult(
        FAIL,
        f"{version}, but torchvision cannot be imported ({error})",
        "install both together, from the same index: pip install --force-reinstall torch torchvision",
    ).if_needed(request.config.data.name in TORCHVISION or name.startswith(("torchvision:", "timm:")))


def _gpu(request: CheckRequest, gpus: list[tuple[str, float]]) -> CheckResult:
    launch = request.config.launch
    kinds = Counter(f"{name}, {memory:.0f} GiB" for name, memory in gpus)
    found = "; ".join(f"{count} x {kind}" for kind, count in kinds.items()) or "none that torch can use"
    num_needed = 1 if request.may_span_nodes else launch.num_processes
    if launch.device == "cuda" and len(gpus) < num_needed:
        if request.uses_ray:
            return CheckResult(WARN, found, "launch.device=cuda: check that the nodes of Ray's workers have GPUs")
        lacks = f"launch.device=cuda needs {num_needed}: check nvidia-smi and torch's build, or launch.device=cpu"
        return CheckResult(FAIL, found, lacks)
    return CheckResult(OK if gpus else ABSENT, found)


def _nccl(request: CheckRequest, facts: Facts, error: str) -> CheckResult:
    if not facts["gpus"]:
        return CheckResult(ABSENT, "needs GPUs")
    if "nccl" in facts:
        num, seconds = facts["nccl"]
        return CheckResult(OK, f"{num} rank{'s' * (num > 1)} connected in {seconds:.1f} s")
    remedy = "set NCCL_DEBUG=INFO for details, or launch.device=cpu"
    return CheckResult(FAIL, f"ranks cannot connect ({error})", remedy).if_needed(request.config.launch.device != "cpu")


# -- packages and services --------------------------------------------------------------------------------------------


def timm(request: CheckRequest) -> CheckResults:
    """The package timm, needed only for models timm:NAME."""
    version, needed = installed("timm"), request.config.model.name.startswith("timm:")
    if version:
        return {"timm": CheckResult(OK, version)}
    return {"timm": CheckResult(FAIL if needed else ABSENT, "not installed", "pip install timm")}


def deepspeed(request: CheckRequest) -> CheckResults:
    """For launch.strategy=zero0 to zero3: the package, and the compiler for its operations."""
    version = installed("deepspeed")
    if not version:
        return {
            "deepspeed": CheckResult(
                FAIL if request.uses_deepspeed else ABSENT, "not installed", "pip install deepspeed"
            )
        }
    compiler = os.environ.get("CXX", "c++")  # the compiler that torch's extensions use
    tools = {compiler: "g++", "ninja": "ninja"}
    missing = [package for tool, package in tools.items() if not shutil.which(tool)]
    if request.uses_deepspeed and (error := _import("deepspeed")):
        return {"deepspeed": CheckResult(FAIL, f"{version} cannot be imported ({error})", "pip install -U deepspeed")}
    if missing:
        found = (
            f"{version}, no {' and no '.join(missing)} on PATH: it cannot build its operations; runs do not need them"
        )
        return {
            "deepspeed": CheckResult(ABSENT, found, "install g++ (and ninja: pip install ninja), and put them on PATH")
        }
    return {"deepspeed": CheckResult(OK, f"{version}, with {compiler} and ninja")}


def ray(request: CheckRequest) -> CheckResults:
    """For launch.launcher=ray: the package, and the cluster if an address is given."""
    version = installed("ray")
    if not version:
        return {
            "ray": CheckResult(
                FAIL if request.uses_ray else ABSENT, "not installed", "pip install 'ray[train,default]'"
            )
        }
    address = request.config.launch.ray_address or os.environ.get("RAY_ADDRESS")
    token, origin = _ray_token()
    mode = os.environ.get("RAY_AUTH_MODE") or ("token" if token else "disabled")  # Ray uses a token if it finds one
    auth = f"auth {mode}" + (f" ({origin})" if mode == "token" and token else "")
    if mode == "token" and not token and address:  # a new local cluster gets a new token
        remedy = "set RAY_AUTH_TOKEN to the cluster's token, or RAY_AUTH_MODE=disabled if it has none"
        return {
            "ray": CheckResult(FAIL, f"{version}, auth token, but there is no token", remedy).if_needed(
                request.uses_ray
            )
        }
    cluster = "no address: a local cluster, or a new one"
    try:
        if address and address.startswith("http") and not request.uses_ray:  # the address of `ray job submit`
            _query_dashboard(address, token if mode == "token" else "")
            cluster = f"{address} answers"
        elif address and check_address(address):
            cluster = f"{address} answers"
    except UsageError as error:
        return {"ray": CheckResult(FAIL, *_split_remedy(str(error))).if_needed(request.uses_ray)}
    if request.uses_ray and (error := _import("ray.train")):
        return {
            "ray": CheckResult(FAIL, f"{version}: ray.train cannot be imported ({error})", "pip install 'ray[train]'")
        }
    return {"ray": CheckResult(OK, f"{version}, {auth}; {cluster}")}


def _ray_token() -> tuple[str, str]:
    """The token that Ray would send, and its origin; ("", "") if there is none."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token, "RAY_AUTH_TOKEN"
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return (path.read_text(encoding="utf-8").strip(), str(path)) if path.exists() else ("", "")


def _query_dashboard(address: str, token: str) -> None:
    """Check that a dashboard answers and accepts the token.

    Raises:
        UsageError: if it does not.
    """
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(f"{address.rstrip('/')}/api/version", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=SERVER_SECONDS) as answer:
            json.loads(answer.read(MAX_ANSWER_BYTES))["ray_version"]
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        raise UsageError(
            f"RAY_ADDRESS ({address}) is not a Ray dashboard that accepts this client ({first_line(error)}): "
            "start the cluster, correct the address, or set RAY_AUTH_TOKEN to its token"
        ) from None


def mlflow(request: CheckRequest) -> CheckResults:
    """The store to which runs are uploaded: a writable SQLite file, or a server that answers API requests."""
    version, needed = installed("mlflow"), request.config.mlflow.enabled
    if not version:
        return {"mlflow": CheckResult(FAIL, "not installed", "pip install mlflow").if_needed(needed)}
    try:
        uri = usable_store_uri(request.config.mlflow.tracking_uri)
    except UsageError as error:
        return {"mlflow": CheckResult.refusal(error).if_needed(needed)}
    if path := sqlite_path(uri):
        return {"mlflow": _sqlite(version, path).if_needed(needed)}
    shown = without_logins(uri)
    if urlsplit(uri).scheme not in ("http", "https", "databricks"):
        found = f"{version}; {shown} is not checked: opening a database would create its tables"
        return {"mlflow": CheckResult(WARN, found, "give the address of a server (http://...) or sqlite:///FILE")}
    env = store_variables(uri) | {"MLFLOW_HTTP_REQUEST_TIMEOUT": str(SERVER_SECONDS)}
    env |= {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    facts = run_in_subprocess("query_mlflow", env=env)
    if "seconds" in facts:
        return {"mlflow": CheckResult(OK, f"{version}; {shown} answers in {facts['seconds']:.2f} s")}
    error = str(facts.get("error"))
    remedy = "start the server, correct mlflow.tracking_uri or MLFLOW_TRACKING_URI, or use mlflow.enabled=false"
    if "403" in error:
        host = urlsplit(uri).netloc.rpartition("@")[2]
        remedy = f"start the server with --allowed-hosts {host}, or use an account that it accepts"
    elif "401" in error:
        remedy = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
    return {"mlflow": CheckResult(FAIL, f"{shown}: {_mlflow_reason(error)}", remedy).if_needed(needed)}


def _mlflow_reason(error: str) -> str:
    """The relevant part of a long error message of the client.

    >>> _mlflow_reason("API request to http://h/ failed with exception (Caused by E('Connection refused'))")
    'Connection refused'
    >>> _mlflow_reason("API request to /x failed with error code 403 != 200. Response body: 'Invalid Host header'")
    'answers 403 (Invalid Host header)'
    """
    if code := re.search(r"error code (\d+) != 200\. Response body: '?(.*?)'?$", error):
        return f"answers {code[1]} ({code[2][:100]})"
    for sign, words in {
        "Connection refused": "Connection refused",
        "timed out": f"no answer within {SERVER_SECONDS} s",
        "not known": "the host name does not resolve",
        "resolution": "the host name does not resolve",
    }.items():
        if sign in error:
            return words
    return error[:150]


def _sqlite(version: str, path: Path) -> CheckResult:
    remedy = "set mlflow.tracking_uri to a file that you may write, or use mlflow.enabled=false"
    folder = _existing(path.parent)
    if error := _unwritable(folder):
        return CheckResult(FAIL, f"{version}; {path} cannot be written ({error})", remedy)
    if not path.exists():
        return CheckResult(OK, f"{version}; {path} will be created")
    try:
        with path.open("r+b") as file:  # opens for writing, without changing the file
            head = file.read(16)
    except OSError as error:
        return CheckResult(FAIL, f"{version}; {path} cannot be written ({error.strerror})", remedy)
    if head and head != b"SQLite format 3\0":
        return CheckResult(FAIL, f"{version}; {path} is not an SQLite file", remedy)
    return CheckResult(OK, f"{version}; {path} can be written")


def data(request: CheckRequest) -> CheckResults:
    """The configured data set, read as a run reads it, and other data sets in the same folder."""
    config = request.config.data
    others = [
        name for name, (_, folder) in TORCHVISION.items() if (config.root / folder).is_dir() and name != config.name
    ]
    beside = f"; {config.root} also has {', '.join(others)}" if others else ""
    if config.name == "digits":
        return {"data": CheckResult(OK, f"digits are included in the package{beside}")}
    facts = run_in_subprocess("read_data", config.model_dump_json())
    if "samples" in facts:
        where = "" if config.is_own or config.name == "stdlib" else f" in {config.root}{beside}"
        return {"data": CheckResult(OK, f"{config.name}: {facts['samples']:,} samples{where}")}
    if facts.get("late"):
        found = f"{config.name} in {config.root} takes more than {IMPORT_SECONDS} s to read: not checked"
        return {"data": CheckResult(WARN, found, "copy it to a faster disk")}
    found, remedy = _split_remedy(facts["error"])
    if config.download:
        return {"data": CheckResult(WARN, f"{config.name} is not complete in {config.root}: the run will download it")}
    return {"data": CheckResult(FAIL, found, remedy)}


def installed(package: str) -> str | None:
    """A package's version, without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _import(module: str) -> str:
    """Why a module cannot be imported; "" if it can."""
    return run_in_subprocess("try_import", module, env={"MLFLOW_DISABLE_TELEMETRY": "true"}).get("error", "")


def _split_remedy(sentence: str) -> tuple[str, str]:
    """Split an error message of this project into problem and remedy.

    >>> _split_remedy("data.root (data) does not hold mnist: it needs the files a, b; copy them there")
    ('data.root (data) does not hold mnist: it needs the files a, b', 'copy them there')
    """
    at = max(sentence.rfind("; "), sentence.rfind(": "))
    return (sentence[:at], sentence[at + 2 :]) if at > 0 else (sentence, "")


CHECKS: dict[
    tuple[str, ...], tuple[float, Callable[[CheckRequest], CheckResults]]
] = {  # result names: (time limit in seconds, check)
    ("python",): (5, python),
    ("torch", "gpu", "gloo", "nccl"): (IMPORT_SECONDS + 10, ranks),
    ("cpu",): (5, processors),
    ("network",): (10, network),
    ("ray",): (IMPORT_SECONDS + 20, ray),
    ("deepspeed",): (IMPORT_SECONDS + 10, deepspeed),
    ("timm",): (5, timm),
    ("mlflow",): (IMPORT_SECONDS + 10, mlflow),
    ("data",): (IMPORT_SECONDS + 10, data),
    ("disk", "shm"): (10, disk),
    ("micro sizes",): (5, micro_sizes),
    ("open files",): (5, open_files),
    ("listeners",): (20, listeners),
}
