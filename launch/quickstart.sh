#!/usr/bin/env bash
# Install, make a tiny base model, and train it with GRPO on two CPU cores.
# Arguments are passed to grpo train: bash launch/quickstart.sh run.seed=7
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/setup.sh cpu
.venv/bin/python recipes/arithmetic.py
.venv/bin/grpo train recipes/arithmetic_cpu.yaml "$@"
cat <<'NEXT'
next: look at the plan of a run   .venv/bin/grpo check recipes/arithmetic_cpu.yaml
      change an option            .venv/bin/grpo train recipes/arithmetic_cpu.yaml algorithm.kl_coef=0.01 run.name=kl
      see the curves              .venv/bin/tensorboard --logdir runs
      read the completions        samples/ in the run folder; docs/look.md
      write your own reward       README.md, "Write a reward function"
NEXT
