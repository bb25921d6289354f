#!/usr/bin/env bash
# Sets the environment of a run on the machine that computes. local.sh sources
# this file, and all other launchers call local.sh. Variables that are set
# already keep their values.

# A killed process loses none of its last lines.
export PYTHONUNBUFFERED=1
