"""Passwords and tokens are used, and stand in nothing that is printed or recorded."""

import base64
import json

import pytest

from gengap_dist.cli import compare, report, study, train
from gengap_dist.cli.exit_codes import run_command
from gengap_dist.config.sections import MlflowConfig
from gengap_dist.credentials import redacted
from gengap_dist.distributed.worker_pool import free_port
from gengap_dist.errors import UsageError
from gengap_dist.preflight import doctor_checks
from gengap_dist.preflight.doctor_checks import CheckRequest
from gengap_dist.tracking.mlflow.client import store_uri, store_variables, usable_store_uri
from gengap_dist.tracking.mlflow.process import sync_now
from tests.conftest import ROOT, config
from tests.tracking.servers import refusing

PASSWORD = "hunter2-s3cret"
LOGIN = f"me:{PASSWORD}"
SHORT = ["--train.steps", "1", "--probe.num_samples", "32", "--mlflow.flush_timeout_seconds", "5"]


def test_a_password_on_a_command_line_is_recorded_nowhere(tmp_path, gengap):
    address = f"127.0.0.1:{free_port()}"
    words = [*SHORT, "--mlflow.tracking_uri", f"http://{LOGIN}@{address}", "--out", "run"]
    done = gengap("train", *words)
    assert done.returncode == 0, done.stderr
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"run.json", "config.yaml", "mlflow.log", "report.html"} <= {path.name for path in files}
    assert PASSWORD.encode() not in b"".join(path.read_bytes() for path in files)
    assert PASSWORD not in done.stdout + done.stderr
    assert "a password on a command line can be read by all users" in done.stderr
    assert f"MLflow at http://{address} did not receive everything" in done.stderr
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert info["config"]["mlflow"]["tracking_uri"] == f"http://{address}"
    assert f"http://{address}" in info["command"]


@pytest.mark.filterwarnings("default")  # MLflow's own
@pytest.mark.parametrize("given", ["address", "token"])
def test_messages_about_a_server_that_quotes_what_it_is_sent(tmp_path, monkeypatch, capsys, given):
    coded = base64.b64encode(LOGIN.encode()).decode()
    with refusing(401, f"not good: {PASSWORD}, Authorization: Basic {coded}") as address:
        uri = address
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "you")  # `connect_client` sets both: they end with this test
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "another")
        if given == "address":
            uri = address.replace("//", f"//{LOGIN}@")
        else:
            monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", PASSWORD)
        (tmp_path / "run").mkdir()
        settings = config(mlflow__tracking_uri=uri, mlflow__enabled=True)
        info = {"status": "finished", "seed": 0, "config": settings.model_dump(mode="json")}
        (tmp_path / "run" / "run.json").write_text(json.dumps(info))
        for command, words in (
            (report.command, ["sync", "run", "--mlflow.tracking_uri", uri]),
            (compare.command, ["experiments:/e", "--out", "out", "--mlflow.tracking_uri", uri, "--debug"]),
            (train.command, ["--print_config", "--mlflow.tracking_uri", uri]),
        ):
            with pytest.raises(SystemExit):
                run_command("gengap", command, words)
        found = doctor_checks.mlflow(CheckRequest(settings, tmp_path))["mlflow"]
    said = capsys.readouterr()
    assert "cannot be reached" in said.err
    assert "cannot be read" in said.err
    assert f"tracking_uri: '{address}'" in said.out
    assert "401" in found.found
    for text in (said.out, said.err, str(found)):
        assert PASSWORD not in text
        assert coded not in text


def test_what_was_recorded_leads_to_the_same_store_again(monkeypatch):
    uri = f"http://{LOGIN}@mlflow:5000"
    recorded = MlflowConfig(tracking_uri=uri).model_dump(mode="json")["tracking_uri"]
    assert recorded == "http://mlflow:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{uri}/")
    assert store_uri(recorded) == f"{uri}/"
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "mlflow")  # part of the address, of which nothing is hidden
    assert store_variables(f"{uri}/")["MLFLOW_TRACKING_URI"] == "http://mlflow:5000/"
    assert store_uri("http://other:5000") == "http://other:5000"


@pytest.mark.parametrize("password", ["pa/ss", "pa#ss", "pa?s@s", "pa ss", 'pa"ss'])
def test_a_password_that_is_not_encoded_is_refused_and_not_shown(monkeypatch, capsys, password):
    uri = f"HTTP://me:{password}@host:5000"
    if not {*password} & {*' "'}:
        assert redacted(f"no {uri}") == "no HTTP://host:5000"
    with pytest.raises(SystemExit) as end:
        run_command("gengap", train.command, ["--print_config", "--mlflow.tracking_uri", uri])
    said = capsys.readouterr()
    assert (end.value.code, said.out) == (2, "")
    assert "percent-encode it" in said.err
    assert password not in said.err
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(UsageError, match="percent-encode it"):
        store_uri(None)


