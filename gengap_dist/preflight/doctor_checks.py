"""What a machine must have to do what a config asks: each check finds out one thing and says what to do about it.

Whatever may hang or crash (torch, a server, a name that does not resolve) is tried in a process or a thread of its own,
with a limit, and the same code is tried that a run uses. Nothing is written that stays.
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
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from gengap_dist.config.sections import RunConfig
from gengap_dist.data import TORCHVISION
from gengap_dist.distributed.launchers.ray import check_address
from gengap_dist.distributed.launchers.torchrun import uses_torchrun
from gengap_dist.errors import UsageError
from gengap_dist.preflight.doctor_subprocess import GIB, IMPORT_SECONDS, Facts, attempt, line, two_ranks
from gengap_dist.tracking.mlflow.uploader import CLIENT_DEFAULTS, store_uri
from gengap_dist.training.autotune.cache import micro_sizes_path, read_micro_sizes

OK, WARN, FAIL, ABSENT = "ok", "warn", "fail", "absent"
SERVER_SECONDS = 5


class CheckResult(NamedTuple):
    """What a check found out."""

    status: str
    """ok; warn: works, but...; fail: this config needs it, and it is broken; absent: not there, and not needed."""
    found: str
    remedy: str = ""

    def needed(self, needed: bool) -> "CheckResult":
        """The same, but no failure if nothing needs it."""
        return self if needed or self.status != FAIL else self._replace(status=WARN)


class CheckRequest(NamedTuple):
    """What the machine is to do."""

    config: RunConfig
    out: Path
    """Folder that the run would write."""

    @property
    def ray(self) -> bool:
        """Whether the ranks come from Ray."""
        backend = self.config.launch.launcher
        return backend == "ray" or (backend == "auto" and "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ)

    @property
    def zero(self) -> bool:
        """Whether DeepSpeed makes the updates."""
        return self.config.launch.strategy.startswith("zero")

    @property
    def nodes(self) -> bool:
        """Whether the ranks may live on several machines."""
        return self.ray or uses_torchrun(self.config.launch)


CheckResults = dict[str, CheckResult]


def run_checks(ask: CheckRequest, tell: Callable[[list[str]], None] = lambda waiting: None) -> CheckResults:
    """All findings, in the order of CHECKS; `tell` hears what is still waited for.

    The checks run side by side; one that overruns its limit is left behind and reported.
    """
    began = time.monotonic()
    answers: queue.Queue[tuple[tuple[str, ...], CheckResults]] = queue.Queue()

    def work(names: tuple[str, ...], check: Callable[[CheckRequest], CheckResults]) -> None:
        try:
            answers.put((names, check(ask)))
        except Exception as error:
            reason = f"cannot be checked ({type(error).__name__}: {line(error)})"
            answers.put((names, dict.fromkeys(names, CheckResult(FAIL, reason, "mend what the message names"))))

    for names, (_, check) in CHECKS.items():  # daemons, so that one that hangs cannot hold up the exit
        threading.Thread(target=work, args=(names, check), daemon=True).start()
    waiting = {names: began + seconds for names, (seconds, _) in CHECKS.items()}
    found: CheckResults = {}
    while waiting:
        tell([name for names in waiting for name in names])
        try:
            names, findings = answers.get(timeout=max(0.0, min(waiting.values()) - time.monotonic()))
            if waiting.pop(names, None):
                found |= findings
        except queue.Empty:
            for names in [names for names, until in waiting.items() if until <= time.monotonic()]:
                del waiting[names]
                late = CheckResult(
                    FAIL, f"no answer within {CHECKS[names][0]} s", "see whether a disk or a network hangs"
                )
                found |= dict.fromkeys(names, late)
    return {name: found[name] for names in CHECKS for name in names}


# -- this machine -----------------------------------------------------------------------------------------------------


def python(ask: CheckRequest) -> CheckResults:
    """The interpreter, and where it runs."""
    found = f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    if not (3, 11) <= sys.version_info < (3, 14):
        return {"python": CheckResult(WARN, found, "not tried with gengap_dist: use Python 3.11 to 3.13")}
    return {"python": CheckResult(OK, found)}


def processors(ask: CheckRequest) -> CheckResults:
    """Cores and memory that this process may use, a container's limits included."""
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    quota, _, period = _control("cpu.max").partition(" ")
    if quota.isdigit():
        cores = min(cores, int(quota) / int(period))
    if (limit := _control("memory.max")).isdigit():
        memory = min(memory, int(limit))
    found = f"{cores:.3g} cores, {memory / GIB:.1f} GiB of memory"
    launch = ask.config.launch
    if not ask.nodes and launch.device == "cpu" and launch.num_processes > cores:
        remedy = f"launch.num_processes ({launch.num_processes}) ranks share them: start fewer to be faster"
        return {"cpu": CheckResult(WARN, found, remedy)}
    return {"cpu": CheckResult(OK, found)}


