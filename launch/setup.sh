#!/usr/bin/env bash
# Makes .venv and installs what a lock file pins: launch/setup.sh cpu|dev|gpu|gpu-dev. Does nothing when that is there.
set -euo pipefail
cd "$(dirname "$0")/.."
lock=${1:-cpu}
[ -f "locks/$lock.txt" ] || { echo "usage: launch/setup.sh cpu|dev|gpu|gpu-dev" >&2; exit 2; }

python=${PYTHON:-}
if [ -z "$python" ]; then
  for candidate in python3.11 python3 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
      python=$candidate
      break
    fi
  done
fi
[ -n "$python" ] || { echo "Python 3.11 is needed (the lock files are made for it) and was not found; set PYTHON=/path/to/python" >&2; exit 2; }

fingerprint() { cat "locks/$1.txt" pyproject.toml | sha256sum | cut -c1-16; }
installed() { [ "$(cat ".venv/.installed-$1" 2>/dev/null)" = "$(fingerprint "$1")" ]; }
case "$lock" in
  gpu*) larger=gpu-dev others="cpu dev" ;;
  *) larger=dev others="gpu gpu-dev" ;;
esac
if [ -f ".venv/.installed-$larger" ]; then
  lock=$larger # holds all of the smaller one; one environment is kept at one lock
fi
for other in $others; do
  [ ! -f ".venv/.installed-$other" ] || { echo ".venv has locks/$other.txt, and vLLM for CPUs and for GPUs do not fit into one environment: remove .venv first" >&2; exit 2; }
done
if ! installed "$lock"; then
  echo "installing locks/$lock.txt into .venv (a few minutes the first time)"
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  log=.venv/install.log
  install() { .venv/bin/python -m pip install --no-deps --quiet --disable-pip-version-check "$@" >>"$log" 2>&1; }
  : >"$log"
  torch=$(grep '^torch==' "locks/$lock.txt")
  # The CPU build of torch is on no general index. Where pip's own configuration does not know it, take PyTorch's. Where
  # it does, pip holds it for the one with CUDA, unless that is asked for letter by letter.
  if [ "$larger" = gpu-dev ]; then torch="torch===${torch#torch==}"; fi
  install "$torch" ||
    { [ "$larger" = dev ] && install --index-url "${TORCH_INDEX_URL:-https://download.pytorch.org/whl/cpu}" "$torch"; } ||
    { tail -n 5 "$log" >&2; echo "torch could not be installed; see $log" >&2; exit 1; }
  install -r "locks/$lock.txt" || { tail -n 5 "$log" >&2; echo "installation failed; see $log" >&2; exit 1; }
  install -e . || { tail -n 5 "$log" >&2; echo "installation failed; see $log" >&2; exit 1; }
  fingerprint "$lock" >".venv/.installed-$lock"
fi
