#!/usr/bin/env bash
# Install, and run the checks and the tests, two test files at a time. --full adds the slow tests and, after
# launch/setup.sh gpu-dev, the tests that need a GPU. Other arguments are passed to pytest (-n 0: one test at a time).
set -euo pipefail
cd "$(dirname "$0")/.."
lock=dev
if [ -f .venv/.installed-gpu ] || [ -f .venv/.installed-gpu-dev ]; then lock=gpu-dev; fi
bash launch/setup.sh "$lock"
.venv/bin/python recipes/arithmetic.py
bash launch/check.sh
select="not slow and not gpu"
workers=2
if [ "${1:-}" = "--full" ]; then
  shift
  select="not gpu"
  if .venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    select="" workers=0 # parallel tests would share the GPU's memory
  fi
fi
# in the order of the folders: files with engines take minutes, and small unit files fill the end
exec .venv/bin/python -m pytest -n "$workers" --dist loadscope --no-loadscope-reorder -m "$select" "$@"
