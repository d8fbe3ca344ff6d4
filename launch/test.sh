#!/usr/bin/env bash
# Sets up like the quickstart and runs the checks and the tests. --full: the slow ones too, and after launch/setup.sh gpu
# those that need a GPU. Other arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
lock=dev
if [ -f .venv/.installed-gpu ] || [ -f .venv/.installed-gpu-dev ]; then lock=gpu-dev; fi
bash launch/setup.sh "$lock"
.venv/bin/python recipes/arithmetic.py
bash launch/check.sh
select="not slow and not gpu"
if [ "${1:-}" = "--full" ]; then
  shift
  select="not gpu"
  if .venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then select=""; fi
fi
exec .venv/bin/python -m pytest -m "$select" "$@"
