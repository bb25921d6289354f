#!/usr/bin/env bash
# Runs clusterq_jax.main on every host of a Cloud TPU pod slice or on the host
# of a single-host TPU. It needs gcloud and an existing TPU VM:
#
#   gcloud compute tpus tpu-vm create NAME --zone=ZONE \
#     --accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite
#
#   launch/tpu_pod.sh [--dry-run] NAME ZONE FLAG...
#
# The script copies the last commit to the hosts and runs it. Weights and
# workdir must be on a file system that every host mounts.
# --dry-run prints the commands and does nothing else.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

clusterq_dry_run "${1:-}" && shift
if (($# < 3)); then
  echo 'usage: launch/tpu_pod.sh [--dry-run] NAME ZONE FLAG...' >&2
  exit 2
fi
name="$1" place=("--zone=$2" '--worker=all')
shift 2

archive='clusterq-jax.tar.gz'
remote="tar -xzf $archive && cd clusterq-jax"
remote+=" && launch/setup.sh && .venv/bin/python -m pip install -q -e '.[tpu,gcs]'"
remote+=" && exec launch/local.sh$(printf ' %q' "$@")"

cd -- "$CLUSTERQ_ROOT"
clusterq_do git archive --prefix=clusterq-jax/ "--output=/tmp/$archive" HEAD
clusterq_do gcloud compute tpus tpu-vm scp "/tmp/$archive" "$name:$archive" \
  "${place[@]}"
clusterq_do gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" \
  "--command=$remote"
