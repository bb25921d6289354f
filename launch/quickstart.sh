#!/usr/bin/env bash
# Sets up .venv, then quantizes the embedded Fashion-MNIST ResNet-20 without
# data and evaluates the student.
#
#   launch/quickstart.sh [WORKDIR [FLAG...]]
#
# The default of WORKDIR is runs/quickstart in the repository. The script passes
# flags, such as --config.seed=1, to clusterq_jax.main.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

if [[ "${1:-}" == -* ]]; then
  echo "quickstart: expected the workdir before the flags:" \
    "launch/quickstart.sh WORKDIR $*" >&2
  exit 2
fi
workdir="${1:-$CLUSTERQ_ROOT/runs/quickstart}"
# A relative path starts at the caller's folder, but the run starts in the root.
if [[ "$workdir" != /* && "$workdir" != *://* ]]; then
  workdir="$PWD/$workdir"
fi

clusterq_setup
cd -- "$CLUSTERQ_ROOT"
echo "quickstart: quantizing a Fashion-MNIST ResNet-20 without data; results" \
  "go to $workdir" >&2
exec "$CLUSTERQ_PYTHON" -m clusterq_jax.main \
  --config=configs/fashion_mnist_resnet20.py \
  --workdir="$workdir" "${@:2}"
