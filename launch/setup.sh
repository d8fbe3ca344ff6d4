#!/usr/bin/env bash
# Create .venv and install the versions that a lock pins: launch/setup.sh cpu|dev|gpu|gpu-dev. Do nothing if they are
# installed. PYTHON=/path/to/python selects the interpreter. TORCH=index installs the CUDA build of torch also for CPUs.
set -euo pipefail
cd "$(dirname "$0")/.."
lock=${1:-cpu}
[ -f "locks/$lock.txt" ] || { echo "usage: launch/setup.sh cpu|dev|gpu|gpu-dev" >&2; exit 2; }
refuse() { echo "$*" >&2; exit 2; }
[ -z "${TORCH:-}" ] || [ "$TORCH" = index ] || refuse "TORCH=$TORCH is not known; TORCH=index is"

runs() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; } # fails for shims that exist but do not run
supported() { case "$1" in 3.11 | 3.12 | 3.13) ;; *) return 1 ;; esac; }
lacks() { # INTERPRETER VERSION: parts that Debian has in separate packages, and without which a run fails
  local packages=""
  "$1" -c 'import ensurepip, venv' 2>/dev/null || packages+=" python$2-venv"
  "$1" -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null || packages+=" python$2-dev"
  [ -n "$packages" ] && echo "lacks its venv module or Python.h (on Debian and Ubuntu: apt install$packages)"
}
check() { # WHAT INTERPRETER [AND WHAT TO DO]
  local parts
  version=$(runs "$2") || refuse "$1 does not run${3:-}"
  supported "$version" || refuse "$1 is Python $version, and Python 3.11, 3.12 or 3.13 is needed${3:-}"
  if parts=$(lacks "$2" "$version"); then refuse "$1 $parts"; fi
}
[ -z "${PYTHON:-}" ] || check "PYTHON=$PYTHON" "$PYTHON"

fingerprint() { cat "locks/$1.txt" pyproject.toml setup.py | sha256sum | cut -c1-16; }
installed() { [ "$(cat ".venv/.installed-$1" 2>/dev/null)" = "$(fingerprint "$1")" ]; }
case "$lock" in
  gpu*) larger=gpu-dev others="cpu dev" ;;
  *) larger=dev others="gpu gpu-dev" ;;
esac
if [ -f ".venv/.installed-$larger" ]; then
  lock=$larger # includes the smaller lock; an environment has one lock
fi
for other in $others; do
  [ ! -f ".venv/.installed-$other" ] || refuse ".venv has locks/$other.txt, and vLLM for CPUs and for GPUs do not fit into one environment: remove .venv first"
done
if installed "$lock"; then exit 0; fi
command -v "${CXX:-g++}" >/dev/null || refuse "${CXX:-g++} was not found; torch needs it to compile at run time (on Debian and Ubuntu: apt install g++)"

pythons=() # lines of version and interpreter, tried in this order
if [ -x .venv/bin/python ]; then
  check .venv .venv/bin/python ": remove .venv first"
  pythons=("$version .venv/bin/python")
elif [ -n "${PYTHON:-}" ]; then
  pythons=("$version $PYTHON")
else
  for name in python3.13 python3.12 python3.11 python3 python; do
    if version=$(runs "$name") && supported "$version"; then
      if parts=$(lacks "$name" "$version"); then echo "$name is skipped: it $parts" >&2; else pythons+=("$version $name"); fi
    fi
  done
  [ ${#pythons[@]} -gt 0 ] || refuse "no usable Python 3.11, 3.12 or 3.13 was found; set PYTHON=/path/to/python"
  mapfile -t pythons < <(printf '%s\n' "${pythons[@]}" | sort --stable -k1,1Vr | awk '!seen[$1]++')
fi
if [ "$larger" = dev ] && ! "${pythons[0]#* }" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null; then
  refuse "vLLM for CPUs needs libnuma.so.1, which was not found (on Debian and Ubuntu: apt install libnuma1)"
fi

log=$(mktemp "${TMPDIR:-/tmp}/grpo-setup-XXXXXX.log")
made="" # set while .venv, made by this call, has no torch yet
trap '[ -z "$made" ] || rm -rf .venv' EXIT
trap 'exit 130' INT # without this, an interrupted pip looks like a failed one
fail() { tail -n 5 "$log" >&2; echo "$*; see $log" >&2; exit 1; }
install() { .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@" >>"$log" 2>&1; }
pin=$(grep '^torch==' "locks/$lock.txt")
hint=" (docs/installation.md has an alternative, TORCH=index)"
if [ "$larger" = gpu-dev ] || [ -n "${TORCH:-}" ]; then
  # for pip, an available CPU build satisfies ==; only === excludes it
  pin=${pin#torch==} hint=""
  pin="torch===${pin%+cpu}"
  pythons=("${pythons[0]}") # the index has it for all versions of Python
fi
install_torch() {
  if [ "$larger" = gpu-dev ]; then
    install --no-deps "$pin"
  elif [ -n "${TORCH:-}" ]; then
    install --constraint locks/gpu.txt "$pin" # it cannot be imported without the CUDA libraries
  else # no general index has it: use pip's configuration first, then PyTorch's index
    local soon=(--no-deps --retries 2 --timeout 15)
    install "${soon[@]}" "$pin" ||
      install "${soon[@]}" --index-url "${TORCH_INDEX_URL:-https://download.pytorch.org/whl/cpu}" "$pin"
  fi
}
for i in "${!pythons[@]}"; do
  read -r version python <<<"${pythons[i]}"
  echo "Python $version ($python): installing locks/$lock.txt into .venv (a few minutes the first time)"
  if [ ! -x .venv/bin/python ]; then
    made=yes
    "$python" -m venv .venv >>"$log" 2>&1 || fail "$python could not create .venv"
  fi
  if install_torch; then made=""; break; fi
  next=${pythons[i + 1]:-}
  [ -n "$next" ] || fail "$pin could not be installed$hint"
  rm -rf .venv
  echo "$pin is not available here for Python $version: trying ${next#* }"
done
install --no-deps -r <(grep -v '^torch==' "locks/$lock.txt") || fail "installation failed"
install --no-deps -e . || fail "installation failed"
mv "$log" .venv/install.log
fingerprint "$lock" >".venv/.installed-$lock"
if [ "$larger" = gpu-dev ]; then # only a note: a login node has no GPU
  driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null) || driver=""
  driver=${driver%%$'\n'*} # a line for each GPU
  if [[ ! "$driver" =~ ^[0-9]+\. ]]; then
    echo "note: nvidia-smi finds no NVIDIA driver here; runs need version 580 or newer" >&2
  elif [ "${driver%%.*}" -lt 580 ]; then
    echo "note: the NVIDIA driver here is version $driver; runs need version 580 or newer" >&2
  fi
fi
case "$lock" in
  gpu) next=".venv/bin/grpo check RECIPE cluster.device=gpu shows the plan of a run (recipes: docs/recipes.md)" ;;
  cpu) next=".venv/bin/python recipes/arithmetic.py makes a model, .venv/bin/grpo train arithmetic_cpu trains it" ;;
  *) next="bash launch/check.sh and bash launch/test.sh check the code (CONTRIBUTING.md)" ;;
esac
echo "installed. next: $next"
