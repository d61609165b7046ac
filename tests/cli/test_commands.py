"""The commands as users start them: exit codes, words on stderr, and nothing lost."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from gengap_dist.cli.exit_codes import run_command
from gengap_dist.cli.probe import command as probe_command
from gengap_dist.cli.train import command as train_command
from gengap_dist.errors import UsageError
from tests.conftest import FULL, ROOT, thinned, weights

pytestmark = pytest.mark.usefixtures("few_figures")

DEMO = ROOT / "configs" / "demo_train.yaml"
QUICK = ["--mlflow.enabled", "false", "--train.steps", "3", "--probe.num_samples", "32"]


@pytest.fixture
def command(capsys, gengap):
    """`gengap` in this process; with GENGAP_FULL=1 in one of its own."""

    def call(name: str, *words: object) -> "subprocess.CompletedProcess[str]":
        with pytest.raises(SystemExit) as exit_:
            run_command(f"gengap {name}", import_module(f"gengap_dist.cli.{name}").command, [*map(str, words)])
        return subprocess.CompletedProcess([], exit_.value.code, *capsys.readouterr())

    return gengap if FULL else call


def test_one_run_from_start_to_report(tmp_path, gengap):
    done = gengap("train", "--config", DEMO, *QUICK, "--launch.num_processes", 2, "--out", "run")
    assert done.returncode == 0, done.stderr
    assert "test accuracy" in done.stdout
    assert "fc2/centred" in done.stdout
    page = (tmp_path / "run" / "report.html").read_text()
    assert "data:text/csv;base64," in page
    assert "http" not in page.replace("http-equiv", "")  # self-contained
    assert json.loads((tmp_path / "run" / "run.json").read_text())["world_size"] == 2


@pytest.mark.full  # else: test_kills.py compares a run under torchrun with one of our own ranks
def test_torchrun_gives_the_same_run(tmp_path, gengap):
    words = ["--config", DEMO, *QUICK, "--train.dtype", "float64"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "3", "-m", "gengap_dist.train"]
    done = subprocess.run([*torchrun, *map(str, words), "--out", "joined"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("test accuracy") == 1
    assert train_command([*map(str, words), "--out", "alone"]) == 0
    one, other = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("joined", "alone"))
    assert (one["world_size"], one["launcher"], other["world_size"]) == (3, "torchrun", 1)
    assert one["result"]["test/loss"] == pytest.approx(other["result"]["test/loss"], rel=1e-9)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--batch.globl_size", "3"], "did you mean --batch.global_size"),
        (["--batch.global_size", "many"], "batch.global_size (many) is not valid"),
        (["--batch.global_size", "-4"], "greater than 0"),
        (["--batch.global_size", "100000"], "larger than the training set of 1294"),
        (["--batch.ghost_size", "64", "--batch.global_size", "1000"], "ghost groups of 64"),
        (["--data.name", "mnist"], "does not contain mnist"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--out", "/proc/nowhere"], "cannot be written"),
        (["--model.name", "tests.nothing:make"], "cannot be imported"),
    ],
)
def test_usage_errors_are_one_sentence_and_leave_nothing(tmp_path, capsys, words, says):
    out = [] if "--out" in words else ["--out", "run"]
    with pytest.raises(SystemExit) as exit_:
        run_command("gengap train", train_command, [*words, *out])
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_usage_errors_from_ranks_and_with_debug(tmp_path, gengap):
    words = ["--launch.num_processes", 2, "--batch.global_size", 5000, "--mlflow.enabled", "false", "--out", "run"]
    done = gengap("train", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("gengap train: batch.global_size (5000) is larger")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
    if FULL:  # else: the same function for errors of any kind, below
        assert "Traceback" in gengap("train", *words, "--debug").stderr


def test_an_existing_run_is_not_overwritten(tmp_path, gengap):
    assert train_command(["--config", str(DEMO), *QUICK, "--out", "run"]) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    done = gengap("train", "--config", DEMO, *QUICK, "--out", "run")
    assert done.returncode == 2
    assert "add --resume" in done.stderr
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_a_schedulers_leftovers_do_not_make_a_single_process_wait(tmp_path, gengap, new_gengap):
    leftovers = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3"}
    done = new_gengap("train", *QUICK, "--out", "run", **leftovers)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["world_size"] == 1
    if FULL:
        assert "already holds" in gengap("train", *QUICK, "--out", "run", **leftovers).stderr


def test_divergence_ends_well(tmp_path, gengap):
    done = gengap("train", *QUICK, "--train.steps", 20, "--optim.lr", 1e9, "--out", "run")
    assert done.returncode == 0, done.stderr
    assert "diverged" in done.stdout
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "diverged"


def test_a_rank_that_dies_is_reported_and_the_run_can_go_on(tmp_path, gengap):
    (tmp_path / "deadly.py").write_text(
        "import os\n"
        "from gengap_dist.models import lenet5\n"
        "def make(num_classes, in_channels):\n"
        "    model = lenet5(num_classes=num_classes, in_channels=in_channels)\n"
        "    def hook(module, args):\n"
        "        steps = module.training and len(args[0]) > 2  # two samples are an inspection before\n"
        "        if steps and os.environ['RANK'] == '1' and os.path.exists('deadly'):\n"
        "            os.kill(os.getpid(), 9)\n"
        "    model.register_forward_pre_hook(hook)\n"
        "    return model\n"
    )
    (tmp_path / "deadly").touch()
    words = [*QUICK, "--launch.num_processes", 2, "--model.name", "deadly:make", "--out", "run"]
    done = gengap("train", *words)
    assert done.returncode == 1
    assert "rank 1 died with exit code -9" in done.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    if FULL:  # else: resuming is under test in training/test_resume.py
        (tmp_path / "deadly").unlink()
        assert gengap("train", *words, "--resume").returncode == 0
        assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"


@pytest.mark.filterwarnings("default")  # what MLflow warns of is not ours to mend
def test_probe_measures_untrained_and_trained(tmp_path, mlflow_db, gengap, new_gengap):
    done = new_gengap(
        "probe", "--model", "lenet5", "--probe.num_samples", 64, "--probe.layers", "fc*", "--out", "spectra"
    )
    assert done.returncode == 0, done.stderr
    assert "fc2/centred" in done.stdout
    assert "conv1" not in done.stdout
    assert (tmp_path / "spectra" / "spectra" / "step_00000000.npz").exists()
    assert (tmp_path / "spectra" / "figures" / "all_spectra.svg").stat().st_size > 5_000
    more = [] if FULL else ["--probe.layers", '["conv2", "fc2"]']
    assert train_command([*QUICK, *more, "--algorithm.weight_averaging", "ema", "--out", "run"]) == 0  # its network
    words = ["--probe.num_samples", "16,32", "--probe.diagnostics", "norms,hessian"]
    done = gengap("probe", "--model", "run", *words, "--out", "again", "--mlflow")
    assert done.returncode == 0, done.stderr
    assert "hessian/eigenvalue_1" in done.stdout
    from gengap_dist.runs.run_folder import load_spectra, read_metrics

    others = ["again"]
    if FULL:
        assert gengap("probe", "--model", "run", "--out", "third").returncode == 0
        others.append("third")
    for step in ("00000000", "00000003"):  # the untrained network and the run's own
        for other in others:
            of_run = load_spectra(tmp_path / "run" / "spectra" / f"step_{step}.npz")
            again = load_spectra(tmp_path / other / "spectra" / f"step_{step}.npz")
            assert of_run.keys() == again.keys()
            assert all((of_run[key][0] == again[key][0]).all() for key in of_run), (step, other)
    lines = {line["step"]: line for line in read_metrics(tmp_path / "again")}
    ran = {line["step"]: line for line in read_metrics(tmp_path / "run")}
    assert lines.keys() == {0, 3}
    assert "effective_rank/fc2/n16" in lines[3]
    assert lines[3]["distance_from_init"] == ran[3]["distance_from_init"] > 0
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{mlflow_db}")
    runs = client.search_runs([client.get_experiment_by_name("gengap_dist").experiment_id])
    (sent,) = [run for run in runs if run.info.run_name == "again"]
    assert sent.data.metrics["hessian/trace"] == pytest.approx(lines[3]["hessian/trace"])
    assert {"figures", "report.html", "spectra"} <= {f.path for f in client.list_artifacts(sent.info.run_id)}


def test_probe_of_a_runs_other_weights_and_of_a_file(tmp_path, command):
    import torch

    assert train_command([*QUICK, "--probe.enabled", "false", "--out", "run"]) == 0
    for which, shown in {"@0": "step 0", "@best": "step", **({"@3": "step 3"} if FULL else {})}.items():
        done = command("probe", "--model", f"run{which}", "--probe.diagnostics", "[]")
        assert done.returncode == 0, done.stderr
        assert shown in done.stdout
    done = command("probe", "--model", "run@7")
    assert done.returncode == 2
    assert "has no weights of step 7: choose 0, 3, last (step 3)" in done.stderr
    state = weights(tmp_path / "run")
    torch.save({"state_dict": state}, tmp_path / "weights.pt")
    words = ["--probe.num_samples", 60, "--probe.diagnostics", "[]"]
    from_file = command("probe", "--model", "lenet5", "--weights", "weights.pt", *words)
    from_run = command("probe", "--model", "run", *words)
    assert from_file.returncode == 0, from_file.stderr
    assert from_file.stdout.splitlines()[1:] == from_run.stdout.splitlines()[1:]  # all but the title
    done = command("probe", "--model", "mlp", "--weights", "weights.pt")
    assert done.returncode == 2
    assert "is of another model" in done.stderr
    (tmp_path / "mine").mkdir()
    for name, is_left in (("refused", False), ("mine", True)):
        done = command("probe", "--model", "nothing", "--out", name)
        assert done.returncode == 2
        assert (tmp_path / name).exists() is is_left


@pytest.mark.parametrize(
    ("model", "layer"),
    thinned(
        [("torchvision:resnet18", "layer3.1.relu#2"), ("timm:resnet10t", "layer3.0.act2")],
        lambda model, layer: "timm" in model,
    ),
)
def test_probe_of_other_peoples_models(gengap, model, layer):
    done = gengap("probe", "--model", model, "--probe.num_samples", 64, "--probe.views", "pool,flatten")
    assert done.returncode == 0, done.stderr
    assert f"{layer}/flatten/centred" in done.stdout
    assert "16,384 > N" in done.stdout or "4,096 > N" in done.stdout


@pytest.mark.full  # else: spectra on several ranks, in tests/probes; torchrun, in test_launch_scripts.py
def test_probe_under_torchrun_is_the_probe_alone(tmp_path, gengap):
    words = ["--model", "lenet5", "--probe.num_samples", "200", "--probe.views", "pool,flatten"]
    words += ["--train.dtype", "float64"]
    assert probe_command([*words, "--out", "one"]) == 0
    torchrun = Path(sys.executable).parent / "torchrun"
    command = [torchrun, "--standalone", "--nproc_per_node", "2", "-m", "gengap_dist", "probe", *words, "--out", "two"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    from gengap_dist.runs.run_folder import load_spectra

    one, two = (load_spectra(tmp_path / name / "spectra" / "step_00000000.npz") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for key in one:
        assert abs(one[key][0] - two[key][0]).max() <= 1e-9 * one[key][0][0], key


OTHERS = [
    ("probe", ["--model", "lenet"], "did you mean lenet5"),
    ("probe", ["--model", "."], "a folder without run.json"),
    ("probe", ["--model", "lenet5", "--probe.layers", "fc22"], "did you mean fc2"),
    ("probe", ["--model", "lenet5", "--probe.num_samples", "1"], "probe.num_samples (1)"),
    ("probe", ["--model", "lenet5", "--mlflow"], "--mlflow sends what is in --out"),
    ("probe", ["--model", "lenet5", "--probe.views", "chanel"], "probe.views (chanel)"),
    ("probe", ["--model", "torchvision:resnet81"], "did you mean resnet18"),
    ("probe", ["--model", "timm:resnet81"], "is not a network of timm"),
    ("probe", ["--model", "torchvision:vit_b_16", "--data.image_size", "33"], "cannot be built for images of 33 x 33"),
    ("probe", ["--model", "lenet5", "--weights", "nowhere.pt"], "nowhere.pt is missing"),
    (
        "probe",
        ["--model", "lenet5", "--probe.memory_mib", "1", "--probe.views", "flatten"],
        "memory_mib: increase it to",
    ),
    ("plan", ["--nods", "3"], "did you mean --nodes"),
    ("report", ["nowhere"], "neither run.json nor study.json"),
    ("study", [], "a study needs its arms"),
    ("study", ["--config", str(DEMO)], "study is not set"),
]


@pytest.mark.parametrize(("command", "words", "says"), OTHERS)
def test_usage_errors_of_the_other_commands(capsys, command, words, says):
    with pytest.raises(SystemExit) as exit_:
        run_command(f"gengap {command}", import_module(f"gengap_dist.cli.{command}").command, words)
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert says in said
    assert "Traceback" not in said


FIRST = [OTHERS[0], OTHERS[-3], OTHERS[-2]]  # of each command


@pytest.mark.parametrize(("command", "words", "says"), thinned(OTHERS, lambda *row: row in FIRST))
def test_usage_errors_of_the_other_commands_in_processes(gengap, command, words, says):
    done = gengap(command, *words)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.processes
def test_gengap_is_the_four_commands(tmp_path):
    script = Path(sys.executable).parent / "gengap"
    assert "study" in subprocess.run([script, "--help"], capture_output=True, text=True, check=True).stdout
    done = subprocess.run([script, "trian"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "did you mean train" in done.stderr
    help_ = subprocess.run([script, "train", "--help"], capture_output=True, text=True, check=True).stdout
    assert "--batch.global_size" in help_


@pytest.mark.processes
def test_a_closed_pipe_is_no_error(tmp_path):
    command = f"{sys.executable} -m gengap_dist.train --help | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=os.environ)
    assert "Traceback" not in done.stderr


def test_unforeseen_errors_are_one_line(capsys):
    def broken(argv):
        raise ZeroDivisionError("a\nb")

    with pytest.raises(SystemExit) as exit_:
        run_command("gengap x", broken, [])
    assert exit_.value.code == 1
    assert capsys.readouterr().err == "gengap x: ZeroDivisionError: a b; --debug shows the traceback\n"

    def mistaken(argv):
        raise UsageError("no")

    with pytest.raises(SystemExit) as exit_:
        run_command("gengap x", mistaken, [])
    assert exit_.value.code == 2
    assert "Traceback" not in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_:
        run_command("gengap x", mistaken, ["--debug"])
    assert exit_.value.code == 2
    assert "Traceback" in capsys.readouterr().err
