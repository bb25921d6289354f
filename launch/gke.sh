#!/usr/bin/env bash
# Submits clusterq_jax.main to a GKE cluster with TPUs, through xpk
# (https://github.com/AI-Hypercomputer/xpk). xpk copies the repository into an
# image and starts the image on every host of the slice.
#
#   launch/gke.sh [--dry-run] CLUSTER TPU_TYPE WORKLOAD FLAG...
#
# TPU_TYPE is a type such as v5litepod-16, and WORKLOAD names the job. Weights
# and workdir must be on storage that xpk mounts into every pod (xpk storage
# attach). A failed job starts again at most ten times and resumes from its last
# checkpoint. --dry-run prints the command and does nothing else.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

clusterq_dry_run "${1:-}" && shift
if (($# < 4)); then
  echo 'usage: launch/gke.sh [--dry-run] CLUSTER TPU_TYPE WORKLOAD FLAG...' >&2
  exit 2
fi
cluster="$1" tpu_type="$2" workload="$3"
shift 3

task="rm -rf .venv && launch/setup.sh"
task+=" && .venv/bin/python -m pip install -q -e '.[tpu,gcs]'"
task+=" && exec launch/local.sh$(printf ' %q' "$@")"
clusterq_do exec xpk workload create "--cluster=$cluster" \
  "--workload=$workload" "--tpu-type=$tpu_type" --num-slices=1 \
  --base-docker-image=python:3.12 "--script-dir=$CLUSTERQ_ROOT" \
  --max-restarts=10 "--command=$task"
