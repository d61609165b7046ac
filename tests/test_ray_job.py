"""launch/ray_job.sh against a real Ray cluster: the job uploads to a server with a password, which nobody sees."""

import base64
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from gengap_dist.runs.run_folder import read_info
from tests.conftest import ROOT
from tests.ray_cluster import RAY, Cluster
from tests.tracking.servers import Quiet, serving

PASSWORD = "hunter2-s3cret"
LOGIN = {"MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_TRACKING_PASSWORD": PASSWORD}
WORDS = ["--train.steps", "3", "--probe.num_samples", "32", "--mlflow.flush_timeout_seconds", "20"]


@pytest.mark.full  # a cluster of its own; that the script sends no secret is in test_launch_files.py
@pytest.mark.processes
def test_the_driver_has_the_password_of_the_clusters_environment(tmp_path):
    given, commands = set[str](), set[str]()

    class Handler(Quiet):
        def do_GET(self) -> None:
            given.add(self.headers.get("Authorization", "nothing"))
            commands.update(" ".join(each.info["cmdline"] or ()) for each in psutil.process_iter(["cmdline"]))
            self.answer(400, b"{}")

    with tempfile.TemporaryDirectory(prefix="r", ignore_cleanup_errors=True) as name, serving(Handler) as address:
        folder = Path(name)
        cluster = Cluster(folder, more=LOGIN | {"PATH": f"{RAY.parent}{os.pathsep}{os.environ['PATH']}"})
        try:
            uri = address.replace("//", f"//me:{PASSWORD}@")
            env = cluster.env | LOGIN | {"PYTHON": sys.executable, "MLFLOW_TRACKING_URI": uri, "NUM_PROCESSES": "1"}
            command = ["bash", "launch/ray_job.sh", "configs/demo_train.yaml", tmp_path / "run", *WORDS]
            done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
            jobs = cluster.ray("job", "list")
        finally:
            cluster.close()
        logs = "".join(path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file())
    assert done.returncode == 0, done.stdout + done.stderr
    assert read_info(tmp_path / "run").launcher == "ray"
    assert given == {f"Basic {base64.b64encode(f'me:{PASSWORD}'.encode()).decode()}"}
    assert "gengap_dist.train" in jobs.stdout + jobs.stderr
    run = "".join(path.read_text(errors="replace") for path in (tmp_path / "run").rglob("*") if path.is_file())
    for text in (done.stdout, done.stderr, jobs.stdout, jobs.stderr, logs, run, *commands):
        assert PASSWORD not in text
    assert "gengap_dist.tracking.mlflow.process" in "".join(commands)
