#!/usr/bin/env bash
# Makes the Python environment of the launch scripts: .venv in the repository's
# root, with the package installed in editable mode.
#
#   launch/setup.sh         installs what a run needs
#   launch/setup.sh test    also installs pytest, ruff and mypy
#
# A second call returns at once unless requirements.txt or pyproject.toml
# changed. A call after an interrupted call completes the installation. The
# other scripts source this file for its functions.
set -euo pipefail

CLUSTERQ_ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
CLUSTERQ_PYTHON="$CLUSTERQ_ROOT/.venv/bin/python"

# Succeeds if command $1 is a Python that this project supports.
_clusterq_supported() {
  local check='import sys
sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'
  "$1" -c "$check" 2>/dev/null
}

# Prints the first interpreter that can make the environment, or exits with 2.
_clusterq_find_python() {
  local candidate found=''
  local -a candidates=(python3.13 python3.12 python3.11 python3)
  if [[ -n "${PYTHON:-}" ]]; then
    candidates=("$PYTHON")
  fi
  for candidate in "${candidates[@]}"; do
    _clusterq_supported "$candidate" || continue
    if "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then
      printf '%s\n' "$candidate"
      return
    fi
    found="${found:-$candidate}"
  done
  if [[ -n "$found" ]]; then
    echo "setup: $found cannot make virtual environments: its venv or" \
      "ensurepip module is missing (on Debian and Ubuntu, install the" \
      "package python3-venv)." >&2
  else
    echo "setup: found no Python 3.11, 3.12 or 3.13 among: ${candidates[*]}." \
      "Install one, or set PYTHON to its path." >&2
  fi
  exit 2
}

# Prints everything that the installed environment depends on. A stamp file in
# .venv stores this text after an installation.
_clusterq_fingerprint() {
  printf '%s\n' "$CLUSTERQ_ROOT"
  cat "$CLUSTERQ_ROOT/requirements.txt" "$CLUSTERQ_ROOT/pyproject.toml"
}

# Succeeds if the environment is up to date. $1: '' or test.
_clusterq_is_set_up() {
  local stamp="$CLUSTERQ_ROOT/.venv/.clusterq-installed${1:+-$1}"
  [[ -x "$CLUSTERQ_PYTHON" && ! -e "$CLUSTERQ_ROOT/.venv.unfinished" ]] &&
    cmp -s "$stamp" <(_clusterq_fingerprint)
}

_clusterq_make_venv() {
  local venv="$CLUSTERQ_ROOT/.venv" python
  # The marker is outside .venv, so it survives a partial removal of .venv.
  if [[ -e "$venv.unfinished" || ! -e "$venv" ]]; then
    python="$(_clusterq_find_python)"
    echo "setup: making .venv with $("$python" --version) ..." >&2
    touch "$venv.unfinished"
    rm -rf "$venv"
    "$python" -m venv "$venv"
    rm "$venv.unfinished"
  elif ! _clusterq_supported "$CLUSTERQ_PYTHON"; then
    echo "setup: the Python in $venv does not start, or is not 3.11 to 3.13." \
      "Remove that folder and call the script again." >&2
    exit 2
  elif ! "$CLUSTERQ_PYTHON" -m pip --version >/dev/null 2>&1; then
    # Environments that uv made have no pip.
    "$CLUSTERQ_PYTHON" -m ensurepip >/dev/null
  fi
}

_clusterq_install() {
  local extra="$1" start=$SECONDS
  local stamp="$CLUSTERQ_ROOT/.venv/.clusterq-installed"
  _clusterq_make_venv
  rm -f "$stamp" "$stamp-test"
  echo "setup: installing clusterq_jax${extra:+ and its $extra tools} into" \
    ".venv (a minute or two the first time) ..." >&2
  (
    cd -- "$CLUSTERQ_ROOT"
    "$CLUSTERQ_PYTHON" -m pip install -qq --no-input \
      --disable-pip-version-check -e ".${extra:+[$extra]}"
  )
  if [[ -n "$extra" ]]; then
    _clusterq_fingerprint >"$stamp-$extra"
  fi
  _clusterq_fingerprint >"$stamp"
  echo "setup: done in $((SECONDS - start)) s." >&2
}

# Makes or updates the environment. $1: '' or test.
clusterq_setup() {
  local extra="${1:-}"
  if [[ -n "$extra" && "$extra" != test ]]; then
    echo "setup: unknown argument '$extra'; 'test' is the only one." >&2
    exit 2
  fi
  if _clusterq_is_set_up "$extra"; then
    return
  fi
  # Only one installation runs at a time. After waiting for the lock, the work
  # may be done already.
  (
    if command -v flock >/dev/null; then
      flock 9 || true
    fi
    if ! _clusterq_is_set_up "$extra"; then
      _clusterq_install "$extra"
    fi
  ) 9<"$CLUSTERQ_ROOT/requirements.txt"
}

# Succeeds if argument $1 is --dry-run. clusterq_do then only prints commands.
clusterq_dry_run() {
  CLUSTERQ_DRY_RUN=''
  [[ "$1" == --dry-run ]] && CLUSTERQ_DRY_RUN=1
}

# Runs a command; in a dry run it prints the command, quoted for a shell.
clusterq_do() {
  local word line=''
  if [[ -z "$CLUSTERQ_DRY_RUN" ]]; then
    "$@"
    return
  fi
  for word in "$@"; do
    [[ "$word" =~ ^[A-Za-z0-9_./:=@,+-]+$ ]] || word="${word@Q}"
    line+=" $word"
  done
  line="${line# exec}"
  echo "${line# }"
}

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then
  clusterq_setup "$@"
fi
