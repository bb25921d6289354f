#!/usr/bin/env bash
# The environment of a run, on the machine that computes; sourced by local.sh,
# which all other routes end in. What is set already stays as it is.

# Compiled programs are kept, so that a restart compiles nothing. On a pod it is
# process 0 that writes them: a folder that the hosts share serves all.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/clusterq-jax}"

# The last lines of a process that is killed are not lost.
export PYTHONUNBUFFERED=1
