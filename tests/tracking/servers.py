"""Real servers for the mirror: MLflow on any store, a PostgreSQL of its own, and ones that refuse."""

import base64
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from gengap_dist.distributed.worker_pool import free_port

POSTGRES = shutil.which("pg_ctl") or next(map(str, Path("/usr/lib/postgresql").glob("*/bin/pg_ctl")), None)


@contextmanager
def mlflow_server(store: str, folder: Path, command: str = "server", *, host: str = "127.0.0.1") -> Iterator[str]:
    """`mlflow server` (or `ui`) on a store, on the loopback, which answers to the name `host` only; its address."""
    port = free_port()
    words = [sys.executable, "-m", "mlflow", command, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    words += ["--backend-store-uri", store, "--allowed-hosts", f"{host}:{port}"]
    words += ["--artifacts-destination", str(folder / "artifacts")] if command == "server" else []
    # its ten processes for jobs, which nothing here uses, would keep two cores busy for half a minute
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    log_path = folder / f"{command}.log"
    with log_path.open("w") as log:
        process = subprocess.Popen(words, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
    uri = f"http://{host}:{port}"
    try:
        for _ in range(600):
            try:  # the store: a server's health page answers earlier, and its first answers are slow
                address = f"{uri}/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default"
                urllib.request.urlopen(address, timeout=2).close()
                break
            except OSError as error:
                if isinstance(error, urllib.error.HTTPError):
                    error.close()
                assert process.poll() is None, log_path.read_text()
                time.sleep(0.2)
        else:
            pytest.fail(f"the server does not start: {log_path.read_text()}")
        yield uri
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def postgresql() -> Iterator[str]:
    """A PostgreSQL that listens on the loopback only; its address as SQLAlchemy takes it."""
    if POSTGRES is None:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    binaries, port = Path(POSTGRES).resolve().parent, free_port()
    if not (binaries / "initdb").exists():  # a wrapper's place, not the programs'
        binaries = next(Path("/usr/lib/postgresql").glob("*/bin"))
    folder = Path(tempfile.mkdtemp(prefix="pg"))
    as_other = []
    if os.getuid() == 0:  # it refuses to run as root
        shutil.chown(folder, "postgres")
        as_other = ["runuser", "-u", "postgres", "--"]
    data, options = folder / "data", f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder}"

    def call(*words: object) -> None:
        done = subprocess.run([*as_other, *map(str, words)], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    call(binaries / "initdb", "-D", data, "-U", "postgres", "--auth=trust", "--no-sync")
    call(binaries / "pg_ctl", "-D", data, "-o", options, "-w", "-l", folder / "log", "start")
    try:
        yield f"postgresql+psycopg://postgres@127.0.0.1:{port}/postgres"
    finally:
        call(binaries / "pg_ctl", "-D", data, "-m", "immediate", "stop")
        shutil.rmtree(folder)


def uploaders_of(folder: Path) -> list[psutil.Process]:
    """The processes that upload a folder."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if {"gengap_dist.tracking.mlflow.process", str(folder)} <= {*(process.info["cmdline"] or ())}
    ]


class Quiet(BaseHTTPRequestHandler):
    """Answers all methods with `do_GET`, and logs nothing."""

    def __getattr__(self, name: str) -> Callable[[], None]:
        if name.startswith("do_"):
            return self.do_GET
        raise AttributeError(name)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))


@contextmanager
def serving(handler: type[Quiet]) -> Iterator[str]:
    """A server in a thread; its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def refusing(status: int, body: str) -> Iterator[str]:
    """A server that gives every request the same answer; its address."""

    class Handler(Quiet):
        def do_GET(self) -> None:
            self.body()
            self.answer(status, body.encode())

    with serving(Handler) as uri:
        yield uri


def passed_on(request: Quiet, server: str) -> tuple[int, bytes]:
    """What `server` answers to a request: status and body."""
    headers = {"Content-Type": request.headers.get("Content-Type", "application/json")}
    words = urllib.request.Request(server + request.path, request.body() or None, headers, method=request.command)
    try:
        with urllib.request.urlopen(words, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


@contextmanager
def losing_answers(server: str, path: str, number: int) -> Iterator[str]:
    """Passes requests on to a server, and loses its first answers to those for a path; the address."""
    lost = 0

    class Handler(Quiet):
        def do_GET(self) -> None:
            nonlocal lost
            answer = passed_on(self, server)
            if self.path.endswith(path) and lost < number:
                lost += 1
                self.close_connection = True
            else:
                self.answer(*answer)

    with serving(Handler) as uri:
        yield uri


@contextmanager
def guarded(server: str, login: str, on_request: Callable[[], None]) -> Iterator[str]:
    """Passes requests on to a server if they come with `login`, USER:PASSWORD; quotes what they have instead."""
    wanted = f"Basic {base64.b64encode(login.encode()).decode()}"

    class Handler(Quiet):
        def do_GET(self) -> None:
            on_request()
            given = self.headers.get("Authorization", "nothing")
            self.answer(*passed_on(self, server) if given == wanted else (401, f"Authorization: {given}".encode()))

    with serving(Handler) as uri:
        yield uri
