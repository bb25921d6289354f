#!/usr/bin/env bash
# Runs clusterq_jax.main on this host, in one process for all its devices; sets
# up .venv first. Where a cluster has started it on several hosts (or once for
# every GPU), the processes find each other.
#
#   launch/local.sh [--dry-run] FLAG...
#
# --dry-run prints the command and does nothing. A relative path in a flag is
# one in the repository.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
# shellcheck source-path=SCRIPTDIR source=env.sh
source "$CLUSTERQ_ROOT/launch/env.sh"

clusterq_dry_run "${1:-}" && shift
cd -- "$CLUSTERQ_ROOT"
if [[ -z "$CLUSTERQ_DRY_RUN" ]]; then
  clusterq_setup
  clusterq_env
fi
clusterq_do exec "$CLUSTERQ_PYTHON" -m clusterq_jax.main "$@"
