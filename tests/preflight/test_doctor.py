"""The doctor, against what is really broken: dead and silent servers, missing files, tools, packages and networks."""

import http.server
import json
import socket
import threading
import time
from pathlib import Path

import pytest

from gengap_dist.data.datasets import list_image_folders
from gengap_dist.distributed.worker_pool import free_port
from gengap_dist.errors import UsageError
from gengap_dist.preflight import doctor_checks
from gengap_dist.preflight.doctor_checks import ABSENT, FAIL, OK, WARN, CheckRequest, CheckResult
from tests.conftest import config
from tests.tracking.servers import mlflow_server

pytestmark = pytest.mark.processes


def ask(**settings: object) -> CheckRequest:
    return CheckRequest(config(**settings), Path("run"))


def test_a_healthy_machine_fits_on_a_screen(tmp_path, new_gengap):
    done = new_gengap("doctor", "--out", "runs/next")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 80
    assert lines[-1].startswith("This machine can run this config")
    assert "two ranks on this machine connected in" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_everything_broken_at_once_is_named_in_json(tmp_path, gengap):
    dead = f"127.0.0.1:{free_port()}"
    words = ["--data.name", "mnist", "--data.root", "nowhere", "--mlflow.tracking_uri", f"http://{dead}"]
    words += ["--launch.launcher", "ray", "--launch.ray_address", dead, "--launch.device", "cuda"]
    done = gengap("doctor", *words, "--out", "/proc/run", "--json")
    assert done.returncode == 1, done.stderr
    told = json.loads(done.stdout)
    found = {check["what"]: check for check in told["checks"]}
    broken = {what for what, check in found.items() if check["status"] == FAIL}
    assert broken == {"ray", "mlflow", "data", "disk"}  # no GPU: Ray's workers may have what this machine lacks
    assert not told["ok"]
    assert all(what in told["verdict"] for what in broken)
    assert "train-images-idx3-ubyte" in found["data"]["found"]
    assert "nowhere/MNIST/raw" in found["data"]["found"]
    assert "data.download" in found["data"]["remedy"]
    assert "Connection refused" in found["mlflow"]["found"]
    assert dead in found["ray"]["found"]
    assert all(check["remedy"] for check in found.values() if check["status"] == FAIL)
    assert list(tmp_path.iterdir()) == []


def test_usage_errors(gengap):
    done = gengap("doctor", "--data.nam", "mnist")
    assert (done.returncode, done.stdout) == (2, "")
    assert "did you mean --data.name" in done.stderr


def test_a_check_that_hangs_or_breaks_does_not_hold_up_the_others(monkeypatch):
    def broken(ask: CheckRequest) -> doctor_checks.CheckResults:
        raise ZeroDivisionError("a\nb")

    stuck = threading.Event()
    slow = {("slow", "too"): (0.2, lambda ask: stuck.wait(60) and {}), ("broken",): (5, broken)}
    monkeypatch.setattr(doctor_checks, "CHECKS", slow | {("open files",): (5, doctor_checks.open_files)})
    began = time.monotonic()
    found = doctor_checks.run_checks(ask())
    stuck.set()
    assert time.monotonic() - began < 2
    assert [finding.status for finding in found.values()] == [FAIL, FAIL, FAIL, OK]
    assert found["too"].found == "no answer within 0.2 s"
    assert "ZeroDivisionError: a" in found["broken"].found


# -- MLflow -----------------------------------------------------------------------------------------------------------


def store(uri: str, *, needed: bool) -> CheckResult:
    return doctor_checks.mlflow(ask(mlflow__enabled=needed, mlflow__tracking_uri=uri))["mlflow"]


