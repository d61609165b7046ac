#!/usr/bin/env bash
# One run with DeepSpeed's own launcher: on this machine, or over ssh (pdsh) on the nodes of a hostfile.
#
# usage: launch/deepspeed/run.sh CONFIG OUT [--section.setting VALUE]...
#
#   CONFIG  settings file, at the same path on every node
#   OUT     run folder that all nodes share; a run that is already there goes on
#
# environment [default]:
#   NUM_PROCESSES  ranks on this machine; without it the hostfile decides
#   HOSTFILE       nodes and their GPUs [launch/deepspeed/hostfile]
#   STRATEGY       zero0, zero1, zero2, zero3 or any other launch.strategy [zero2]
#   DEVICE         cuda or cpu [cuda]
#   MASTER_PORT    port on the first node [29500]
#   PYTHON         interpreter [python]
#
# This launcher does not start dead ranks again: call the script once more, and the run goes on.

set -euo pipefail

usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; }
case ${1:-} in -h | --help) usage && exit 0 ;; esac
[ $# -ge 2 ] || { usage >&2 && exit 2; }
config=$1 out=$2
shift 2

if [ -n "${NUM_PROCESSES:-}" ]; then
  where=(--num_gpus "$NUM_PROCESSES")
else
  hostfile=${HOSTFILE:-$(dirname "$0")/hostfile}
  [ -f "$hostfile" ] || { echo "HOSTFILE ($hostfile) is no file: name one, or set NUM_PROCESSES" >&2 && exit 2; }
  # DeepSpeed gives all words to a shell of each node (pdsh), and quotes none of them against it
  words=("$PWD" "$config" "$out" "$@" "${STRATEGY:-}" "${DEVICE:-}" "${MASTER_PORT:-}" "${PYTHONPATH:-}")
  special=$'$`\\"\';&|<>()*?!#~%\n\t'
  [[ ${words[*]} != *["$special"]* ]] || { echo "a word of the command, or this folder's name, has a character" \
    "such as \$ or a quote, which a shell on the nodes would interpret: write the setting in CONFIG, or rename" >&2 && exit 2; }
  # a missing hostfile, or one with a single node, would otherwise mean this machine, without a word
  where=(--hostfile "$hostfile" --force_multi)
fi
device=${DEVICE:-cuda}
[ "$device" = cuda ] || export DS_ACCELERATOR=$device

# NCCL's flight recorder: where GPUs hang, each rank leaves OUT/nccl_trace_rank_<R> (docs/clusters.md); nodes of a
# hostfile read these names from ~/.deepspeed_env, not from here
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-${TORCH_NCCL_TRACE_BUFFER_SIZE:-2000}}
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
export TORCH_FR_DUMP_TEMP_FILE=${TORCH_FR_DUMP_TEMP_FILE:-${TORCH_NCCL_DEBUG_INFO_TEMP_FILE:-$out/nccl_trace_rank_}}

"${PYTHON:-python}" -m deepspeed.launcher.runner "${where[@]}" --master_port "${MASTER_PORT:-29500}" \
  --no_local_rank --module gengap_dist.train --config "$config" --out "$out" --resume \
  --launch.launcher torchrun --launch.strategy "${STRATEGY:-zero2}" --launch.device "$device" "$@" &
runner=$!

# Told to leave, the launcher of a hostfile tells its nodes. The local one would go and leave its ranks running: its
# child is the one that tells them, and then waits 30 seconds.
tell=(kill -TERM "$runner")
[ -z "${NUM_PROCESSES:-}" ] || tell=(pkill -TERM -P "$runner")
trap '"${tell[@]}" || true' TERM INT
while true; do
  wait "$runner" && code=0 || code=$?
  kill -0 "$runner" 2>/dev/null || break # a signal ends `wait` too: only then is the launcher still there
done
exit "$code"
