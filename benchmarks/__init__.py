"""Comparative measurements, run by hand: `python -m benchmarks.<name>`."""

import grpo as grpo  # sets the variables that Ray reads on import, since the modules here import ray first
