#!/usr/bin/env bash
# From nothing to a trained model on two CPU cores: installs, makes a tiny base model, trains it with GRPO.
# Arguments are passed on: bash launch/quickstart.sh run.seed=7
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/setup.sh cpu
.venv/bin/python recipes/arithmetic.py
.venv/bin/grpo train recipes/arithmetic_cpu.yaml "$@"
cat <<'NEXT'
next: look at the completions   .venv/bin/python -c "import pyarrow.parquet as p; print(p.read_table('RUN/samples/step-000001.parquet').to_pandas()[['prompt','completion','reward']])"
      change an option          .venv/bin/grpo train recipes/arithmetic_cpu.yaml algorithm.group_size=8
      write your own reward     README.md, "Write a reward function"
NEXT
