"""A real Ray cluster on this machine, for the tests that need one."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from gengap_dist.distributed.worker_pool import free_port

ROOT = Path(__file__).parent.parent
RAY = Path(sys.executable).parent / "ray"


class Cluster:
    """`ray start --head --block` on loopback, in its own folder and with its own ports.

    All of Ray's processes have the variables `more`, and the cluster as many CPUs and GPUs as it is told, whether there
    are any.
    """

    def __init__(
        self, folder: Path, *, num_cpus: int = 4, num_gpus: int = 0, more: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        names = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port")
        self.ports = {name: free_port() for name in names}  # the defaults are one machine's, for one cluster
        self.address = f"127.0.0.1:{self.ports['port']}"
        self.env = os.environ | {
            "PYTHONPATH": str(ROOT),
            "RAY_AUTH_MODE": "disabled",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's word for: loopback only
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
            "RAY_prestart_worker_first_driver": "0",  # four processes that a job with variables of its own cannot use
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{self.ports['dashboard-port']}",
            **more,
        }
        self.env.pop("RAY_ADDRESS", None)
        words = ["--head", "--block", "--num-cpus", str(num_cpus), "--num-gpus", str(num_gpus)]
        words += [
            "--resources",
            '{"slot": 1}',
            "--object-store-memory",
            "100000000",
            "--temp-dir",
            str(folder),
            "--dashboard-host",
            "127.0.0.1",
        ]
        for name, port in self.ports.items():
            words += [f"--{name}", str(port)]
        self.log = folder / "start.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [RAY, "start", *words], env=self.env, stdout=log, stderr=log, start_new_session=True
            )
        until(lambda: "Ray runtime started" in self.log.read_text() or self.process.poll() is not None)
        assert self.process.poll() is None, self.log.read_text()

    def close(self) -> None:
        """Ask; then make sure. Never `ray stop`, which ends every cluster of this machine."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1)  # it takes up to 30 s to hand over what runs there
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def ray(self, *words: object, **kwargs) -> "subprocess.CompletedProcess[str]":
        return run([RAY, *words], env=self.env, **kwargs)

    def submit(
        self, *words: object, name: str, path: Path = ROOT, wait: bool = True, **more: str
    ) -> "subprocess.CompletedProcess[str]":
        """`ray job submit`; modules in `path` can be imported in the job, whose processes have the variables `more`."""
        flags = [f"--submission-id={name}", *([] if wait else ["--no-wait"])]
        flags += [f"--runtime-env-json={json.dumps({'env_vars': {'PYTHONPATH': f'{ROOT}:{path}'} | more})}"]
        job = [sys.executable, "-m", "gengap_dist.train", *words]
        end = time.monotonic() + 60
        while True:
            done = self.ray("job", "submit", *flags, "--", *job)
            if "No available agent" not in done.stderr or time.monotonic() > end:
                return done
            time.sleep(1)  # a cluster's first seconds: nothing was submitted

    def train(self, *words: object, cwd: Path) -> "subprocess.CompletedProcess[str]":
        """The command as a driver of its own, beside the cluster."""
        env = self.env | {"RAY_ADDRESS": self.address}
        return run([sys.executable, "-m", "gengap_dist.train", *words], env=env, cwd=cwd)


def run(words, *, env, cwd=None, timeout=300) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*map(str, words)], env=env, cwd=cwd, capture_output=True, text=True, timeout=timeout)


def until(holds, seconds: float = 240.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.1)
