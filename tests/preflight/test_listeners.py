"""What the doctor says of servers that other machines can reach."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gengap_dist.config.sections import RunConfig
from gengap_dist.preflight import doctor_checks
from gengap_dist.preflight.doctor_checks import OK, WARN, CheckRequest
from tests.ray_cluster import until

pytestmark = pytest.mark.processes
SERVER = """
import http.server, pathlib, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(int(sys.argv[2]))
        self.end_headers()
        self.wfile.write(sys.argv[3].encode())
server = http.server.HTTPServer((sys.argv[1], 0), Handler)
pathlib.Path("port").write_text(str(server.server_port))
server.serve_forever()
"""


@contextmanager
def standing(folder: Path, name: str, host: str, status: int = 200, body: str = "{}", **env: str) -> Iterator[str]:
    """A server whose command line is that of a service; its port."""
    (folder / name).write_text(SERVER)
    command = [sys.executable, name, host, str(status), body]
    with subprocess.Popen(command, cwd=folder, env=os.environ | env, stderr=subprocess.DEVNULL) as process:
        try:
            until((folder / "port").exists)
            until(lambda: (folder / "port").read_text() != "")
            yield (folder / "port").read_text()
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("name", "host", "more", "is_open"),
    [
        ("mlflow_server.py", "0.0.0.0", {}, True),
        ("mlflow_server.py", "0.0.0.0", {"status": 403, "body": "Invalid Host header"}, True),
        ("mlflow_server.py", "0.0.0.0", {"status": 401}, False),
        ("mlflow_server.py", "127.0.0.1", {}, False),
        ("gcs_server", "0.0.0.0", {"RAY_AUTH_MODE": "disabled"}, True),
        ("gcs_server", "0.0.0.0", {"RAY_AUTH_MODE": "token"}, False),
    ],
)
def test_servers_that_others_reach_without_a_password(tmp_path, monkeypatch, name, host, more, is_open):
    with standing(tmp_path, name, host, **more) as port:
        found = doctor_checks.listeners(CheckRequest(RunConfig(), tmp_path))["listeners"]
    assert (f":{port})" in found.found) == is_open
    if is_open:
        assert found.status == WARN
        assert "127.0.0.1" in found.remedy
    else:
        assert found.status in (OK, WARN)  # this machine may have others
