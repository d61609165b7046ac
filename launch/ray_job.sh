#!/usr/bin/env bash
# Submit one run to a Ray cluster and follow its log.
#
# usage: launch/ray_job.sh CONFIG OUT [--section.setting VALUE]...
#
#   CONFIG  settings file inside this repository, which is uploaded with the job (.rayignore says what stays here)
#   OUT     run folder: an absolute path that all nodes share; a run that is already there goes on
#
# environment [default]:
#   RAY_API_SERVER_ADDRESS  the cluster's dashboard [http://127.0.0.1:8265]
#   RAY_AUTH_MODE           token, or disabled where the cluster has it so [token]
#   RAY_AUTH_TOKEN          its token [the one in ~/.ray/auth_token]
#   NUM_PROCESSES           ranks [2]
#   MLFLOW_*                go with the job, without passwords and tokens: whoever may see the dashboard can read a
#                           job's variables. The cluster must know them (docs/clusters.md#secrets)
#   TORCH_FR_*, TORCH_NCCL_*  go with the job
#   PYTHON                  interpreter here, with Ray [python]
#
# Each rank has a GPU if the cluster's nodes have that many; `--launch.device cuda` waits for nodes that bring them.

set -euo pipefail

usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; }
case ${1:-} in -h | --help) usage && exit 0 ;; esac
[ $# -ge 2 ] || { usage >&2 && exit 2; }
config=$1 out=$2
shift 2

cd "$(dirname "$0")/.."
[[ $config != /* && -f $config ]] || { echo "CONFIG ($config) must be a file, relative to $PWD" >&2 && exit 2; }
[[ $out == /* ]] || { echo "OUT ($out) must be an absolute path: ranks have a working folder of their own" >&2 && exit 2; }
[[ "$*" != *://*:*@* ]] || { echo "a job's command line can be read by whoever may see the dashboard: it must hold no" \
  "password (docs/clusters.md#secrets)" >&2 && exit 2; }
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
python=${PYTHON:-python}

runtime_env=$(mktemp)
trap 'rm -f "$runtime_env"' EXIT
"$python" - launch/ray_runtime_env.yaml "$out" >"$runtime_env" <<'PYTHON'
import os, sys, yaml
from gengap_dist.credentials import is_secret, without_logins

runtime_env = yaml.safe_load(open(sys.argv[1]))
given = {name: value for name, value in os.environ.items() if name.startswith(("MLFLOW_", "TORCH_FR_", "TORCH_NCCL_"))}
if secret := [name for name, value in given.items() if is_secret(name) or without_logins(value) != value]:
    print(f"{', '.join(secret)}: passwords and tokens stay here, see docs/clusters.md#secrets", file=sys.stderr)
given = {name: without_logins(value) for name, value in given.items() if not is_secret(name)}
recorder = runtime_env["env_vars"] | {"TORCH_FR_DUMP_TEMP_FILE": f"{sys.argv[2]}/nccl_trace_rank_"}
for name, older in {"BUFFER_SIZE": "TRACE_BUFFER_SIZE", "DUMP_TEMP_FILE": "DEBUG_INFO_TEMP_FILE"}.items():
    recorder[f"TORCH_FR_{name}"] = given.get(f"TORCH_NCCL_{older}", recorder[f"TORCH_FR_{name}"])
runtime_env["env_vars"] = recorder | given
yaml.safe_dump(runtime_env, sys.stdout)
PYTHON

"$python" -m ray.scripts.scripts job submit \
  --address "${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}" \
  --working-dir . --runtime-env "$runtime_env" \
  -- python -m gengap_dist.train --config "$config" --out "$out" --resume \
  --launch.launcher ray --launch.num_processes "${NUM_PROCESSES:-2}" "$@"
