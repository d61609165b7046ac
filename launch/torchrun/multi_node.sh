#!/usr/bin/env bash
# Start this node's ranks with torchrun: run it on every node, with the same arguments.
#
# usage: launch/torchrun/multi_node.sh CONFIG OUT [--section.setting VALUE]...
#
#   CONFIG  settings file, the same on every node
#   OUT     run folder that all nodes share; a run that is already there goes on
#
# environment [default]:
#   NNODES          nodes, or MIN:MAX to go on with the ones that are left [1]
#   NPROC_PER_NODE  ranks on this node, or auto: one per GPU, without GPUs one per core [auto]
#   RDZV_ENDPOINT   HOST:PORT of one of the nodes, the same everywhere; needed for more than one node
#   RDZV_ID         name of this run, the same everywhere [gengap]
#   LOCAL_ADDR      this node's address, if its host name does not resolve
#   MAX_RESTARTS    how often ranks that died, and with MIN:MAX nodes that came or went, are started again [3]
#   PYTHON          interpreter [python]
#
# example, on each of four nodes, of which one may die:
#   NNODES=3:4 RDZV_ENDPOINT=node0:29400 launch/torchrun/multi_node.sh configs/demo_train.yaml /shared/runs/demo

set -euo pipefail

usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; }
case ${1:-} in -h | --help) usage && exit 0 ;; esac
[ $# -ge 2 ] || { usage >&2 && exit 2; }
config=$1 out=$2
shift 2

nnodes=${NNODES:-1}
if [ "$nnodes" = 1 ]; then
  endpoint=${RDZV_ENDPOINT:-localhost:0} # any free port: nobody else has to find it
else
  endpoint=${RDZV_ENDPOINT:?is needed for $nnodes nodes: HOST:PORT of one of them}
fi

# a store of their own for each start of the ranks: torch would keep that of the first, even if its node is gone
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# ranks that were asked to leave save before they go: give them longer than the 30 seconds torchrun would
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-100}
# NCCL's flight recorder: where GPUs hang, each rank leaves OUT/nccl_trace_rank_<R> (docs/clusters.md)
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-${TORCH_NCCL_TRACE_BUFFER_SIZE:-2000}}
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
export TORCH_FR_DUMP_TEMP_FILE=${TORCH_FR_DUMP_TEMP_FILE:-${TORCH_NCCL_DEBUG_INFO_TEMP_FILE:-$out/nccl_trace_rank_}}
exec "${PYTHON:-python}" -m torch.distributed.run \
  --nnodes "$nnodes" --nproc-per-node "${NPROC_PER_NODE:-auto}" --max-restarts "${MAX_RESTARTS:-3}" \
  --rdzv-backend c10d --rdzv-endpoint "$endpoint" --rdzv-id "${RDZV_ID:-gengap}" \
  ${LOCAL_ADDR:+--local-addr "$LOCAL_ADDR"} \
  -m gengap_dist.train --config "$config" --out "$out" --resume --launch.launcher torchrun "$@"
