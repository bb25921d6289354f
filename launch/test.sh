#!/usr/bin/env bash
# Sets up .venv with the test tools, then runs the tests.
#
#   launch/test.sh [PYTEST ARGUMENT...]
#
#   launch/test.sh                  all tests except those marked `full`
#   launch/test.sh -m "not slow"    quick tests, for daily work
#   launch/test.sh -m full          the longest tests; .ci/run adds them
#
# Relative paths in the arguments start at the repository's root.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

clusterq_setup test
cd -- "$CLUSTERQ_ROOT"
exec "$CLUSTERQ_PYTHON" -m pytest "$@"