def _control(name: str) -> str:
    """A limit of the container this runs in; empty if there is none."""
    path = Path("/sys/fs/cgroup") / name
    return path.read_text().strip() if path.exists() else ""


def network(ask: CheckRequest) -> CheckResults:
    """Whether gloo finds an address of this machine that others can reach: an interface named, or the host's name."""
    interfaces = [name for _, name in socket.if_nameindex()]
    pin = f"export GLOO_SOCKET_IFNAME={' or '.join(filter(_is_up, interfaces)) or 'an interface that is up'}"
    if pinned := os.environ.get("GLOO_SOCKET_IFNAME"):
        if wrong := set(pinned.split(",")) - set(interfaces):
            return {"network": CheckResult(FAIL, f"GLOO_SOCKET_IFNAME={pinned}: no interface {min(wrong)} here", pin)}
        return {"network": CheckResult(OK, f"interface {pinned} (GLOO_SOCKET_IFNAME)")}
    host = socket.gethostname()
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as mine:
            mine.bind(address)
    except OSError as error:
        return {
            "network": CheckResult(WARN, f"host name {host} is not an address of this machine ({line(error)})", pin)
        }
    if ask.nodes and str(address[0]).startswith(("127.", "::1")):
        return {"network": CheckResult(WARN, f"{host} is {address[0]}, which other nodes cannot reach", pin)}
    return {"network": CheckResult(OK, f"{host} is {address[0]}")}


def _is_up(interface: str) -> bool:
    """Whether a network interface may lead to other machines."""
    state = Path("/sys/class/net") / interface / "operstate"
    return interface != "lo" and not (state.exists() and state.read_text().strip() == "down")


def disk(ask: CheckRequest) -> CheckResults:
    """Room where the run would write, whether it can be written to, and Ray's shared memory."""
    folder = _existing(ask.out)
    free = shutil.disk_usage(folder).free / GIB
    found = f"{free:.1f} GiB free in {folder}"
    if error := _unwritable(folder):
        here = CheckResult(FAIL, f"{folder} cannot be written ({error})", "give another --out")
    elif free < 2:
        here = CheckResult(WARN if free > 0.2 else FAIL, found, "make room, or give another --out")
    else:
        here = CheckResult(OK, found)
    shm = Path("/dev/shm")
    if not shm.is_dir():
        return {"disk": here, "shm": CheckResult(ABSENT, "no /dev/shm on this system")}
    shared = shutil.disk_usage(shm).free / GIB
    found = f"{shared:.1f} GiB free in {shm}"
    if shared < 1 and (ask.ray or ask.config.launch.device == "cuda"):
        return {"disk": here, "shm": CheckResult(WARN, found, "Ray and NCCL use it: in a container, --shm-size=8g")}
    return {"disk": here, "shm": CheckResult(OK, found)}


def _existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _unwritable(folder: Path) -> str:
    """Why no file can be made in a folder; empty if it can."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:  # one without a name, where the system has such
            file.write(b"1")
    except OSError as error:
        return error.strerror or str(error)
    return ""


def micro_sizes(ask: CheckRequest) -> CheckResults:
    """Where batch.micro_size=auto remembers what it found."""
    path, size = micro_sizes_path(), ask.config.batch.micro_size
    if size != "auto":
        return {"micro sizes": CheckResult(ABSENT, f"batch.micro_size is {size}")}
    remedy = f"make {path} writable, or delete it: until then every run measures anew"
    try:
        known = read_micro_sizes()
    except ValueError as error:
        return {"micro sizes": CheckResult(WARN, f"damaged ({error})", remedy)}
    if error := _unwritable(_existing(path.parent)):
        return {"micro sizes": CheckResult(WARN, f"{path.parent} cannot be written ({error})", remedy)}
    return {"micro sizes": CheckResult(OK, f"{len(known.found)} known, in {path}; a run measures what is not")}


def open_files(ask: CheckRequest) -> CheckResults:
    """How many files a process may open: ranks and Ray's workers hold a socket for each other."""
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4096 if ask.ray else 1024
    if limit < wanted:
        return {"open files": CheckResult(WARN, f"{limit:,} at once", f"ulimit -n {min(65536, max(most, wanted))}")}
    return {"open files": CheckResult(OK, f"{limit:,} at once")}


