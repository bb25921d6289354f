#!/usr/bin/env bash
# Sets up .venv, then runs clusterq_jax.main on this host, in one process for
# all devices. If a cluster manager starts this script on several hosts or once
# per GPU, the processes find each other.
#
#   launch/local.sh [--dry-run] FLAG...
#
# Relative paths in flags start at the repository's root. --dry-run prints the
# command and does nothing else.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
# shellcheck source-path=SCRIPTDIR source=env.sh
source "$CLUSTERQ_ROOT/launch/env.sh"

clusterq_dry_run "${1:-}" && shift
cd -- "$CLUSTERQ_ROOT"
if [[ -z "$CLUSTERQ_DRY_RUN" ]]; then
  clusterq_setup
fi
clusterq_do exec "$CLUSTERQ_PYTHON" -m clusterq_jax.main "$@"
