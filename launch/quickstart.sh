#!/usr/bin/env bash
# From nothing to a trained model on two CPU cores: installs, makes a tiny base model, trains it with GRPO.
# Arguments are passed on: bash launch/quickstart.sh run.seed=7
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/setup.sh cpu
.venv/bin/python recipes/arithmetic.py
.venv/bin/grpo train recipes/arithmetic_cpu.yaml "$@"
cat <<'NEXT'
next: look at the plan of a run   .venv/bin/grpo check recipes/arithmetic_cpu.yaml
      change an option            .venv/bin/grpo train recipes/arithmetic_cpu.yaml algorithm.kl_coef=0.01 run.name=anchored
      see its curves              .venv/bin/tensorboard --logdir runs
      write your own reward       README.md, "Write a reward function"; the completions are in the run folder's samples/
NEXT