# -- torch and two ranks ----------------------------------------------------------------------------------------------


def ranks(ask: CheckRequest) -> CheckResults:
    """Torch, its GPUs, and two ranks on this machine that meet over gloo and, where there are GPUs, NCCL."""
    first, second = two_ranks()
    launch = ask.config.launch
    error = first.get("error") or second.get("error") or "no answer"
    if "torch" not in first:
        broken = CheckResult(FAIL, f"cannot be imported ({error})", "pip install --force-reinstall torch torchvision")
        none = CheckResult(WARN, "not known without torch")
        return {"torch": broken, "gpu": none, "gloo": none, "nccl": none}
    if "gloo" in first and "gloo" in second:
        gloo = CheckResult(OK, f"two ranks here met in {first['gloo']:.1f} s")
    else:
        remedy = "export GLOO_SOCKET_IFNAME=lo (one machine) or its network interface; see what a firewall stops"
        gloo = CheckResult(FAIL, f"two ranks here do not meet ({error})", remedy).needed(
            launch.num_processes > 1 or ask.nodes
        )
    return {
        "torch": _torch(ask, first),
        "gpu": _gpu(ask, first["gpus"]),
        "gloo": gloo,
        "nccl": _nccl(ask, first, error),
    }


def _torch(ask: CheckRequest, facts: Facts) -> CheckResult:
    version, vision = facts["torch"], facts.get("torchvision")
    if tuple(map(int, version.split(".")[:2])) < (2, 11):
        return CheckResult(FAIL, version, "pip install 'torch>=2.11' torchvision")
    if vision:
        return CheckResult(OK, f"{version} with torchvision {vision}")
    name = ask.config.model.name
    error = facts.get("torchvision_error", "it ends the process")
    return CheckResult(
        FAIL,
        f"{version}, but torchvision cannot be imported ({error})",
        "install the two as a pair, from one index: pip install --force-reinstall torch torchvision",
    ).needed(ask.config.data.name != "digits" or name.startswith(("torchvision:", "timm:")))


def _gpu(ask: CheckRequest, gpus: list[tuple[str, float]]) -> CheckResult:
    launch = ask.config.launch
    kinds = Counter(f"{name}, {memory:.0f} GiB" for name, memory in gpus)
    found = "; ".join(f"{count} x {kind}" for kind, count in kinds.items()) or "none that torch can use"
    here = 1 if ask.nodes else launch.num_processes
    if launch.device == "cuda" and len(gpus) < here:
        if ask.ray:
            return CheckResult(WARN, found, "launch.device=cuda: see that the nodes of Ray's workers have GPUs")
        lacks = f"launch.device=cuda needs {here}: check nvidia-smi and torch's build, or launch.device=cpu"
        return CheckResult(FAIL, found, lacks)
    return CheckResult(OK if gpus else ABSENT, found)


def _nccl(ask: CheckRequest, facts: Facts, error: str) -> CheckResult:
    if not facts["gpus"]:
        return CheckResult(ABSENT, "needs GPUs")
    if "nccl" in facts:
        num, seconds = facts["nccl"]
        return CheckResult(OK, f"{num} rank{'s' * (num > 1)} met in {seconds:.1f} s")
    remedy = "NCCL_DEBUG=INFO says more; launch.device=cpu goes without"
    return CheckResult(FAIL, f"ranks do not meet ({error})", remedy).needed(ask.config.launch.device != "cpu")


# -- packages and services --------------------------------------------------------------------------------------------


