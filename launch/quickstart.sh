#!/usr/bin/env bash
# Quantizes the embedded Fashion-MNIST ResNet-20 without data, then evaluates
# it; sets up .venv first.
#
#   launch/quickstart.sh [WORKDIR [FLAG...]]
#
# WORKDIR is runs/quickstart in the repository unless named; flags go to
# clusterq_jax.main as they are, say --config.seed=1.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

if [[ "${1:-}" == -* ]]; then
  echo "quickstart: flags come after the workdir:" \
    "launch/quickstart.sh WORKDIR $*" >&2
  exit 2
fi
workdir="${1:-$CLUSTERQ_ROOT/runs/quickstart}"
# A relative path is the caller's; the run itself starts in the root.
if [[ "$workdir" != /* && "$workdir" != *://* ]]; then
  workdir="$PWD/$workdir"
fi

clusterq_setup
clusterq_env
cd -- "$CLUSTERQ_ROOT"
echo "quickstart: data-free quantization of a Fashion-MNIST ResNet-20; the" \
  "time left is shown as soon as it is measured; results go to $workdir" >&2
exec "$CLUSTERQ_PYTHON" -m clusterq_jax.main \
  --config=configs/fashion_mnist_resnet20.py \
  --workdir="$workdir" "${@:2}"