DEMO = ["--config", str(ROOT / "gengap_dist/configs/demo.yaml")]
NO_SERVER = "is not the address of a server: write http://HOST:PORT"


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("htp://me:secret@h:5000", "(htp://me@h:5000) is of no kind that MLflow knows (htp): give http://HOST:PORT"),
        ("http://h:99999", "(http://h:99999) is not an address (Port out of range"),
        ("localhost:5000", f"(localhost:5000) {NO_SERVER}"),
        ("127.0.0.1:5000/x", f"(127.0.0.1:5000/x) {NO_SERVER}"),
        ("http:/h:5000", f"(http:/h:5000) {NO_SERVER}"),
        ("http+x://h", "(http+x://h) is of no kind that MLflow knows (http+x)"),
    ],
)
def test_addresses_that_mlflow_does_not_know_are_refused(monkeypatch, uri, says):
    with pytest.raises(UsageError) as error:
        usable_store_uri(uri)
    assert str(error.value).startswith(f"mlflow.tracking_uri {says}")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(UsageError) as error:
        usable_store_uri(None)
    assert str(error.value).startswith(f"MLFLOW_TRACKING_URI {says}")
    with pytest.raises(UsageError):
        usable_store_uri(uri)  # what is configured is what the variable says


@pytest.mark.parametrize(
    ("main", "words"),
    [(train.command, ["--train.steps", "1"]), (study.command, DEMO), (study.command, [*DEMO, "--dry-run"])],
)
def test_such_an_address_is_refused_before_anything_is_written(tmp_path, monkeypatch, capsys, main, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        run_command("gengap", main, [*words, "--mlflow.tracking_uri", "localhost:5000", "--out", "out"])
    assert end.value.code == 2
    assert NO_SERVER in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "uri",
    [
        "databricks",
        "databricks://profile",
        "postgresql+psycopg://h/db",
        "./mlruns",
        "http://h:5000/a@b",
        "http://[::1]:5000/a@b",
        "http://me:p%2Fs@h/",
        "sqlite:////a b@c",
    ],
)
def test_other_addresses_are_used(uri):
    assert usable_store_uri(uri) == store_uri(uri) == uri


@pytest.mark.parametrize(
    "text", ["http://h:5000/a@b", "sqlite:////a b/c@d.db", "me@example.org: see https://h/", "a:b@c"]
)
def test_what_is_no_secret_stays(text):
    assert redacted(text) == text


def test_secrets_of_the_environment(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7")
    monkeypatch.setenv("OTHER_TOKEN", "true")  # too short to be told from words
    assert redacted("signed with wJalrXUtnFEMI/K7: true") == "signed with ***: true"


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "HTTP://me@h", "sqlite:////tmp/of_another_program.db"])
def test_a_folder_does_not_say_where_it_is_sent(uri, tmp_path, monkeypatch):
    """That server would get the login of the environment, and MLflow makes its tables in any database."""
    settings = config(mlflow__tracking_uri=uri, mlflow__enabled=True)
    info = {"status": "finished", "seed": 0, "config": settings.model_dump(mode="json")}
    (tmp_path / "run.json").write_text(json.dumps(info))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UsageError, match=r"only a folder says so: if it is yours, add --mlflow.tracking_uri "):
        sync_now(tmp_path, None, lambda name, done, total: None)


@pytest.mark.parametrize(
    "word", ["mlflow.tracking_uri=http://127.0.0.1:9", "launch.ray_address=ray://127.0.0.1:9", "launch.ray_address=h:1"]
)
def test_a_folder_does_not_say_which_server_resumes_it(word, tmp_path, monkeypatch, capsys):
    for variable in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        monkeypatch.delenv(variable, raising=False)
    setting, _, address = word.partition("=")
    with pytest.raises(SystemExit):
        run_command("gengap", train.command, ["--print_config", f"--{setting}", address])
    (tmp_path / "config.yaml").write_text(capsys.readouterr().out)
    for words, is_refused in (([], True), ([f"--{setting}", address], False)):
        with pytest.raises(SystemExit) as left:
            run_command("gengap", train.command, ["--resume", "--out", str(tmp_path), "--print_config", *words])
        assert left.value.code == (2 if is_refused else 0)
        said = capsys.readouterr().err
        assert (f"if it is yours, add --{setting} {address}" in said) == is_refused
