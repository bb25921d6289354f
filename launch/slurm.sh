#!/usr/bin/env bash
# Submits clusterq_jax.main to Slurm, with one process per GPU of NODES nodes.
# Call it on a login node that shares the repository with the compute nodes.
# First run launch/setup.sh and pip install -e '.[cuda]' there.
#
#   launch/slurm.sh [--dry-run] NODES GPUS_PER_NODE FLAG...
#
# Partition, account and time limit come from Slurm's variables, such as
# SBATCH_PARTITION, SBATCH_ACCOUNT and SBATCH_TIMELIMIT. Slurm signals the run
# two minutes before the limit. The run then saves its state and stops, and the
# same call resumes it. --dry-run prints the command and does nothing else.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

clusterq_dry_run "${1:-}" && shift
if (($# < 3)); then
  echo 'usage: launch/slurm.sh [--dry-run] NODES GPUS_PER_NODE FLAG...' >&2
  exit 2
fi
nodes="$1" gpus="$2"
shift 2

# A failed task ends the others at once.
task="exec srun --kill-on-bad-exit=1 launch/local.sh$(printf ' %q' "$@")"
clusterq_do exec sbatch --job-name=clusterq-jax "--chdir=$CLUSTERQ_ROOT" \
  "--nodes=$nodes" "--ntasks-per-node=$gpus" "--gpus-per-node=$gpus" \
  --signal=TERM@120 --requeue --open-mode=append "--wrap=$task"
