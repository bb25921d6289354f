#!/usr/bin/env bash
# Sets the environment of a run on the machine that computes. local.sh sources
# this file, and all other launchers call local.sh. Variables that are set
# already keep their values.

# JAX keeps compiled programs here, so a restart compiles nothing. On a pod,
# process 0 writes them; a folder that all hosts share serves every process.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/clusterq-jax}"

# A killed process loses none of its last lines.
export PYTHONUNBUFFERED=1