def timm(ask: CheckRequest) -> CheckResults:
    """Needed for models called timm:NAME only."""
    version, needed = installed("timm"), ask.config.model.name.startswith("timm:")
    if version:
        return {"timm": CheckResult(OK, version)}
    return {"timm": CheckResult(FAIL if needed else ABSENT, "not installed", "pip install timm")}


def deepspeed(ask: CheckRequest) -> CheckResults:
    """For launch.strategy=zero0 to zero3: the package, and what builds its operations."""
    version = installed("deepspeed")
    if not version:
        return {"deepspeed": CheckResult(FAIL if ask.zero else ABSENT, "not installed", "pip install deepspeed")}
    compiler = os.environ.get("CXX", "c++")  # as torch's extensions choose it
    tools = {compiler: "g++", "ninja": "ninja"}
    missing = [package for tool, package in tools.items() if not shutil.which(tool)]
    if ask.zero and (error := _import("deepspeed")):
        return {"deepspeed": CheckResult(FAIL, f"{version} cannot be imported ({error})", "pip install -U deepspeed")}
    if missing:
        found = f"{version}, no {' and no '.join(missing)} on PATH: it cannot build its operations; runs do without"
        return {
            "deepspeed": CheckResult(ABSENT, found, "install g++ (and ninja: pip install ninja), and put them on PATH")
        }
    return {"deepspeed": CheckResult(OK, f"{version}, with {compiler} and ninja")}


def ray(ask: CheckRequest) -> CheckResults:
    """For launch.launcher=ray: the package, and the cluster if an address is given."""
    version = installed("ray")
    if not version:
        return {"ray": CheckResult(FAIL if ask.ray else ABSENT, "not installed", "pip install 'ray[train,default]'")}
    address = ask.config.launch.ray_address or os.environ.get("RAY_ADDRESS")
    token, origin = _ray_token()
    mode = os.environ.get("RAY_AUTH_MODE") or ("token" if token else "disabled")  # Ray takes a token if it finds one
    auth = f"auth {mode}" + (f" ({origin})" if mode == "token" and token else "")
    if mode == "token" and not token and address:  # a cluster of one's own gets a new token
        remedy = "set RAY_AUTH_TOKEN to the cluster's token, or RAY_AUTH_MODE=disabled if it has none"
        return {"ray": CheckResult(FAIL, f"{version}, auth token, but there is no token", remedy).needed(ask.ray)}
    cluster = "no address: a cluster here, or a new one"
    try:
        if address and address.startswith("http") and not ask.ray:  # where `ray job submit` goes
            _ask_dashboard(address, token if mode == "token" else "")
            cluster = f"{address} answers"
        elif address and check_address(address):
            cluster = f"{address} answers"
    except UsageError as error:
        return {"ray": CheckResult(FAIL, *_split(str(error))).needed(ask.ray)}
    if ask.ray and (error := _import("ray.train")):
        return {
            "ray": CheckResult(FAIL, f"{version}: ray.train cannot be imported ({error})", "pip install 'ray[train]'")
        }
    return {"ray": CheckResult(OK, f"{version}, {auth}; {cluster}")}


def _ray_token() -> tuple[str, str]:
    """The token Ray would show, and where it comes from; two empty words if there is none."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token, "RAY_AUTH_TOKEN"
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return (path.read_text().strip(), str(path)) if path.exists() else ("", "")


def _ask_dashboard(address: str, token: str) -> None:
    """Refuse the address of a dashboard that does not answer, or not to us."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(f"{address.rstrip('/')}/api/version", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=SERVER_SECONDS) as answer:
            json.load(answer)["ray_version"]
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"RAY_ADDRESS ({address}) is not a Ray dashboard that lets us in ({line(error)}): start the cluster, correct "
            "the address, or set RAY_AUTH_TOKEN to its token"
        ) from None


