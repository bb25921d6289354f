#!/usr/bin/env bash
# Runs the tests; sets up .venv with the test tools first.
#
#   launch/test.sh [PYTEST ARGUMENT...]
#
#   launch/test.sh                  all tests except those marked `full`
#   launch/test.sh -m "not slow"    the quick ones: is daily work sound?
#   launch/test.sh -m full          those that take longest; .ci/run adds them
#
# Paths among the arguments are relative to the repository's root.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

clusterq_setup test
clusterq_env
cd -- "$CLUSTERQ_ROOT"
exec "$CLUSTERQ_PYTHON" -m pytest "$@"
