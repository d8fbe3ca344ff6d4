#!/usr/bin/env bash
# Check formatting, lint, import layers and types, in under a minute. Needs launch/setup.sh dev.
set -euo pipefail
cd "$(dirname "$0")/.."
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/lint-imports --no-cache >/tmp/grpo-lint-imports.$$ || { cat /tmp/grpo-lint-imports.$$; rm -f /tmp/grpo-lint-imports.$$; exit 1; }
rm -f /tmp/grpo-lint-imports.$$
.venv/bin/mypy
