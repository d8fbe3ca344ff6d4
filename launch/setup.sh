#!/usr/bin/env bash
# Makes .venv and installs what a lock file pins: launch/setup.sh cpu|dev|gpu|gpu-dev. Does nothing when that is there.
# PYTHON=/path/to/python names the interpreter; TORCH=index takes the CUDA build of torch for CPUs, too.
set -euo pipefail
cd "$(dirname "$0")/.."
lock=${1:-cpu}
[ -f "locks/$lock.txt" ] || { echo "usage: launch/setup.sh cpu|dev|gpu|gpu-dev" >&2; exit 2; }
refuse() { echo "$*" >&2; exit 2; }
[ -z "${TORCH:-}" ] || [ "$TORCH" = index ] || refuse "TORCH=$TORCH is not known; TORCH=index is"

runs() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; } # some shims are there and do not run
supported() { case "$1" in 3.11 | 3.12 | 3.13) ;; *) return 1 ;; esac; }
lacks() { # INTERPRETER VERSION: parts that Debian has in packages of their own, and without which a run fails
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
  lock=$larger # holds all of the smaller one; one environment is kept at one lock
fi
for other in $others; do
  [ ! -f ".venv/.installed-$other" ] || refuse ".venv has locks/$other.txt, and vLLM for CPUs and for GPUs do not fit into one environment: remove .venv first"
done
if installed "$lock"; then exit 0; fi
command -v "${CXX:-g++}" >/dev/null || refuse "${CXX:-g++} is needed, torch compiles with it at run time, and was not found (on Debian and Ubuntu: apt install g++)"

pythons=() # lines of version and interpreter, to be tried in this order
if [ -x .venv/bin/python ]; then
  check .venv .venv/bin/python ": remove .venv first"
  pythons=("$version .venv/bin/python")
elif [ -n "${PYTHON:-}" ]; then
  pythons=("$version $PYTHON")
else
  for name in python3.13 python3.12 python3.11 python3 python; do
    if version=$(runs "$name") && supported "$version"; then
      if parts=$(lacks "$name" "$version"); then echo "$name is passed over: it $parts" >&2; else pythons+=("$version $name"); fi
    fi
  done
  [ ${#pythons[@]} -gt 0 ] || refuse "Python 3.11, 3.12 or 3.13 is needed and none was found that can be used; set PYTHON=/path/to/python"
  mapfile -t pythons < <(printf '%s\n' "${pythons[@]}" | sort --stable -k1,1Vr | awk '!seen[$1]++')
fi
if [ "$larger" = dev ] && ! "${pythons[0]#* }" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null; then
  refuse "vLLM for CPUs needs libnuma.so.1, which was not found (on Debian and Ubuntu: apt install libnuma1)"
fi

log=$(mktemp "${TMPDIR:-/tmp}/grpo-setup-XXXXXX.log")
made="" # this call has made .venv, and torch is not in it yet
trap '[ -z "$made" ] || rm -rf .venv' EXIT
trap 'exit 130' INT # pip ends as if it had failed
fail() { tail -n 5 "$log" >&2; echo "$*; see $log" >&2; exit 1; }
install() { .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@" >>"$log" 2>&1; }
pin=$(grep '^torch==' "locks/$lock.txt")
hint=" (docs/installation.md has another way, TORCH=index)"
if [ "$larger" = gpu-dev ] || [ -n "${TORCH:-}" ]; then
  # pip holds the CPU build, where it knows one, for the one with CUDA, unless that is asked for letter by letter
  pin=${pin#torch==} hint=""
  pin="torch===${pin%+cpu}"
  pythons=("${pythons[0]}") # an index has it for each
fi
install_torch() {
  if [ "$larger" = gpu-dev ]; then
    install --no-deps "$pin"
  elif [ -n "${TORCH:-}" ]; then
    install --constraint locks/gpu.txt "$pin" # it cannot be imported without the CUDA libraries
  else # is on no general index: where pip's own configuration does not know it, take PyTorch's
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
    "$python" -m venv .venv >>"$log" 2>&1 || fail "$python could not make .venv"
  fi
  if install_torch; then made=""; break; fi
  next=${pythons[i + 1]:-}
  [ -n "$next" ] || fail "$pin could not be installed$hint"
  rm -rf .venv
  echo "$pin is not to be had here for Python $version: trying ${next#* }"
done
install --no-deps -r <(grep -v '^torch==' "locks/$lock.txt") || fail "installation failed"
install --no-deps -e . || fail "installation failed"
mv "$log" .venv/install.log
fingerprint "$lock" >".venv/.installed-$lock"
case "$lock" in
  gpu) next=".venv/bin/grpo check RECIPE cluster.device=gpu shows the plan of a run (recipes: docs/recipes.md)" ;;
  cpu) next=".venv/bin/python recipes/arithmetic.py makes a model, .venv/bin/grpo train arithmetic_cpu trains it" ;;
  *) next="bash launch/check.sh and bash launch/test.sh check the code (CONTRIBUTING.md)" ;;
esac
echo "installed. next: $next"