def mlflow(ask: CheckRequest) -> CheckResults:
    """The store that runs are mirrored to: an SQLite file that can be written, or a server that answers its API."""
    version, needed = installed("mlflow"), ask.config.mlflow.enabled
    if not version:
        return {"mlflow": CheckResult(FAIL, "not installed", "pip install mlflow").needed(needed)}
    uri = store_uri(ask.config.mlflow.tracking_uri)
    if uri.startswith("sqlite:///"):
        return {"mlflow": _sqlite(version, Path(uri.removeprefix("sqlite:///"))).needed(needed)}
    shown = _without_password(uri)
    if urlsplit(uri).scheme not in ("http", "https", "databricks"):
        found = f"{version}; {shown} is not tried: opening a database would make its tables"
        return {"mlflow": CheckResult(WARN, found, "give the address of a server (http://...) or sqlite:///FILE")}
    env = CLIENT_DEFAULTS | os.environ | {"MLFLOW_HTTP_REQUEST_TIMEOUT": str(SERVER_SECONDS)}
    env |= {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    facts = attempt("ask_mlflow", uri, env=env)
    if "seconds" in facts:
        return {"mlflow": CheckResult(OK, f"{version}; {shown} answers in {facts['seconds']:.2f} s")}
    error = str(facts.get("error"))
    remedy = "start the server, correct mlflow.tracking_uri or MLFLOW_TRACKING_URI, or use mlflow.enabled=false"
    if "403" in error:
        host = urlsplit(uri).netloc.rpartition("@")[2]
        remedy = f"start the server with --allowed-hosts {host}, or name a user that it lets in"
    elif "401" in error:
        remedy = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
    return {"mlflow": CheckResult(FAIL, f"{shown}: {_mlflow_reason(error)}", remedy).needed(needed)}


def _mlflow_reason(error: str) -> str:
    """What matters in the client's long messages.

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
        "not known": "the host's name does not resolve",
        "resolution": "the host's name does not resolve",
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
        return CheckResult(OK, f"{version}; {path} will be made")
    try:
        with path.open("r+b") as file:  # for writing, which changes nothing yet
            head = file.read(16)
    except OSError as error:
        return CheckResult(FAIL, f"{version}; {path} cannot be written ({error.strerror})", remedy)
    if head and head != b"SQLite format 3\0":
        return CheckResult(FAIL, f"{version}; {path} is not an SQLite file", remedy)
    return CheckResult(OK, f"{version}; {path} can be written")


def _without_password(uri: str) -> str:
    """An address that can be shown.

    >>> _without_password("http://me:secret@host:5000")
    'http://me@host:5000'
    """
    return re.sub(r"(//[^/@:]*):[^/@]*@", r"\1@", uri)


def data(ask: CheckRequest) -> CheckResults:
    """The configured data set, read as a run would read it, and which others are beside it."""
    config = ask.config.data
    others = [
        name for name, (_, folder) in TORCHVISION.items() if (config.root / folder).is_dir() and name != config.name
    ]
    beside = f"; {config.root} also has {', '.join(others)}" if others else ""
    if config.name == "digits":
        return {"data": CheckResult(OK, f"digits come with the package{beside}")}
    facts = attempt("read_data", config.model_dump_json())
    if "images" in facts:
        return {"data": CheckResult(OK, f"{config.name}: {facts['images']:,} images in {config.root}{beside}")}
    if facts.get("late"):
        found = f"{config.name} in {config.root} takes more than {IMPORT_SECONDS} s to look through: not checked"
        return {"data": CheckResult(WARN, found, "copy it to a faster disk")}
    found, remedy = _split(facts["error"])
    if config.download:
        return {"data": CheckResult(WARN, f"{config.name} is not whole in {config.root}: the run will download it")}
    return {"data": CheckResult(FAIL, found, remedy)}


def installed(package: str) -> str | None:
    """A package's version, without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _import(module: str) -> str:
    """Why a module cannot be imported; empty if it can."""
    return attempt("try_import", module, env={"MLFLOW_DISABLE_TELEMETRY": "true"}).get("error", "")


def _split(sentence: str) -> tuple[str, str]:
    """What is wrong, and what to do about it: our errors end in the remedy.

    >>> _split("data.root (data) does not hold mnist: it needs the files a, b; copy them there")
    ('data.root (data) does not hold mnist: it needs the files a, b', 'copy them there')
    """
    at = max(sentence.rfind("; "), sentence.rfind(": "))
    return (sentence[:at], sentence[at + 2 :]) if at > 0 else (sentence, "")


CHECKS: dict[tuple[str, ...], tuple[float, Callable[[CheckRequest], CheckResults]]] = {  # rows: seconds, check
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
}
