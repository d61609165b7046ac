"""What a person submits: linted, held against schemas, every command line parsed by the tools that would get it.

No container engine, cluster or network is needed. `make check` runs this file, and `make test` leaves it out.
"""

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import warnings
import zipfile
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from check_jsonschema.builtin_schemas import get_builtin_schema

from gengap_dist.cli.options import Options, parse
from gengap_dist.config.loading import resolve
from gengap_dist.config.sections import RunConfig
from gengap_dist.errors import UsageError
from tests.conftest import ROOT

SCRIPTS = sorted([*(ROOT / "launch").rglob("*.sh"), *(ROOT / "launch").rglob("*.sbatch")])
TEXTS = sorted(path for top in ("launch", "docker") for path in (ROOT / top).rglob("*") if path.is_file())
KUBERNETES = sorted((ROOT / "launch" / "kuberay").glob("*.yaml"))
COMPOSE, DOCKERFILE = ROOT / "docker" / "compose.yaml", ROOT / "docker" / "Dockerfile"
SETTINGS = ("--optim.lr", "0.125")  # what the user adds must arrive


def name(path):
    return str(path.relative_to(ROOT))


def tool(command: str) -> str:
    found = shutil.which(command, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert found, f'{command} is missing: pip install -e ".[dev]"'
    return found


def lint(*words) -> None:
    done = subprocess.run([*map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def load(path):
    return yaml.safe_load(path.read_text())


# -- our own command, wherever it stands ----------------------------------------------------------------------------


def check_train(words: list[str]) -> RunConfig:
    """The settings of `... -m gengap_dist.train WORDS`; raises UsageError if `train` would not take them."""
    argv = words[words.index("gengap_dist.train") + 1 :]
    options, overrides = parse(Options, argv, prog="gengap train", description="", settings=RunConfig)
    assert options.resume, "a launch file starts runs that go on"
    assert options.out is not None
    # the images have the repository's configs in /app
    files = [ROOT / str(path).removeprefix("/app/") for path in options.config]
    assert files
    return resolve(RunConfig, files, overrides)


# -- scripts --------------------------------------------------------------------------------------------------------

RECORDER = f"""#!{sys.executable}
# stands where a script's interpreter, srun or scontrol would: `-m MODULE ...` is written down instead of run
import json, os, sys
words = sys.argv[1:]
while os.path.basename(sys.argv[0]) == "srun" and words[0].startswith("--"):
    del words[0]
if "-m" not in words:
    os.execv(sys.executable, [sys.executable, *words])
at = words.index("-m")
record = {{"words": words[at + 1 :], "env": dict(os.environ)}}
if "--runtime-env" in words:
    record["runtime_env"] = open(words[words.index("--runtime-env") + 1]).read()
json.dump(record, open(os.environ["RECORD"], "w"))
"""


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """`recorded("launch/x.sh", **env)`: module and words of what the script would have run, and its environment."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    for command in ("python", "srun"):
        (bin_ / command).write_text(RECORDER)
        (bin_ / command).chmod(0o755)
    monkeypatch.chdir(ROOT)

    def run(script: str, *words: str, **env: str) -> dict:
        record = tmp_path / "record.json"
        slurm = {"SLURM_JOB_ID": "7", "SLURMD_NODENAME": "node0", "SLURM_JOB_NUM_NODES": "2"}
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW", "SLURM", "RAY", "TORCH_"))}
        done = subprocess.run(
            ["bash", script, "configs/demo_train.yaml", str(tmp_path / "run"), *words],
            env=clean | slurm | {"RECORD": str(record), "PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}"} | env,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(record.read_text())

    return run


def test_scripts_are_clean():
    assert len(SCRIPTS) == 5
    lint(tool("shellcheck"), *SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS, ids=name)
def test_scripts_say_how_they_are_used(script):
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in script.read_text()
    wrong = subprocess.run(["bash", script], capture_output=True, text=True)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    asked = subprocess.run(["bash", script, "--help"], capture_output=True, text=True)
    assert (asked.returncode, asked.stderr) == (0, "")
    assert asked.stdout == wrong.stderr
    assert f"{name(script)} CONFIG OUT" in asked.stdout


@pytest.mark.parametrize(
    ("script", "env", "backend"),
    [
        ("launch/ray_job.sh", {"NUM_PROCESSES": "3"}, "ray"),
        ("launch/torchrun/multi_node.sh", {}, "torchrun"),
        (
            "launch/torchrun/multi_node.sh",
            {"NNODES": "1:4", "RDZV_ENDPOINT": "node0:1", "LOCAL_ADDR": "::1"},
            "torchrun",
        ),
        ("launch/slurm/torchrun.sbatch", {"SLURM_GPUS_ON_NODE": "8"}, "torchrun"),
        ("launch/slurm/ray.sbatch", {"SLURM_GPUS_ON_NODE": "4"}, "ray"),
        ("launch/deepspeed/run.sh", {}, "torchrun"),
        ("launch/deepspeed/run.sh", {"NUM_PROCESSES": "2", "DEVICE": "cpu", "STRATEGY": "zero3"}, "torchrun"),
    ],
)
def test_scripts_speak_to_train(recorded, script, env, backend):
    config = check_train(recorded(script, *SETTINGS, **env)["words"])
    assert config.launch.launcher == backend
    assert config.optim.lr == 0.125
    if backend == "ray":
        assert config.launch.num_processes == {"launch/ray_job.sh": 3, "launch/slurm/ray.sbatch": 8}[script]


RECORDER_NAMES = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_FR_DUMP_TEMP_FILE")


@pytest.mark.parametrize("script", SCRIPTS, ids=name)
@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, ("2000", "1", "{out}/nccl_trace_rank_")),
        (
            {"TORCH_FR_BUFFER_SIZE": "7", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0", "TORCH_FR_DUMP_TEMP_FILE": "/x/y"},
            ("7", "0", "/x/y"),
        ),
        (
            {"TORCH_NCCL_TRACE_BUFFER_SIZE": "8", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "/x/z"},
            ("8", "1", "/x/z"),
        ),
    ],
)
def test_gpus_that_hang_leave_a_trace(recorded, tmp_path, script, given, wanted):
    """What is set already stays, also under the names that torch had before."""
    record = recorded(name(script), *SETTINGS, **given)
    env = yaml.safe_load(record["runtime_env"])["env_vars"] if "runtime_env" in record else record["env"]
    assert tuple(env[name] for name in RECORDER_NAMES) == tuple(w.format(out=tmp_path / "run") for w in wanted)


@pytest.mark.parametrize("script", ["launch/torchrun/multi_node.sh", "launch/slurm/torchrun.sbatch"])
def test_torchrun_takes_it(recorded, script):
    from torch.distributed.run import parse_args

    record = recorded(script, *SETTINGS, NPROC_PER_NODE="4", MAX_RESTARTS="5")
    assert record["words"][0] == "torch.distributed.run"
    args = parse_args(record["words"][1:])
    assert (args.nproc_per_node, args.max_restarts, args.rdzv_backend) == ("4", 5, "c10d")
    assert (args.module, args.training_script) == (True, "gengap_dist.train")
    assert args.nnodes == ("2" if "slurm" in script else "1")
    assert record["env"]["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "100"


def test_ray_job_submit_takes_it(recorded):
    from ray.job_submission import JobSubmissionClient  # noqa: F401  (what `submit` needs: ray[default])
    from ray.runtime_env import RuntimeEnv
    from ray.scripts.scripts import cli as ray

    given = {"MLFLOW_TRACKING_URI": "http://mlflow:5000", "MLFLOW_EXPERIMENT_NAME": "a: 'b'"}
    record = recorded("launch/ray_job.sh", *SETTINGS, RAY_API_SERVER_ADDRESS="http://head:8265", **given)
    assert record["words"][:3] == ["ray.scripts.scripts", "job", "submit"]
    submit = ray.commands["job"].commands["submit"]
    params = submit.make_context("submit", record["words"][3:]).params
    assert (params["address"], params["working_dir"]) == ("http://head:8265", ".")
    assert params["entrypoint"][:3] == ("python", "-m", "gengap_dist.train")
    assert record["env"]["RAY_AUTH_MODE"] == "token"
    runtime_env = yaml.safe_load(record["runtime_env"])
    RuntimeEnv(**runtime_env)
    assert {k: v for k, v in runtime_env["env_vars"].items() if k.startswith("MLFLOW")} == given
    assert not Path(params["runtime_env"]).exists()


def test_a_ray_job_carries_no_secret(recorded):
    """Its command line and its variables are in the dashboard, and in logs that everybody can read."""
    secret = {"MLFLOW_TRACKING_URI": "http://me:hunter22@mlflow:5000", "MLFLOW_TRACKING_TOKEN": "hunter22"}
    record = recorded("launch/ray_job.sh", MLFLOW_TRACKING_PASSWORD="hunter22", **secret)
    assert "hunter22" not in f"{record['words']} {record['runtime_env']}"
    variables = yaml.safe_load(record["runtime_env"])["env_vars"]
    assert {name: v for name, v in variables.items() if "MLFLOW" in name} == {
        "MLFLOW_TRACKING_URI": "http://mlflow:5000"
    }
    command = [
        "bash",
        "launch/ray_job.sh",
        "configs/demo_train.yaml",
        "/runs/x",
        "--mlflow.tracking_uri",
        "http://me:pw@h",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, "password" in done.stderr) == (2, "", True)


def test_ray_job_wants_paths_that_hold_on_the_nodes():
    for config, out in (
        ("/etc/hostname", "/runs/x"),
        ("configs/none.yaml", "/runs/x"),
        ("configs/demo_train.yaml", "runs/x"),
    ):
        done = subprocess.run(["bash", ROOT / "launch/ray_job.sh", config, out], capture_output=True, text=True)
        assert done.returncode == 2
        assert "must be" in done.stderr


@pytest.mark.parametrize(("env", "num_gpus"), [({}, None), ({"SLURM_GPUS_ON_NODE": "4"}, 4)])
def test_symmetric_run_takes_it(recorded, env, num_gpus):
    from ray.scripts.scripts import cli as ray
    from ray.scripts.symmetric_run import curate_and_validate_ray_start_args, symmetric_run

    record = recorded("launch/slurm/ray.sbatch", *SETTINGS, **env)
    words = record["words"]
    assert words[:2] == ["ray.scripts.scripts", "symmetric-run"]
    params = symmetric_run.make_context("symmetric-run", words[2:]).params
    assert (params["address"], params["min_nodes"]) == ("node0:20007", 2)
    start = curate_and_validate_ray_start_args(words[2 : words.index("--")])
    assert ray.commands["start"].make_context("start", start).params["num_gpus"] == num_gpus
    assert check_train(words).launch.ray_address == "node0:20007"
    assert (record["env"]["RAY_AUTH_MODE"], len(record["env"]["RAY_AUTH_TOKEN"])) == ("token", 64)


DRIVER = """#!/usr/bin/env bash
# in place of the interpreter: Ray's symmetric-run is what it runs; train leaves when it is told to
if [[ " $* " == *" symmetric-run "* ]]; then
  while [ "$1" != -- ]; do shift; done
  shift && "$@"
  exit
elif [ "$1" = -c ]; then echo token && exit
fi
mkdir -p "$OUT"
trap 'echo "{\\"status\\": \\"$STATUS\\"}" >"$OUT/run.json"; exit "$CODE"' TERM
touch "$OUT/started"
[[ $* == *torchrun* ]] && kill -TERM $$
for _ in {1..100}; do sleep 0.1; done
"""


@pytest.mark.parametrize("script", ["torchrun", "ray"])
@pytest.mark.parametrize(
    ("status", "code", "again"), [("preempted", 75, True), ("finished", 0, False), ("failed", 1, False)]
)
def test_slurm_requeues_what_was_preempted(tmp_path, script, status, code, again):
    """The real thing was tried on a one-node Slurm; this holds the script's decision."""
    bin_, out = tmp_path / "bin", tmp_path / "run"
    bin_.mkdir()
    stubs = {"python": DRIVER, "srun": '#!/bin/sh\n[ "$1" = --kill-on-bad-exit=0 ] && shift\nexec "$@"\n'}
    stubs["scontrol"] = '#!/bin/sh\necho "$@" >"$OUT/scontrol"\n'
    for command, text in stubs.items():
        (bin_ / command).write_text(text)
        (bin_ / command).chmod(0o755)
    env = {"SLURM_JOB_ID": "7", "SLURMD_NODENAME": "node0", "SLURM_JOB_NUM_NODES": "1", "TMPDIR": str(tmp_path)}
    env |= {"PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}", "OUT": str(out), "STATUS": status, "CODE": str(code)}
    job = subprocess.Popen(["bash", ROOT / f"launch/slurm/{script}.sbatch", "x.yaml", out], env=os.environ | env)
    if script == "ray":  # as `--signal=B:USR1` does
        while not (out / "started").exists():
            assert job.poll() is None
            time.sleep(0.05)
        job.send_signal(signal.SIGUSR1)
    assert job.wait(30) == code
    assert (out / "scontrol").exists() == again
    if again:
        assert (out / "scontrol").read_text() == "requeue 7\n"


def test_deepspeed_takes_it(recorded, tmp_path):
    from deepspeed.launcher.runner import fetch_hostfile, parse_args

    for env in ({}, {"NUM_PROCESSES": "2", "DEVICE": "cpu"}):
        record = recorded("launch/deepspeed/run.sh", *SETTINGS, **env)
        assert record["words"][0] == "deepspeed.launcher.runner"
        args = parse_args(record["words"][1:])
        assert (args.module, args.no_local_rank, args.user_script) == (True, True, "gengap_dist.train")
        if env:
            assert (args.num_gpus, record["env"]["DS_ACCELERATOR"]) == (2, "cpu")
        else:
            assert dict(fetch_hostfile(args.hostfile)) == {"node0": 8, "node1": 8}
            assert args.force_multi  # one node in the file is that node, not this machine


@pytest.mark.parametrize("word", ["$(touch x)", "`touch x`", "a;touch x", "it's", 'a"b', "a\nb", "*"])
def test_a_word_that_a_shell_of_the_nodes_would_interpret_is_refused(recorded, tmp_path, word):
    """DeepSpeed's launcher gives the whole command to a shell of each node."""
    with pytest.raises(AssertionError, match="shell on the nodes"):
        recorded("launch/deepspeed/run.sh", f"--data.root={word}")
    assert not (tmp_path / "record.json").exists()
    recorded("launch/deepspeed/run.sh", f"--data.root={word}", NUM_PROCESSES="2")  # no shell is between


def test_no_file_has_a_name_in_the_temporary_folder_that_others_can_predict():
    for path in SCRIPTS:
        assert not re.findall(r"/tmp\b|TMPDIR", path.read_text()), path


def test_the_upload_leaves_data_and_runs_here(tmp_path):
    from ray._private.runtime_env.packaging import create_package

    tree = tmp_path / "tree"
    left = ("data/MNIST/raw/x", "runs/a/run.json", "studies/a/x", "mlflow.db", "mlartifacts/1/x", ".venv/bin/python")
    left += (".git/HEAD", "gengap_dist/__pycache__/a.pyc", "demo/study.json", "docker/.env", "a.npz", "slurm-x-7.out")
    taken = (
        "gengap_dist/data/digits.npz",
        "gengap_dist/data/sampler.py",
        "configs/demo_train.yaml",
        "launch/ray_job.sh",
    )
    for file in (*left, *taken):
        (tree / file).parent.mkdir(parents=True, exist_ok=True)
        (tree / file).touch()
    shutil.copy(ROOT / ".rayignore", tree)
    create_package(str(tree), tmp_path / "upload.zip", include_gitignore=False)
    names = zipfile.ZipFile(tmp_path / "upload.zip").namelist()
    assert {n for n in names if not n.endswith("/")} == {*taken, ".rayignore"}


# -- Kubernetes -----------------------------------------------------------------------------------------------------


def check_kubernetes(manifest: dict) -> None:
    """Raise for a manifest that Kubernetes or KubeRay would refuse, or whose volumes do not meet."""
    if manifest["apiVersion"] != "ray.io/v1":
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
        return
    jsonschema.validate(manifest, load(ROOT / "tests" / "kuberay.schema.yaml"))
    for template in pod_templates(manifest):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": template["spec"]}
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
        volumes = {volume["name"] for volume in template["spec"].get("volumes", ())}
        for container in template["spec"]["containers"]:
            mounts = {mount["name"] for mount in container.get("volumeMounts", ())}
            if mounts != volumes:
                raise ValueError(f"{container['name']} mounts {mounts} of {volumes}")


def pod_templates(tree) -> list[dict]:
    """Every pod template below a key that holds one."""
    found = []
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        found += [value] if key in ("template", "submitterPodTemplate") else pod_templates(value)
    return found


@pytest.mark.parametrize("path", KUBERNETES, ids=name)
def test_kubernetes_manifests(path):
    check_kubernetes(load(path))


def test_pods_are_not_root_and_share_the_run_folders():
    claim = load(ROOT / "launch/kuberay/storage.yaml")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    job = load(ROOT / "launch/kuberay/rayjob.yaml")
    *nodes, submitter = sorted(pod_templates(job), key=lambda template: "volumes" not in template["spec"])
    assert len(nodes) == 2
    for template in (*nodes, submitter):
        assert template["spec"]["securityContext"]["runAsNonRoot"]
        for container in template["spec"]["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["resources"].keys() == {"requests", "limits"}
    for template in nodes:
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        assert volumes["runs"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        mounts = {m["name"]: m["mountPath"] for m in template["spec"]["containers"][0]["volumeMounts"]}
        assert mounts["runs"] == "/runs"


def test_only_a_clusters_own_pods_and_its_operator_may_connect():
    policy = load(ROOT / "launch/kuberay/networkpolicy.yaml")["spec"]
    own = policy["podSelector"]
    assert policy["policyTypes"] == ["Ingress"]
    (inside, operator) = policy["ingress"]
    assert inside == {"from": [{"podSelector": own}]}
    assert [port["port"] for port in operator["ports"]] == [8265]
    for file in ("rayjob", "raycluster"):
        for template in pod_templates(load(ROOT / f"launch/kuberay/{file}.yaml")):
            assert template["metadata"]["labels"] == own["matchLabels"]


def test_the_ray_job_is_a_run():
    job = load(ROOT / "launch/kuberay/rayjob.yaml")["spec"]
    words = job["entrypoint"].split()
    config = check_train(words)
    assert config.launch.launcher == "ray"
    assert words[words.index("--out") + 1].startswith("/runs/")
    (ranks,) = job["rayClusterSpec"]["workerGroupSpecs"]
    assert config.launch.num_processes <= ranks["minReplicas"]
    assert (job["shutdownAfterJobFinishes"], job["backoffLimit"] > 0) == (True, True)
    from ray.runtime_env import RuntimeEnv

    runtime_env = yaml.safe_load(job["runtimeEnvYAML"])
    RuntimeEnv(**runtime_env)
    out = words[words.index("--out") + 1]
    wanted = ("2000", "1", f"{out}/nccl_trace_rank_")
    assert tuple(runtime_env["env_vars"][name] for name in RECORDER_NAMES) == wanted
    assert load(ROOT / "launch/kuberay/raycluster.yaml")["spec"] == job["rayClusterSpec"]  # written twice, one thing


# -- containers -----------------------------------------------------------------------------------------------------


def check_compose(tree: dict) -> None:
    """Raise for what Compose would refuse: its schema, and names that stand for nothing."""
    jsonschema.validate(tree, get_builtin_schema("vendor.compose-spec"))
    for service in tree["services"].values():
        wanted = {*service.get("depends_on", ())} - {*tree["services"]}
        wanted |= {config["source"] for config in service.get("configs", ())} - {*tree["configs"]}
        wanted |= {volume.split(":")[0] for volume in service.get("volumes", ())} - {*tree["volumes"]}
        if wanted:
            raise ValueError(f"{wanted} is nowhere")


def test_compose():
    check_compose(load(COMPOSE))


def test_compose_by_its_own_command():
    compose = ["docker", "compose"]
    if not shutil.which("docker") or subprocess.run([*compose, "version"], capture_output=True).returncode:
        compose = ["docker-compose"]
        if not shutil.which("docker-compose"):
            pytest.skip("Docker's compose is not installed; the schema and the names are checked without it")
    filled = dict.fromkeys(variables(ROOT / "docker/env.example"), "1")
    command = [*compose, "-f", str(COMPOSE), "--profile", "train", "config", "--quiet"]
    done = subprocess.run(command, env=os.environ | filled, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def variables(path):
    return re.findall(r"^([A-Z_0-9]+)=", path.read_text(), re.MULTILINE)


def test_compose_variables_are_in_the_example():
    text = COMPOSE.read_text()
    assert {*re.findall(r"\$\{([A-Z_0-9]+)", text)} == {*variables(ROOT / "docker/env.example")}
    for secret in ("POSTGRES_PASSWORD", "S3_ACCESS_KEY", "S3_SECRET_KEY", "RAY_AUTH_TOKEN"):
        assert f"${{{secret}:?" in text  # an empty one is refused
    assert not re.findall(r"(?i)(password|secret|token)\S*: *[a-z0-9]", text)  # none is written here


def test_compose_trains_on_its_cluster():
    services = load(COMPOSE)["services"]
    words = services["train"]["command"].split()
    config = check_train(words)
    assert config.launch.launcher == "ray"
    assert words[words.index("--out") + 1].startswith("/runs/")
    for service in ("ray-head", "ray-worker", "train"):
        assert services[service]["volumes"] == ["runs:/runs"]
        assert services[service]["environment"]["RAY_AUTH_MODE"] == "token"
    from ray.scripts.scripts import cli as ray

    for service in ("ray-head", "ray-worker"):
        words = services[service]["command"].replace("${RAY_WORKER_CPUS:-2}", "2").split()
        assert words[:2] == ["ray", "start"]
        ray.commands["start"].make_context("start", words[2:])
    words = services["train"]["command"].split()
    ray.commands["job"].commands["submit"].make_context("submit", words[3:])


def test_mlflow_server_takes_its_command():
    with warnings.catch_warnings(action="ignore"):  # of MLflow about its own code
        from mlflow.cli import cli as mlflow
    service = load(COMPOSE)["services"]["mlflow"]
    words = service["command"].split()
    params = mlflow.commands["server"].make_context("server", words[2:]).params
    assert "mlflow:5000" in params["allowed_hosts"]
    assert params["artifacts_destination"] == "s3://mlflow"


def test_dockerfile():
    lint(tool("hadolint"), "--config", ROOT / "docker" / "hadolint.yaml", DOCKERFILE)
    text = DOCKERFILE.read_text()
    stages = {*re.findall(r"^FROM .* AS (\S+)", text, re.MULTILINE)}
    built = {service["build"]["target"] for service in load(COMPOSE)["services"].values() if "build" in service}
    assert built <= stages
    (extras,) = re.findall(r'"\.\[(.*?)\]"', text)
    assert {*extras.split(",")} <= {
        *tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    }
    copied = {word for line in re.findall(r"^COPY (?!--from)(.*)", text, re.MULTILINE) for word in line.split()[:-1]}
    copied = {word for word in copied if not word.startswith("--")}
    assert all((ROOT / word).exists() for word in copied)
    kept = {line[1:] for line in (ROOT / "docker/Dockerfile.dockerignore").read_text().split() if line.startswith("!")}
    assert kept == copied


# -- all of them ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", TEXTS, ids=name)
def test_every_file_that_is_named_exists(path):
    for mentioned in re.findall(r"(?<![\w/.])(?:/app/)?((?:launch|docker|configs)/[\w./-]*\w)", path.read_text()):
        if mentioned != "docker/.env":  # the user's own
            assert (ROOT / mentioned).exists(), mentioned


def renamed(tree, path: str, new: str):
    """A copy in which the last key of a dotted path has another name."""
    tree = copy.deepcopy(tree)
    *parents, last = path.split(".")
    below = tree
    for key in parents:
        below = below[int(key) if isinstance(below, list) else key]
    below[new] = below.pop(last)
    return tree


@pytest.mark.parametrize(
    ("file", "path", "new"),
    [
        ("launch/kuberay/storage.yaml", "spec.accessModes", "accessMode"),
        ("launch/kuberay/rayjob.yaml", "spec.entrypoint", "entryPoint"),
        ("launch/kuberay/rayjob.yaml", "spec.backoffLimit", "backOffLimit"),
        ("launch/kuberay/rayjob.yaml", "spec.submitterPodTemplate.spec.restartPolicy", "restart"),
        ("launch/kuberay/rayjob.yaml", "spec.rayClusterSpec.authOptions.mode", "modes"),
        ("launch/kuberay/rayjob.yaml", "spec.rayClusterSpec.workerGroupSpecs.0.minReplicas", "minReplica"),
        ("launch/kuberay/raycluster.yaml", "spec.headGroupSpec.template.spec.securityContext.runAsNonRoot", "nonRoot"),
        ("launch/kuberay/raycluster.yaml", "spec.headGroupSpec.template.spec.containers.0.volumeMounts", "mounts"),
        ("launch/kuberay/raycluster.yaml", "spec.headGroupSpec.template.spec.volumes.0.name", "nam"),
        ("docker/compose.yaml", "services.ray-head.command", "comand"),
        ("docker/compose.yaml", "services.ray-head.healthcheck.interval", "every"),
        ("docker/compose.yaml", "services.postgres", "database"),
        ("docker/compose.yaml", "volumes.runs", "run"),
        ("docker/compose.yaml", "configs.s3", "store"),
    ],
)
def test_a_misspelt_key_is_refused(file, path, new):
    check = check_compose if "compose" in file else check_kubernetes
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError, ValueError)):
        check(renamed(load(ROOT / file), path, new))


def test_other_mistakes_are_refused(tmp_path):
    entrypoint = load(ROOT / "launch/kuberay/rayjob.yaml")["spec"]["entrypoint"]
    for right, wrong, said in (("num_processes", "num_process", "did you mean"), ("ray ", "rays ", "launcher .rays.")):
        with pytest.raises(UsageError, match=said):
            check_train(entrypoint.replace(right, wrong).split())
    (tmp_path / "a.sh").write_text("#!/usr/bin/env bash\nrm -r $1/x\n")
    with pytest.raises(AssertionError, match="SC2086"):
        lint(tool("shellcheck"), tmp_path / "a.sh")
    (tmp_path / "Dockerfile").write_text(DOCKERFILE.read_text().replace("USER 1000\n", "") + "USER root\n")
    with pytest.raises(AssertionError, match="DL3002"):
        lint(tool("hadolint"), "--config", ROOT / "docker" / "hadolint.yaml", tmp_path / "Dockerfile")