def test_a_server_that_never_answers_is_given_up(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        began = time.monotonic()
        finding = store(f"http://127.0.0.1:{listener.getsockname()[1]}", needed=False)
        assert time.monotonic() - began < 30
    assert (finding.status, finding.if_needed(True).status) == (WARN, WARN)
    assert "no answer within 5 s" in finding.found


def test_a_real_server(tmp_path):
    with mlflow_server(f"sqlite:///{tmp_path}/store.db", tmp_path, host="localhost") as uri:
        finding = store(uri, needed=True)
        assert finding.status == OK, finding
        assert "answers in" in finding.found
        other_name = uri.replace("localhost", "127.0.0.1")  # its health page would answer
        finding = store(other_name, needed=True)
    assert finding.status == FAIL
    assert "403" in finding.found
    assert f"--allowed-hosts {other_name.removeprefix('http://')}" in finding.remedy


def test_a_server_that_wants_a_password():
    class Locked(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(401)

        do_POST = do_GET

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Locked) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        finding = store(f"http://me:secret@127.0.0.1:{web.server_port}", needed=True)
        web.shutdown()
    assert finding.status == FAIL
    assert "MLFLOW_TRACKING_PASSWORD" in finding.remedy
    assert "secret" not in str(finding)


def test_sqlite_stores_are_neither_made_nor_touched(tmp_path):
    fresh = tmp_path / "new" / "mlflow.db"
    assert store(f"sqlite:///{fresh}", needed=True).status == OK
    assert list(tmp_path.iterdir()) == []
    for path in (Path("/proc/mlflow.db"), Path("/proc/version")):
        finding = store(f"sqlite:///{path}", needed=True)
        assert finding.status == FAIL
        assert f"{path} cannot be written" in finding.found
        assert finding.remedy
    assert store("sqlite:////proc/mlflow.db", needed=False).status == WARN
    text = tmp_path / "notes.db"
    text.write_text("no database, but long enough to look at")
    before = text.stat().st_mtime_ns
    assert "is not an SQLite file" in store(f"sqlite:///{text}", needed=True).found
    assert text.stat().st_mtime_ns == before


# -- packages and tools -----------------------------------------------------------------------------------------------


def test_deepspeed_without_what_builds_its_operations(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    finding = doctor_checks.deepspeed(ask(launch__strategy="zero2"))["deepspeed"]  # it can be imported all the same
    assert finding.status == ABSENT
    assert "no g++ and no ninja on PATH" in finding.found
    assert list(tmp_path.iterdir()) == []


def test_torch_that_cannot_be_imported(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so is missing')")
    monkeypatch.syspath_prepend(str(tmp_path))  # ranks have the path of the process that starts them
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    found = doctor_checks.ranks(ask())
    assert found["torch"].status == FAIL
    assert "libcudart.so is missing" in found["torch"].found
    assert {found[what].status for what in ("gpu", "gloo", "nccl")} == {WARN}


def test_a_broken_pair_and_a_network_interface_that_is_not_there(tmp_path, monkeypatch):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    needs_both = ask(launch__num_processes=2, model__name="torchvision:resnet18", launch__device="cuda")
    found = doctor_checks.ranks(needs_both) | doctor_checks.network(needs_both)
    assert {what: finding.status for what, finding in found.items() if what != "nccl"} == {
        "torch": FAIL,
        "gpu": FAIL,
        "gloo": FAIL,
        "network": FAIL,
    }
    assert "nms does not exist" in found["torch"].found
    assert "no interface nosuch0" in found["network"].found
    assert "GLOO_SOCKET_IFNAME" in found["network"].remedy
    assert found["gloo"].found.startswith("two ranks on this machine cannot connect")


def test_rays_dashboard_and_its_token(tmp_path, monkeypatch):
    class Dashboard(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.headers["Authorization"] != "Bearer right":
                self.send_error(401)
                return
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"ray_version": "2.60.0"}')

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Dashboard) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        monkeypatch.setenv("RAY_ADDRESS", f"http://127.0.0.1:{web.server_port}")
        found = []
        for token in ("right", "wrong"):
            monkeypatch.setenv("RAY_AUTH_TOKEN", token)
            found.append(doctor_checks.ray(ask())["ray"])
        web.shutdown()
    assert [finding.status for finding in found] == [OK, WARN]
    assert "auth token (RAY_AUTH_TOKEN)" in found[0].found
    assert "401" in found[1].found
    assert "right" not in found[0].found
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "nowhere"))
    assert "there is no token" in doctor_checks.ray(ask())["ray"].found


def test_what_is_not_needed_is_only_absent(monkeypatch):
    monkeypatch.setattr(doctor_checks, "installed", lambda package: None)
    for check in (doctor_checks.ray, doctor_checks.deepspeed, doctor_checks.timm):
        assert {finding.status for finding in check(ask()).values()} == {ABSENT}
    needs = ask(launch__launcher="ray", launch__strategy="zero1", model__name="timm:resnet18")
    for check in (doctor_checks.ray, doctor_checks.deepspeed, doctor_checks.timm):
        (finding,) = check(needs).values()
        assert finding.status == FAIL
        assert "pip install" in finding.remedy


# -- data -------------------------------------------------------------------------------------------------------------


def test_data_are_read_as_a_run_reads_them(tmp_path, real_data):
    (tmp_path / "data" / "cifar-10-batches-py").mkdir(parents=True)
    (tmp_path / "data" / "MNIST").symlink_to(real_data / "MNIST")
    finding = doctor_checks.data(ask(data__name="mnist"))["data"]
    assert finding == CheckResult(OK, "mnist: 70,000 samples in data; data also has cifar10")
    (tmp_path / "data" / "FashionMNIST").symlink_to(real_data / "MNIST")
    finding = doctor_checks.data(ask(data__name="fashion_mnist"))["data"]
    assert finding.status == FAIL
    assert "is that of mnist" in finding.found


def test_folders_of_pictures(tmp_path):
    for folder in ("train/a", "train/b", "test/a", "test/c"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "1.png").touch()
    wanted = config(data__name="imagefolder", data__root=str(tmp_path)).data
    with pytest.raises(UsageError, match="class b is not in both"):
        list_image_folders(wanted)
    (tmp_path / "test" / "c").rename(tmp_path / "test" / "b")
    assert [len(listing.paths) for listing in list_image_folders(wanted)] == [2, 2]
    (tmp_path / "train" / "b" / "1.png").unlink()
    finding = doctor_checks.data(ask(data__name="imagefolder", data__root=str(tmp_path)))["data"]
    assert finding.status == FAIL
    assert "needs one sub-folder of images per class" in finding.found
    asked = f"arrange the files as {tmp_path}/train/CLASS/IMAGE.jpg, or set data.root to the folder that has train"
    assert finding.remedy == asked


def test_what_auto_remembers(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    auto = ask(batch__micro_size="auto")
    assert doctor_checks.micro_sizes(ask())["micro sizes"].status == ABSENT
    assert doctor_checks.micro_sizes(auto)["micro sizes"].found.startswith("0 known, in ")
    folder = tmp_path / "gengap_dist"
    folder.mkdir()
    (folder / "micro_sizes.json").write_text("{")
    assert doctor_checks.micro_sizes(auto)["micro sizes"].status == WARN
    assert list(folder.iterdir()) == [folder / "micro_sizes.json"]
